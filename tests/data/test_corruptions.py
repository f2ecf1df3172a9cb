"""Corruptions: the same bytes everywhere, stronger with the severity, drawn for training images."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from camoxpert.config import AugmentConfig, build_config, check_conflicts
from camoxpert.data.samples.augment import SampleTransform, square_pair
from camoxpert.data.samples.augment_device import apply_draws
from camoxpert.data.samples.corruptions import CORRUPTIONS, SEVERITIES, corrupt
from camoxpert.data.samples.draw import CORRUPT_SEVERITIES, draw
from camoxpert.errors import ConfigError
from camoxpert.runtime.processes import World
from camoxpert.synthesis.toy import toy_pair
from camoxpert.training.data import find_data

STILL = AugmentConfig(
    hflip=0, rotate=0, scale=0, translate=0, brightness=0, contrast=0, saturation=0, hue=0, blur=0,
    noise=0,
)  # fmt: skip
ALL = [(name, severity) for name in CORRUPTIONS for severity in SEVERITIES]
# First 12 digits of SHA-256 of picture() by severity.
GOLDEN = {
    "noise": "6ad3a3f673f6 f7e9ca062850 841b6ab41728 5102896f059e 696ed76c80ea",
    "blur": "9297a31daf9f 5e830963f7ce 74ecc681b0e8 540943cbd321 3609370bb116",
    "motion": "b3a1b867d3d8 2bbdb350c42f 826d95517642 1ad0dbe41e43 2cd92f93afb3",
    "fog": "d32ff3ddce12 bd805902f742 d68c293155cb 1bb1e889f038 497ca077def2",
    "brightness": "7fea95979ed0 2d6b6c048677 7cbe5a10c7ba d6b5574d21f3 00494f14f22e",
    "contrast": "60b862c2b165 be89510378e4 44e268b4dbbe 09f3a9512ef8 2b13e68fdffb",
    "pixelate": "6c0c59761610 abbdba1153b3 313da37868d3 1c9bd08c9878 73a87873e134",
}
# Root mean square error of smooth() as JPEG, levels.
JPEG_ERRORS = (12.82, 14.28, 15.14, 18.08, 21.95)


def picture(height: int = 128, width: int = 160) -> np.ndarray:
    """Return an image of waves and edges, made without floating point."""
    y, x = np.mgrid[:height, :width]
    planes = [(x * x + 3 * y) % 256, (x * y + 5 * x) % 197 + 30, (7 * x + y * y) // 3 % 256]
    image = np.stack(planes, -1).astype(np.uint8)
    image[height // 4 : height // 2, width // 4 : width // 2] = (200, 60, 20)
    image[:4] = 0
    return image


def smooth(size: int = 128) -> np.ndarray:
    return toy_pair(3, 0, size=size, difficulty=0.2)[0]


def distance(image: np.ndarray, name: str, severity: int) -> float:
    changed = corrupt(image, name, severity, key="a").astype(float)
    return float(np.abs(changed - image).mean())


class TestCorrupt:
    @pytest.mark.parametrize("name", [name for name in CORRUPTIONS if name != "jpeg"])
    def test_the_same_bytes_on_every_machine(self, name: str) -> None:
        digests = [
            hashlib.sha256(corrupt(picture(), name, severity, seed=3, key="a").tobytes())
            for severity in SEVERITIES
        ]
        assert " ".join(digest.hexdigest()[:12] for digest in digests) == GOLDEN[name]

    @pytest.mark.parametrize("severity", SEVERITIES)
    def test_jpeg_within_a_tolerance(self, severity: int) -> None:
        """Codecs may round differently: the picture's error is that of the quality, no more."""
        image = smooth()
        changed = corrupt(image, "jpeg", severity).astype(float)
        error = np.sqrt(((changed - image) ** 2).mean())
        assert error == pytest.approx(JPEG_ERRORS[severity - 1], rel=0.1)
        assert np.array_equal(corrupt(image, "jpeg", severity, seed=1, key="b"), changed)

    @pytest.mark.parametrize(("name", "severity"), ALL)
    def test_a_pure_function(self, name: str, severity: int) -> None:
        image = picture()
        before = image.copy()
        changed = corrupt(image, name, severity, seed=1, key="a")
        corrupt(image, "noise", 5, key="something in between")
        again = corrupt(image, name, severity, seed=1, key="a")
        assert np.array_equal(changed, again) and np.array_equal(image, before)
        assert changed.dtype == np.uint8 and changed.shape == image.shape
        assert not np.array_equal(changed, image) and changed.flags.c_contiguous
        upended = np.ascontiguousarray(image[:, ::-1])[:, ::-1]  # a view with another layout
        assert np.array_equal(corrupt(upended, name, severity, seed=1, key="a"), changed)

    @pytest.mark.parametrize("name", ["noise", "motion", "fog"])
    def test_the_seed_and_the_name_choose_the_stream(self, name: str) -> None:
        image = picture()
        several = {corrupt(image, name, 3, key=f"{k}").tobytes() for k in range(8)}
        assert len(several) > 4
        assert len({corrupt(image, name, 3, seed=k, key="a").tobytes() for k in range(8)}) > 4
        odd = "caf\udce9"  # a file name whose bytes are not text
        assert np.array_equal(corrupt(image, name, 3, key=odd), corrupt(image, name, 3, key=odd))

    @pytest.mark.parametrize("name", list(CORRUPTIONS))
    def test_a_higher_severity_changes_more(self, name: str) -> None:
        for image in (smooth(), picture()):
            distances = [distance(image, name, severity) for severity in SEVERITIES]
            assert distances == sorted(distances) and distances[0] < 0.95 * distances[-1]

    @pytest.mark.parametrize("name", ["blur", "motion", "fog", "pixelate"])
    def test_strength_follows_the_size_of_the_image(self, name: str) -> None:
        """A picture and its copy of twice the size look alike after corruption."""
        large = cv2.GaussianBlur(picture(384, 512), (0, 0), 4)
        small = cv2.resize(large, (256, 192), interpolation=cv2.INTER_AREA)
        shrunk = cv2.resize(corrupt(large, name, 4), (256, 192), interpolation=cv2.INTER_AREA)
        changed = corrupt(small, name, 4).astype(float)
        assert np.abs(changed - shrunk).mean() < 0.35 * np.abs(changed - small).mean()

    @pytest.mark.parametrize("size", [(1, 1), (1, 40), (33, 7), (32, 32)])
    def test_odd_sizes(self, size: tuple[int, int]) -> None:
        for name, severity in ALL:
            assert corrupt(picture(*size), name, severity).shape == (*size, 3)

    def test_by_hand(self) -> None:
        grey = np.full((8, 8, 3), 100, np.uint8)
        for name in ("blur", "motion", "pixelate", "contrast"):
            assert np.array_equal(corrupt(grey, name, 5), grey), f"{name} of a plain image"
        # Value 200 rises by 0.2 * 255 = 51 to 251; hue and saturation stay: 100 * 251 / 200.
        pixel = np.array([[[200, 100, 50], [0, 0, 0]]], np.uint8)
        assert corrupt(pixel, "brightness", 2).tolist() == [[[251, 126, 63], [51, 51, 51]]]
        # Means 15 and a tenth of the contrast left.
        pair = np.array([[[11, 5, 1], [19, 25, 29]]], np.uint8)
        assert corrupt(pair, "contrast", 4).tolist() == [[[15, 14, 14], [15, 16, 16]]]
        noise = corrupt(np.full((128, 128, 3), 128, np.uint8), "noise", 1).astype(float) - 128
        assert noise.std() == pytest.approx(0.08 * 255, rel=0.02) and abs(noise.mean()) < 0.3
        # A disc of radius 2 (10/224 of 45) has 13 pixels.
        point = np.zeros((45, 45, 3), np.uint8)
        point[22, 22] = 130
        blurred = corrupt(point, "blur", 5)
        assert (blurred > 0).sum() == 13 * 3 and blurred.max() == 10


