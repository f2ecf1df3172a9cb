"""The weighted F-measure (Margolin et al., CVPR 2014), which needs the pixels.

Two ideas: an error inside the object counts less where its neighbourhood is right (7 x 7 Gaussian),
and a false alarm counts more, up to twice, the farther it is from the object.
"""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

EPS = float(np.spacing(1))
RADIUS = 3
"""Radius of the 7 x 7 Gaussian, in pixels."""
SIGMA = 5.0
"""Standard deviation of the Gaussian, in pixels."""
FAR = 260
"""Distance in pixels from which a false alarm's weight is 2 to the last bit."""
FALSE_ALARM_WEIGHT = 2 - np.exp(np.log(0.5) / 5 * np.sqrt(np.arange(FAR * FAR + 1)))
"""Weight by squared distance: 1 at the object, 1.5 at 5 pixels, rising to 2."""


def _neighbours_by_distance() -> dict[int, NDArray[np.int64]]:
    """Return the offsets (row, column) at each squared distance up to 18, by column, then row.

    18 = 3 * 3 + 3 * 3 is the farthest that the Gaussian of an object pixel reaches. The order is
    the one in which scipy's exact distance transform, which the field's code uses, breaks ties.
    """
    table: dict[int, list[tuple[int, int]]] = {}
    reach = range(-RADIUS - 1, RADIUS + 2)
    for column in reach:
        for row in reach:
            squared = row * row + column * column
            if 0 < squared <= 2 * RADIUS * RADIUS:
                table.setdefault(squared, []).append((row, column))
    return {squared: np.array(offsets) for squared, offsets in sorted(table.items())}


NEIGHBOURS = _neighbours_by_distance()
PAD = RADIUS + 1
GAUSSIAN = np.exp(-(np.arange(-RADIUS, RADIUS + 1) ** 2) / (2 * SIGMA**2))
GAUSSIAN /= GAUSSIAN.sum()


def weighted_fmeasure(
    prediction_HW: NDArray[np.uint8],
    values_L: NDArray[np.float64],
    mask_HW: NDArray[np.bool_],
) -> float:
    """Return the weighted F-measure with beta 1.

    Args:
        prediction_HW: uint8 map, contiguous.
        values_L: (256,) value in 0..1 of each grey level, from ``level_values``.
        mask_HW: bool, contiguous, True on the object.

    Returns:
        0..1; 0 for an empty mask.
    """
    object_HW = mask_HW.view(np.uint8)
    num_foreground = cv2.countNonZero(object_HW)
    if num_foreground == 0:
        return 0.0
    # Pixels outside the box of the object, its surroundings and all errors do not count.
    wrong_HW = np.asarray(cv2.LUT(prediction_HW, (values_L > 0).view(np.uint8)), np.uint8)
    x, y, width, height = cv2.boundingRect(wrong_HW | object_HW)
    part = (slice(max(y - PAD, 0), y + height + PAD), slice(max(x - PAD, 0), x + width + PAD))
    prediction_HW, object_HW = prediction_HW[part], np.ascontiguousarray(object_HW[part])
    wrong_HW = wrong_HW[part]
    background_HW = object_HW ^ 1
    if num_foreground == object_HW.size:
        distance_HW: NDArray[Any] = np.zeros(object_HW.shape, np.float32)
    else:
        # Exact except for the float32 root; rounding its square restores the integer.
        distance_HW = cv2.distanceTransform(background_HW, cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
    object_error = _object_error(prediction_HW, values_L, object_HW, distance_HW)

    # A background pixel without error adds nothing.
    places = np.flatnonzero((wrong_HW & background_HW).view(np.bool_))
    errors = values_L[prediction_HW.ravel()[places]]
    weights = FALSE_ALARM_WEIGHT[_squares(np.minimum(distance_HW.ravel()[places], FAR))]
    # Not a dot product: BLAS splits long ones by thread count, so the last bit would vary.
    false_alarms = float((errors * weights).sum())

    hits = num_foreground - object_error
    recall = 1 - object_error / num_foreground
    precision = hits / (hits + false_alarms + EPS)
    return 2 * recall * precision / (recall + precision + EPS)


def _object_error(
    prediction_HW: NDArray[np.uint8],
    values_L: NDArray[np.float64],
    object_HW: NDArray[np.uint8],
    distance_HW: NDArray[np.float32],
) -> float:
    """Return the sum of the object's errors, each at most the mean error around it.

    A background pixel gets the error of its nearest object pixel. Pixels beyond the Gaussian's
    reach stay 0, because they affect no object pixel.
    """
    # Work in the object's box, with a margin as wide as the farthest neighbour, so that an offset
    # in the flat arrays never reaches the object in another row.
    x, y, width, height = cv2.boundingRect(object_HW)
    box = (slice(y, y + height), slice(x, x + width))
    error_BB = cv2.LUT(np.ascontiguousarray(prediction_HW[box]), 1 - values_L)
    error_BB = cv2.multiply(error_BB, object_HW[box], dtype=cv2.CV_64F)
    margin = (PAD, PAD, PAD, PAD, cv2.BORDER_CONSTANT)
    error_BB = cv2.copyMakeBorder(error_BB, *margin, value=0)
    object_BB = cv2.copyMakeBorder(object_HW[box], *margin, value=0)
    distance_BB = _with_margin(distance_HW, box)

    # Reads are on the object and writes are off it, so one array is enough.
    flat_error, inside = error_BB.ravel(), object_BB.view(np.bool_).ravel()
    band = np.flatnonzero(cv2.inRange(distance_BB, 0.5, PAD + 0.5) > 0)
    squared = _squares(distance_BB.ravel()[band])
    for distance, offsets in NEIGHBOURS.items():
        chosen = band[squared == distance]
        if len(chosen):
            steps = offsets[:, 0] * object_BB.shape[1] + offsets[:, 1]
            sources = chosen[:, None] + steps
            # The first in the table's order that is on the object; at this distance there is one.
            first = inside.take(sources, mode="clip").argmax(axis=1)
            flat_error[chosen] = flat_error[sources[np.arange(len(chosen)), first]]
    smooth_BB = cv2.sepFilter2D(
        error_BB, cv2.CV_64F, GAUSSIAN, GAUSSIAN, borderType=cv2.BORDER_CONSTANT
    )
    cv2.min(error_BB, smooth_BB, dst=smooth_BB)
    return float(cv2.multiply(smooth_BB, object_BB, dtype=cv2.CV_64F).sum())


def _with_margin(distance_HW: NDArray[np.float32], box: tuple[slice, slice]) -> NDArray[np.float32]:
    """Return the box grown by PAD on every side; 0 beyond the image."""
    (top, rows, bottom), (left, columns, right) = (
        _grown(part, length) for part, length in zip(box, distance_HW.shape, strict=True)
    )
    return cv2.copyMakeBorder(  # type: ignore[return-value]  # cv2's stubs drop the float32
        distance_HW[rows, columns], top, bottom, left, right, cv2.BORDER_CONSTANT, value=0
    )


def _grown(part: slice, length: int) -> tuple[int, slice, int]:
    """Grow a slice by PAD within 0..length; also return what is missing on either side."""
    low, high = part.start - PAD, part.stop + PAD
    inside = slice(max(low, 0), min(high, length))
    return inside.start - low, inside, high - inside.stop


def _squares(distances: NDArray[np.float32]) -> NDArray[np.int32]:
    squares: NDArray[np.int32] = np.rint(distances * distances).astype(np.int32)
    return squares
