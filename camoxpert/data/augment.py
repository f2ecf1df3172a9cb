"""Random changes to a sample, drawn from (seed, epoch, index) and nothing else.

albumentations stays behind this module: 2.0.8 is its last MIT release.
"""

from __future__ import annotations

import hashlib
import os
import warnings
from typing import Any

import cv2
import numpy as np

from camoxpert.config import AugmentConfig


class SampleTransform:
    """Resizes a pair to the training size and, for training, changes it at random.

    Args:
        img_size: side of the square result, in pixels.
        augment: strengths, or None for evaluation (resize only).
        seed: seed of the run.
    """

    def __init__(self, *, img_size: int, augment: AugmentConfig | None, seed: int) -> None:
        self.img_size = img_size
        self.augment = augment
        self.seed = seed
        self._pipeline: Any = None

    def __call__(
        self, image: np.ndarray, mask: np.ndarray, *, epoch: int, index: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Transform uint8 (H, W, 3) and (H, W) to uint8 (S, S, 3) and (S, S) with 0 and 255.

        Equal (seed, epoch, index) give equal results, in whatever process and order.
        """
        image, mask = resize_pair(image, mask, self.img_size)
        if self.augment is None:
            return image, mask
        if self._pipeline is None:
            self._pipeline = build_pipeline(self.augment)
        # albumentations gives every worker the same stream; a seed per sample sets it right.
        self._pipeline.set_random_seed(sample_seed(self.seed, epoch, index))
        changed = self._pipeline(image=image, mask=mask)
        binary = np.where(changed["mask"] > 127, np.uint8(255), np.uint8(0))
        return np.ascontiguousarray(changed["image"]), binary


def sample_seed(seed: int, epoch: int, index: int) -> int:
    """Hash (seed, epoch, index) to 32 bits; neighbours get unrelated seeds."""
    digest = hashlib.blake2b(f"{seed}/{epoch}/{index}".encode(), digest_size=4).digest()
    return int.from_bytes(digest, "little")


def resize_pair(image: np.ndarray, mask: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Resize a pair to a square; the mask is averaged, then cut at one half."""
    shrink = min(image.shape[:2]) > size
    how = cv2.INTER_AREA if shrink else cv2.INTER_LINEAR
    small = cv2.resize(mask, (size, size), interpolation=how)
    binary = np.where(small > 127, np.uint8(255), np.uint8(0))
    return cv2.resize(image, (size, size), interpolation=how), binary


def build_pipeline(augment: AugmentConfig) -> Any:
    """Build the albumentations pipeline; a strength of 0 leaves its step out."""
    os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import albumentations as A

        steps: list[Any] = []
        if augment.hflip:
            steps.append(A.HorizontalFlip(p=augment.hflip))
        if augment.vflip:
            steps.append(A.VerticalFlip(p=augment.vflip))
        if augment.rotate or augment.scale or augment.translate:
            steps.append(
                A.Affine(
                    scale=(1 - augment.scale, 1 + augment.scale),
                    rotate=(-augment.rotate, augment.rotate),
                    translate_percent=(-augment.translate, augment.translate),
                    interpolation=cv2.INTER_LINEAR,
                    mask_interpolation=cv2.INTER_LINEAR,
                    # The same border for both: a mirrored object must be labelled as one.
                    border_mode=cv2.BORDER_REFLECT_101,
                    p=1.0,
                )
            )
        if augment.brightness or augment.contrast or augment.saturation or augment.hue:
            steps.append(
                A.ColorJitter(
                    brightness=(1 - augment.brightness, 1 + augment.brightness),
                    contrast=(1 - augment.contrast, 1 + augment.contrast),
                    saturation=(1 - augment.saturation, 1 + augment.saturation),
                    hue=(-augment.hue, augment.hue),
                    p=0.8,
                )
            )
        if augment.blur:
            steps.append(A.GaussianBlur(blur_limit=(3, 5), p=augment.blur))
        if augment.noise:
            steps.append(A.GaussNoise(std_range=(0.01, 0.05), p=augment.noise))
        return A.Compose(steps)
