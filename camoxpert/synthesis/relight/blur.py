"""Gaussian blurs of any width on batches: average down, then one small matrix for each axis.

A blur of sigma s changes nothing finer than s, so its input may be averaged over cells of about
s / 4 first. What is left of the Gaussian, its mirrored borders and the way back to full size are
one matrix for the rows and one for the columns: two small products instead of thousands of taps.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from camoxpert.data.samples.augment_device import upload

CELL = 4.0
"""Sigmas are at least this many cells wide."""


def blur(maps_BCHW: Tensor, sigma: float) -> Tensor:
    """Blur with a Gaussian; beyond the border the image is mirrored (OpenCV's BORDER_REFLECT).

    Args:
        maps_BCHW: float.
        sigma: in pixels; below 0.3 nothing changes.
    """
    if sigma < 0.3:
        return maps_BCHW
    height, width = maps_BCHW.shape[-2:]
    cell = cell_of(sigma)
    rows = _matrix(height, sigma, cell, maps_BCHW.device)
    columns = _matrix(width, sigma, cell, maps_BCHW.device)
    coarse = pooled(maps_BCHW, cell)
    # The smaller product first.
    return rows @ (coarse @ columns.mT)


def cell_of(sigma: float) -> int:
    """Return the side of the cells that a blur averages first: a power of two."""
    return 2 ** max(0, int(np.floor(np.log2(sigma / CELL))))


def pooled(maps_BCHW: Tensor, cell: int) -> Tensor:
    """Average over cells; cells at the far border average the pixels that they have."""
    if cell == 1:
        return maps_BCHW
    return F.avg_pool2d(maps_BCHW, cell, ceil_mode=True, count_include_pad=False)


@lru_cache(maxsize=64)
def _matrix(length: int, sigma: float, cell: int, device: torch.device) -> Tensor:
    """Return the (length, cells) matrix that blurs averages over cells and enlarges them."""
    return upload(_weights(length, sigma, cell), torch.empty(0, device=device))


def _weights(length: int, sigma: float, cell: int) -> np.ndarray:
    # Averaging and spreading over a cell are two boxes of variance (cell^2 - 1) / 12.
    remaining = sigma**2 - (cell**2 - 1) / 6
    # One mirrored period: pixel k of 2 * length is at distance k or 2 * length - k.
    period = 2 * length
    reach = int(np.ceil(6 * sigma / period)) + 1
    offsets = np.arange(period)[:, None] + period * np.arange(-reach, reach + 1)
    tap = np.exp(-0.5 * offsets.astype(np.float64) ** 2 / remaining).sum(1)
    i, j = np.arange(length)[:, None], np.arange(length)[None]
    full = tap[np.abs(i - j)] + tap[i + j + 1]
    full /= full.sum(1, keepdims=True)
    starts = np.arange(0, length, cell)
    return np.add.reduceat(full, starts, axis=1)
