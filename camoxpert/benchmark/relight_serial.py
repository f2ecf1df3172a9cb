"""The relighting that `benchmark relight` compares with: one image after the other, OpenCV, numpy.

It is written as such scripts are: in double precision, Gaussians of full width on the three
channels of full-size images, and a loop over the steps of a ray march. ``tuned`` is the same in
single precision with one plane for the light, what a careful author could reach without changing
the methods. The outputs are those of ``camoxpert.synthesis.relight`` within rounding and the error
of both ways to take a shadow.
"""

from __future__ import annotations

import math
import time

import cv2
import numpy as np
import torch

from camoxpert.synthesis.relight.albedo import FLOOR, NOMINAL, SIGMAS
from camoxpert.synthesis.relight.colour import LUMINANCE, light_colour
from camoxpert.synthesis.relight.draw import Light
from camoxpert.synthesis.relight.height import (
    COARSEST,
    GRAIN_SIGMA,
    SWEEPS,
    TEXTURE_SIGMA,
    WORKING_SIZE,
)
from camoxpert.synthesis.relight.light import STEEPEST, TEXTURE_SLOPE, to_numbers
from camoxpert.synthesis.relight.patterns import nearness, pattern_light
from camoxpert.synthesis.relight.pipeline import Seconds
from camoxpert.synthesis.relight.recombine import FEATHER, MOST_DELIGHT
from camoxpert.synthesis.relight.shadows import LOWEST, PENUMBRA_SIGMAS

Map = np.ndarray
MARCH_STEPS = 160


def gaussian(values: Map, sigma: float) -> Map:
    """Blur with OpenCV, mirrored at the border."""
    return cv2.GaussianBlur(values, (0, 0), sigma, borderType=cv2.BORDER_REFLECT)


def serial_linear(image_HW3: Map, *, tuned: bool = False) -> Map:
    """Return linear light 0..1 of uint8 sRGB."""
    value: Map = np.divide(image_HW3, 255, dtype=np.float32 if tuned else np.float64)
    linear = np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)
    return linear.astype(value.dtype)


def serial_retinex(linear_HWC: Map) -> Map:
    """Return the logarithm of the reflectance (H, W, C), channel by channel."""
    scale = max(linear_HWC.shape[:2]) / NOMINAL
    blurs = [np.log(gaussian(linear_HWC, sigma * scale) + FLOOR) for sigma in SIGMAS]
    return np.log(linear_HWC + FLOOR) - np.mean(blurs, axis=0)


def serial_surround(linear_HW3: Map, *, tuned: bool = False) -> Map:
    """Return the mean of the logarithms of three blurs' luminance; ``tuned`` blurs one plane."""
    scale = max(linear_HW3.shape[:2]) / NOMINAL
    weights = np.array(LUMINANCE, linear_HW3.dtype)
    blurs = [
        gaussian(linear_HW3 @ weights, sigma * scale)
        if tuned
        else gaussian(linear_HW3, sigma * scale) @ weights
        for sigma in SIGMAS
    ]
    return np.mean([np.log(blurred + FLOOR) for blurred in blurs], axis=0)


def serial_height(mask_HW: Map) -> Map:
    """Return the height of a round body with this outline, as a share of the longer side."""
    longer = max(mask_HW.shape)
    cell = math.ceil(longer / WORKING_SIZE)
    levels = [_shrunk(mask_HW, cell)]
    while max(levels[-1].shape) > COARSEST:
        levels.append(_shrunk(levels[-1], 2))
    solution = np.zeros_like(levels[-1])
    for level in range(len(levels) - 1, -1, -1):
        inside = levels[level]
        solution = cv2.resize(solution, inside.shape[::-1], interpolation=cv2.INTER_LINEAR)
        source = (cell * 2**level / longer) ** 2
        for _ in range(SWEEPS):
            around = cv2.copyMakeBorder(solution, 1, 1, 1, 1, cv2.BORDER_REPLICATE)
            total = around[1:-1, 2:] + around[1:-1, :-2] + around[2:, 1:-1] + around[:-2, 1:-1]
            solution = (total + source) * inside / 4
    fine = cv2.resize(solution, mask_HW.shape[::-1], interpolation=cv2.INTER_LINEAR)
    return np.sqrt(np.maximum(2 * fine, 0)) * mask_HW


