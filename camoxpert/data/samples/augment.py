"""Augment on the CPU: albumentations' operators with our own random numbers.

Only this module uses albumentations: 2.0.8 is its last MIT release. Its sampling, which gives every
data worker the same stream, is not used.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from functools import cached_property
from typing import Any

import cv2
import numpy as np

from camoxpert.config import AugmentConfig, DataConfig
from camoxpert.data.files.labels import has_void, join_void, void_planes
from camoxpert.data.files.modalities import joined_known
from camoxpert.data.samples.corruptions import corrupt
from camoxpert.data.samples.draw import Draw, draw, gaussian_kernel, scaled
from camoxpert.data.samples.scenes import Scenes, guest_of, relit_one


def training_sides(data: DataConfig) -> tuple[int, ...]:
    """Return the sides of the training images, in pixels, multiples of 32, ascending."""
    if not data.multi_scale:
        return (data.img_size,)
    sides = {max(32, round(data.img_size * factor / 32) * 32) for factor in data.multi_scale}
    return tuple(sorted(sides))


def image_sides(data: DataConfig) -> tuple[int, ...]:
    """Return the sides of all images that a network sees, that of evaluation first."""
    return (data.img_size, *(side for side in training_sides(data) if side != data.img_size))


def source_side(data: DataConfig) -> int:
    """Return the side to which pairs are decoded before they are augmented."""
    return data.source_size or max(training_sides(data))


def sample_transform(data: DataConfig, seed: int, scenes: Scenes | None = None) -> SampleTransform:
    """Return the transform from pairs to training samples."""
    return SampleTransform(
        img_size=data.img_size,
        augment=data.augment,
        seed=seed,
        source=source_side(data),
        scenes=scenes,
    )


class SampleTransform:
    """Turns a pair into a training sample, a pure function of (seed, epoch, index).

    Args:
        img_size: side of the square result, in pixels.
        augment: strengths, or None for evaluation (resize only).
        seed: seed of the run.
        source: side to which pairs are decoded before they are augmented; unset: ``img_size``.
        scenes: what relights and composes, where ``augment`` asks for it.
    """

    def __init__(
        self,
        *,
        img_size: int,
        augment: AugmentConfig | None,
        seed: int,
        source: int | None = None,
        scenes: Scenes | None = None,
    ) -> None:
        asked = augment is not None and bool(augment.relight or augment.compose)
        assert scenes is not None or not asked, "nothing makes the scenes"
        self.img_size = img_size
        self.augment = None if augment is None else scaled(augment)
        self.seed = seed
        self.source = source or img_size
        self.scenes = scenes

    def __call__(
        self, image: np.ndarray, mask: np.ndarray, *, epoch: int, index: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Transform uint8 (H, W, 3) and (H, W) to uint8 (T, T, 3) and (T, T), mask values as read.

        Equal (seed, epoch, index) give equal results in any process and order.
        """
        return self.change(square_pair(image, mask, self.source), epoch=epoch, index=index)

    def change(
        self, pixels: np.ndarray, *, epoch: int, index: int, target: int | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Augment a pair that was decoded to uint8 (S, S, 4); ``target`` overrides ``img_size``.

        An object of another image, if its draw has one, is in it already: see ``compose``.
        """
        side = target or self.img_size
        sample = self.draw(epoch=epoch, index=index, target=side)
        return self._operators.apply(relit_one(pixels, sample, self.scenes), sample, side)

    def compose(
        self,
        pixels: np.ndarray,
        place: int,
        sample: Draw,
        *,
        givers: int,
        read: Callable[[int], np.ndarray],
    ) -> np.ndarray:
        """Return a labelled pair, uint8 (S, S, 4), with the object that its draw has for it.

        Args:
            pixels, place: the pair and its position.
            sample: its draw.
            givers: see ``guest_of``.
            read: returns the pair at another position.
        """
        giver = guest_of(sample, place, givers)
        if giver is None or self.scenes is None:
            return pixels
        return self.scenes.compose(pixels, read(giver), sample.guest_seed)

    def change_map(
        self, map_HW: np.ndarray, *, epoch: int, index: int, target: int | None = None
    ) -> np.ndarray:
        """Move a soft map, uint8 (S, S), as ``change`` moves the pair; its values stay soft."""
        side = target or self.img_size
        return self._operators.move(map_HW, self.draw(epoch=epoch, index=index, target=side), side)

    def change_planes(
        self, planes: np.ndarray, *, epoch: int, index: int, target: int | None = None
    ) -> np.ndarray:
        """Move the planes of modalities, uint8 (S, S, M), as ``change`` moves the pair.

        Nothing but the geometry of the draw: light, colour and noise are the camera's. Unknown
        pixels stay unknown.
        """
        side = target or self.img_size
        sample = self.draw(epoch=epoch, index=index, target=side)
        moved = [self._operators.move_known(plane, sample, side) for plane in cv2.split(planes)]
        return np.stack(moved, axis=-1)

    def draw(self, *, epoch: int, index: int, target: int | None = None) -> Draw:
        """Return the augmentation of a sample."""
        return draw(
            self.augment,
            seed=self.seed,
            epoch=epoch,
            index=index,
            source=self.source,
            target=target or self.img_size,
        )

    @cached_property
    def _operators(self) -> Operators:
        # Made at the first use, often in a data worker: importing albumentations takes seconds.
        return Operators()


def square_pair(image: np.ndarray, mask: np.ndarray, side: int) -> np.ndarray:
    """Resize a pair to one uint8 array (S, S, 4), RGB and mask."""
    small, binary = resize_pair(image, mask, side)
    return np.dstack([small, binary])


def resize_pair(image: np.ndarray, mask: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Resize a pair to a square; the mask is averaged, then cut at one half (see ``join_void``)."""

    # One filter for each: the decoder may have shrunk the image already.
    def resized(plane: np.ndarray) -> np.ndarray:
        small: np.ndarray = cv2.resize(plane, (size, size), interpolation=_filter(mask, size))
        return small

    if has_void(mask):
        objects, void = void_planes(mask)
        binary = join_void(resized(objects), resized(void))
    else:
        binary = np.where(resized(mask) > 127, np.uint8(255), np.uint8(0))
    return cv2.resize(image, (size, size), interpolation=_filter(image, size)), binary


def resize_plane(plane: np.ndarray, size: int) -> np.ndarray:
    """Resize an image or a soft map to a square; values are averaged, nothing is cut."""
    return cv2.resize(plane, (size, size), interpolation=_filter(plane, size))


def _filter(picture: np.ndarray, size: int) -> int:
    return cv2.INTER_AREA if min(picture.shape[:2]) > size else cv2.INTER_LINEAR


class Operators:
    """albumentations' operators, called with the numbers of a draw."""

    def __init__(self) -> None:
        os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import albumentations as A

            # The same border for both: a mirrored object must be labelled as an object.
            self._affine: Any = A.Affine(
                interpolation=cv2.INTER_LINEAR, border_mode=cv2.BORDER_REFLECT_101
            )
            self._colour: Any = A.ColorJitter()
            self._blur: Any = A.GaussianBlur()
            self._noise: Any = A.GaussNoise()

    def move(self, plane: np.ndarray, sample: Draw, target: int) -> np.ndarray:
        """Apply the geometry of a draw alone to uint8 (S, S); returns (T, T)."""
        if sample.flips is not None:
            axes = [axis for axis, flip in zip((1, 0), sample.flips, strict=True) if flip]
            return np.ascontiguousarray(np.flip(plane, axes) if axes else plane)
        matrix = np.vstack([sample.matrix, [0, 0, 1]])
        moved: np.ndarray = self._affine.apply(
            np.ascontiguousarray(plane), matrix=matrix, output_shape=(target, target)
        )
        return moved

    def move_known(self, plane: np.ndarray, sample: Draw, target: int) -> np.ndarray:
        """As ``move``, for a plane in which 0 stands for unknown and must not blend."""
        if sample.flips is not None:
            return self.move(plane, sample, target)
        total, share = (
            self.move(part, sample, target).astype(np.float32)
            for part in (plane, np.where(plane > 0, np.uint8(255), np.uint8(0)))
        )
        return joined_known(total, share / 255)

    def apply(self, pixels: np.ndarray, sample: Draw, target: int) -> tuple[np.ndarray, np.ndarray]:
        """Augment uint8 (S, S, 4) to an image (T, T, 3) and a mask (T, T) of 0, VOID and 255."""
        void: np.ndarray | None = None
        if sample.flips is not None:
            # Flips alone move whole pixels: nothing is resampled.
            axes = [axis for axis, flip in zip((1, 0), sample.flips, strict=True) if flip]
            warped = np.ascontiguousarray(np.flip(pixels, axes) if axes else pixels)
        else:
            shape = (target, target)
            matrix = np.vstack([sample.matrix, [0, 0, 1]])
            pixels = np.ascontiguousarray(pixels)
            stored = cv2.extractChannel(pixels, 3)
            if has_void(stored):
                # Objects and void are resampled apart: their values must not blend.
                objects, plane = void_planes(stored)
                pixels = np.dstack([pixels[..., :3], objects])
                void = self._affine.apply(plane, matrix=matrix, output_shape=shape)
            warped = self._affine.apply(pixels, matrix=matrix, output_shape=shape)
        # OpenCV splits channels several times faster than strided indexing does.
        image: np.ndarray = cv2.cvtColor(warped, cv2.COLOR_RGBA2RGB)
        mask: np.ndarray = cv2.extractChannel(warped, 3)
        if void is not None:
            mask = join_void(mask, void)
        elif sample.flips is None:
            mask = cv2.threshold(mask, 127, 255, cv2.THRESH_BINARY)[1]
        if sample.colour:
            image = self._colour.apply(
                image,
                brightness=sample.brightness,
                contrast=sample.contrast,
                saturation=sample.saturation,
                hue=sample.hue,
                order=[0, 1, 2, 3],
            )
        if sample.blur:
            image = self._blur.apply(image, kernel=gaussian_kernel(sample.blur))
        if sample.noise:
            generator = np.random.default_rng(sample.noise_seed)
            noise = generator.standard_normal(image.shape, np.float32) * (255 * sample.noise)
            image = self._noise.apply(image, noise_map=noise)
        if sample.corruption:
            image = corrupt(image, sample.corruption, sample.severity, seed=sample.corruption_seed)
        return image, mask
