"""Regions of feature maps as routing units: cut into a grid of cells, and joined again.

All cells of a level have one shape, so that the experts' grouped dispatch takes them as it takes
images. An expert sees a cell with a halo of the pixels around it, and its output there is dropped.
Without a halo its filters would meet a border of zeros inside the image: the outputs of the two
pixels along a border were off by 30 to 80 % of their norm (filters of the specialists, random
features), with the halo of 2 by 0 to 26 %; operators that reach no further are exact. A halo of 7
would be exact for all local operators, at 2.7 times the work (a grid of 4 on 88 pixels); 2 costs
1.4 times. In a grid of 2, where cells have the halo on one side only, it is 1.1 times. What an
expert takes from its whole input, such as a mean, is that of the cell.

Shape letters: B batch, C channels, H height, W width; U routing units, those of an image in a row.
"""

from typing import NamedTuple

import torch
from torch import Tensor

HALO = 2
"""Pixels around a cell that an expert sees as well."""
SMALLEST = 4
"""Pixels along the side of the smallest cell."""


class Cells(NamedTuple):
    """The cells along one side of a map.

    Attributes:
        size: pixels of every window.
        windows: first pixel of each window.
        cores: first pixel and end of each cell; together they are the side.
    """

    size: int
    windows: list[int]
    cores: list[tuple[int, int]]


def grid_of(asked: int, height: int, width: int) -> int:
    """Return the largest grid up to ``asked`` whose cells are not too small; 1 is the whole map."""
    if asked == 1:
        return 1  # Without looking at the size, which an exported graph leaves open.
    return max(1, min(asked, height // SMALLEST, width // SMALLEST))


def cells(side: int, grid: int, halo: int) -> Cells:
    """Return the cells of a side; if it is not divisible, some are a pixel longer than others.

    Windows have one size. At the ends of the side they are moved inwards instead of padded.
    """
    cores = [(index * side // grid, (index + 1) * side // grid) for index in range(grid)]
    size = min(side, -(-side // grid) + halo * min(2, grid - 1))
    return Cells(size, [max(0, min(start - halo, side - size)) for start, _ in cores], cores)


def cut(x_BCHW: Tensor, grid: int, *, halo: int = 0) -> Tensor:
    """Return the windows of all cells, (B * grid^2, C, h, w), those of an image in a row."""
    if grid == 1:
        return x_BCHW
    rows, columns = (cells(side, grid, halo) for side in x_BCHW.shape[-2:])
    windows = [
        x_BCHW[:, :, top : top + rows.size, left : left + columns.size]
        for top in rows.windows
        for left in columns.windows
    ]
    return torch.stack(windows, 1).flatten(0, 1)


def join(x_UCHW: Tensor, size_hw: tuple[int, int] | torch.Size, *, grid: int, halo: int) -> Tensor:
    """Put the windows' cells back together; what lies in the halo is dropped.

    Args:
        x_UCHW: as ``cut`` returns them with the same grid and halo.
        size_hw: of the map.
        grid, halo: see ``cut``.
    """
    if grid == 1:
        return x_UCHW
    rows, columns = (cells(side, grid, halo) for side in size_hw)
    windows = x_UCHW.unflatten(0, (-1, grid, grid))
    lines = []
    for r, (top, (start, end)) in enumerate(zip(rows.windows, rows.cores, strict=True)):
        line = [
            windows[:, r, c, :, start - top : end - top, first - left : last - left]
            for c, (left, (first, last)) in enumerate(
                zip(columns.windows, columns.cores, strict=True)
            )
        ]
        lines.append(torch.cat(line, 3))
    return torch.cat(lines, 2)
