"""Cast shadows: turn the heights so that light travels along rows, and keep a running maximum."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from camoxpert.synthesis.relight.blur import FEW_CELLS, blur, cell_of, enlarged, pooled

PENUMBRA_SIGMAS = (0.0, 0.003, 0.008, 0.02)
"""Blurs that penumbras are mixed from, as shares of the longer side."""
Size = tuple[int, int]
APART = 2
"""Steps between what casts and what receives: interpolation would let points shade themselves."""
SPREAD = 0.01
"""How far around shadows their penumbra is known; a share of the longer side."""
LOWEST = 0.1
"""Smallest slope of a ray: flatter ones cast shadows of unbounded length."""


def cast_shadows(
    heights_B1HW: Tensor, casters_B1HW: Tensor, azimuth_B: Tensor, slope_B: Tensor, radius_B: Tensor
) -> tuple[Tensor, Tensor]:
    """Return how much of the light each point sees, and how wide the penumbra is there.

    A point at distance t along the light, of height z, is dark if some point before it is higher
    than the ray: h(t') + t' slope > z + t slope. So one running maximum of h + t slope along
    every row answers for all points at once. It is taken along the lowest ray of the light: by how
    much the shadow lies above z, over the distance to what casts it, is the slope by which the
    light is covered, and the visible share of the light follows. Heights of shadows are turned
    back and then compared with the image's own: comparing first would blur the outline twice.

    Args:
        heights_B1HW: height of what receives shadows, in pixels.
        casters_B1HW: height of what casts them, in pixels; 0 casts none.
        azimuth_B: direction the light comes from, radians, counterclockwise from the right.
        slope_B: tangent of the light's elevation.
        radius_B: tangent of its angular radius.

    Returns:
        visibility (B, 1, H, W), 0..1; penumbra (B, 1, H, W): its half width in pixels.
    """
    _, _, height, width = heights_B1HW.shape
    side = math.ceil(math.hypot(height, width)) + 2
    # Unit vector along the travel of light; rows of the image grow downwards.
    x, y = -azimuth_B.cos(), azimuth_B.sin()
    grid = _turned(x, -y, (side, side), (height, width))
    turned = F.grid_sample(casters_B1HW, grid, align_corners=True)[:, 0]
    radius = radius_B[:, None, None]
    lowest = (slope_B[:, None, None] - radius).clamp(min=LOWEST)
    steps = torch.arange(side, dtype=torch.float32, device=turned.device)
    ramp = lowest * steps
    reached, where = torch.cummax(turned.add_(ramp), dim=2)
    # Height of the shadow over each point, and the distance to what casts it.
    both = torch.empty(len(azimuth_B), 2, side, side, device=turned.device)
    both[:, 0, :, :APART] = -1
    both[:, 1, :, :APART] = 1
    torch.sub(reached[..., :-APART], ramp[..., APART:], out=both[:, 0, :, APART:])
    torch.sub(steps[APART:], where[..., :-APART], out=both[:, 1, :, APART:])
    grid = _turned(x, y, (height, width), (side, side))
    shadow, distance = F.grid_sample(both, grid, align_corners=True).split(1, 1)
    distance = distance.clamp_(min=1)
    # The share of the light's width that is covered.
    span = (slope_B[:, None, None] + radius - lowest).clamp(min=1e-4)[:, None]
    covered = shadow.sub_(heights_B1HW).div_(distance)
    # The surface beside a point is nearer than any step.
    rise = _rise(heights_B1HW, -x, -y).sub_(lowest[:, None])
    covered = torch.maximum(covered, rise).div_(span).clamp_(0, 1)
    return 1 - covered, distance.mul_(radius[:, None])


def _rise(heights_B1HW: Tensor, x_B: Tensor, y_B: Tensor) -> Tensor:
    """Return the slope of heights from each pixel towards (x, y)."""
    around = F.pad(heights_B1HW, (1, 1, 1, 1), mode="replicate")
    x, y = x_B[:, None, None, None], y_B[:, None, None, None]
    rise = (around[..., 1:-1, 2:] - heights_B1HW).mul_(x.clamp(min=0))
    rise -= (around[..., 1:-1, :-2] - heights_B1HW).mul_(x.clamp(max=0))
    rise += (around[..., 2:, 1:-1] - heights_B1HW).mul_(y.clamp(min=0))
    rise -= (around[..., :-2, 1:-1] - heights_B1HW).mul_(y.clamp(max=0))
    return rise


def _turned(cos_B: Tensor, sin_B: Tensor, target: Size, source: Size) -> Tensor:
    """Return the grid for ``grid_sample`` that turns a map around its centre.

    Pixel (x, y) of the target, from its centre, comes from (x cos + y sin, y cos - x sin).
    """
    height, width = target
    x = torch.arange(width, device=cos_B.device) - (width - 1) / 2
    y = (torch.arange(height, device=cos_B.device) - (height - 1) / 2)[:, None]
    cos, sin = cos_B[:, None, None], sin_B[:, None, None]
    grid = torch.empty(len(cos_B), height, width, 2, device=cos_B.device)
    across, down = 2 / (source[1] - 1), 2 / (source[0] - 1)
    torch.add(x * (cos * across), y * (sin * across), out=grid[..., 0])
    torch.add(y * (cos * down), x * (sin * -down), out=grid[..., 1])
    return grid


def soften(visible_B1HW: Tensor, penumbra_B1HW: Tensor) -> Tensor:
    """Blur the edges of shadows by the width of their penumbra, which grows with the distance.

    ``cast_shadows`` fades along the light; this adds what a wide light does across it.
    """
    size = max(visible_B1HW.shape[-2:])
    dark = 1 - visible_B1HW
    # Beside a shadow the width is that of the shadow nearby; it varies slowly.
    spread = torch.cat([dark * penumbra_B1HW, dark], 1)
    cell = cell_of(SPREAD * size, 1.0)
    spread = blur(pooled(spread, cell), SPREAD * size / cell)
    sigma = enlarged(0.5 * spread[:, :1] / spread[:, 1:].clamp(min=1e-3), cell, dark.shape)
    sigmas = [share * size for share in PENUMBRA_SIGMAS]
    mixed = torch.zeros_like(dark)
    for k, level in enumerate(sigmas):
        weight = torch.ones_like(sigma)
        if k > 0:
            weight = ((sigma - sigmas[k - 1]) / (level - sigmas[k - 1])).clamp_(0, 1)
        if k + 1 < len(sigmas):
            weight = weight * ((sigmas[k + 1] - sigma) / (sigmas[k + 1] - level)).clamp_(0, 1)
        mixed += weight * (dark if k == 0 else blur(dark, level, cells=FEW_CELLS))
    # Less than a hundredth is nothing: shadows end.
    return (1 - mixed).div_(0.99).clamp_(0, 1)
