"""Samples depend on (seed, epoch, index) and nothing else; image and mask stay together."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch

from camoxpert.config import AugmentConfig, DataConfig
from camoxpert.data.cache.build import open_cache
from camoxpert.data.cache.reader import CacheReader
from camoxpert.data.files.manifest import Manifest, load_train
from camoxpert.data.loader import (
    LoaderPlan,
    build_eval_loader,
    build_loader,
    device_batches,
)
from camoxpert.data.samples.augment import SampleTransform
from camoxpert.data.samples.sampler import EpochSampler
from camoxpert.errors import DataError
from camoxpert.synthesis.toy import TEXTURES, generate_toy, toy_pair

STRONG = AugmentConfig(vflip=0.5, rotate=60, blur=0.3, noise=0.3)


def loader_of(manifest: Manifest, workers: int, *, persistent: bool = True, seed: int = 1):
    data = DataConfig(img_size=32, augment=STRONG, persistent_workers=persistent)
    return build_loader(manifest, data, LoaderPlan(workers), batch_size=8, seed=seed)


def digest(loader, epoch: int, start: int = 0) -> list[str]:
    loader.set_epoch(epoch, start_batch=start)
    return [
        hashlib.sha1(b.images.numpy().tobytes() + b.masks.numpy().tobytes()).hexdigest()
        for b in loader
    ]


def test_bitwise_the_same_for_any_workers_and_any_resume(toy_data: Path) -> None:
    manifest = load_train([toy_data])
    alone = loader_of(manifest, 0)
    epochs = [digest(alone, epoch) for epoch in range(2)]
    for workers, persistent in ((1, True), (2, True), (2, False)):
        loader = loader_of(manifest, workers, persistent=persistent)
        assert [digest(loader, epoch) for epoch in range(2)] == epochs
        loader.close()
    assert digest(alone, 1, start=3) == epochs[1][3:]
    # Controls: epochs differ, seeds differ, and all batches of an epoch differ.
    assert not set(epochs[0]) & set(epochs[1])
    assert digest(loader_of(manifest, 0, seed=2), 0) != epochs[0]
    assert len(set(epochs[0])) == len(epochs[0]) == 5


def test_the_global_generators_are_left_alone(toy_data: Path) -> None:
    torch.manual_seed(0)
    np.random.seed(0)
    expected = (torch.rand(1), np.random.rand())
    torch.manual_seed(0)
    np.random.seed(0)
    digest(loader_of(load_train([toy_data]), 0), 0)
    assert (torch.rand(1), np.random.rand()) == expected


def test_sampler_by_hand() -> None:
    sampler = EpochSampler(10, seed=3)
    first = [index for _, index, _ in sampler]
    assert sorted(first) == list(range(10)) and first != list(range(10))
    sampler.epoch = 1
    assert [index for _, index, _ in sampler] != first
    sampler.epoch, sampler.start = 0, 4
    assert [index for _, index, _ in sampler] == first[4:] and len(sampler) == 6
    ranks = [EpochSampler(10, seed=3, rank=r, world_size=4) for r in range(4)]
    shares = [[i for _, i, _ in s] for s in ranks]
    assert {len(share) for share in shares} == {3}
    assert {index for share in shares for index in share} == set(range(10))


def test_a_batch_shares_its_size_on_every_rank_and_after_a_resume() -> None:
    def sizes(rank: int, start: int = 0) -> list[int]:
        sampler = EpochSampler(
            40, seed=3, rank=rank, world_size=2, batch_size=4, targets=(32, 64, 96)
        )
        sampler.start = start
        return [target for _, _, target in sampler]

    whole = sizes(0)
    assert all(len(set(whole[i : i + 4])) == 1 for i in range(0, 20, 4))
    assert len(set(whole)) > 1 and sizes(1) == whole and sizes(0, 8) == whole[8:]


def test_image_and_mask_move_together() -> None:
    """The image is the mask drawn in white; after any augmentation they must still agree."""
    mask = np.zeros((64, 64), np.uint8)
    mask[12:40, 20:52] = 255
    image = np.repeat(mask[..., None], 3, 2)
    shapes = AugmentConfig(
        vflip=0.5, rotate=40, brightness=0, contrast=0, saturation=0, hue=0, blur=0, noise=0
    )
    transform = SampleTransform(img_size=48, augment=shapes, seed=0)
    seen = set()
    for index in range(40):
        moved, target = transform(image, mask, epoch=0, index=index)
        assert set(np.unique(target)) <= {0, 255}
        assert ((moved[..., 0] > 127) != (target > 127)).mean() < 0.01
        seen.add(target.tobytes())
    assert len(seen) > 30


def test_colour_changes_do_not_touch_the_mask() -> None:
    colours = AugmentConfig(hflip=0, rotate=0, scale=0, translate=0, blur=1, noise=1)
    image, mask = toy_pair(0, 0, size=32, difficulty=0)
    changed, target = SampleTransform(img_size=32, augment=colours, seed=0)(
        image, mask, epoch=0, index=0
    )
    assert np.array_equal(target, mask) and not np.array_equal(changed, image)


def test_evaluation_only_resizes() -> None:
    image, mask = toy_pair(0, 0, size=32, difficulty=0)
    same, target = SampleTransform(img_size=32, augment=None, seed=0)(image, mask, epoch=3, index=5)
    assert np.array_equal(same, image) and np.array_equal(target, mask)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_broken_file_reaches_the_user_as_its_own_error(tmp_path: Path, workers: int) -> None:
    generate_toy(tmp_path, num_train=12, num_test=0, size=32, seed=0)
    manifest = load_train([tmp_path])
    manifest.pairs[5].image.write_bytes(b"")
    with pytest.raises(DataError, match=r"is empty \(0 bytes\)") as caught:
        list(loader_of(manifest, workers))
    assert manifest.pairs[5].image.name in str(caught.value)
    assert "Traceback" not in str(caught.value)


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_workers_that_do_not_fork_give_the_same_batches(tmp_path: Path, method: str) -> None:
    generate_toy(tmp_path, num_train=8, num_test=0, size=32, seed=0)
    manifest = load_train([tmp_path])
    data = DataConfig(img_size=32, augment=STRONG, start_method=method)
    options = {"batch_size": 4, "seed": 1}
    expected = digest(build_loader(manifest, data, **options), 0)
    loader = build_loader(manifest, data, LoaderPlan(1), **options)
    assert digest(loader, 0) == expected
    loader.close()


@pytest.mark.parametrize("cached", [False, True])
def test_ranks_share_an_epoch(toy_data: Path, cached: bool) -> None:
    manifest = load_train([toy_data])
    data = DataConfig(img_size=32)
    plan = LoaderPlan(
        cache=open_cache(manifest, data, mode="ram") if cached else None, on_device=cached
    )

    def names(rank: int, world_size: int) -> list[str]:
        loader = build_loader(
            manifest, data, plan, batch_size=4, seed=1, rank=rank, world_size=world_size
        )
        assert isinstance(loader, CacheReader) == cached
        loader.set_epoch(2)
        assert len(list(loader)) == len(loader)
        return [name for batch in loader for name in batch.names]

    shares = [names(rank, 4) for rank in range(4)]
    assert {len(share) for share in shares} == {10}
    whole = names(0, 1)
    assert [name for place in zip(*shares, strict=True) for name in place] == whole
    assert sorted(whole) == sorted(pair.name for pair in manifest.pairs)


def test_evaluation_batches_keep_the_originals(toy_data: Path) -> None:
    manifest = load_train([toy_data])
    loader = build_eval_loader(manifest, DataConfig(img_size=32), batch_size=7, keep_images=True)
    batches = list(loader)
    assert len(loader) == len(batches) == 6
    assert [name for b in batches for name in b.names] == [p.name for p in manifest.pairs]
    assert batches[0].images.shape == (7, 3, 32, 32)
    assert batches[0].full_masks[0].shape == batches[0].sizes[0] == (48, 48)
    assert batches[0].originals[0].shape == (48, 48, 3)


def test_device_batches_count_the_wait(toy_data: Path) -> None:
    loader = loader_of(load_train([toy_data]), 0)
    loader.set_epoch(0)
    pairs = list(device_batches(loader, torch.device("cpu")))
    assert len(pairs) == 5 and all(wait > 0 for _, wait in pairs)


class TestToy:
    def test_pairs_are_a_function_of_their_arguments(self) -> None:
        image, mask = toy_pair(3, 4, size=64, difficulty=0.5)
        again, same = toy_pair(3, 4, size=64, difficulty=0.5)
        assert np.array_equal(image, again) and np.array_equal(mask, same)
        assert not np.array_equal(image, toy_pair(3, 5, size=64, difficulty=0.5)[0])
        assert not np.array_equal(image, toy_pair(4, 4, size=64, difficulty=0.5)[0])

    @pytest.mark.parametrize("difficulty", [0.0, 0.5, 1.0])
    def test_masks_are_exact_and_of_useful_size(self, difficulty: float) -> None:
        for index in range(20):
            image, mask = toy_pair(0, index, size=64, difficulty=difficulty)
            assert image.shape == (64, 64, 3) and set(np.unique(mask)) == {0, 255}
            assert 0.01 < (mask > 0).mean() < 0.4

    @pytest.mark.parametrize("limits", [(0.004, 0.01), (0.05, 0.3), (0.02, 0.02)])
    def test_object_sizes_keep_their_limits(self, limits: tuple[float, float]) -> None:
        """Every mask has its share of the image, to a pixel where one size is asked for."""
        low, high = limits
        shares = [
            (toy_pair(0, index, size=96, object_size=limits)[1] > 0).mean() for index in range(30)
        ]
        pixels = 3 / 96**2 if low == high else 0
        assert low - pixels <= min(shares) and max(shares) <= high + pixels
        # The sizes fill the limits: half of their logarithms are below the middle.
        if low != high:
            below = np.mean(np.array(shares) < (low * high) ** 0.5)
            assert 0.25 < below < 0.75

    @pytest.mark.parametrize("limits", [(0.0, 0.1), (0.2, 0.1), (0.1, 0.6), (0.001, 0.1)])
    def test_object_sizes_that_cannot_be_drawn(self, limits: tuple[float, float]) -> None:
        with pytest.raises(ValueError, match=r"share|pixels"):
            toy_pair(0, 0, size=64, object_size=limits)

    def test_harder_means_less_to_see(self) -> None:
        """The colour difference between object and surroundings falls; the outline stays."""

        def contrast(difficulty: float) -> float:
            values = []
            for index in range(30):
                image, mask = toy_pair(1, index, size=64, difficulty=difficulty)
                inside, outside = image[mask > 0].mean(0), image[mask == 0].mean(0)
                values.append(np.abs(inside - outside).mean())
            return float(np.mean(values))

        easy, middle, hard = (contrast(d) for d in (0.0, 0.5, 1.0))
        assert easy > 2 * middle > 2 * hard
        assert hard < 8
        outlines = [toy_pair(1, 7, size=64, difficulty=d)[1] for d in (0.0, 1.0)]
        assert np.array_equal(*outlines)

    def test_statistics_match_at_full_difficulty(self) -> None:
        """The spread of grey levels is the same in object and background, for every texture."""
        for index in range(len(TEXTURES) * 4):
            image, mask = toy_pair(2, index, size=96, difficulty=1.0)
            grey = image.mean(2)
            inside, outside = grey[mask > 0].std(), grey[mask == 0].std()
            assert 0.6 < inside / outside < 1.6

    def test_files(self, tmp_path: Path) -> None:
        generate_toy(tmp_path, num_train=6, num_test=3, size=32)
        assert len(list((tmp_path / "TrainDataset" / "GT").iterdir())) == 6
        assert len(list((tmp_path / "TestDataset" / "toy" / "Imgs").iterdir())) == 3
        assert {p.group for p in load_train([tmp_path]).pairs} == set(TEXTURES)
