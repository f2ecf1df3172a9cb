"""Measures of one image, each a pure function of its joint histogram (weighted F: weighted.py).

Two steps: binarise (``threshold_confusion`` at all 256 thresholds, ``adaptive_confusion``,
``binary_confusion``), then score the confusion counts. A score function takes counts of any shape
and returns that shape, so a curve and a single number come from the same line of code. All values
are fractions in 0..1 (E-measure: up to N / (N - 1) for N pixels), in float64. Void pixels are in no
count: every measure is that of the labelled pixels alone, as if the image had no others.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from camoxpert.metrics.histogram import JointHistogram

Floats = NDArray[np.float64]
EPS = float(np.spacing(1))


class Confusion(NamedTuple):
    """Pixel counts of one or more binarisations of the same image."""

    tp: Any
    """Object pixels that were found: int, or int64 of any shape."""
    fp: Any
    """Background pixels taken for the object; same shape."""
    num_foreground: int
    """Object pixels in the mask."""
    num_background: int
    """Background pixels in the mask."""

    @property
    def fn(self) -> Any:
        """Object pixels that were missed."""
        return self.num_foreground - self.tp

    @property
    def tn(self) -> Any:
        """Background pixels that were not marked as object."""
        return self.num_background - self.fp


def mean_value(histogram: JointHistogram, values: Floats) -> float:
    """Return the mean of the prediction over the image, 0..1."""
    return float(histogram.totals.sum(axis=0) @ values) / histogram.num_pixels


def mean_absolute_error(histogram: JointHistogram, values: Floats) -> float:
    """Return the mean of |prediction - mask| (Perazzi et al., CVPR 2012); 0 is perfect.

    Args:
        histogram: of the image.
        values: (256,) value of each grey level, from ``level_values``.
    """
    background, foreground = histogram.totals
    return float(background @ values + foreground @ (1 - values)) / histogram.num_pixels


def quantised_counts(histogram: JointHistogram, values: Floats) -> NDArray[np.int64]:
    """Return (2, 256) counts of background and foreground over trunc(255 * value).

    The fixed thresholds are applied to the stretched map after it was truncated (not rounded) to 8
    bits again.
    """
    bins = (values * 255).astype(np.uint8)
    counts_CL = np.zeros((2, 256), np.int64)
    for class_counts, class_totals in zip(counts_CL, histogram.totals, strict=True):
        np.add.at(class_counts, bins, class_totals)
    return counts_CL


def threshold_confusion(counts_CL: NDArray[np.int64]) -> Confusion:
    """Binarise at 255, 254, ... 0 (level >= threshold): index 0 is the strictest, index 255 takes
    every pixel.

    Args:
        counts_CL: (2, 256) from ``quantised_counts``.
    """
    fp, tp = np.cumsum(counts_CL[:, ::-1], axis=1)
    return Confusion(tp, fp, int(tp[-1]), int(fp[-1]))


def adaptive_confusion(
    histogram: JointHistogram,
    values: Floats,
    *,
    pixels: Callable[[], NDArray[np.uint8]] | None = None,
) -> Confusion:
    """Binarise at twice the map's mean, at most 1 (value >= threshold).

    Args:
        histogram: of the image.
        values: (256,) value of each grey level.
        pixels: returns the map, for parity to the last bit. If a level equals the threshold, the
            rounding of the mean decides which side it falls on; only then the mean is computed
            from the pixels, summed as an array, as the reference does.
    """
    threshold = 2 * mean_value(histogram, values)
    if pixels is not None and (np.abs(values - threshold) < 1e-9).any():
        threshold = 2 * float(np.take(values, pixels()).mean())
    return _confusion(histogram, values >= min(threshold, 1.0))


def binary_confusion(histogram: JointHistogram, values: Floats) -> Confusion:
    """Binarise at one half (value > 0.5, strictly)."""
    return _confusion(histogram, values > 0.5)


def _confusion(histogram: JointHistogram, taken_L: NDArray[np.bool_]) -> Confusion:
    background, foreground = histogram.totals
    return Confusion(
        int(foreground[taken_L].sum()),
        int(background[taken_L].sum()),
        int(foreground.sum()),
        int(background.sum()),
    )


def precision(confusion: Confusion) -> Any:
    """Return TP / (TP + FP), 0 where nothing was taken."""
    return _ratio(confusion.tp, confusion.tp + confusion.fp)


def recall(confusion: Confusion) -> Any:
    """Return TP / (TP + FN), 0 without an object."""
    return _ratio(confusion.tp, confusion.tp + confusion.fn)


def specificity(confusion: Confusion) -> Any:
    """Return TN / (TN + FP), 0 without background."""
    return _ratio(confusion.tn, confusion.tn + confusion.fp)


def fmeasure(confusion: Confusion, *, beta_squared: float = 0.3) -> Any:
    """Return the F-measure (Achanta et al., CVPR 2009); the default beta favours precision."""
    p, r = precision(confusion), recall(confusion)
    return _ratio((1 + beta_squared) * p * r, beta_squared * p + r)


def iou(confusion: Confusion) -> Any:
    """Return the intersection over union of object and prediction, 0 where both are empty."""
    return _ratio(confusion.tp, confusion.tp + confusion.fp + confusion.fn)


def dice(confusion: Confusion) -> Any:
    """Return the Dice coefficient, 0 where object and prediction are empty."""
    return _ratio(2 * confusion.tp, 2 * confusion.tp + confusion.fp + confusion.fn)


def balanced_error_rate(confusion: Confusion) -> Any:
    """Return 1 - (recall + specificity) / 2, lower is better; an absent class counts as wrong."""
    return 1 - 0.5 * (recall(confusion) + specificity(confusion))


def emeasure(confusion: Confusion) -> Any:
    """Return the enhanced-alignment measure (Fan et al., IJCAI 2018).

    Mask and binary map are demeaned; a pixel's pair of deviations takes one of four values, so the
    alignment matrix is four numbers and their counts. The reference divides by N - 1: a perfect map
    of N pixels scores N / (N - 1). A mask of one class has no deviation, and the measure becomes
    the share of pixels in agreement.
    """
    num_foreground, num_background = confusion.num_foreground, confusion.num_background
    num_pixels = num_foreground + num_background
    taken = confusion.tp + confusion.fp
    if num_foreground == 0:
        aligned = num_pixels - taken
    elif num_background == 0:
        aligned = taken
    else:
        taken_share, object_share = taken / num_pixels, num_foreground / num_pixels
        aligned = (
            confusion.tp * _alignment(1 - taken_share, 1 - object_share)
            + confusion.fp * _alignment(1 - taken_share, -object_share)
            + confusion.fn * _alignment(-taken_share, 1 - object_share)
            + confusion.tn * _alignment(-taken_share, -object_share)
        )
    # One pixel: the reference divides by 2**-52 there and reports 4.5e15.
    return aligned / max(num_pixels - 1, 1)


def _alignment(map_deviation: Any, mask_deviation: float) -> Any:
    product, squares = map_deviation * mask_deviation, map_deviation**2 + mask_deviation**2
    return (2 * product / (squares + EPS) + 1) ** 2 / 4


def smeasure(histogram: JointHistogram, values: Floats, *, alpha: float = 0.5) -> float:
    """Return the structure measure (Fan et al., ICCV 2017).

    ``alpha`` weighs the object part (how bright and even the map is on the object, how dark off it)
    against the region part (structural similarity in four blocks around the object's centroid). An
    empty or full mask is scored by the mean of the map alone.

    Args:
        histogram: of the image.
        values: (256,) value of each grey level.
        alpha: weight of the object part, 0..1.

    Returns:
        0..1. Never NaN: a block without pixels has no weight and is left out, where the oracle
        divides by zero.
    """
    object_share = histogram.num_foreground / histogram.num_pixels
    if object_share == 0:
        return 1 - mean_value(histogram, values)
    if object_share == 1:
        return mean_value(histogram, values)
    background, foreground = histogram.totals
    object_part = object_share * _object_score(foreground, values)
    object_part += (1 - object_share) * _object_score(background, 1 - values)
    region_part = 0.0
    for index, counts_CL in enumerate(histogram.counts):
        num_block = int(counts_CL.sum())
        if num_block:
            score = _block_similarity(histogram, index, values)
            region_part += num_block / histogram.num_pixels * score
    return max(0.0, alpha * object_part + (1 - alpha) * region_part)


def _object_score(counts_L: NDArray[np.int64], values: Floats) -> float:
    num = int(counts_L.sum())
    mean = float(counts_L @ values) / num
    deviation = float(np.sqrt(counts_L @ (values - mean) ** 2 / (num - 1))) if num > 1 else 0.0
    return 2 * mean / (mean * mean + 1 + deviation + EPS)


def _block_similarity(histogram: JointHistogram, index: int, values: Floats) -> float:
    """Return the structural similarity of map and mask within one block."""
    background, foreground = histogram.counts[index]
    levels = background + foreground
    num, num_foreground = int(levels.sum()), int(foreground.sum())
    present = np.flatnonzero(levels)
    if len(present) == 1:
        if 0 < num_foreground < num:
            return 0.0
        return _flat_similarity(histogram, index, float(values[present[0]]))
    x, y = float(levels @ values) / num, num_foreground / num
    deviations = values - x
    divisor = max(num - 1, 1)
    variance_x = float(levels @ deviations**2) / divisor
    variance_y = (num_foreground * (1 - y) ** 2 + (num - num_foreground) * y * y) / divisor
    covariance = float((foreground * (1 - y) - background * y) @ deviations) / divisor
    numerator = 4 * x * y * covariance
    return numerator / ((x * x + y * y) * (variance_x + variance_y) + EPS)


def _flat_similarity(histogram: JointHistogram, index: int, value: float) -> float:
    """Return the similarity of a block where map and mask are both constant.

    It is 1 in exact arithmetic. The field's code gives 0 where the floating-point mean of equal
    numbers differs from that number, as it does for 7 grey blocks in 10, and S changes by up to a
    half. To report the same number, the sum is repeated on the same memory layout. Black and white
    blocks, usually the only flat blocks of a map that uses its full range, add up exactly. With
    void the labelled pixels are one list.
    """
    if value in (0.0, 1.0):
        return 1.0
    if histogram.num_void:
        listed = np.full(int(histogram.counts[index].sum()), value)
        return 1.0 if listed.mean() == value else 0.0
    flat = np.full(histogram.shape, value)[histogram.blocks[index]]
    return 1.0 if flat.mean() == value else 0.0


def _ratio(numerator: Any, denominator: Any) -> Any:
    """Divide elementwise; 0 where the denominator is 0."""
    if isinstance(denominator, (int, float)):
        return numerator / denominator if denominator else 0.0
    denominator = np.asarray(denominator, np.float64)
    return np.divide(numerator, denominator, out=np.zeros_like(denominator), where=denominator != 0)
