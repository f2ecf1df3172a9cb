"""Find the places in backgrounds that look like an object.

Every background is described by windows of four sizes on a grid of cells (``describe.py``). Windows
that touch an object of the background are left out, so that nothing is ever pasted over one. A
search compares all windows of a size at once.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import cv2
import numpy as np

from camoxpert.synthesis.compose.describe import (
    CELLS,
    FEATURES,
    WEIGHTS,
    features_of,
    grid_shape,
    plane_grid,
)

SIDES = (3, 5, 8, 12)
"""Sides of the windows in cells; a background has 16 along its shorter side."""
STRIDES = (3, 3, 4, 4)
SMALLEST, WIDEST = 32, 4
"""Fewest pixels of a background's shorter side, and its longer side by its shorter one at most;
others have no windows."""
LEAST_PART = 0.5
"""Share of a background's shorter side that a part without objects must have to be used alone."""


@dataclass(frozen=True)
class BackgroundEntry:
    """What is known of a background without its pixels.

    Attributes:
        name: of the picture.
        source, mask: its files; mask "": it shows no object, or none is known.
        height, width: pixels.
    """

    name: str
    source: str
    mask: str
    height: int
    width: int


@dataclass(frozen=True)
class Described:
    """A background, ready to be indexed.

    Attributes:
        entry: what is known of it.
        taken: (rows, columns), bool: cells that show a part of an object.
        windows: int32 (M, 4): size (index of ``SIDES``), top row, left column, and 1 if a large
            part of the picture around it shows no object.
        features: float32 (M, FEATURES).
    """

    entry: BackgroundEntry
    taken: np.ndarray
    windows: np.ndarray
    features: np.ndarray


@dataclass(frozen=True)
class BackgroundIndex:
    """Windows of many backgrounds.

    Attributes:
        entries: the backgrounds.
        taken: for each, cells that show a part of an object.
        windows: int32 (M, 5): number of the background, then as in ``Described``; ordered by size.
        features: float32 (M, FEATURES), standardised and weighted.
        norms: float32 (M,), squared lengths of the features.
        grids: int32 (N, 2), rows and columns of each grid.
        centre, scale: float32 (FEATURES,); features are ``(raw - centre) * scale``.
    """

    entries: tuple[BackgroundEntry, ...]
    taken: tuple[np.ndarray, ...]
    windows: np.ndarray
    features: np.ndarray
    norms: np.ndarray
    grids: np.ndarray
    centre: np.ndarray
    scale: np.ndarray

    def __len__(self) -> int:
        return len(self.entries)


@dataclass(frozen=True)
class Place:
    """A window of a background.

    Attributes:
        background: its number.
        top, left, side: in cells.
        distance: of its features from those searched for, root mean square of weighted standard
            deviations.
    """

    background: int
    top: int
    left: int
    side: int
    distance: float


def describe(
    name: str,
    image: np.ndarray,
    mask: np.ndarray | None = None,
    *,
    source: str = "",
    mask_source: str = "",
    size: tuple[int, int] | None = None,
) -> Described:
    """Describe a background.

    Args:
        name, source, mask_source: see ``BackgroundEntry``.
        image: uint8 (H, W, 3) RGB.
        mask: uint8 (H, W), above 0 on its objects and where nothing is known; None: no object.
        size: height and width of the picture, if ``image`` was reduced.
    """
    height, width = size or image.shape[:2]
    usable = min(height, width) >= SMALLEST and max(height, width) <= WIDEST * min(height, width)
    grid = plane_grid(image, grid_shape(height, width))
    taken = taken_cells(mask, *grid.shape[:2])
    sums = _integral(grid)
    blocked = _integral(taken[..., None].astype(np.float32))
    windows, features = [], []
    for number, (side, stride) in enumerate(zip(SIDES, STRIDES, strict=True)):
        top, left = np.meshgrid(
            _starts(grid.shape[0], side, stride),
            _starts(grid.shape[1], side, stride),
            indexing="ij",
        )
        free = (_sum(blocked, top, left, side)[..., 0] == 0) & usable
        top, left = top[free], left[free]
        room = [has_room(taken, *place, side) for place in zip(top, left, strict=True)]
        windows.append(np.stack([np.full(len(top), number), top, left, room], 1))
        features.append(features_of(_sum(sums, top, left, side) / side**2))
    entry = BackgroundEntry(name, source, mask_source, height, width)
    return Described(
        entry, taken, np.concatenate(windows).astype(np.int32), np.concatenate(features)
    )


