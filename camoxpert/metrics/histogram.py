"""The joint histogram of one prediction and its mask, from which nearly every measure is computed.

A prediction has only 256 grey levels. Counting each level on the object and on the background, in
each of the four blocks around the object's centroid, keeps everything that MAE, S-, E- and
F-measure, IoU and Dice need: 2048 integers instead of a million pixels, and a measure costs
microseconds.

Suffixes: H, W height and width; Q 4 blocks; C background (0), foreground (1); L 256 grey levels.
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

Slices = tuple[slice, slice]
EXACT_IN_FLOAT32 = 1 << 24


def joint_histogram(
    prediction_HW: NDArray[np.uint8],
    mask_HW: NDArray[np.bool_],
    void_HW: NDArray[np.bool_] | None = None,
) -> JointHistogram:
    """Count grey levels per block (split at the object's centroid) and class.

    Args:
        prediction_HW: uint8 map, 0..255; 0 on void pixels.
        mask_HW: bool mask of the same shape, True on the object.
        void_HW: bool, True where nobody labelled the pixel; these are not counted.

    Returns:
        The histogram; its counts add up to H * W, less the void pixels.
    """
    sums = _projections(mask_HW)
    split = _centroid_split(*sums)
    object_HW = mask_HW.view(np.uint8)
    top, bottom, left, right = (end for line in sums for end in _extent(line))
    counts_QCL = np.empty((4, 2, 256), np.int64)
    for counts_CL, (rows, columns) in zip(counts_QCL, block_slices(split), strict=True):
        everything = _level_counts(prediction_HW[rows, columns], None)
        box = (_common(rows, top, bottom), _common(columns, left, right))
        counts_CL[1] = _level_counts(prediction_HW[box], object_HW[box])
        counts_CL[0] = everything - counts_CL[1]
    if void_HW is not None:
        counts_QCL[:, 0, 0] -= void_counts(void_HW, split)
    height, width = mask_HW.shape
    return JointHistogram(
        counts=counts_QCL,
        shape=(height, width),
        split=split,
        num_void=0 if void_HW is None else int(np.count_nonzero(void_HW)),
        box=(slice(top, bottom), slice(left, right)),
    )


def void_counts(void_HW: NDArray[np.bool_], split: tuple[int, int]) -> NDArray[np.int64]:
    """Return the number of void pixels in each of the four blocks."""
    blocks = (void_HW[rows, columns] for rows, columns in block_slices(split))
    return np.array([np.count_nonzero(block) for block in blocks], np.int64)


def _common(part: slice, start: int, stop: int) -> slice:
    """Return the intersection of start:stop with a block's slice, which is open at one end."""
    low = max(part.start or 0, start)
    high = stop if part.stop is None else min(part.stop, stop)
    return slice(low, max(low, high))


def _level_counts(
    pixels_HW: NDArray[np.uint8], where_HW: NDArray[np.uint8] | None
) -> NDArray[np.int64]:
    """Count the 256 levels, of all pixels or of those where ``where_HW`` is not 0."""
    counts_L = np.zeros(256, np.int64)
    if pixels_HW.size == 0:
        return counts_L
    # OpenCV counts exactly but returns float32: no band may exceed what float32 can count.
    rows = max(1, EXACT_IN_FLOAT32 // pixels_HW.shape[1])
    for top in range(0, pixels_HW.shape[0], rows):
        band = slice(top, top + rows)
        # Most pixels of most maps are 0, and calcHist is slow on runs of one level: zeros are
        # counted with countNonZero instead, ten times as fast.
        where = pixels_HW[band] if where_HW is None else where_HW[band]
        counts = cv2.calcHist([pixels_HW[band]], [0], where, [256], [0, 256])
        counts_L += counts.ravel().astype(np.int64)
    if where_HW is None:
        counts_L[0] = pixels_HW.size - cv2.countNonZero(pixels_HW)
    return counts_L


def level_values(histogram: JointHistogram, *, normalise: bool) -> NDArray[np.float64]:
    """Return the value in 0..1 that each grey level stands for.

    Args:
        histogram: of the image; its darkest and brightest level are the ends of the stretch.
        normalise: stretch the image's own range to 0..1 (min-max), as the field's evaluation code
            does. A map of one level cannot be stretched and keeps its value.

    Returns:
        float64 (256,), rising. Levels outside the image's range are clipped to 0 and 1.
    """
    values: NDArray[np.float64] = np.arange(256) / 255
    if not normalise:
        return values
    present = np.flatnonzero(histogram.totals.sum(axis=0))
    low, high = values[present[0]], values[present[-1]]
    if low == high:
        return values
    # Same order of operations as the oracle, so that thresholds fall between the same doubles.
    values = np.clip((values - low) / (high - low), 0.0, 1.0)
    return values


def split_point(mask_HW: NDArray[np.bool_]) -> tuple[int, int]:
    """Return the first row and column of the lower right block: the rounded centroid, plus one.

    The plus one is a MATLAB index that the S-measure's reference code kept; every published number
    includes it. A centroid in the last row or column therefore leaves blocks without a pixel.
    """
    return _centroid_split(*_projections(mask_HW))


def _projections(mask_HW: NDArray[np.bool_]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the number of object pixels of every row and of every column."""
    object_HW = mask_HW.view(np.uint8)
    rows, columns = (
        cv2.reduce(object_HW, axis, cv2.REDUCE_SUM, dtype=cv2.CV_32S).ravel().astype(np.int64)
        for axis in (1, 0)
    )
    return rows, columns


def _centroid_split(rows: NDArray[np.int64], columns: NDArray[np.int64]) -> tuple[int, int]:
    num_foreground = int(rows.sum())
    if num_foreground == 0:
        return round(len(rows) / 2) + 1, round(len(columns) / 2) + 1
    row = int(rows @ np.arange(len(rows))) / num_foreground
    column = int(columns @ np.arange(len(columns))) / num_foreground
    # round: half to even, as numpy's.
    return round(row) + 1, round(column) + 1


def _extent(line: NDArray[np.int64]) -> tuple[int, int]:
    """Return start and end of the part of a projection that is not 0."""
    places = np.flatnonzero(line)
    return (int(places[0]), int(places[-1]) + 1) if len(places) else (0, 0)


def block_slices(split: tuple[int, int]) -> tuple[Slices, Slices, Slices, Slices]:
    """Return the four blocks as slices: upper left, upper right, lower left, lower right."""
    row, column = split
    upper, lower = slice(0, row), slice(row, None)
    left, right = slice(0, column), slice(column, None)
    return (upper, left), (upper, right), (lower, left), (lower, right)


@dataclass(frozen=True, eq=False)
class JointHistogram:
    """Grey levels of a prediction, counted per block and class."""

    counts: NDArray[np.int64]
    """(4, 2, 256): block (upper left, upper right, lower left, lower right),
    background/foreground, level."""
    shape: tuple[int, int]
    """Height and width in pixels."""
    split: tuple[int, int]
    """First row and first column of the lower right block."""
    box: Slices | None = None
    """Rows and columns of the object's bounding box; None if unknown."""
    num_void: int = 0
    """Pixels that nobody labelled; they are in no count."""

    @property
    def totals(self) -> NDArray[np.int64]:
        """Counts of the whole image, (2, 256)."""
        totals: NDArray[np.int64] = self.counts.sum(axis=0)
        return totals

    @property
    def num_pixels(self) -> int:
        """Number of labelled pixels: H * W, less the void ones."""
        return self.shape[0] * self.shape[1] - self.num_void

    @property
    def num_foreground(self) -> int:
        """Number of object pixels in the mask."""
        return int(self.counts[:, 1].sum())

    @property
    def blocks(self) -> tuple[Slices, Slices, Slices, Slices]:
        """Index of each block into an (H, W) array, in the order of ``counts``."""
        return block_slices(self.split)
