"""The form of an object: heights above its ground, as shares of the image's longer side."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from camoxpert.synthesis.relight.blur import FEW_CELLS, blur, enlarged, pooled

WORKING_SIZE = 256
"""Longer side of the finest grid that bodies are inflated on."""
COARSEST = 8
SWEEPS = 8
AROUND = 0.08
"""Width of the ring of ground that counts as around an object; a share of the longer side."""
TEXTURE_SIGMA, GRAIN_SIGMA = 0.012, 0.0015
"""Texture is finer than the first and coarser than the second; shares of the longer side."""


def height_from_mask(masks_B1HW: Tensor) -> Tensor:
    """Return the height of a round body with the outline of the mask; 0 outside.

    The square root of twice the solution u of laplace(u) = -1 inside, u = 0 outside: the smooth
    distance transform of Gorelick et al., Shape representation and classification using the
    Poisson equation, 2006. A long limb of radius r becomes half a cylinder of radius r or so; there
    is no crease along the middle as in the distance itself. An object that the image cuts goes on
    beyond it.

    Args:
        masks_B1HW: bool or 0/1 (B, 1, H, W).
    """
    height, width = masks_B1HW.shape[-2:]
    longer = max(height, width)
    cell = math.ceil(longer / WORKING_SIZE)
    levels = [pooled(masks_B1HW.float(), cell)]
    while max(levels[-1].shape[-2:]) > COARSEST:
        levels.append(pooled(levels[-1], 2))
    solution = torch.zeros_like(levels[-1])
    for level in range(len(levels) - 1, -1, -1):
        inside = levels[level]
        if level < len(levels) - 1:
            solution = enlarged(solution, 2, inside.shape)
        solution = _relaxed(solution, inside, cell * 2**level / longer)
    solution = enlarged(solution, cell, masks_B1HW.shape)
    return (solution * 2).clamp_(min=0).sqrt_().mul_(masks_B1HW)


def _relaxed(u_B1HW: Tensor, inside_B1HW: Tensor, spacing: float) -> Tensor:
    """Return u after sweeps of u = mean of the four neighbours + spacing^2 / 4."""
    for _ in range(SWEEPS):
        around = F.pad(u_B1HW, (1, 1, 1, 1), mode="replicate")
        total = around[..., 1:-1, 2:] + around[..., 1:-1, :-2]
        total += around[..., 2:, 1:-1]
        total += around[..., :-2, 1:-1]
        u_B1HW = total.add_(spacing**2).mul_(inside_B1HW * 0.25)
    return u_B1HW


def height_from_depth(depths_B1HW: Tensor, masks_B1HW: Tensor) -> Tensor:
    """Return heights of a depth map whose larger values are nearer, in any unit.

    The ground under the object is a plane through the depth around it, plus what that leaves,
    blurred; the object is what rises above. The unit is chosen so that the mean height of the
    object is that of a round body.

    Args:
        depths_B1HW: float (B, 1, H, W).
        masks_B1HW: bool or 0/1.
    """
    inside = masks_B1HW.float()
    outside = 1 - inside
    sigma = AROUND * max(inside.shape[-2:])
    level = depths_B1HW - _plane(depths_B1HW, blur(inside, sigma) * outside)
    both = blur(torch.cat([level * outside, outside], 1), sigma)
    rise = (level - both[:, :1] / both[:, 1:].clamp(min=1e-4)) * inside
    # A sunken object is taken as a flat one; its form remains.
    rise = (rise - rise.amin((2, 3), keepdim=True).clamp(max=0)) * inside
    body = height_from_mask(masks_B1HW)
    total = rise.sum((2, 3), keepdim=True)
    return rise * (body.sum((2, 3), keepdim=True) / total.clamp(min=1e-6))


def _plane(values_B1HW: Tensor, weights_B1HW: Tensor) -> Tensor:
    """Return the plane of least weighted squares through values."""
    height, width = values_B1HW.shape[-2:]
    device = values_B1HW.device
    x = torch.linspace(-1, 1, width, device=device).expand(height, width)
    y = torch.linspace(-1, 1, height, device=device)[:, None].expand(height, width)
    weights = weights_B1HW / weights_B1HW.sum((2, 3), keepdim=True).clamp(min=1e-6)

    def mean(value: Tensor) -> Tensor:
        return (value * weights).sum((2, 3), keepdim=True)

    x, y = x - mean(x), y - mean(y)
    level = mean(values_B1HW)
    xx, xy, yy = mean(x * x) + 1e-6, mean(x * y), mean(y * y) + 1e-6
    xz, yz = mean(x * (values_B1HW - level)), mean(y * (values_B1HW - level))
    determinant = xx * yy - xy * xy
    return level + x * (xz * yy - yz * xy) / determinant + y * (yz * xx - xz * xy) / determinant


def texture(luminance_B1HW: Tensor) -> Tensor:
    """Return fine relief from brightness, about -1..1: dark is deep.

    Source of the idea: Langer and Zucker, Shape from shading on a cloudy day, 1994.
    """
    size = max(luminance_B1HW.shape[-2:])
    fine = blur(luminance_B1HW, GRAIN_SIGMA * size)
    coarse = blur(luminance_B1HW, TEXTURE_SIGMA * size, cells=FEW_CELLS)
    return ((fine + 0.01) / (coarse + 0.01)).log_().clamp_(-1, 1)
