"""Relight a batch: linear light, albedo, height, shadows, light, recombine."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from camoxpert.synthesis.relight.albedo import log_light, log_surround
from camoxpert.synthesis.relight.blur import enlarged, pooled
from camoxpert.synthesis.relight.colour import luminance, to_linear, to_srgb
from camoxpert.synthesis.relight.draw import Light
from camoxpert.synthesis.relight.height import height_from_mask, texture
from camoxpert.synthesis.relight.light import Numbers, shading, to_numbers, white_for_grey
from camoxpert.synthesis.relight.patterns import nearness, pattern_light
from camoxpert.synthesis.relight.recombine import recombine
from camoxpert.synthesis.relight.shadows import cast_shadows, soften

STAGES = ("linear", "albedo", "height", "shadows", "light", "recombine", "encode")
"""Keys of ``seconds``, in the order of work."""
SHADOW_SIZE = 1536
"""Longer side in pixels or cells that cast shadows are taken at."""
Seconds = dict[str, float]


@dataclass(frozen=True)
class Relit:
    """Images in a new light.

    Attributes:
        images_B3HW: uint8 sRGB.
        changed_B1HW: bool; pixels that differ from the input, all within the mask or a shadow.
    """

    images_B3HW: Tensor
    changed_B1HW: Tensor


@torch.no_grad()
def relight(
    images_B3HW: Tensor,
    masks_B1HW: Tensor,
    lights: Sequence[Light],
    *,
    heights_B1HW: Tensor | None = None,
    albedos_B3HW: Tensor | None = None,
    seconds: Seconds | None = None,
) -> Relit:
    """Return a batch in the light that each image was drawn.

    Works on the device of the images; the host does not wait for it, unless ``seconds`` is given.
    An image does not depend on the others of its batch.

    Args:
        images_B3HW: uint8 sRGB.
        masks_B1HW: uint8; the object is where it is above 127. Masks are not changed.
        lights: one per image.
        heights_B1HW: height above the ground as a share of the longer side, such as
            ``height_from_depth`` returns; None: a round body with the outline of the mask.
        albedos_B3HW: linear albedo; None: by ``albedo.albedo``.
        seconds: gets the seconds of each of ``STAGES`` added.

    Raises:
        ValueError: shapes or types do not fit each other.
    """
    count = len(images_B3HW)
    if images_B3HW.device.type == "cpu" and count > 1:
        _check(images_B3HW, masks_B1HW, lights)
        # One image at a time stays in the processor's cache: 0.75 of the time at 512 pixels.
        parts = [
            relight(
                images_B3HW[i : i + 1],
                masks_B1HW[i : i + 1],
                lights[i : i + 1],
                heights_B1HW=None if heights_B1HW is None else heights_B1HW[i : i + 1],
                albedos_B3HW=None if albedos_B3HW is None else albedos_B3HW[i : i + 1],
                seconds=seconds,
            )
            for i in range(count)
        ]
        return Relit(
            torch.cat([part.images_B3HW for part in parts]),
            torch.cat([part.changed_B1HW for part in parts]),
        )
    linear = relit_linear(
        images_B3HW,
        masks_B1HW,
        lights,
        heights_B1HW=heights_B1HW,
        albedos_B3HW=albedos_B3HW,
        seconds=seconds,
    )
    with _timed("encode", seconds, images_B3HW):
        images = to_srgb(linear)
        red, green, blue = (images != images_B3HW).split(1, 1)
        changed = red | green | blue
    return Relit(images, changed)


@torch.no_grad()
def relit_linear(
    images_B3HW: Tensor,
    masks_B1HW: Tensor,
    lights: Sequence[Light],
    *,
    heights_B1HW: Tensor | None = None,
    albedos_B3HW: Tensor | None = None,
    seconds: Seconds | None = None,
) -> Tensor:
    """Return linear light before it is rounded to bytes; the arguments are those of ``relight``."""
    _check(images_B3HW, masks_B1HW, lights)
    size = max(images_B3HW.shape[-2:])
    numbers = white_for_grey(to_numbers(lights, images_B3HW), images_B3HW)
    with _timed("linear", seconds, images_B3HW):
        linear = to_linear(images_B3HW)
        grey = luminance(linear)
        inside = (masks_B1HW > 127).float()
    with _timed("albedo", seconds, images_B3HW):
        old_light = None
        if any(light.delight for light in lights):
            old_light = (
                log_surround(grey) if albedos_B3HW is None else log_light(grey, albedos_B3HW)
            )
    with _timed("height", seconds, images_B3HW):
        heights = height_from_mask(inside) if heights_B1HW is None else heights_B1HW.float()
        heights = heights * (numbers["thickness"][:, None] * size)
        grain = texture(grey) if any(light.detail * light.relief for light in lights) else None
    with _timed("shadows", seconds, images_B3HW):
        visible = _visible(lights, numbers, heights, inside, own=heights_B1HW is None)
    with _timed("light", seconds, images_B3HW):
        key, around = shading(heights[:, 0], grain, inside[:, 0], numbers)
    with _timed("recombine", seconds, images_B3HW):
        return recombine(
            linear,
            inside,
            numbers,
            key_BHW=key,
            around_BHW=around,
            visible_B1HW=visible,
            log_light_B1HW=old_light,
        )


def _visible(
    lights: Sequence[Light], numbers: Numbers, heights: Tensor, inside: Tensor, *, own: bool
) -> Tensor:
    """Return the share of the directional light that shadows leave (B, 1, H, W).

    ``own``: heights are 0 outside of the mask, so that what casts and what receives are one map.
    """
    visible = torch.ones_like(inside)
    slope = numbers["elevation"].tan()
    if any(light.shadow * light.key for light in lights):
        # Shadows of large photographs are taken on cells: their edges are soft there anyway, and
        # the turned square takes 40 bytes a pixel.
        cell = math.ceil(max(heights.shape[-2:]) / SHADOW_SIZE)
        receivers = pooled(heights, cell) / cell
        casters = receivers if own else pooled(heights * inside, cell) / cell
        azimuth, radius = numbers["azimuth"].flatten(), numbers["softness"].flatten()
        seen = soften(*cast_shadows(receivers, casters, azimuth, slope.flatten(), radius))
        seen = enlarged(seen, cell, heights.shape)
        visible = 1 - numbers["shadow"][:, None] * (1 - seen)
    # A pattern falls along the light: on raised surfaces it moves towards it.
    along = heights[:, 0] / slope
    shift = torch.stack([-along * numbers["azimuth"].cos(), along * numbers["azimuth"].sin()], 1)
    passed = pattern_light(lights, numbers, shift)
    if passed is not None:
        strength = numbers["pattern_strength"] * nearness(inside[:, 0], numbers["pattern_reach"])
        visible = visible * (1 - strength[:, None] * (1 - passed))
    return visible


def _check(images: Tensor, masks: Tensor, lights: Sequence[Light]) -> None:
    batch, channels, height, width = images.shape
    if channels != 3 or images.dtype != torch.uint8:
        raise ValueError(f"images must be uint8 (B, 3, H, W); got {images.dtype} {images.shape}")
    if masks.shape != (batch, 1, height, width) or len(lights) != batch:
        raise ValueError(
            f"{batch} images of {height}x{width} need masks (B, 1, H, W) and as many lights; got "
            f"{tuple(masks.shape)} and {len(lights)}"
        )


@contextmanager
def _timed(stage: str, seconds: Seconds | None, like: Tensor) -> Iterator[None]:
    """Add the seconds of a block; on a device the host waits for it, to tell stages apart."""
    if seconds is None:
        yield
        return
    started = _now(like)
    yield
    seconds[stage] = seconds.get(stage, 0.0) + _now(like) - started


def _now(like: Tensor) -> float:
    if like.device.type == "cuda":
        torch.cuda.synchronize(like.device)
    return time.perf_counter()
