"""One draw, two back ends: both move the object to the same pixels."""

from __future__ import annotations

import colorsys
import dataclasses

import cv2
import numpy as np
import pytest
import torch

from camoxpert.config import AugmentConfig
from camoxpert.data.samples.augment import Operators, SampleTransform, resize_pair, square_pair
from camoxpert.data.samples.augment_device import apply_draws, gaussian_noise, turn_hue, warp
from camoxpert.data.samples.draw import GREY, Draw, draw, linear_colour
from camoxpert.synthesis.toy import toy_pair

STILL = AugmentConfig(
    hflip=0, rotate=0, scale=0, translate=0, brightness=0, contrast=0, saturation=0, hue=0, blur=0,
    noise=0,
)  # fmt: skip
WILD = AugmentConfig(vflip=0.5, rotate=90, scale=0.4, translate=0.2, blur=0, noise=0)


def pixels_of(count: int, size: int = 48, difficulty: float = 0.0) -> np.ndarray:
    pairs = [toy_pair(3, index, size=size, difficulty=difficulty) for index in range(count)]
    return np.stack([square_pair(image, mask, size) for image, mask in pairs])


def both(pixels: np.ndarray, augment: AugmentConfig, target: int, epoch: int = 0):
    """Apply the same draws on the CPU and in a batch."""
    transform = SampleTransform(img_size=target, augment=augment, seed=5, source=pixels.shape[1])
    alone = [transform.change(p, epoch=epoch, index=i) for i, p in enumerate(pixels)]
    draws = [transform.draw(epoch=epoch, index=i) for i in range(len(pixels))]
    images, masks = apply_draws(torch.from_numpy(pixels), draws, target)
    return (
        np.stack([image for image, _ in alone]),
        np.stack([mask for _, mask in alone]),
        images.permute(0, 2, 3, 1).numpy(),
        masks[:, 0].numpy(),
        draws,
    )


class TestDraw:
    def test_a_function_of_seed_epoch_and_index(self) -> None:
        def of(seed: int, epoch: int, index: int) -> bytes:
            sample = draw(WILD, seed=seed, epoch=epoch, index=index, source=32, target=32)
            return sample.matrix.tobytes() + np.float64(sample.hue).tobytes()

        assert of(1, 2, 3) == of(1, 2, 3)
        assert len({of(s, e, i) for s in range(3) for e in range(5) for i in range(40)}) == 600
        assert of(1, 2, 3) != of(1, 3, 2) != of(2, 1, 3)

    def test_switching_one_change_off_leaves_the_others(self) -> None:
        """Every number has a fixed place in the stream."""
        options = {"seed": 0, "epoch": 1, "source": 32, "target": 32}
        for index in range(20):
            whole = draw(WILD, index=index, **options)
            less = draw(dataclasses.replace(WILD, brightness=0, hflip=0), index=index, **options)
            assert less.brightness == 1 and less.hue == whole.hue
            assert less.contrast == whole.contrast

    def test_matrix_by_hand(self) -> None:
        # From 4 to 8 pixels: the centre of pixel 0 (0.5 of 4) lands on 1.0 of 8, pixel 0.5.
        matrix = draw(None, seed=0, epoch=0, index=0, source=4, target=8).matrix
        assert np.allclose(matrix, [[2, 0, 0.5], [0, 2, 0.5]])
        mirrored = dataclasses.replace(STILL, hflip=1.0)
        sample = draw(mirrored, seed=0, epoch=0, index=0, source=4, target=4)
        assert np.allclose(sample.matrix, [[-1, 0, 3], [0, 1, 0]])
        assert sample.flips == (True, False)

    @pytest.mark.parametrize("name", ["hflip", "vflip", "blur", "noise"])
    def test_odds_are_kept(self, name) -> None:
        augment = dataclasses.replace(STILL, **{name: 0.25})
        draws = [draw(augment, seed=0, epoch=0, index=i, source=8, target=8) for i in range(2000)]
        field = {"hflip": lambda d: d.flips[0], "vflip": lambda d: d.flips[1]}.get(
            name, lambda d: getattr(d, name) > 0
        )
        assert np.mean([field(d) for d in draws]) == pytest.approx(0.25, abs=0.04)

    def test_strengths_are_kept(self) -> None:
        draws = [draw(WILD, seed=0, epoch=0, index=i, source=8, target=8) for i in range(500)]
        zooms = [np.sqrt(abs(np.linalg.det(d.matrix[:, :2]))) for d in draws]
        assert 0.6 <= min(zooms) < 0.65 and 1.35 < max(zooms) <= 1.4
        assert all(0.8 <= d.brightness <= 1.2 and abs(d.hue) <= 0.02 for d in draws)
        assert np.mean([d.colour for d in draws]) == pytest.approx(0.8, abs=0.06)


