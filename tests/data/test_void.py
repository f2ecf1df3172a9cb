"""Label maps give objects and void; void reaches the batch by every way, and nothing else moves."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from camoxpert.config import build_config
from camoxpert.data.cache.build import open_cache
from camoxpert.data.cache.table import map_cache
from camoxpert.data.files.image_io import read_levels, read_mask, read_mask_as
from camoxpert.data.files.labels import VOID, join_void
from camoxpert.data.files.manifest import Search, load_train
from camoxpert.data.loader import LoaderPlan, build_eval_loader, build_loader, finish
from camoxpert.data.samples.augment import Operators, resize_pair
from camoxpert.data.samples.augment_device import apply_draws
from camoxpert.data.samples.draw import draw
from camoxpert.errors import DataError

Mask = np.ndarray


def disc(radius: int = 12, *, row: int = 30, column: int = 40) -> Mask:
    y, x = np.mgrid[:60, :80]
    inside: Mask = (y - row) ** 2 + (x - column) ** 2 < radius**2
    return inside


def ring(inside: Mask, width: int = 1) -> Mask:
    grown = cv2.dilate(inside.view(np.uint8), np.ones((3, 3), np.uint8), iterations=width)
    return (grown > 0) & ~inside


def painted(*parts: tuple[Mask, int], dtype: type = np.uint8) -> Mask:
    levels = np.zeros((60, 80), dtype)
    for where, value in parts:
        levels[where] = value
    return levels


def colour_map(levels: Mask) -> Image.Image:
    """A palette image with some colours of PASCAL VOC."""
    image = Image.fromarray(levels, "P")
    colours = {1: (128, 0, 0), 2: (0, 128, 0), 15: (192, 128, 128), 255: (224, 224, 192)}
    table = [0] * 768
    for index, colour in colours.items():
        table[3 * index : 3 * index + 3] = colour
    image.putpalette(table)
    return image


BODY, OTHER = disc(), disc(7, row=12, column=12)
VOC = painted((BODY, 1), (ring(BODY), 255))
WITH_VOID: dict[str, Callable[[], Image.Image]] = {
    "grey": lambda: Image.fromarray(VOC),
    "thick outline": lambda: Image.fromarray(painted((BODY, 7), (ring(BODY, 5), 255))),
    "small object": lambda: Image.fromarray(painted((disc(4), 1), (ring(disc(4)), 255))),
    "two classes": lambda: Image.fromarray(
        painted((BODY, 15), (ring(BODY), 255), (OTHER, 3), (ring(OTHER), 255))
    ),
    "palette": lambda: colour_map(painted((BODY, 15), (ring(BODY), 255))),
    "colours": lambda: colour_map(painted((BODY, 15), (ring(BODY), 255))).convert("RGB"),
    "grey of the palette": lambda: Image.fromarray(painted((BODY, 38), (ring(BODY, 3), 220))),
    "difficult area": lambda: Image.fromarray(painted((BODY, 1), (ring(BODY), 255), (OTHER, 255))),
    "16 bits": lambda: Image.fromarray(painted((BODY, 1), (ring(BODY), 65535), dtype=np.uint16)),
    "open outline": lambda: Image.fromarray(
        painted((BODY, 1), (np.roll(BODY, 1, 1) & ~BODY, 254), (BODY & ~np.roll(BODY, 1, 1), 255))
    ),
}


@pytest.mark.parametrize("kind", WITH_VOID)
def test_labels_are_objects_and_their_outline_is_void(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "m.png"
    image = WITH_VOID[kind]()
    image.save(path)
    mask, encoding = read_mask_as(path)
    assert set(np.unique(mask)) == {0, VOID, 255}
    assert "void" in encoding
    levels = np.asarray(image).reshape(60, 80, -1)[..., 0]
    white = levels >= 220
    assert np.array_equal(mask == VOID, white)
    assert np.array_equal(mask == 255, (levels > 0) & ~white)


@pytest.mark.parametrize("values", [(1, 2), (1, 200), (3, 250), (50, 100), (100, 200)])
def test_instance_numbers_are_objects(tmp_path: Path, values: tuple[int, int]) -> None:
    Image.fromarray(painted((BODY, values[0]), (OTHER, values[1]))).save(tmp_path / "m.png")
    mask, encoding = read_mask_as(tmp_path / "m.png")
    assert np.array_equal(mask, np.where(BODY | OTHER, 255, 0))
    assert encoding == "label map"


@pytest.mark.parametrize("values", [(1, 255), (85, 255), (170, 255)])
def test_white_beside_a_label_that_may_be_either_is_refused(
    tmp_path: Path, values: tuple[int, int]
) -> None:
    Image.fromarray(painted((BODY, values[0]), (OTHER, values[1]))).save(tmp_path / "m.png")
    with pytest.raises(DataError, match=f"label map .0, {values[0]}, 255.*may be unlabelled"):
        read_mask(tmp_path / "m.png")


def enlarged(levels: Mask, factor: float, how: int) -> Mask:
    resized: Mask = cv2.resize(levels, None, fx=factor, fy=factor, interpolation=how)
    return resized


def as_jpeg(levels: Mask, path: Path, quality: int) -> Mask:
    Image.fromarray(levels).save(path, "JPEG", quality=quality)
    return np.asarray(Image.open(path))


GREY: dict[str, Callable[[Mask, Path], Mask]] = {
    "halved": lambda m, _: enlarged(m, 0.5, cv2.INTER_AREA),
    "enlarged": lambda m, _: enlarged(m, 2.0, cv2.INTER_LINEAR),
    "halved, then doubled": lambda m, _: enlarged(
        enlarged(m, 0.5, cv2.INTER_AREA), 2.0, cv2.INTER_NEAREST
    ),
    "blurred": lambda m, _: cv2.GaussianBlur(m, (0, 0), 1.0),
    "a PNG of a JPEG": lambda m, path: as_jpeg(m, path / "a.jpg", 40),
    "four levels": lambda m, _: enlarged(m, 0.5, cv2.INTER_AREA) // 85 * 85,
    "nearly white": lambda m, _: np.where(ring(BODY), 253, m).astype(np.uint8),
    "specks": lambda m, _: np.where((np.indices(m.shape) % 30 == 7).all(0), 1, m).astype(np.uint8),
    "limited range": lambda m, _: (16 + m.astype(int) * 219 // 255).astype(np.uint8),
}


@pytest.mark.parametrize("kind", GREY)
def test_grey_outlines_are_no_labels(tmp_path: Path, kind: str) -> None:
    levels = GREY[kind](painted((BODY, 255)), tmp_path)
    Image.fromarray(levels).save(tmp_path / "m.png")
    mask = read_mask(tmp_path / "m.png")
    assert np.array_equal(mask, np.where(levels > 128, 255, 0))


def test_a_trimap_keeps_its_meaning(tmp_path: Path) -> None:
    levels = painted((BODY, 255), (ring(BODY, 2), 128))
    Image.fromarray(levels).save(tmp_path / "m.png")
    assert np.array_equal(read_mask(tmp_path / "m.png"), np.where(levels == 255, 255, 0))


class TestPalettes:
    @pytest.mark.parametrize("label", [1, 7, 255])
    def test_a_palette_that_is_all_black_is_read_by_its_indices(
        self, tmp_path: Path, label: int
    ) -> None:
        Image.fromarray(painted((BODY, label)), "P").save(tmp_path / "m.png")
        assert np.array_equal(read_mask(tmp_path / "m.png") > 0, BODY)
        assert read_levels(tmp_path / "m.png").levels.any()

    def test_one_label_without_a_colour_beside_a_white_outline(self, tmp_path: Path) -> None:
        image = Image.fromarray(painted((BODY, 7), (ring(BODY), 255)), "P")
        image.putpalette([0] * 765 + [255] * 3)
        image.save(tmp_path / "m.png")
        mask = read_mask(tmp_path / "m.png")
        assert np.array_equal(mask == 255, BODY) and np.array_equal(mask == VOID, ring(BODY))

    @pytest.mark.parametrize("alpha", [True, False])
    def test_alpha_decides_only_where_it_differs(self, tmp_path: Path, alpha: bool) -> None:
        image = Image.fromarray(painted((BODY, 1)), "P")
        image.putpalette([0] * 768)
        image.save(tmp_path / "m.png", transparency=bytes([0, 255]) if alpha else 9)
        assert np.array_equal(read_mask(tmp_path / "m.png") > 0, BODY)

    def test_white_that_a_program_wrote_twice_is_white(self, tmp_path: Path) -> None:
        """The control: colours count where they tell the object from the background."""
        image = Image.fromarray(painted((BODY, 1), (ring(disc(20)), 2)), "P")
        image.putpalette([255] * 3 + [0] * 3 + [255] * 3 + [0] * 759)
        image.save(tmp_path / "m.png")
        assert np.array_equal(read_mask(tmp_path / "m.png") > 0, ~BODY)

    def test_void_alone_is_no_object(self, tmp_path: Path) -> None:
        colour_map(painted((ring(BODY, 3), 255))).save(tmp_path / "m.png")
        mask = read_mask(tmp_path / "m.png")
        assert np.array_equal(mask == VOID, ring(BODY, 3)) and not (mask == 255).any()
        colour_map(painted((np.ones((60, 80), bool), 255))).save(tmp_path / "m.png")
        with pytest.raises(DataError, match="void everywhere"):
            read_mask(tmp_path / "m.png")


DECODED = np.where(BODY, 255, np.where(ring(BODY, 4), VOID, 0)).astype(np.uint8)


class TestResampling:
    def test_the_rule_by_hand(self) -> None:
        objects = np.array([255, 128, 127, 100, 60, 0, 200], np.uint8)
        void = np.array([0, 0, 0, 100, 100, 128, 55], np.uint8)
        # 100 + 100: the labelled part is 155, of which 100 is object.
        assert join_void(objects, void).tolist() == [255, 255, 0, 255, 0, VOID, 255]

    def test_resizing_keeps_void_between_object_and_background(self) -> None:
        image = np.zeros((60, 80, 3), np.uint8)
        _, small = resize_pair(image, DECODED, 40)
        assert set(np.unique(small)) == {0, VOID, 255}
        known = cv2.resize((DECODED == 255).view(np.uint8) * 255, (40, 40), interpolation=3)
        # No pixel that is all background became an object, nor the other way round.
        assert not (small[known == 0] == 255).any() and (small[known == 255] == 255).all()
        assert (small == VOID).mean() == pytest.approx((DECODED == VOID).mean(), abs=0.01)

    def pixels(self) -> np.ndarray:
        image = np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8)
        small, mask = resize_pair(image, DECODED, 48)
        return np.dstack([small, mask])

    def test_the_cpu_and_the_device_move_void_to_the_same_pixels(self) -> None:
        pixels = self.pixels()
        augment = build_config({}).data.augment
        for index in range(6):
            sample = draw(augment, seed=1, epoch=0, index=index, source=48, target=48)
            _, ours = Operators().apply(pixels, sample, 48)
            _, theirs = apply_draws(torch.from_numpy(pixels)[None], [sample], 48, void=True)
            assert set(np.unique(ours)) <= {0, VOID, 255} and (ours == VOID).any()
            assert (theirs[0, 0].numpy() != ours).mean() < 0.02

    def test_masks_without_void_are_the_same_beside_masks_with_void(self) -> None:
        pixels = np.stack([self.pixels(), self.pixels()])
        pixels[1, ..., 3] = np.where(pixels[1, ..., 3] == 255, 255, 0)
        augment = build_config({}).data.augment
        draws = [draw(augment, seed=1, epoch=0, index=i, source=48, target=48) for i in (0, 1)]
        images, masks = apply_draws(torch.from_numpy(pixels), draws, 48, void=True)
        image, mask = apply_draws(torch.from_numpy(pixels[1:]), draws[1:], 48)
        assert torch.equal(masks[1:], mask) and torch.equal(images[1:], image)


class TestBatches:
    @pytest.fixture
    def root(self, tmp_path: Path) -> Path:
        generator = np.random.default_rng(0)
        for folder in ("Imgs", "GT"):
            (tmp_path / "data" / folder).mkdir(parents=True)
        for index in range(4):
            image = generator.integers(0, 256, (60, 80, 3), dtype=np.uint8)
            Image.fromarray(image).save(tmp_path / "data" / "Imgs" / f"{index}.png")
            levels = VOC if index % 2 else painted((BODY, 255))
            Image.fromarray(levels).save(tmp_path / "data" / "GT" / f"{index}.png")
        return tmp_path / "data"

    @pytest.mark.parametrize("way", ["files", "raw", "disk", "cached raw", "ram"])
    def test_void_arrives_by_every_way(self, root: Path, tmp_path: Path, way: str) -> None:
        data = build_config({"data.img_size": 64, "data.cache_dir": str(tmp_path / "c")}).data
        manifest = load_train([str(root)], Search())
        cache = None
        if way in ("disk", "cached raw", "ram"):
            cache = open_cache(manifest, data, mode="ram" if way == "ram" else "disk")
            assert cache.void == {1, 3}
            if cache.path is not None:
                assert map_cache(cache.path.parent).void == {1, 3}
        plan = LoaderPlan(cache=cache, on_device=way in ("raw", "cached raw", "ram"))
        loader = build_loader(manifest, data, plan, batch_size=4, seed=0)
        batch = finish(loader, next(iter(loader)), torch.device("cpu"))
        known = batch.known()
        assert batch.void and known is not None
        share = 1 - known.mean((1, 2, 3))
        assert sorted(name for name, part in zip(batch.names, share, strict=True) if part) == [
            "1",
            "3",
        ]
        assert set(torch.unique(batch.masks).tolist()) == {0, VOID, 255}
        assert not (batch.target() * (1 - known)).any()
        assert batch.split(2)[1].known() is not None

    def test_without_void_there_is_nothing_to_weigh(self, root: Path) -> None:
        for path in (root / "GT").iterdir():
            Image.fromarray(painted((BODY, 255))).save(path)
        data = build_config({"data.img_size": 64}).data
        manifest = load_train([str(root)], Search())
        for on_device in (False, True):
            loader = build_loader(
                manifest, data, LoaderPlan(on_device=on_device), batch_size=4, seed=0
            )
            batch = finish(loader, next(iter(loader)), torch.device("cpu"))
            assert not batch.void and batch.known() is None

    def test_evaluation_sees_void_at_the_original_size(self, root: Path) -> None:
        data = build_config({"data.img_size": 64}).data
        loader = build_eval_loader(load_train([str(root)], Search()), data, batch_size=4)
        masks = next(iter(loader)).full_masks
        assert np.array_equal(masks[1] == VOID, ring(BODY))
        assert not (masks[0] == VOID).any()
