"""Light on an object: the numbers of a batch of lights as tensors, normals, and shading."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from torch import Tensor
from torch.nn import functional as F

from camoxpert.runtime.device import upload
from camoxpert.synthesis.relight.colour import light_colour
from camoxpert.synthesis.relight.draw import Light

Numbers = dict[str, Tensor]
"""Numbers of a batch of lights by name, each (B, 1, 1) on the device; angles in radians."""

ANGLES = ("azimuth", "elevation", "pattern_angle")
PLAIN = (
    *("key", "exposure", "delight", "relief", "detail", "thickness", "softness", "shadow"),
    *("pattern_strength", "pattern_scale", "pattern_blur", "pattern_x", "pattern_y"),
    "pattern_reach",
)
COLOURS = ("temperature", "sky")
STEEPEST = 2.5
"""Largest slope of a surface; the outline of a round body has none."""
TEXTURE_SLOPE = 0.004
"""Height of texture of contrast 1, as a share of the longer side."""


def to_numbers(lights: Sequence[Light], like: Tensor) -> Numbers:
    """Return the numbers of lights on a tensor's device, with one transfer.

    Temperatures become ``temperature`` and ``sky``, linear RGB (B, 3, 1, 1).
    """
    rows = []
    for light in lights:
        row = [math.radians(getattr(light, name)) for name in ANGLES]
        row += [getattr(light, name) for name in PLAIN]
        for name in COLOURS:
            row += light_colour(getattr(light, name))
        rows.append(row)
    table = upload(np.array(rows), like)
    names = (*ANGLES, *PLAIN)
    numbers = {name: table[:, i, None, None] for i, name in enumerate(names)}
    for k, name in enumerate(COLOURS):
        start = len(names) + 3 * k
        numbers[name] = table[:, start : start + 3, None, None]
    return numbers


def white_for_grey(numbers: Numbers, images_B3HW: Tensor) -> Numbers:
    """Return numbers with white lights for images without any colour.

    What a grey camera sees has no colour in any light; a coloured object would be all too easy to
    find in such an image.
    """
    red, green, blue = images_B3HW.split(1, 1)
    coloured = ((red != green) | (green != blue)).flatten(1).any(1)[:, None, None, None]
    return numbers | {name: numbers[name].where(coloured, 1.0) for name in COLOURS}


def slopes(heights_BHW: Tensor) -> tuple[Tensor, Tensor]:
    """Return the slopes of heights in pixels along x and y: Scharr's derivative."""
    around = F.pad(heights_BHW[:, None], (1, 1, 1, 1), mode="replicate")[:, 0]
    # (3, 10, 3) / 16 across, half the difference along.
    rows = around[:, 1:-1] * (10 / 32)
    rows = rows.add_(around[:, :-2], alpha=3 / 32).add_(around[:, 2:], alpha=3 / 32)
    along_x = rows[..., 2:] - rows[..., :-2]
    columns = around[..., 1:-1] * (10 / 32)
    columns = columns.add_(around[..., :-2], alpha=3 / 32).add_(around[..., 2:], alpha=3 / 32)
    return along_x, columns[:, 2:] - columns[:, :-2]


def shading(
    heights_BHW: Tensor, texture_B1HW: Tensor | None, masks_BHW: Tensor, numbers: Numbers
) -> tuple[Tensor, Tensor]:
    """Return the directional and the other light on the object, each of mean 1 over the mask.

    Lambert's law with normals from the heights; a wide light reaches around the edge of the
    shaded side by as much as its radius.

    Args:
        heights_BHW: in pixels.
        texture_B1HW: fine relief, see ``height.texture``; None: none.
        masks_BHW: float, 0 or 1.
        numbers: see ``to_numbers``.

    Returns:
        key, around: (B, H, W). The second is the share of the surroundings that a surface sees.
    """
    size = max(heights_BHW.shape[-2:])
    form = heights_BHW
    if texture_B1HW is not None:
        form = form + texture_B1HW[:, 0] * (numbers["detail"] * TEXTURE_SLOPE * size)
    dx, dy = slopes(form)
    relief = numbers["relief"]
    # Steep slopes are bent, not cut: a cut would show as an edge.
    steep = (dx.square() + dy.square()).mul_(1 / STEEPEST**2).add_(1).rsqrt_().mul_(relief)
    dx, dy = dx.mul_(steep), dy.mul_(steep)
    up = (dx.square() + dy.square()).add_(1).rsqrt_()
    azimuth, elevation = numbers["azimuth"], numbers["elevation"]
    # Normal (-dx, -dy, 1) * up; direction to the light (cos a cos e, -sin a cos e, sin e).
    facing = dy * (azimuth.sin() * elevation.cos())
    facing -= dx * (azimuth.cos() * elevation.cos())
    facing = facing.add_(elevation.sin()).mul_(up)
    wrap = numbers["softness"]
    key = ((facing + wrap) / (1 + wrap)).clamp_(min=0)
    around = up.mul_(0.5).add_(0.5)
    return _of_mean_one(key, masks_BHW), _of_mean_one(around, masks_BHW)


def _of_mean_one(value_BHW: Tensor, masks_BHW: Tensor) -> Tensor:
    total = (value_BHW * masks_BHW).sum((1, 2), keepdim=True)
    count = masks_BHW.sum((1, 2), keepdim=True).clamp(min=1)
    # An object that no light reaches stays dark rather than growing without bound.
    return value_BHW / (total / count).clamp(min=0.15)