class TestTraining:
    def test_the_draw(self) -> None:
        half = dataclasses.replace(STILL, corrupt=0.5)
        draws = [draw(half, seed=0, epoch=0, index=i, source=8, target=8) for i in range(2000)]
        hit = [sample for sample in draws if sample.corruption]
        assert len(hit) / 2000 == pytest.approx(0.5, abs=0.04)
        assert {sample.corruption for sample in hit} == set(CORRUPTIONS)
        assert {sample.severity for sample in hit} == set(CORRUPT_SEVERITIES)
        shares = [sum(s.corruption == name for s in hit) / len(hit) for name in CORRUPTIONS]
        assert min(shares) > 0.09
        # The stream of the other changes is what it was.
        none = [draw(STILL, seed=0, epoch=0, index=i, source=8, target=8) for i in range(50)]
        assert not any(sample.corruption for sample in none)
        assert [s.noise_seed for s in none] == [s.noise_seed for s in draws[:50]]

    def test_images_change_and_masks_do_not(self) -> None:
        pairs = [square_pair(*toy_pair(3, i, size=48, difficulty=0.1), 48) for i in range(12)]
        always = dataclasses.replace(STILL, corrupt=1.0)
        transform = SampleTransform(img_size=48, augment=always, seed=5)
        for index, pixels in enumerate(pairs):
            image, mask = transform.change(pixels, epoch=1, index=index)
            again, _ = transform.change(pixels, epoch=1, index=index)
            assert np.array_equal(mask, pixels[..., 3]) and np.array_equal(image, again)
            sample = transform.draw(epoch=1, index=index)
            expected = corrupt(
                np.ascontiguousarray(pixels[..., :3]),
                sample.corruption,
                sample.severity,
                seed=sample.corruption_seed,
            )
            assert np.array_equal(image, expected)
        other = {transform.change(pairs[0], epoch=e, index=0)[0].tobytes() for e in range(6)}
        assert len(other) > 3

    def test_strength_leaves_the_probability(self) -> None:
        """Whoever asks for corruption gets it, also in a short run with weak augmentation."""
        asked = dataclasses.replace(AugmentConfig(), corrupt=1.0, strength=0.0)
        sample = SampleTransform(img_size=32, augment=asked, seed=0).draw(epoch=0, index=0)
        assert sample.corruption and not sample.colour

    def test_the_device_refuses(self) -> None:
        words = {"data.augment.corrupt": 0.3, "data.augment_on": "device"}
        with pytest.raises(ConfigError, match=r"data\.augment\.corrupt 0\.3 needs the CPU"):
            check_conflicts(build_config(words))
        check_conflicts(build_config({**words, "data.augment_on": "auto"}))
        always = dataclasses.replace(STILL, corrupt=1.0)
        sample = draw(always, seed=0, epoch=0, index=0, source=32, target=32)
        with pytest.raises(AssertionError, match="on the CPU"):
            apply_draws(torch.zeros(1, 32, 32, 4, dtype=torch.uint8), [sample], 32)

    @pytest.mark.parametrize("share", [0.0, 0.3])
    def test_auto_is_the_cpu_and_says_so(self, toy_data: Path, share: float, capsys) -> None:
        words = {"data.roots": [str(toy_data)], "data.img_size": 32, "data.num_workers": 0}
        asked = build_config({**words, "data.cache": "none", "data.augment.corrupt": share})
        found = find_data(asked, World(), device="cuda", write=False)
        said = " ".join(capsys.readouterr().out.split())
        assert found.loading.on_device == (share == 0)
        told = "corruptions are made on the CPU; 30% of the images corrupted, at severities 1 to 3"
        assert (told in said) == (share > 0)

    def test_a_run_trains_with_them(self, train, tmp_path: Path, capsys) -> None:
        words = ("--epochs", "1", "--no-report", "--no-test", "--augment-on", "cpu")
        assert train(*words, "data.augment.corrupt=1") == 0
        said = " ".join(capsys.readouterr().out.split())
        assert "as asked; 100% of the images corrupted, at severities 1 to 3" in said
