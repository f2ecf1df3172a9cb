"""Draw the numbers of a sample's augmentation from (seed, epoch, index) alone.

Both back ends apply the same numbers, so the CPU and the device move the object to the same pixels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np

from camoxpert.config import AugmentConfig
from camoxpert.data.samples.corruptions import CORRUPTIONS

T = TypeVar("T")

# Probability that a sample's colours change at all.
COLOUR_PROBABILITY = 0.8
BLUR_SIGMAS = (0.6, 1.2)
BLUR_RADIUS = 3
NOISE_RANGE = (0.01, 0.05)
CORRUPT_SEVERITIES = (1, 2, 3)
"""Severities of corruption in training; 4 and 5 are left to the test."""
# Weights of red, green and blue in a grey level (Rec. 601).
GREY = np.array([0.299, 0.587, 0.114])

SCALED = (
    *("rotate", "scale", "translate", "brightness", "contrast", "saturation", "hue"),
    *("blur", "noise"),
)
"""Fields of ``AugmentConfig`` that its ``strength`` multiplies."""


def scaled(augment: AugmentConfig) -> AugmentConfig:
    """Return augmentation with its strength multiplied in; unset counts as 1."""
    strength = 1.0 if augment.strength is None else augment.strength
    values = {field: strength * getattr(augment, field) for field in SCALED}
    return replace(augment, strength=1.0, **values)


@dataclass(frozen=True)
class Draw:
    """The augmentation of one sample, in numbers.

    Attributes:
        matrix: (2, 3) float64; maps source pixels (x, y) to target pixels, centres at whole
            numbers.
        flips: (left-right, up-down), where the matrix only flips and both sizes are equal;
            otherwise None.
        brightness, contrast, saturation: factors; 1 changes nothing.
        hue: shift, fraction of the circle.
        blur: sigma of a Gaussian in target pixels; 0: none.
        noise: standard deviation of Gaussian noise, fraction of the full scale; 0: none.
        noise_seed: seed of the noise.
        corruption: one of ``CORRUPTIONS``, applied last; "": none.
        severity: of the corruption.
        corruption_seed: seed of its random stream.
        light: seed of another light on the scene; None: as it is.
        guest: share in 0..1 that chooses which other image gives an object; None: none does.
        guest_seed: seed of how it is pasted.
    """

    matrix: np.ndarray
    flips: tuple[bool, bool] | None
    brightness: float = 1.0
    contrast: float = 1.0
    saturation: float = 1.0
    hue: float = 0.0
    blur: float = 0.0
    noise: float = 0.0
    noise_seed: int = 0
    corruption: str = ""
    severity: int = 0
    corruption_seed: int = 0
    light: int | None = None
    guest: float | None = None
    guest_seed: int = 0

    @property
    def colour(self) -> bool:
        """Whether colours change."""
        return (self.brightness, self.contrast, self.saturation, self.hue) != (1, 1, 1, 0)


def draw(
    augment: AugmentConfig | None, *, seed: int, epoch: int, index: int, source: int, target: int
) -> Draw:
    """Return the augmentation of sample ``index`` in ``epoch``.

    Every number has a fixed place in the random stream, so that switching one change off leaves the
    others as they are.

    Args:
        augment: strengths; None only resizes.
        seed, epoch, index: seed of the random stream.
        source, target: sides of the square before and after, in pixels.
    """
    if augment is None:
        return Draw(_matrix(source, target), (False, False) if source == target else None)
    generator = np.random.default_rng([seed, epoch, index])
    u = generator.random(23).tolist()
    mirrored, upended = u[0] < augment.hflip, u[1] < augment.vflip
    angle = _within(u[2], augment.rotate)
    zoom = 1 + _within(u[3], augment.scale)
    shift = (_within(u[4], augment.translate), _within(u[5], augment.translate))
    still = source == target and not (augment.rotate or augment.scale or augment.translate)
    matrix = _matrix(source, target, mirrored, upended, angle, zoom, shift)
    colour = u[6] < COLOUR_PROBABILITY
    corrupted = u[14] < augment.corrupt
    return Draw(
        matrix,
        (mirrored, upended) if still else None,
        brightness=1 + _within(u[7], augment.brightness) * colour,
        contrast=1 + _within(u[8], augment.contrast) * colour,
        saturation=1 + _within(u[9], augment.saturation) * colour,
        hue=_within(u[10], augment.hue) * colour,
        blur=_between(u[11] / augment.blur, *BLUR_SIGMAS) if u[11] < augment.blur else 0.0,
        noise=_between(u[12] / augment.noise, *NOISE_RANGE) if u[12] < augment.noise else 0.0,
        noise_seed=int(u[13] * 2**31),
        corruption=_one_of(tuple(CORRUPTIONS), u[15]) if corrupted else "",
        severity=_one_of(CORRUPT_SEVERITIES, u[16]) if corrupted else 0,
        corruption_seed=int(u[17] * 2**31),
        light=int(u[19] * 2**31) if u[18] < augment.relight else None,
        guest=u[21] if u[20] < augment.compose else None,
        guest_seed=int(u[22] * 2**31),
    )


def linear_colour(sample: Draw) -> tuple[np.ndarray, float]:
    """Return brightness, contrast and saturation as one linear change of RGB.

    Contrast scales about the mean grey of the image, saturation about the grey of each pixel (Rec.
    601 weights, as in torchvision). Saturation does not change greys, so the three commute.

    Returns:
        (3, 3) matrix, and the factor of the mean grey that is added to every channel.
    """
    saturation = sample.saturation * np.eye(3) + (1 - sample.saturation) * np.tile(GREY, (3, 1))
    pivot = (1 - sample.contrast) * sample.brightness
    return sample.brightness * sample.contrast * saturation, pivot


def gaussian_kernel(sigma: np.ndarray | float) -> np.ndarray:
    """Return the weights of a Gaussian over ``2 * BLUR_RADIUS + 1`` pixels, summing to 1.

    For sigmas (N, 1) the result is (N, 2 * BLUR_RADIUS + 1).
    """
    offsets = np.arange(-BLUR_RADIUS, BLUR_RADIUS + 1)
    kernel: np.ndarray = np.exp(-0.5 * (offsets / sigma) ** 2)
    kernel /= kernel.sum(-1, keepdims=True)
    return kernel


def _within(u: float, strength: float) -> float:
    """Spread u in 0..1 over -strength..strength."""
    return (2 * u - 1) * strength


def _one_of(values: Sequence[T], u: float) -> T:
    return values[int(u * len(values))]


def _between(u: float, low: float, high: float) -> float:
    return low + u * (high - low)


def _matrix(
    source: int,
    target: int,
    mirrored: bool = False,
    upended: bool = False,
    angle: float = 0.0,
    zoom: float = 1.0,
    shift: tuple[float, float] = (0.0, 0.0),
) -> np.ndarray:
    """Compose flip, rotation about the centre (degrees, counter-clockwise), zoom and shift
    (fractions of the side) into a map of pixel centres."""
    radians = math.radians(angle)
    scale = zoom * target / source
    cosine, sine = scale * math.cos(radians), scale * math.sin(radians)
    flip = np.diag([-1.0 if mirrored else 1.0, -1.0 if upended else 1.0])
    linear = np.array([[cosine, sine], [-sine, cosine]]) @ flip
    # Centres: pixel i covers i to i + 1, so its centre is at i + 1/2 of the side.
    offset = (target - 1) / 2 + target * np.array(shift) - linear @ np.full(2, (source - 1) / 2)
    return np.column_stack([linear, offset])