def taken_cells(mask: np.ndarray | None, rows: int, columns: int) -> np.ndarray:
    """Return which cells show any pixel of an object, bool (rows, columns)."""
    if mask is None:
        return np.zeros((rows, columns), bool)
    # In floating point, since bytes would round a single pixel in a large cell to nothing.
    shares = cv2.resize(
        (mask > 0).astype(np.float32), (columns, rows), interpolation=cv2.INTER_AREA
    )
    return shares > 0


def index_of(backgrounds: Iterable[Described]) -> BackgroundIndex:
    """Return the index of described backgrounds."""
    every = list(backgrounds)
    windows = [
        np.concatenate([np.full((len(b.windows), 1), number), b.windows], 1)
        for number, b in enumerate(every)
    ]
    rows = np.concatenate(windows).astype(np.int32) if every else np.zeros((0, 5), np.int32)
    raw = np.concatenate([b.features for b in every]) if every else np.zeros((0, FEATURES))
    order = np.argsort(rows[:, 1], kind="stable")
    rows, raw = rows[order], raw[order]
    centre = raw.mean(0) if len(raw) else np.zeros(FEATURES)
    spread = raw.std(0) if len(raw) else np.ones(FEATURES)
    scale = WEIGHTS / np.maximum(spread, 0.05 * spread.mean() + 1e-6)
    features = ((raw - centre) * scale).astype(np.float32)
    return BackgroundIndex(
        entries=tuple(b.entry for b in every),
        taken=tuple(b.taken for b in every),
        windows=rows,
        features=features,
        norms=(features**2).sum(1),
        grids=np.array([b.taken.shape for b in every], np.int32).reshape(-1, 2),
        centre=centre.astype(np.float32),
        scale=scale.astype(np.float32),
    )


def nearest_places(
    index: BackgroundIndex,
    features: np.ndarray,
    *,
    size: int,
    choices: int,
    skip: int = 0,
    sides: Sequence[bool] = (False,) * 4,
    trim: bool = True,
    background: int | None = None,
    room: bool = False,
) -> list[Place]:
    """Return the best window of each of the backgrounds that resemble an object most, best first.

    Args:
        index: the windows.
        features: float32 (FEATURES,) of the object, as ``object_features`` returns them.
        size: index of ``SIDES``.
        choices: most backgrounds to return.
        skip: leave so many out that resemble it more; fewer, if there would be no others.
        sides: edges that the object must be placed at: left, top, right, bottom.
        trim: the picture will be cut where the window begins, so that three fifths of the
            background must lie on its other side; False: the window must lie at that edge.
        background: look in this one only.
        room: only windows with a large part without objects around them.
    """
    first, last = np.searchsorted(index.windows[:, 1], [size, size + 1])
    rows, planes = index.windows[first:last], index.features[first:last]
    wanted = (features - index.centre) * index.scale
    if not len(rows):
        return []
    distance = index.norms[first:last] - 2 * planes @ wanted + (wanted**2).sum()
    if room:
        distance = np.where(rows[:, 4] > 0, distance, np.inf)
    if background is not None:
        distance = np.where(rows[:, 0] == background, distance, np.inf)
    if any(sides):
        allowed = _allowed(index, rows, size, sides, 0.4 if trim else 0.0)
        distance = np.where(allowed, distance, np.inf)
    # The windows of a background follow each other: the best of each, then the best of those.
    starts = np.flatnonzero(np.diff(rows[:, 0], prepend=-1))
    best = np.minimum.reduceat(distance, starts)
    places = []
    order = np.argsort(best, kind="stable")[: int(np.isfinite(best).sum())]
    skip = max(0, min(skip, len(order) - choices))
    for group in order[skip : skip + choices]:
        end = starts[group + 1] if group + 1 < len(starts) else len(rows)
        row = rows[starts[group] + int(np.argmin(distance[starts[group] : end]))]
        rms = float(np.sqrt(max(best[group], 0) / FEATURES))
        places.append(Place(int(row[0]), int(row[2]), int(row[3]), SIDES[size], rms))
    return places


