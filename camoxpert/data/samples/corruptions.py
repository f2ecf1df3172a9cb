"""Eight corruptions of an image at five severities, the same bytes on every machine.

The kinds are those of Hendrycks and Dietterich, Benchmarking Neural Network Robustness to Common
Corruptions and Perturbations, ICLR 2019 (ImageNet-C); the code and the levels are our own. Levels
that are lengths are fractions of the image's shorter side, so that a large and a small copy of a
picture look alike; noise and JPEG blocks are made of pixels, as they are in cameras.

All but JPEG is integer arithmetic. Random numbers come
from the raw words of PCG64, which numpy keeps stable, unlike the distributions made from them.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

Image = NDArray[np.uint8]
Words = Callable[[int], NDArray[np.uint64]]
"""Returns the next random 64-bit words of an image's stream."""

SEVERITIES = (1, 2, 3, 4, 5)
FOG_GREY = 230
FOG_CELLS = (2, 4, 8, 16, 32)
"""Cells of each octave of fog across the image; each octave weighs half of the one before."""
DIRECTIONS = tuple(
    (round(1024 * math.cos(math.pi * k / 16)), round(1024 * math.sin(math.pi * k / 16)))
    for k in range(16)
)
"""Directions of motion over a half turn, in 1/1024: whole numbers, so that no rounding differs."""
# Sum of eight random bytes: mean and standard deviation.
BYTES_MEAN, BYTES_STD = 1020, 209.02
NOISE_ROWS = 32


@dataclass(frozen=True)
class Corruption:
    """A kind of corruption.

    Attributes:
        apply: image, level and random words to the corrupted image.
        levels: one per severity, the mildest first.
        unit: what a level means.
    """

    apply: Callable[[Image, float, Words], Image]
    levels: tuple[float, float, float, float, float]
    unit: str


def corrupt(image: Image, name: str, severity: int, *, seed: int = 0, key: str = "") -> Image:
    """Return a corrupted copy of an image.

    A pure function of its arguments. The severity is not part of the random stream: the severities
    of an image share their noise, their fog and their direction of motion, and differ in strength.

    Args:
        image: uint8 RGB (H, W, 3).
        name: a key of ``CORRUPTIONS``.
        severity: 1 (mild) to 5.
        seed: seed of the random stream.
        key: what else selects the stream, usually the image's name.

    Returns:
        uint8 RGB (H, W, 3).
    """
    assert image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3
    assert severity in SEVERITIES
    kind = CORRUPTIONS[name]
    text = f"{seed}/{name}/{key}".encode("utf-8", "surrogateescape")
    bits = np.random.PCG64(int.from_bytes(hashlib.sha256(text).digest()[:16], "big"))
    return kind.apply(image, kind.levels[severity - 1], bits.random_raw)


def _noise(image: Image, level: float, words: Words) -> Image:
    """Add noise that is nearly normal: the sum of eight random bytes (Irwin and Hall)."""
    low = np.uint64(0x00FF00FF00FF00FF)
    factor = round(255 * level / BYTES_STD * 1024)
    table = (((np.arange(8 * 255 + 1) - BYTES_MEAN) * factor + 512) >> 10).astype(np.int16)
    noisy = np.empty_like(image)
    # Blocks of rows fit into the cache of a core.
    for start in range(0, len(image), NOISE_ROWS):
        block = image[start : start + NOISE_ROWS]
        word = words(block.size)
        odd = (word >> np.uint64(8)) & low
        word &= low
        word += odd
        # The product adds the four 16-bit parts in the highest one.
        word *= np.uint64(0x0001000100010001)
        word >>= np.uint64(48)
        added = table.take(word.astype(np.int16)).reshape(block.shape)
        noisy[start : start + NOISE_ROWS] = _clipped(block + added)
    return noisy