def _shrunk(values: Map, cell: int) -> Map:
    size = (-(-values.shape[1] // cell), -(-values.shape[0] // cell))
    return cv2.resize(values, size, interpolation=cv2.INTER_AREA)


def march(
    heights_HW: Map, azimuth: float, slope: float, radius: float, *, steps: int = MARCH_STEPS
) -> tuple[Map, Map]:
    """Return visibility and penumbra by stepping from every pixel towards the light.

    Args:
        heights_HW: float, in pixels.
        azimuth: radians, counterclockwise from the right.
        slope, radius: tangents of the elevation and of the angular radius of the light.
        steps: as many as the longest shadow is divided into.
    """
    lowest = max(slope - radius, LOWEST)
    step = float(heights_HW.max()) / lowest / steps
    highest = heights_HW.copy()
    distance = np.zeros_like(heights_HW)
    size = heights_HW.shape[::-1]
    for k in range(1, steps + 1):
        x, y = k * step * math.cos(azimuth), -k * step * math.sin(azimuth)
        moved = cv2.warpAffine(heights_HW, np.array([[1, 0, -x], [0, 1, -y]]), size)
        ray = moved - k * step * lowest
        higher = ray > highest
        highest = np.where(higher, ray, highest)
        distance = np.where(higher, heights_HW.dtype.type(k * step), distance)
    distance = np.maximum(distance, 1)
    span = max(slope + radius - lowest, 1e-4)
    dark = np.minimum((highest - heights_HW) / distance / span, 1)
    return 1 - dark, distance * radius


def serial_soften(visible_HW: Map, penumbra_HW: Map) -> Map:
    """Blur the edges of shadows by the width of their penumbra."""
    size = max(visible_HW.shape)
    dark = 1 - visible_HW
    spread = gaussian(dark * penumbra_HW, 0.01 * size)
    sigma = 0.5 * spread / np.maximum(gaussian(dark, 0.01 * size), 1e-3)
    levels = [share * size for share in PENUMBRA_SIGMAS]
    blurred = [dark, *(gaussian(dark, level) for level in levels[1:])]
    place = np.interp(sigma, levels, np.arange(len(levels)))
    mixed = sum(np.clip(1 - np.abs(place - k), 0, 1) * values for k, values in enumerate(blurred))
    return np.clip((1 - mixed) / 0.99, 0, 1)


def serial_relight(
    image_HW3: Map,
    mask_HW: Map,
    light: Light,
    *,
    tuned: bool = False,
    seconds: Seconds | None = None,
) -> Map:
    """Return one image in the light, uint8 (H, W, 3); the stages are those of ``relight``.

    Args:
        image_HW3: uint8 sRGB.
        mask_HW: uint8; the object is where it is above 127.
        light: what to draw.
        tuned: in single precision, and the surrounds of one plane.
        seconds: gets the seconds of every stage added.
    """
    clock = _Clock(seconds)
    size = max(mask_HW.shape)
    linear = serial_linear(image_HW3, tuned=tuned)
    grey = linear @ np.array(LUMINANCE, linear.dtype)
    inside = (mask_HW > 127).astype(linear.dtype)
    clock.stage("linear")
    surround = serial_surround(linear, tuned=tuned)
    clock.stage("albedo")
    heights = serial_height(inside) * (light.thickness * size)
    fine, coarse = gaussian(grey, GRAIN_SIGMA * size), gaussian(grey, TEXTURE_SIGMA * size)
    grain = np.clip(np.log((fine + 0.01) / (coarse + 0.01)), -1, 1)
    clock.stage("height")
    azimuth, elevation = math.radians(light.azimuth), math.radians(light.elevation)
    seen = serial_soften(*march(heights, azimuth, math.tan(elevation), light.softness))
    visible = (1 - light.shadow * (1 - seen)) * _passed(light, heights, inside)
    clock.stage("shadows")
    key, around = _shading(heights + grain * (light.detail * TEXTURE_SLOPE * size), inside, light)
    clock.stage("light")
    direct = np.array(light_colour(light.temperature)) * light.key
    other = np.array(light_colour(light.sky)) * (1 - light.key)
    ground = (other + direct * visible[..., None]) / (other + direct)
    count = max(inside.sum(), 1)
    removed = np.clip((surround * inside).sum() / count - surround, -MOST_DELIGHT, MOST_DELIGHT)
    gain = 2**light.exposure * np.exp(light.delight * removed)
    lit = direct * (key * visible)[..., None] + other * around[..., None]
    inner = np.clip(2 * gaussian(inside, FEATHER) - 1, 0, 1) * inside
    factor = ground + inner[..., None] * (lit * gain[..., None] - ground)
    bright = linear * factor / (1 + np.maximum(factor - 1, 0) * linear)
    clock.stage("recombine")
    curve = 1.055 * np.maximum(bright, 0.0031308) ** (1 / 2.4) - 0.055
    encoded = np.where(bright <= 0.0031308, 12.92 * bright, curve)
    result: Map = np.clip(np.round(255 * encoded), 0, 255).astype(np.uint8)
    clock.stage("encode")
    return result


def _shading(form_HW: Map, inside_HW: Map, light: Light) -> tuple[Map, Map]:
    dx, dy = (
        cv2.Scharr(form_HW, -1, *axis, scale=1 / 32, borderType=cv2.BORDER_REPLICATE)
        for axis in ((1, 0), (0, 1))
    )
    steep = light.relief / np.sqrt(1 + (dx**2 + dy**2) / STEEPEST**2)
    dx, dy = dx * steep, dy * steep
    up = 1 / np.sqrt(1 + dx**2 + dy**2)
    azimuth, elevation = math.radians(light.azimuth), math.radians(light.elevation)
    flat = math.cos(elevation)
    facing = up * (
        dy * math.sin(azimuth) * flat - dx * math.cos(azimuth) * flat + math.sin(elevation)
    )
    key = np.maximum((facing + light.softness) / (1 + light.softness), 0)
    around = 0.5 + 0.5 * up
    count = max(inside_HW.sum(), 1)
    return tuple(v / max((v * inside_HW).sum() / count, 0.15) for v in (key, around))


def _passed(light: Light, heights_HW: Map, inside_HW: Map) -> Map:
    """Return what a pattern lets pass: the formulas of patterns are the same ones."""
    maps = torch.from_numpy(np.stack([heights_HW, inside_HW])).float()
    numbers = to_numbers([light], maps)
    along = maps[:1] / numbers["elevation"].tan()
    shift = torch.stack([-along * numbers["azimuth"].cos(), along * numbers["azimuth"].sin()], 1)
    passed = pattern_light([light], numbers, shift)
    if passed is None:
        return np.ones_like(heights_HW)
    near = nearness(maps[1:], numbers["pattern_reach"])[0].numpy()
    return 1 - light.pattern_strength * near * (1 - passed[0, 0].numpy())


class _Clock:
    """Adds the seconds since the last stage to the one that ended."""

    def __init__(self, seconds: Seconds | None) -> None:
        self._seconds = seconds
        self._last = time.perf_counter()

    def stage(self, name: str) -> None:
        now = time.perf_counter()
        if self._seconds is not None:
            self._seconds[name] = self._seconds.get(name, 0.0) + now - self._last
        self._last = now