def free_box(
    taken: np.ndarray, place: Place, *, sides: Sequence[bool]
) -> tuple[int, int, int, int]:
    """Return a large part of a background around a window that shows no object, in cells.

    The window grows by one line of cells at a time, in turn to each side, until the line shows a
    part of an object or the picture ends.

    Args:
        taken: bool (rows, columns), cells with a part of an object.
        place: the window, which shows none.
        sides: left, top, right, bottom: do not grow there.

    Returns:
        left, top, right, bottom; the latter two are excluded.
    """
    rows, columns = taken.shape
    left, top, right, bottom = (
        place.left,
        place.top,
        place.left + place.side,
        place.top + place.side,
    )
    open_sides = [not side for side in sides]
    while any(open_sides):
        for side in range(4):
            if not open_sides[side]:
                continue
            line = (
                taken[top:bottom, left - 1] if side == 0 and left > 0
                else taken[top - 1, left:right] if side == 1 and top > 0
                else taken[top:bottom, right] if side == 2 and right < columns
                else taken[bottom, left:right] if side == 3 and bottom < rows
                else None
            )  # fmt: skip
            if line is None or line.any():
                open_sides[side] = False
                continue
            left -= side == 0
            top -= side == 1
            right += side == 2
            bottom += side == 3
    return left, top, right, bottom


def has_room(taken: np.ndarray, top: int, left: int, side: int) -> bool:
    """Return whether a part around a window that shows no object can be used alone."""
    if not taken.any():
        return True
    box = free_box(taken, Place(0, int(top), int(left), side, 0.0), sides=(False,) * 4)
    return is_large(box)


def is_large(box: tuple[int, int, int, int]) -> bool:
    """Return whether a part of a background, in cells, can be used alone."""
    return min(box[2] - box[0], box[3] - box[1]) >= LEAST_PART * CELLS


def _allowed(
    index: BackgroundIndex, rows: np.ndarray, size: int, sides: Sequence[bool], share: float
) -> np.ndarray:
    """Return which windows leave at most a share of their background beyond these sides."""
    shapes = index.grids[rows[:, 0]]
    side = SIDES[size]
    left, top, right, bottom = sides
    kept = np.ones(len(rows), bool)
    if left:
        kept &= rows[:, 3] <= share * shapes[:, 1]
    if right:
        kept &= rows[:, 3] + side >= (1 - share) * shapes[:, 1]
    if top:
        kept &= rows[:, 2] <= share * shapes[:, 0]
    if bottom:
        kept &= rows[:, 2] + side >= (1 - share) * shapes[:, 0]
    return kept


def _starts(length: int, side: int, stride: int) -> np.ndarray:
    """Return where windows start: evenly, and one at each end."""
    if side >= length:
        return np.zeros(1, np.int64)
    number = -(-(length - side) // stride) + 1
    return np.unique(np.rint(np.linspace(0, length - side, number)).astype(np.int64))


def _integral(grid: np.ndarray) -> np.ndarray:
    sums = np.zeros((grid.shape[0] + 1, grid.shape[1] + 1, grid.shape[2]))
    sums[1:, 1:] = grid.cumsum(0, dtype=np.float64).cumsum(1)
    return sums


def _sum(sums: np.ndarray, top: np.ndarray, left: np.ndarray, side: int) -> np.ndarray:
    bottom, right = top + side, left + side
    return sums[bottom, right] - sums[top, right] - sums[bottom, left] + sums[top, left]
