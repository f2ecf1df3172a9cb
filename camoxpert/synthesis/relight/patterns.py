"""Shadows of things outside of the image: how much of the light passes them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from camoxpert.runtime.device import upload
from camoxpert.synthesis.relight.draw import PATTERN_NAMES, Light

Pattern = Callable[[Tensor, Tensor, Tensor, Sequence[int]], Tensor]
LATTICE = 64
"""Side of the square of random numbers that leaves are made of; it repeats beyond."""


def blinds(u_BHW: Tensor, v_BHW: Tensor, edge_B11: Tensor, seeds: Sequence[int]) -> Tensor:
    """Return stripes of light between slats."""
    return _bars(v_BHW, 0.55, edge_B11)


def window(u_BHW: Tensor, v_BHW: Tensor, edge_B11: Tensor, seeds: Sequence[int]) -> Tensor:
    """Return the panes of a window, two across and three down, with dark bars between them."""
    inside = _bars(u_BHW / 2, 0.82, edge_B11 / 2) * _bars(v_BHW / 2.6, 0.86, edge_B11 / 2.6)
    return inside


def leaves(u_BHW: Tensor, v_BHW: Tensor, edge_B11: Tensor, seeds: Sequence[int]) -> Tensor:
    """Return the flecks of light under a tree: round and soft, images of the sun."""
    lattice = np.stack(
        [np.random.default_rng(seed).standard_normal((2, LATTICE, LATTICE)) for seed in seeds]
    )
    # Periodic, with a border for the interpolation.
    padded = upload(np.pad(lattice, ((0, 0), (0, 0), (2, 2), (2, 2)), mode="wrap"), u_BHW)
    coarse = _lattice_value(padded[:, :1], u_BHW, v_BHW)
    fine = _lattice_value(padded[:, 1:], 2.9 * u_BHW, 2.9 * v_BHW)
    return _step(0.7 * coarse + 0.6 * fine - 0.15, 0.5 + 2 * edge_B11)


PATTERNS: Mapping[str, Pattern] = {"blinds": blinds, "leaves": leaves, "window": window}
assert tuple(PATTERNS) == PATTERN_NAMES


def pattern_light(
    lights: Sequence[Light], numbers: Mapping[str, Tensor], shift_B2HW: Tensor
) -> Tensor | None:
    """Return how much of the directional light passes each pattern; None where there is none.

    Args:
        lights: of the batch.
        numbers: their numbers as (B, 1, 1) tensors on the device.
        shift_B2HW: by how many pixels the pattern moves, x and y: it bends over raised surfaces.

    Returns:
        (B, 1, H, W), 0..1; 1 in images without a pattern.
    """
    if not any(light.pattern for light in lights):
        return None
    batch, _, height, width = shift_B2HW.shape
    device = shift_B2HW.device
    result = torch.ones(batch, height, width, device=device)
    size = max(height, width)
    for name, pattern in PATTERNS.items():
        chosen = [i for i, light in enumerate(lights) if light.pattern == name]
        if not chosen:
            continue
        rows = slice(None) if len(chosen) == batch else _index(chosen, device)
        own = {key: value[rows] for key, value in numbers.items()}
        x = torch.arange(width, device=device) - width / 2 + shift_B2HW[rows, 0]
        y = torch.arange(height, device=device)[:, None] - height / 2 + shift_B2HW[rows, 1]
        cos, sin = own["pattern_angle"].cos(), own["pattern_angle"].sin()
        unit = own["pattern_scale"] * size
        u = (x * cos + y * sin) / unit + own["pattern_x"] * 7
        v = (y * cos - x * sin) / unit + own["pattern_y"] * 7
        passed = pattern(u, v, own["pattern_blur"], [lights[i].pattern_seed for i in chosen])
        if isinstance(rows, slice):
            result = passed
        else:
            result.index_copy_(0, rows, passed)
    return result[:, None]


def nearness(masks_BHW: Tensor, reach_B11: Tensor) -> Tensor:
    """Return 1 on and around an object, falling to 0 beyond ``reach`` times its size.

    The object is taken as the ellipse of its variances along x and y.
    """
    _, height, width = masks_BHW.shape
    x = torch.arange(width, dtype=torch.float32, device=masks_BHW.device)
    y = torch.arange(height, dtype=torch.float32, device=masks_BHW.device)
    squared = [
        _squared_distance(masks_BHW.sum(1), x, reach_B11[:, 0])[:, None],
        _squared_distance(masks_BHW.sum(2), y, reach_B11[:, 0])[:, :, None],
    ]
    return _step(1 - (squared[0] + squared[1]).sqrt_(), 1.0)


def _squared_distance(counts_BN: Tensor, place_N: Tensor, reach_B1: Tensor) -> Tensor:
    """Return the squared distance along an axis, 1 at the middle of the fade."""
    total = counts_BN.sum(1, keepdim=True).clamp(min=1)
    centre = (counts_BN * place_N).sum(1, keepdim=True) / total
    apart = (place_N - centre).square()
    variance = (counts_BN * apart).sum(1, keepdim=True) / total
    # Two deviations hold an ellipse; the fade begins at half its middle.
    return apart / (variance.clamp(min=1) * (4 * (1 + reach_B1)).square())


def _index(rows: Sequence[int], device: torch.device) -> Tensor:
    return upload(np.array(rows), torch.empty(0, device=device)).long()


def _step(value: Tensor, edge: Tensor | float) -> Tensor:
    """Return 0 to 1 smoothly where a value rises through 0 within ``edge``."""
    t = (value / edge + 0.5).clamp_(0, 1)
    return t * t * (3 - 2 * t)


def _bars(value: Tensor, share: float, edge: Tensor) -> Tensor:
    """Return 1 over a share of every unit interval, 0 over the rest, with soft edges."""
    from_middle = (value - value.floor() - 0.5).abs_()
    return _step(share / 2 - from_middle, edge)


def _lattice_value(lattice_B1NN: Tensor, u_BHW: Tensor, v_BHW: Tensor) -> Tensor:
    """Return smooth noise: random numbers at whole coordinates, interpolated between them."""
    side = lattice_B1NN.shape[-1]
    # Pixel i of the lattice is at 2i / (side - 1) - 1; two pixels of border.
    grid = torch.stack([u_BHW % LATTICE, v_BHW % LATTICE], -1).add_(2).mul_(2 / (side - 1)).sub_(1)
    return F.grid_sample(lattice_B1NN, grid, mode="bicubic", align_corners=True)[:, 0]
