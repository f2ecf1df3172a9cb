"""New scenes of training images: exact masks, the same in both back ends and in any worker."""

from __future__ import annotations

import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from camoxpert.config import AugmentConfig, DataConfig, build_config
from camoxpert.data.cache.build import open_cache
from camoxpert.data.files.labels import VOID
from camoxpert.data.files.made import find_made
from camoxpert.data.files.manifest import Manifest, Search, load_train
from camoxpert.data.files.unlabeled import find_unlabeled, joined
from camoxpert.data.loader import LoaderPlan, build_loader, finish
from camoxpert.data.samples.augment import SampleTransform, square_pair
from camoxpert.data.samples.augment_device import apply_draws
from camoxpert.data.samples.batches import Batch
from camoxpert.data.samples.draw import Draw, draw
from camoxpert.data.samples.scenes import guest_of, relit
from camoxpert.runs.folder import run_name
from camoxpert.synthesis.online import OnlineScenes
from camoxpert.synthesis.toy import generate_toy, toy_pair

SIDE = 64
STILL = AugmentConfig(
    hflip=0, rotate=0, scale=0, translate=0, brightness=0, contrast=0, saturation=0, hue=0, blur=0,
    noise=0,
)  # fmt: skip
SCENES = OnlineScenes()


def pixels_of(count: int) -> np.ndarray:
    pairs = [toy_pair(3, index, size=SIDE, difficulty=0.0) for index in range(count)]
    return np.stack([square_pair(image, mask, SIDE) for image, mask in pairs])


class TestDraw:
    def test_off_by_default_and_the_odds_are_kept(self) -> None:
        options = {"seed": 0, "epoch": 1, "source": 8, "target": 8}
        plain = [draw(AugmentConfig(), index=i, **options) for i in range(50)]
        assert not any(d.light is not None or d.guest is not None for d in plain)
        scenes = AugmentConfig(relight=0.25, compose=0.25)
        draws = [draw(scenes, index=i, **options) for i in range(2000)]
        assert np.mean([d.light is not None for d in draws]) == pytest.approx(0.25, abs=0.04)
        assert np.mean([d.guest is not None for d in draws]) == pytest.approx(0.25, abs=0.04)
        assert len({d.light for d in draws}) > 400
        # The other numbers of a sample stay as they are.
        for before, after in zip(plain, draws, strict=False):
            assert before.matrix.tobytes() == after.matrix.tobytes() and before.hue == after.hue

    def test_strength_does_not_scale_them(self) -> None:
        weak = AugmentConfig(relight=1.0, compose=1.0, strength=0.0)
        transform = SampleTransform(img_size=32, augment=weak, seed=0, scenes=SCENES)
        sample = transform.draw(epoch=0, index=0)
        assert sample.light is not None and sample.guest is not None

    def test_another_image_gives_the_object(self) -> None:
        still = np.eye(2, 3)
        for place in range(5):
            for share in (0.0, 0.35, 0.999):
                chosen = guest_of(Draw(still, None, guest=share), place, 5)
                assert chosen is not None and 0 <= chosen < 5 and chosen != place
        assert guest_of(Draw(still, None, guest=0.5), 0, 1) is None
        assert guest_of(Draw(still, None), 0, 5) is None


class TestCompose:
    def test_the_mask_holds_both_objects_and_nothing_else(self) -> None:
        pixels = pixels_of(9)
        changed = 0
        for i in range(8):
            made = SCENES.compose(pixels[i], pixels[i + 1], seed=i)
            assert made.shape == pixels[i].shape and made.dtype == np.uint8
            assert set(np.unique(made[..., 3])) <= {0, 255}
            moved = (made[..., :3] != pixels[i][..., :3]).any(2)
            labelled = made[..., 3] != pixels[i][..., 3]
            # A label changes only where pixels do.
            assert (labelled & ~moved).sum() <= 0.02 * max(labelled.sum(), 50)
            changed += bool((made[..., 3] > pixels[i][..., 3]).any())
            assert np.array_equal(made, SCENES.compose(pixels[i], pixels[i + 1], seed=i))
        assert changed >= 4
        others = SCENES.compose(pixels[0], pixels[1], seed=100)
        assert not np.array_equal(others, SCENES.compose(pixels[0], pixels[1], seed=0))

    def test_without_an_object_or_a_place_nothing_changes(self) -> None:
        one, other = pixels_of(2)
        before, empty, full = one.copy(), other.copy(), one.copy()
        empty[..., 3], full[..., 3] = 0, 255
        assert np.array_equal(SCENES.compose(one, empty, seed=0), one)
        assert np.array_equal(SCENES.compose(full, other, seed=0), full)
        SCENES.compose(one, other, seed=0)
        assert np.array_equal(one, before)

    def test_void_stays_where_nothing_is_pasted(self) -> None:
        one, other = pixels_of(2)
        one[:12, :, 3] = VOID
        made = SCENES.compose(one, other, seed=3)
        same = made[..., 3] == one[..., 3]
        assert (made[..., 3][~same] != VOID).all() and (made[:12, :, 3] == VOID).mean() > 0.5


