"""Soft maps move as the masks do, on both back ends; images without masks join the batches."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from camoxpert.config import AugmentConfig, DataConfig
from camoxpert.data.cache.build import open_cache
from camoxpert.data.files.image_io import read_mask, write_png
from camoxpert.data.files.labels import VOID
from camoxpert.data.files.made import NO_MADE
from camoxpert.data.files.manifest import Manifest, load_train
from camoxpert.data.files.mixing import mixed_in
from camoxpert.data.files.unlabeled import find_unlabeled, joined
from camoxpert.data.loader import LoaderPlan, build_loader, finish
from camoxpert.data.samples.augment import SampleTransform, resize_pair, square_pair
from camoxpert.data.samples.augment_device import apply_draws, move_maps
from camoxpert.data.samples.batches import Batch
from camoxpert.data.samples.sampler import UNLABELED_STREAM, EpochSampler, Mixed
from camoxpert.data.samples.soft import SoftMaps
from camoxpert.errors import DataError
from camoxpert.synthesis.toy import toy_pair

WILD = AugmentConfig(vflip=0.5, rotate=90, scale=0.4, translate=0.2)
FLIPS = AugmentConfig(vflip=0.5, strength=0.0)
SIDE = 48


@pytest.mark.parametrize("augment", [WILD, FLIPS], ids=["wild", "flips"])
@pytest.mark.parametrize("target", [48, 32])
def test_a_mask_used_as_map_stays_the_mask(augment: AugmentConfig, target: int) -> None:
    pairs = [toy_pair(3, i, size=SIDE, difficulty=0.0) for i in range(8)]
    pixels = np.stack([square_pair(image, mask, SIDE) for image, mask in pairs])
    maps = np.ascontiguousarray(pixels[..., 3])
    transform = SampleTransform(img_size=target, augment=augment, seed=5, source=SIDE)
    draws = [transform.draw(epoch=1, index=i) for i in range(8)]
    moved = move_maps(torch.from_numpy(maps), draws, target)
    _, masks = apply_draws(torch.from_numpy(pixels), draws, target)
    assert moved.shape == masks.shape == (8, 1, target, target)
    assert torch.equal(moved > 127, masks > 127)
    agreed = 0
    for i in range(8):
        _, mask = transform.change(pixels[i], epoch=1, index=i)
        map_HW = transform.change_map(maps[i], epoch=1, index=i)
        assert np.array_equal(map_HW > 127, mask > 127)
        # Both back ends move soft values alike.
        near = np.abs(map_HW.astype(int) - moved[i, 0].numpy().astype(int)) <= 3
        assert near.mean() > 0.99
        # The control: the draw of another sample moves it elsewhere.
        other = transform.change_map(maps[i], epoch=1, index=i + 20)
        agreed += np.array_equal(other > 127, mask > 127)
    assert agreed < 8


def test_soft_values_stay_soft() -> None:
    ramp = np.tile(np.linspace(0, 255, SIDE).astype(np.uint8), (SIDE, 1))
    transform = SampleTransform(img_size=SIDE, augment=WILD, seed=5, source=SIDE)
    draws = [transform.draw(epoch=0, index=0)]
    for moved in (
        transform.change_map(ramp, epoch=0, index=0),
        move_maps(torch.from_numpy(ramp)[None], draws, SIDE)[0, 0].numpy(),
    ):
        assert len(np.unique(moved)) > 20


def mask_maps(manifest: Manifest, folder: Path) -> SoftMaps:
    """Return the masks as the maps of a teacher, and grey for images without one."""
    paths = {}
    for number, pair in enumerate(manifest.pairs):
        path = folder / f"{number}.png"
        grey = np.full((SIDE, SIDE), 60, np.uint8)
        if pair.labeled:
            mask = read_mask(pair.mask)
            _, grey = resize_pair(np.dstack([mask] * 3), mask, SIDE)
        write_png(path, grey)
        paths[pair.dataset, pair.name] = path
    return SoftMaps(paths, SIDE)


@pytest.fixture
def mixed(toy_data: Path, tmp_path: Path) -> tuple[Manifest, SoftMaps]:
    """Return 40 pairs and the 8 images of the test set without masks, with maps."""
    (images,) = (toy_data / "TestDataset").glob("*/Imgs")
    manifest = joined(load_train([toy_data]), NO_MADE, find_unlabeled(images))
    return manifest, mask_maps(manifest, tmp_path / "maps")


def batches(manifest: Manifest, plan: LoaderPlan, epoch: int = 0, **data: object) -> list[Batch]:
    config = DataConfig(img_size=SIDE, augment=WILD, **data)
    loader = build_loader(manifest, config, plan, batch_size=8, seed=1)
    loader.set_epoch(epoch)
    found = [finish(loader, batch, torch.device("cpu")) for batch in loader]
    loader.close()
    return found


@pytest.mark.parametrize("way", ["files", "device", "cache", "reader"])
def test_every_way_of_reading_brings_the_map_of_its_image(
    way: str, mixed: tuple[Manifest, SoftMaps], tmp_path: Path
) -> None:
    manifest, soft = mixed
    cached = way in ("cache", "reader")
    data = DataConfig(img_size=SIDE, cache_dir=str(tmp_path / "cache"))
    cache = open_cache(manifest, data, mode="disk") if cached else None
    plan = LoaderPlan(cache=cache, on_device=way in ("device", "reader"), soft=soft)
    found = batches(manifest, plan)
    assert sum(len(batch.names) for batch in found) == 48
    unlabeled = []
    for batch in found:
        assert batch.soft.shape == batch.masks.shape and batch.unlabeled is not None
        known = ~batch.unlabeled
        assert torch.equal(batch.soft[known] > 127, batch.masks[known] > 127)
        assert (batch.masks[batch.unlabeled] == VOID).all()
        assert (batch.soft[batch.unlabeled] == 60).all()
        assert not batch.known()[batch.unlabeled].any() and batch.known()[known].all()
        unlabeled += [n for n, k in zip(batch.names, batch.unlabeled, strict=True) if k]
        # The parts of a batch carry their own.
        parts = batch.split(3)
        assert torch.equal(torch.cat([part.soft for part in parts]), batch.soft)
        assert torch.equal(torch.cat([part.unlabeled for part in parts]), batch.unlabeled)
    assert len(set(unlabeled)) == len(unlabeled) == 8


def test_images_and_masks_are_those_without_a_teacher(
    mixed: tuple[Manifest, SoftMaps], toy_data: Path
) -> None:
    manifest, soft = mixed
    labeled = replace(manifest, pairs=tuple(p for p in manifest.pairs if p.labeled))
    for on_device in (False, True):
        plain = batches(labeled, LoaderPlan(on_device=on_device))
        taught = batches(labeled, LoaderPlan(on_device=on_device, soft=soft))
        for a, b in zip(plain, taught, strict=True):
            assert a.names == b.names and a.soft is None and b.unlabeled is None
            assert torch.equal(a.images, b.images) and torch.equal(a.masks, b.masks)


def test_a_map_that_is_missing_or_of_another_size_is_named(
    mixed: tuple[Manifest, SoftMaps],
) -> None:
    manifest, soft = mixed
    path = soft.of(manifest)[0]
    write_png(path, np.zeros((20, 30), np.uint8))
    with pytest.raises(DataError, match=r"0\.png is 30x20 and should be 48x48"):
        soft.read(path)
    with pytest.raises(DataError, match="has no map"):
        soft.read(None)


class TestSampler:
    @staticmethod
    def order(
        epoch: int = 0, rank: int = 0, world: int = 1, *, unlabeled: int = 0, mixed_in: int = 0
    ) -> list[int]:
        mixed = (Mixed(unlabeled, mixed_in, UNLABELED_STREAM),)
        sampler = EpochSampler(30, seed=2, rank=rank, world_size=world, mixed=mixed)
        sampler.seek(epoch, 0)
        return list(sampler.indices())

    def test_every_batch_has_its_share(self) -> None:
        order = self.order(unlabeled=100, mixed_in=10)
        assert len(order) == 40 and set(order[:]) >= set(range(30))
        for size in (4, 8, 20):
            for start in range(0, 40, size):
                extra = sum(index >= 30 for index in order[start : start + size])
                assert abs(extra - size / 4) <= 1, (size, start)

    def test_the_others_keep_their_order(self) -> None:
        order = self.order(unlabeled=100, mixed_in=10)
        assert [index for index in order if index < 30] == self.order()

    def test_epochs_draw_others_and_none_twice(self) -> None:
        drawn = [
            {index for index in self.order(epoch, unlabeled=100, mixed_in=30) if index >= 30}
            for epoch in range(3)
        ]
        assert [len(part) for part in drawn] == [30, 30, 30]
        assert drawn[0] != drawn[1] != drawn[2] and max(set().union(*drawn)) < 130
        assert len(set().union(*drawn)) > 50

    def test_ranks_share_them(self) -> None:
        ranks = [self.order(rank=r, world=2, unlabeled=100, mixed_in=10) for r in (0, 1)]
        extra = [{index for index in order if index >= 30} for order in ranks]
        assert [len(part) for part in extra] == [5, 5] and not extra[0] & extra[1]
        assert extra[0] | extra[1] == {
            index for index in self.order(unlabeled=100, mixed_in=10) if index >= 30
        }

    def test_how_many_an_epoch_sees(self) -> None:
        assert mixed_in(30, 100, 0.5) == 30
        assert mixed_in(30, 100, 0.25) == 10
        assert mixed_in(30, 7, 0.5) == 7
        assert mixed_in(30, 0, 0.5) == 0


def test_what_is_no_folder_of_images_is_named(tmp_path: Path, toy_data: Path) -> None:
    with pytest.raises(DataError, match="--unlabeled: There is no folder"):
        find_unlabeled(tmp_path / "none")
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(DataError, match=r"holds no images. It holds .txt 1"):
        find_unlabeled(tmp_path)
    assert len(find_unlabeled("")) == 0
    found = find_unlabeled(toy_data / "TrainDataset" / "Imgs")
    assert len(found) == 40 and not any(pair.labeled for pair in found.pairs)