class TestBothBackEnds:
    @pytest.mark.parametrize("target", [48, 64, 32])
    def test_the_object_is_at_the_same_pixels(self, target) -> None:
        pixels = pixels_of(24)
        plain = dataclasses.replace(WILD, brightness=0, contrast=0, saturation=0, hue=0)
        images, masks, device_images, device_masks, draws = both(pixels, plain, target)
        assert images.shape == device_images.shape == (24, target, target, 3)
        assert set(np.unique(masks)) | set(np.unique(device_masks)) <= {0, 255}
        # OpenCV places samples to 1/32 pixel: the outline may differ by a pixel here and there.
        assert (masks != device_masks).mean() < 0.004
        assert np.abs(images.astype(int) - device_images).mean() < 1
        assert len({d.matrix.tobytes() for d in draws}) == 24
        # Control: with another epoch's draws the objects are elsewhere.
        other = both(pixels, plain, target, epoch=1)[1]
        assert (masks != other).mean() > 0.05

    def test_colours_agree(self) -> None:
        pixels = pixels_of(16)
        colours = dataclasses.replace(STILL, brightness=0.2, contrast=0.2, saturation=0.2, hue=0.05)
        images, masks, device_images, device_masks, _ = both(pixels, colours, 48)
        assert np.array_equal(masks, device_masks) and np.array_equal(masks, pixels[..., 3])
        change = np.abs(images.astype(int) - pixels[..., :3]).mean()
        apart = np.abs(images.astype(int) - device_images).mean()
        # albumentations rounds to whole levels and degrees after each of its four steps.
        assert change > 8 and apart < 1.5

    def test_flips_alone_move_whole_pixels(self) -> None:
        pixels = pixels_of(12)
        flips = dataclasses.replace(STILL, hflip=0.5, vflip=0.5)
        images, masks, device_images, device_masks, draws = both(pixels, flips, 48)
        assert np.array_equal(images, device_images) and np.array_equal(masks, device_masks)
        for index, sample in enumerate(draws):
            axes = [axis for axis, flip in zip((1, 0), sample.flips, strict=True) if flip]
            assert np.array_equal(images[index], np.flip(pixels[index, ..., :3], axes))
        assert len({d.flips for d in draws}) > 2

    def test_blur_and_noise(self) -> None:
        pixels = pixels_of(8)
        blurred = both(pixels, dataclasses.replace(STILL, blur=1.0), 48)
        assert np.abs(blurred[0].astype(int) - blurred[2]).max() <= 2
        rough = np.abs(np.diff(pixels[..., :3].astype(int), axis=1)).mean()
        assert np.abs(np.diff(blurred[0].astype(int), axis=1)).mean() < 0.8 * rough
        noisy = both(pixels, dataclasses.replace(STILL, noise=1.0), 48)
        grey = (pixels[..., :3].min(-1) > 40) & (pixels[..., :3].max(-1) < 215)
        for images in (noisy[0], noisy[2]):
            for image, original, where, sample in zip(
                images, pixels[..., :3], grey, noisy[4], strict=True
            ):
                spread = (image.astype(float) - original)[where].std()
                assert spread == pytest.approx(255 * sample.noise, rel=0.1, abs=0.3)