def _blur(image: Image, level: float, words: Words) -> Image:
    """Put the image out of focus: the mean over a disc, row by row of the disc."""
    radius = level * _side(image)
    reach = int(radius)
    height = image.shape[0]
    above = cv2.copyMakeBorder(image, reach, reach, 0, 0, cv2.BORDER_REFLECT_101)
    total = np.zeros(image.shape, np.int32)
    area = 0
    for row in range(reach + 1):
        width = 2 * math.isqrt(int(radius * radius) - row * row) + 1
        sums: Any = cv2.boxFilter(
            above,
            cv2.CV_32S,
            (width, 1),
            normalize=False,
            borderType=cv2.BORDER_REFLECT_101,
        )
        for start in {reach - row, reach + row}:
            total += sums[start : start + height]
            area += width
    return _clipped((2 * total + area) // (2 * area))


def _motion(image: Image, level: float, words: Words) -> Image:
    """Smear the image along a line, in one of sixteen directions."""
    x, y = DIRECTIONS[int(words(1)[0]) % len(DIRECTIONS)]
    half = round(8 * max(level * _side(image), 1))
    # Sixteen points a pixel, symmetrical about the middle.
    steps = np.arange(1 - 2 * half, 2 * half, 2)
    places = np.stack([steps * y, steps * x]) + (1 << 14) >> 15
    reach = int(np.abs(places).max())
    height, width = image.shape[:2]
    border = (reach, reach, reach, reach)
    padded = cv2.copyMakeBorder(image, *border, cv2.BORDER_REFLECT_101).astype(np.uint16)
    # Weights sum to 256, so that 16 bits hold the sum.
    total = np.full(image.shape, 128, np.uint16)
    offsets, counts = np.unique(places, axis=1, return_counts=True)
    weights = np.diff(counts.cumsum() * 256 // counts.sum(), prepend=0)
    for down, right, weight in zip(*(offsets + reach).tolist(), weights.tolist(), strict=True):
        total += padded[down : down + height, right : right + width] * np.uint16(weight)
    return (total >> 8).astype(np.uint8)


def _fog(image: Image, level: float, words: Words) -> Image:
    """Lay fog of uneven density over the image: light grey, blended by its opacity."""
    height, width = image.shape[:2]
    total = np.zeros((height, width), np.int32)
    for octave, cells in enumerate(FOG_CELLS):
        grid = (words((cells + 1) ** 2) >> np.uint64(56)).astype(np.uint8)
        plane = cv2.resize(
            grid.reshape(cells + 1, cells + 1),
            (width, height),
            interpolation=cv2.INTER_LINEAR_EXACT,
        )
        total += plane.astype(np.int32) << (len(FOG_CELLS) - octave)
    total -= total.min()
    density = total * 255 // max(int(total.max()), 1)
    opacity = (round(256 * level) * (192 + density // 2) >> 8).astype(np.uint16)[..., None]
    # At most 255 * 256 + 128: 16 bits hold it.
    return ((image * (256 - opacity) + FOG_GREY * opacity + 128) >> 8).astype(np.uint8)


def _brightness(image: Image, level: float, words: Words) -> Image:
    """Raise the value of every pixel, at equal hue and saturation (HSV)."""
    value = cv2.max(cv2.max(image[..., 0], image[..., 1]), image[..., 2])
    # By value and level of the channel. A black pixel has no hue: it becomes grey.
    before = np.arange(256)[:, None]
    raised = np.minimum(before + round(255 * level), 255)
    levels = np.where(before == 0, 1, np.arange(256)[None])
    table = _clipped((levels * raised + before // 2) // np.maximum(before, 1))
    return table.ravel().take((value.astype(np.uint16) << 8)[..., None] + image)


def _contrast(image: Image, level: float, words: Words) -> Image:
    """Pull every channel towards its mean."""
    factor = round(level * (1 << 16))
    levels = np.arange(256)
    tables = []
    for plane in cv2.split(image):
        mean = (int(plane.sum(dtype=np.int64)) + plane.size // 2) // plane.size
        tables.append(_clipped(mean + (((levels - mean) * factor + (1 << 15)) >> 16)))
    changed: Any = cv2.LUT(image, np.stack(tables, -1)[None])
    return np.asarray(changed, np.uint8)


def _jpeg(image: Image, level: float, words: Words) -> Image:
    """Compress the image as JPEG and decode it again."""
    options = [cv2.IMWRITE_JPEG_QUALITY, int(level)]
    done, data = cv2.imencode(".jpg", cv2.cvtColor(image, cv2.COLOR_RGB2BGR), options)
    assert done
    decoded: Any = cv2.imdecode(data, cv2.IMREAD_COLOR)
    return np.asarray(cv2.cvtColor(decoded, cv2.COLOR_BGR2RGB), np.uint8)


def _pixelate(image: Image, level: float, words: Words) -> Image:
    """Replace the image by square cells of its mean colour."""
    cell = max(1.0, level * _side(image))
    sums: NDArray[np.int32] = image.astype(np.int32)
    sizes = []
    for axis in (0, 1):
        length = image.shape[axis]
        cells = max(1, round(length / cell))
        starts = np.arange(cells) * length // cells
        sums = np.add.reduceat(sums, starts, axis)
        sizes.append(np.diff(starts, append=length))
    area = (sizes[0][:, None] * sizes[1][None, :])[..., None]
    means = _clipped((sums + area // 2) // area)
    return means.repeat(sizes[0], 0).repeat(sizes[1], 1)


def _side(image: Image) -> int:
    return min(image.shape[:2])


def _clipped(values: NDArray[np.integer]) -> Image:
    return np.clip(values, 0, 255).astype(np.uint8)


CORRUPTIONS: Mapping[str, Corruption] = {
    "noise": Corruption(_noise, (0.08, 0.12, 0.18, 0.26, 0.38), "standard deviation of 1"),
    "blur": Corruption(_blur, (3 / 224, 4 / 224, 6 / 224, 8 / 224, 10 / 224), "radius by side"),
    "motion": Corruption(_motion, (0.04, 0.06, 0.08, 0.11, 0.14), "length by side"),
    "fog": Corruption(_fog, (0.3, 0.42, 0.54, 0.65, 0.75), "mean opacity"),
    "brightness": Corruption(_brightness, (0.1, 0.2, 0.3, 0.4, 0.5), "added to the value"),
    "contrast": Corruption(_contrast, (0.4, 0.3, 0.2, 0.1, 0.05), "contrast that is left"),
    "jpeg": Corruption(_jpeg, (25, 18, 15, 10, 7), "quality"),
    "pixelate": Corruption(_pixelate, (1 / 96, 1 / 72, 1 / 56, 1 / 40, 1 / 28), "cell by side"),
}
