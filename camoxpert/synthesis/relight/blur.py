"""Gaussian blurs of any width on batches, at a cost that does not grow with the width.

A blur of sigma s leaves nothing finer than s, so its input is averaged over cells of about s / 3
first. What is left of the Gaussian, with its mirrored borders, is one small matrix for the rows
and one for the columns. Wide blurs come back to full size by the same matrices, others by linear
interpolation, which takes less time there. Narrow blurs are sums of shifted maps.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from camoxpert.runtime.device import upload

CELLS = 3.0
"""Sigmas are at least this many cells wide: on a photo the largest error of log light is 0.0035."""
FEW_CELLS = 1.5
"""The same for what nobody sees sharply: penumbras, texture."""
WIDE_CELL = 8
"""From this size of cells on the matrices enlarge."""


def blur(maps_BCHW: Tensor, sigma: float, *, cells: float = CELLS) -> Tensor:
    """Blur with a Gaussian; beyond the border the image is mirrored (OpenCV's BORDER_REFLECT).

    Args:
        maps_BCHW: float.
        sigma: in pixels; below 0.3 nothing changes.
        cells: least number of cells in a sigma.
    """
    if sigma < 0.3:
        return maps_BCHW
    cell = cell_of(sigma, cells)
    if cell == 1:
        return _shifted_sum(_shifted_sum(maps_BCHW, sigma, dim=3), sigma, dim=2)
    height, width = maps_BCHW.shape[-2:]
    rows = _matrix(height, sigma, cell, maps_BCHW.device)
    columns = _matrix(width, sigma, cell, maps_BCHW.device)
    blurred = rows @ (pooled(maps_BCHW, cell) @ columns.mT)
    if cell >= WIDE_CELL:
        return blurred
    return enlarged(blurred, cell, maps_BCHW.shape)


def cell_of(sigma: float, cells: float = CELLS) -> int:
    """Return the side of the cells that a blur averages first: a power of two."""
    return 2 ** max(0, math.floor(math.log2(sigma / cells)))


def pooled(maps_BCHW: Tensor, cell: int) -> Tensor:
    """Average over cells; cells at the far border average the pixels that they have."""
    if cell == 1:
        return maps_BCHW
    height, width = maps_BCHW.shape[-2:]
    if cell == 2 and height % 2 == width % 2 == 0:
        # A sixth of the time of the general way.
        rows = maps_BCHW[..., ::2, :] + maps_BCHW[..., 1::2, :]
        return (rows[..., ::2] + rows[..., 1::2]).mul_(0.25)
    return F.avg_pool2d(maps_BCHW, cell, ceil_mode=True, count_include_pad=False)


def enlarged(maps_BCHW: Tensor, cell: int, shape: torch.Size) -> Tensor:
    """Interpolate averages over cells linearly, to the height and width of ``shape``."""
    if cell == 1:
        return maps_BCHW
    fine = F.interpolate(maps_BCHW, scale_factor=float(cell), mode="bilinear", align_corners=False)
    return fine[..., : shape[-2], : shape[-1]]


def _shifted_sum(maps_BCHW: Tensor, sigma: float, *, dim: int) -> Tensor:
    length = maps_BCHW.shape[dim]
    reach = min(math.ceil(3.5 * sigma), length)
    tap = np.exp(-0.5 * (np.arange(-reach, reach + 1) / sigma) ** 2)
    weights = (tap / tap.sum()).tolist()
    before = maps_BCHW.narrow(dim, 0, reach).flip(dim)
    after = maps_BCHW.narrow(dim, length - reach, reach).flip(dim)
    padded = torch.cat([before, maps_BCHW, after], dim)
    total = maps_BCHW * weights[reach]
    for k in range(2 * reach + 1):
        if k != reach:
            total.add_(padded.narrow(dim, k, length), alpha=weights[k])
    return total


@lru_cache(maxsize=64)
def _matrix(length: int, sigma: float, cell: int, device: torch.device) -> Tensor:
    """Return the matrix that blurs averages over cells of a row of pixels."""
    return upload(_weights(length, sigma, cell), torch.empty(0, device=device))


def _weights(length: int, sigma: float, cell: int) -> np.ndarray:
    """Return the (pixels, cells) matrix of a blur, or (cells, cells) for narrow cells.

    Averaging over cells and spreading over their pixels are two boxes of variance
    (cell^2 - 1) / 12, the linear interpolation is a triangle of variance cell^2 / 6: the Gaussian
    in between makes up the rest. The last cell may be narrower.
    """
    wide = cell >= WIDE_CELL
    remaining = sigma**2 - (cell**2 - 1) / 6 - (0 if wide else cell**2 / 6)
    # One mirrored period in half pixels: pixel k of 2 * length is at distance k or 2 * length - k.
    period = 4 * length
    reach = math.ceil(12 * sigma / period) + 1
    offsets = np.arange(period)[:, None] + period * np.arange(-reach, reach + 1)
    tap = np.exp(-0.5 * (offsets / 2) ** 2 / remaining).sum(1)
    starts = np.arange(0, length, cell)
    pixels = 2 * np.arange(length)
    centres = starts + np.minimum(starts + cell, length) - 1
    targets = (pixels if wide else centres)[:, None]
    full = tap[np.abs(targets - pixels)] + tap[(targets + pixels + 2) % period]
    weights = np.add.reduceat(full, starts, axis=1)
    return weights / weights.sum(1, keepdims=True)
