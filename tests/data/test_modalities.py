"""Depth, heat and the like: which files, their values, and one geometric draw for all."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from helpers.sensors import views
from PIL import Image

from camoxpert.cli import main
from camoxpert.config import AugmentConfig, DataConfig, build_config
from camoxpert.config.checks import check_conflicts
from camoxpert.data.cache.build import find_cache, open_cache
from camoxpert.data.files.headers import unreadable_pairs
from camoxpert.data.files.manifest import Search, load_eval, load_train
from camoxpert.data.files.modalities import (
    normalised,
    read_plane,
    read_planes,
    resize_known,
)
from camoxpert.data.loader import LoaderPlan, build_eval_loader, build_loader, finish
from camoxpert.data.samples.augment import SampleTransform
from camoxpert.data.samples.augment_device import move_planes
from camoxpert.data.samples.batches import Batch
from camoxpert.doctor.dataset import examine_data
from camoxpert.errors import ConfigError, DataError
from camoxpert.synthesis.toy_modalities import toy_views

NAMES = ("depth", "thermal")
SEARCH = Search(modalities=NAMES)
STRONG = AugmentConfig(strength=1.0, rotate=30, scale=0.3, translate=0.1)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return views(tmp_path_factory.mktemp("sensors") / "data", train=12, test=4)


@pytest.fixture
def data(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "data"))


def settings(**options: object) -> DataConfig:
    return DataConfig(img_size=32, modalities=("rgb", *NAMES), num_workers=0, **options)


class TestValues:
    def test_sixteen_bits_by_hand(self) -> None:
        """101 values 0, 1000, 1010 ... 1990, and two outliers. 0 is unknown; of the other 102 the
        2nd percentile lies at rank 2.02 and the 98th at rank 98.98."""
        values = np.array([0, 1, *range(1000, 2000, 10), 60000], np.uint16)[None]
        low, high = 1000 + 10 * 1.02, 1000 + 10 * 97.98
        plane = normalised(values)[0]
        assert plane[0] == 0, "unknown"
        assert plane[1] == 1 and plane[-1] == 255, "outliers are cut"
        assert plane[2 + 50] == 1 + round(254 * (1500 - low) / (high - low)) == 129
        assert plane[2 + 90] == 1 + round(254 * (1900 - low) / (high - low))
        # Without 0s that count as measured, the numbers stay the same however many there are.
        more = np.concatenate([values, np.zeros((1, 400), np.uint16)], 1)
        assert np.array_equal(normalised(more)[0, : plane.size], plane)

    def test_eight_bits_keep_zero_and_floats_lose_nan(self) -> None:
        eight = normalised(np.arange(256, dtype=np.uint8)[None])[0]
        assert eight[0] == 1 and eight[-1] == 255 and (eight > 0).all()
        floats = np.array([[np.nan, -1.0, 0.0, 1.0, np.inf]], np.float32)
        assert normalised(floats)[0].tolist() == [0, 1, 128, 255, 0]

    def test_all_the_same_and_nothing_at_all(self) -> None:
        assert set(normalised(np.full((3, 3), 700, np.uint16)).flat) == {128}
        assert not normalised(np.zeros((3, 3), np.uint16)).any()
        assert not normalised(np.full((3, 3), np.nan, np.float32)).any()

    def test_unknown_pixels_do_not_blend(self) -> None:
        plane = np.full((40, 40), 200, np.uint8)
        plane[:, 20:] = 0
        for side in (10, 64):
            assert set(resize_known(plane, (side, side)).flat) == {0, 200}

    @pytest.mark.parametrize("kind", ["uint8", "uint16", "tiff", "npy", "jpeg", "grey rgb"])
    def test_files(self, tmp_path: Path, kind: str) -> None:
        values = np.linspace(10, 250, 20 * 30).reshape(20, 30)
        path = tmp_path / {"tiff": "a.tif", "npy": "a.npy", "jpeg": "a.jpg"}.get(kind, "a.png")
        if kind == "uint16":
            Image.fromarray((values * 40).astype(np.uint16)).save(path)
        elif kind == "tiff":
            Image.fromarray(values.astype(np.float32)).save(path)
        elif kind == "npy":
            np.save(path, values[None])
        elif kind == "grey rgb":
            Image.fromarray(np.repeat(values.astype(np.uint8)[..., None], 3, 2)).save(path)
        else:
            Image.fromarray(values.astype(np.uint8)).save(path)
        plane = read_plane(path)
        assert plane.shape == (20, 30) and plane.dtype == np.uint8
        expected = normalised(values).astype(int)
        assert np.abs(plane.astype(int) - expected).max() <= (6 if kind == "jpeg" else 2)

    @pytest.mark.parametrize(
        ("name", "content", "words"),
        [
            ("a.png", np.zeros((4, 4, 3), np.uint8) + np.arange(3, dtype=np.uint8), "in colour"),
            ("a.npy", np.zeros((4, 4, 3)), r"float64 of shape \(4, 4, 3\)"),
            ("a.npy", b"no array", "cannot be read as an array"),
            ("a.png", b"no picture", "not an image"),
            ("a.png", None, "a.png"),
        ],
    )
    def test_bad_files_get_one_paragraph(
        self, tmp_path: Path, name: str, content: object, words: str
    ) -> None:
        path = tmp_path / name
        if isinstance(content, bytes):
            path.write_bytes(content)
        elif isinstance(content, np.ndarray) and name.endswith(".npy"):
            np.save(path, content)
        elif isinstance(content, np.ndarray):
            Image.fromarray(content).save(path)
        with pytest.raises(DataError, match=words) as caught:
            read_plane(path)
        assert "\n" not in str(caught.value)

    def test_no_pickle_is_loaded(self, tmp_path: Path) -> None:
        np.save(tmp_path / "a.npy", np.array([[{"a": 1}]], object), allow_pickle=True)
        with pytest.raises(DataError, match="cannot be read"):
            read_plane(tmp_path / "a.npy")


class TestFiles:
    def test_folders_beside_the_images(self, data: Path) -> None:
        for manifest in (load_train([data], SEARCH), load_eval(data, SEARCH)["toy"]):
            for pair in manifest.pairs:
                assert [name for name, _ in pair.modalities] == list(NAMES)
                assert all(path.stem == pair.name for _, path in pair.modalities)
            assert not manifest.notes
        assert all(not pair.modalities for pair in load_train([data]).pairs), "not asked for"

    @pytest.mark.parametrize(
        "folders",
        [
            ("images/train", "masks/train", "DEPTH/train", "images/test", "masks/test", ""),
            ("train/images", "train/masks", "train/depth", "test/images", "test/masks", ""),
            ("X-Image", "X-Mask", "X-Depth", "", "", ""),
            ("Train/Image", "Train/GT_Object", "Train/Depth", "", "", ""),
            ("Images/Train", "GT", "Depth/Train", "Images/Test", "GT", ""),
        ],
    )
    def test_other_layouts(self, tmp_path: Path, folders: tuple[str, ...]) -> None:
        root = tmp_path / "other"
        for start in (0, 3):
            images, masks, depth = folders[start : start + 3]
            for name in (f"a{start}", f"b{start}") if images else ():
                for folder in filter(None, (images, masks, depth)):
                    (root / folder).mkdir(parents=True, exist_ok=True)
                    grey = np.zeros((8, 8), np.uint8)
                    grey[:4] = 255
                    picture = np.repeat(grey[..., None], 3, 2) if folder == images else grey
                    Image.fromarray(picture).save(root / folder / f"{name}.png")
        pairs = load_train([root], Search(modalities=("depth",))).pairs
        assert len(pairs) == 2
        assert all(dict(pair.modalities)["depth"].stem == pair.name for pair in pairs)

    def test_missing_files_are_said_and_are_not_zeros(self, data: Path) -> None:
        pairs = load_train([data], SEARCH).pairs
        dict(pairs[3].modalities)["depth"].unlink()
        (data / "TrainDataset" / "Depth" / "stray.png").write_bytes(b"")
        manifest = load_train([data], SEARCH)
        notes = "\n".join(manifest.notes)
        assert "1 of 12 images have no depth" in notes and pairs[3].name in notes
        assert "1 files of depth have no image (stray)" in notes
        (batch,) = build_eval_loader(manifest, settings(), batch_size=12)
        assert batch.planes is not None
        there = (batch.planes > 0).flatten(2).any(2)
        assert (~there).nonzero().tolist() == [[3, 0]]
        shutil.rmtree(data / "TrainDataset" / "Thermal")
        assert "12 of 12 images have no thermal" in "\n".join(load_train([data], SEARCH).notes)

    def test_columns_of_a_table(self, data: Path) -> None:
        folder = data / "TrainDataset"
        names = sorted(path.stem for path in (folder / "Imgs").iterdir())
        rows = [
            f"Imgs/{n}.jpg,GT/{n}.png,{f'Depth/{n}.png' if i else ''},Thermal/{n}.png"
            for i, n in enumerate(names)
        ]
        table = folder / "pairs.csv"
        table.write_text("\n".join(["image,mask,Depth,Thermal", *rows]))
        manifest = load_train([table], SEARCH)
        have = [dict(pair.modalities).keys() for pair in manifest.pairs]
        assert have == [{"thermal"}] + [{"depth", "thermal"}] * 11
        assert "1 of 12 images have no depth" in manifest.notes[0]
        table.write_text(f"image,mask,depth\nImgs/{names[0]}.jpg,GT/{names[0]}.png,gone.png")
        with pytest.raises(DataError, match=r"line 2.*gone\.png"):
            load_train([table], SEARCH)

    def test_another_section_is_refused(self, data: Path) -> None:
        pair = load_train([data], SEARCH).pairs[0]
        Image.fromarray(np.ones((40, 90), np.uint8)).save(dict(pair.modalities)["depth"])
        with pytest.raises(DataError, match=r"90x40 pixels and its image .* 40x40: another aspect"):
            read_planes(pair, NAMES, (40, 40), 32)
        # Another resolution of the same section is fine.
        Image.fromarray(np.ones((20, 20), np.uint8)).save(dict(pair.modalities)["depth"])
        assert read_planes(pair, NAMES, (40, 40), 32).shape == (32, 32, 2)

    def test_damage_is_found_before_training(self, data: Path) -> None:
        manifest = load_train([data], SEARCH)
        path = dict(manifest.pairs[2].modalities)["thermal"]
        path.write_bytes(path.read_bytes()[:400])
        ((pair, reason),) = unreadable_pairs(manifest)
        assert pair == manifest.pairs[2] and str(path) in reason

    def test_the_content_hash_follows_the_files(self, data: Path) -> None:
        before, plain = load_train([data], SEARCH).content_hash(), load_train([data]).content_hash()
        path = dict(load_train([data], SEARCH).pairs[0].modalities)["depth"]
        path.write_bytes(path.read_bytes() + b"x")
        assert load_train([data], SEARCH).content_hash() != before
        assert load_train([data]).content_hash() == plain


class TestOneDraw:
    @pytest.mark.parametrize("on_device", [False, True])
    def test_a_landmark_lands_at_the_same_place_in_all(self, on_device: bool) -> None:
        """A white square on black in image, mask and planes stays one square in all of them."""
        side = 48
        mark = np.zeros((side, side), np.uint8)
        mark[14:22, 28:38] = 255
        pixels = np.dstack([mark] * 4)
        planes = np.dstack([np.maximum(mark, 1)] * 2)
        quiet = replace(
            STRONG, brightness=0, contrast=0, saturation=0, hue=0, blur=0, noise=0, hflip=0.5
        )
        transform = SampleTransform(img_size=side, augment=quiet, seed=3)
        moved_somewhere = 0
        for index in range(12):
            image, mask = transform.change(pixels, epoch=0, index=index)
            if on_device:
                draws = [transform.draw(epoch=0, index=index)]
                batch = torch.from_numpy(planes)[None]
                changed = move_planes(batch, draws, side)[0].permute(1, 2, 0).numpy()
            else:
                changed = transform.change_planes(planes, epoch=0, index=index)
            centres = [
                _centre(one) for one in (image[..., 0], mask, changed[..., 0], changed[..., 1])
            ]
            assert np.ptp(np.array(centres), axis=0).max() < 0.5
            moved_somewhere += np.abs(np.array(centres[0]) - _centre(mark)).max() > 3
        assert moved_somewhere > 6, "the control: the draws move things"

    def test_light_and_colour_are_the_cameras(self) -> None:
        pixels = np.full((32, 32, 4), 100, np.uint8)
        planes = np.full((32, 32, 1), 77, np.uint8)
        loud = AugmentConfig(
            strength=1.0, rotate=0, scale=0, translate=0, noise=1.0, brightness=0.9
        )
        transform = SampleTransform(img_size=32, augment=loud, seed=0)
        image, _ = transform.change(pixels, epoch=0, index=1)
        assert image.std() > 0
        assert (transform.change_planes(planes, epoch=0, index=1) == 77).all()

    @pytest.mark.parametrize("on_device", [False, True])
    def test_batches_are_the_same_with_and_without_cache(
        self, whole: Path, tmp_path: Path, on_device: bool
    ) -> None:
        manifest = load_train([whole], SEARCH)
        options = settings(cache_dir=str(tmp_path), augment=STRONG)
        cache = open_cache(manifest, options, mode="disk")
        assert cache.pixels.shape == (12, 32, 32, 6)
        found = []
        for held in (None, cache):
            plan = LoaderPlan(cache=held, on_device=on_device)
            loader = build_loader(manifest, options, plan, batch_size=5, seed=1)
            loader.set_epoch(2)
            found.append([finish(loader, b, torch.device("cpu")) for b in loader])
            loader.close()
        for one, other in zip(*found, strict=True):
            assert one.names == other.names and list(one.modalities) == list(NAMES)
            for name, plane in one.modalities.items():
                assert plane.dtype == torch.uint8 and plane.shape[1:] == (1, 32, 32)
                assert torch.equal(plane, other.modalities[name])
                assert one.present()[name].all()
            assert torch.equal(one.images, other.images)

    def test_splitting_a_batch_splits_its_planes(self) -> None:
        images = torch.zeros(5, 3, 4, 4, dtype=torch.uint8)
        plane = torch.arange(5, dtype=torch.uint8)[:, None, None, None].expand(5, 1, 4, 4)
        batch = Batch(images, images[:, :1], list("abcde"), [(4, 4)] * 5, list(range(5)))
        batch.modalities = {"depth": plane}
        parts = batch.to(torch.device("cpu")).split(2)
        assert [p.modalities["depth"][:, 0, 0, 0].tolist() for p in parts] == [[0, 1, 2], [3, 4]]
        assert parts[0].present()["depth"].tolist() == [False, True, True]


def _centre(plane: np.ndarray) -> np.ndarray:
    weights = plane.astype(float) * (plane > 60)
    y, x = np.mgrid[: plane.shape[0], : plane.shape[1]]
    return np.array([(weights * y).sum(), (weights * x).sum()]) / weights.sum()


def test_a_cache_is_of_its_modalities(data: Path, tmp_path: Path) -> None:
    manifest = load_train([data], SEARCH)
    options = settings(cache_dir=str(tmp_path / "cache"))
    open_cache(manifest, options, mode="disk")
    assert find_cache(manifest, options)[0] is not None
    # That of photographs alone is another one, and neither replaces the other.
    plain = replace(options, modalities=())
    assert find_cache(load_train([data]), plain)[1].startswith("miss")
    open_cache(load_train([data]), plain, mode="disk")
    assert find_cache(manifest, options)[0] is not None
    path = dict(manifest.pairs[0].modalities)["depth"]
    Image.fromarray(np.ones((40, 40), np.uint8)).save(path)
    assert "1 changed" in find_cache(manifest, options)[1]


def test_settings_that_cannot_be() -> None:
    for values, words in (
        ({"data.modalities": ["Depth!"]}, "small letters"),
        ({"data.modalities": ["mask"]}, "none of image, mask"),
        ({"data.modalities": ["depth", "depth"]}, "each once"),
        ({"data.modality_dropout": 0.5}, "Name them with --modalities"),
        ({"data.modalities": ["depth"], "model.decoder": "unet"}, "--decoder unet does not work"),
        ({"data.modalities": ["depth"], "data.augment.compose": 0.2}, "compose does not work"),
        ({"data.modalities": ["depth"], "data.modality_dropout": 0.1}, "at least 0.3"),
    ):
        with pytest.raises(ConfigError, match=words):
            check_conflicts(build_config(values))


class TestDoctor:
    @staticmethod
    def shifted(root: Path, right: int) -> Path:
        """Write photographs, masks, and heat that shows what the photographs do, moved right."""
        rng = np.random.default_rng(0)
        for index in range(6):
            noise = cv2.GaussianBlur(rng.random((96, 96)).astype(np.float32), (0, 0), 3)
            grey = np.uint8(255 * (noise - noise.min()) / np.ptp(noise))
            mask = np.zeros_like(grey)
            mask[30:50, 30:50] = 255
            heat = np.roll(grey, right, axis=1)
            for folder, picture in (
                ("Imgs", np.repeat(grey[..., None], 3, 2)),
                ("GT", mask),
                ("Thermal", heat),
            ):
                (root / folder).mkdir(parents=True, exist_ok=True)
                Image.fromarray(picture).save(root / folder / f"{index}.png")
        return root

    @staticmethod
    def said(root: Path, name: str = "thermal") -> list[tuple[str, str]]:
        data = DataConfig(roots=(str(root),), modalities=("rgb", name))
        found = examine_data(data, copies=False).findings
        return [(f.level, f.text) for f in found if f.check == "modalities"]

    def test_shifted_copies_are_told(self, tmp_path: Path) -> None:
        ((level, text),) = self.said(self.shifted(tmp_path / "still", 0))
        assert level == "note" and "no shift fits better" in text and "6 of 6 images" in text
        ((level, text),) = self.said(self.shifted(tmp_path / "moved", 6))
        # 6 of 96 pixels are 8 of 128.
        assert level == "warning" and "6.2% further right and 0.0% further" in text

    def test_on_the_command_line(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        words = ["doctor", str(self.shifted(tmp_path / "moved", 6)), "--no-copies"]
        words += ["-o", str(tmp_path / "page"), "--device", "cpu"]
        main([*words, "--modalities", "rgb", "thermal"])
        assert "does not lie on the photographs" in " ".join(capsys.readouterr().out.split())
        assert main([*words, "--modalities", "rgb", "Depth!"]) == 2

    def test_files_and_missing_ones(self, tmp_path: Path) -> None:
        root = self.shifted(tmp_path / "data", 0)
        (root / "Thermal" / "0.png").write_bytes(b"no picture")
        (root / "Thermal" / "1.png").unlink()
        Image.fromarray(np.zeros((96, 96), np.uint16)).save(root / "Thermal" / "2.png")
        (broken, empty, judged) = self.said(root)
        assert broken[0] == "error" and "not an image" in broken[1]
        assert empty[0] == "warning" and "1 file without a measured value" in empty[1]
        assert "5 of 6 images have it" in judged[1]
        assert self.said(root, "depth")[0] == (
            "error",
            "No image has depth. Put its files into a folder depth/ beside the images.",
        )


class TestScenes:
    def test_no_sensor_alone_tells_what_is_hidden(self) -> None:
        """Each shows a decoy like the object, where the others show nothing."""
        contrasts = []
        for index in range(8):
            image, mask, seen = toy_views(5, index, NAMES, size=64)
            assert image.shape == (64, 64, 3) and 0 < (mask > 0).mean() < 0.2
            assert seen["depth"].dtype == np.uint16 and seen["thermal"].dtype == np.uint8
            assert 0.005 < (seen["depth"] == 0).mean() < 0.05, "holes"
            heat = seen["thermal"].astype(float)
            warm = heat > np.percentile(heat[mask > 0], 60)
            contrasts.append((warm & (mask == 0)).sum() / max((warm & (mask > 0)).sum(), 1))
        assert np.median(contrasts) > 0.5, "much that is as warm is not the object"

    def test_equal_arguments_equal_pixels(self) -> None:
        one, other = (toy_views(5, 3, names, size=48) for names in (NAMES, ("thermal",)))
        assert np.array_equal(one[0], other[0]) and np.array_equal(one[1], other[1])
        assert np.array_equal(one[2]["thermal"], other[2]["thermal"])
        assert not np.array_equal(one[0], toy_views(6, 3, NAMES, size=48)[0])
        with pytest.raises(ValueError, match="at least 32"):
            toy_views(5, 3, NAMES, size=16)