class TestRelight:
    def test_masks_and_everything_far_from_the_object_stay(self) -> None:
        pixels = torch.from_numpy(pixels_of(6))
        made = SCENES.relight(pixels, list(range(6)))
        assert torch.equal(made[..., 3], pixels[..., 3]) and made.dtype == torch.uint8
        inside = pixels[..., 3] == 255
        change = (made[..., :3].int() - pixels[..., :3].int()).abs().amax(-1)
        assert float(change[inside].float().mean()) > 5
        assert float((change[~inside] == 0).float().mean()) > 0.3

    def test_void_counts_as_no_object(self) -> None:
        pixels = torch.from_numpy(pixels_of(1))
        pixels[..., 3] = VOID
        assert torch.equal(SCENES.relight(pixels, [5]), pixels)
        pixels[..., 3] = 0
        assert torch.equal(SCENES.relight(pixels, [5]), pixels)

    def test_grey_images_stay_grey(self) -> None:
        pixels = torch.from_numpy(pixels_of(4))
        pixels[..., :3] = pixels[..., 1:2]
        made = SCENES.relight(pixels, list(range(4)))
        assert torch.equal(made[..., 0], made[..., 1]) and torch.equal(made[..., 1], made[..., 2])
        assert not torch.equal(made, pixels)

    def test_the_host_does_not_wait(self) -> None:
        from camoxpert.profile.syncs import SyncCounter

        pixels = torch.from_numpy(pixels_of(3))
        draws = [Draw(np.eye(2, 3), None, light=light) for light in (4, None, 6)]
        SCENES.relight(pixels[:1], [4])
        with SyncCounter() as counter:
            relit(pixels, draws, SCENES)
        assert counter.syncs == 0


class TestBothBackEnds:
    @pytest.mark.parametrize("augment", [
        replace(STILL, relight=1.0),
        replace(STILL, hflip=0.5, rotate=40, scale=0.2, relight=0.6),
    ], ids=["still", "moved"])  # fmt: skip
    def test_the_light_is_the_same(self, augment: AugmentConfig) -> None:
        pixels = pixels_of(10)
        transform = SampleTransform(img_size=SIDE, augment=augment, seed=5, scenes=SCENES)
        draws = [transform.draw(epoch=0, index=i) for i in range(10)]
        alone = [transform.change(p, epoch=0, index=i) for i, p in enumerate(pixels)]
        batch = relit(torch.from_numpy(pixels), draws, SCENES)
        images, masks = apply_draws(batch, draws, SIDE)
        apart = np.abs(
            np.stack([image for image, _ in alone]).astype(int)
            - images.permute(0, 2, 3, 1).numpy()
        )  # fmt: skip
        assert (np.stack([mask for _, mask in alone]) != masks[:, 0].numpy()).mean() < 0.004
        assert apart.max() <= 1 if augment.rotate == 0 else apart.mean() < 1
        # The control: without the light they differ.
        plain, _ = apply_draws(torch.from_numpy(pixels), draws, SIDE)
        assert (plain.int() - images.int()).abs().float().mean() > 1

    def test_scenes_travel_to_workers(self) -> None:
        assert pickle.loads(pickle.dumps(SCENES)) == SCENES


def batches(manifest: Manifest, plan: LoaderPlan, epoch: int = 0, **data: object) -> list[Batch]:
    augment = replace(STILL, relight=0.5, compose=0.7)
    config = DataConfig(img_size=SIDE, augment=augment, unlabeled_share=0.1, **data)
    loader = build_loader(manifest, config, replace(plan, scenes=SCENES), batch_size=8, seed=1)
    loader.set_epoch(epoch)
    found = [finish(loader, batch, torch.device("cpu")) for batch in loader]
    loader.close()
    return found


def test_every_way_of_reading_makes_the_same_scenes(toy_data: Path, tmp_path: Path) -> None:
    generate_toy(tmp_path / "made", num_train=6, num_test=0, size=48, seed=4)
    (without_masks,) = (toy_data / "TestDataset").glob("*/Imgs")
    manifest = joined(
        load_train([toy_data]),
        find_made([tmp_path / "made"], Search()),
        find_unlabeled(without_masks),
    )
    data = DataConfig(img_size=SIDE, cache_dir=str(tmp_path / "cache"))
    cache = open_cache(manifest, data, mode="disk")
    plain = LoaderPlan()
    ways = {
        "files": plain,
        "workers": replace(plain, num_workers=2),
        "device": replace(plain, on_device=True),
        "reader": replace(plain, on_device=True, cache=cache),
    }
    found = {name: batches(manifest, plan) for name, plan in ways.items()}
    for name in ("workers", "device", "reader"):
        for a, b in zip(found["files"], found[name], strict=True):
            assert a.names == b.names and torch.equal(a.masks, b.masks), name
            assert int((a.images.int() - b.images.int()).abs().max()) <= 1, name
            if name == "workers":
                assert torch.equal(a.images, b.images)
    # Nothing is pasted into an image whose mask is not known; the control: into the others it is.
    for batch in found["files"]:
        if batch.unlabeled is not None:
            assert (batch.masks[batch.unlabeled] == VOID).all()
    other = batches(manifest, plain, epoch=1)
    first, second = (
        {i: m for batch in part for i, m in zip(batch.indices, batch.masks, strict=True)}
        for part in (found["files"], other)
    )
    assert sum(not torch.equal(first[i], second[i]) for i in range(40)) > 10


def test_names_of_runs_stay() -> None:
    # As it was before these settings were there.
    assert run_name(build_config({"data.augment.relight": 0.0})) == run_name(build_config({}))
    assert run_name(build_config({"data.augment.relight": 0.1})) != run_name(build_config({}))