class TestDeviceBackEnd:
    def test_a_sample_does_not_depend_on_its_batch(self) -> None:
        pixels = torch.from_numpy(pixels_of(6))
        strong = dataclasses.replace(WILD, blur=0.5, noise=0.5)
        draws = [draw(strong, seed=1, epoch=0, index=i, source=48, target=48) for i in range(6)]
        images, masks = apply_draws(pixels, draws, 48)
        for i in range(6):
            alone, mask = apply_draws(pixels[i : i + 1], draws[i : i + 1], 48)
            assert (alone[0].int() - images[i].int()).abs().max() <= 1
            assert torch.equal(mask[0], masks[i])

    def test_warp_against_opencv_beyond_the_edge(self) -> None:
        image = np.random.default_rng(0).random((16, 16)).astype(np.float32)
        matrix = np.array([[0.5, 0.1, 6.0], [-0.1, 0.5, -3.0]])
        expected = cv2.warpAffine(
            image, matrix, (20, 20), flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT_101
        )
        got = warp(torch.from_numpy(image)[None, None], [matrix], 20)[0, 0].numpy()
        assert np.abs(got - expected).max() < 0.05 and np.abs(got - expected).mean() < 0.01

    def test_hue_against_the_standard_library(self) -> None:
        colours = np.random.default_rng(0).integers(0, 256, (64, 3)).astype(np.float32)
        images = torch.from_numpy(colours.T.reshape(1, 3, 8, 8).copy())
        turned = turn_hue(images, torch.tensor([0.3]))[0].reshape(3, 64).T.numpy()
        for before, after in zip(colours, turned, strict=True):
            hue, saturation, value = colorsys.rgb_to_hsv(*(before / 255))
            expected = colorsys.hsv_to_rgb((hue + 0.3) % 1, saturation, value)
            assert np.allclose(after / 255, expected, atol=1e-4)
        assert torch.allclose(turn_hue(images, torch.tensor([0.0])), images, atol=1e-3)

    def test_linear_colour_by_hand(self) -> None:
        identity = np.array([[1.0, 0, 0], [0, 1, 0]])
        matrix, pivot = linear_colour(Draw(identity, None, brightness=2.0, contrast=0.5))
        # Twice as bright, half the contrast: every colour stays, half of twice the mean is added.
        assert np.allclose(matrix, np.eye(3)) and pivot == 1.0
        matrix, pivot = linear_colour(Draw(identity, None, saturation=0.0))
        assert np.allclose(matrix @ [10, 20, 30], GREY @ [10, 20, 30]) and pivot == 0

    def test_noise_is_normal_and_a_function_of_its_seed(self) -> None:
        like = torch.zeros(1, 3, 128, 128)
        noise = gaussian_noise(like, 7)
        assert torch.equal(noise, gaussian_noise(like, 7))
        assert abs(float(noise.mean())) < 0.02 and float(noise.std()) == pytest.approx(1, abs=0.02)
        other = gaussian_noise(like, 8)
        together = torch.stack([noise.flatten(), other.flatten()])
        assert abs(float(torch.corrcoef(together)[0, 1])) < 0.02
        within = torch.stack([noise.flatten()[:-1], noise.flatten()[1:]])
        assert abs(float(torch.corrcoef(within)[0, 1])) < 0.02

    def test_no_host_sync(self) -> None:
        from camoxpert.profile.syncs import SyncCounter

        pixels = torch.from_numpy(pixels_of(4))
        strong = dataclasses.replace(WILD, blur=1.0, noise=1.0)
        draws = [draw(strong, seed=1, epoch=0, index=i, source=48, target=32) for i in range(4)]
        with SyncCounter() as counter:
            apply_draws(pixels, draws, 32)
        assert counter.syncs == 0


def test_operators_do_not_change_their_input() -> None:
    pixels = pixels_of(1)[0]
    before = pixels.copy()
    sample = draw(WILD, seed=0, epoch=0, index=0, source=48, target=48)
    Operators().apply(pixels, sample, 48)
    assert np.array_equal(pixels, before)


def test_a_mask_is_averaged_however_small_its_image_was_decoded() -> None:
    mask = np.zeros((256, 256), np.uint8)
    mask[:, ::3] = 255
    mask[:, 1::3] = 255
    whole = np.repeat(mask[..., None], 3, 2)
    half = cv2.resize(whole, (32, 32), interpolation=cv2.INTER_AREA)
    _, expected = resize_pair(whole, mask, 32)
    _, got = resize_pair(half, mask, 32)
    assert np.array_equal(got, expected) and expected.all(), "two thirds are more than half"
