"""The weighted F-measure (Margolin et al., CVPR 2014), the one measure that needs the pixels.

Two ideas: an error inside the object counts less where its neighbourhood is right (7 x 7 Gaussian),
and a false alarm counts more, up to twice, the farther it is from the object.
"""

from __future__ import annotations

import cv2
import numpy as np
from numpy.typing import NDArray

EPS = float(np.spacing(1))
RADIUS = 3
"""Of the 7 x 7 Gaussian, in pixels."""
SIGMA = 5.0
"""Of the Gaussian, in pixels."""
FAR = 260
"""Distance in pixels from which a false alarm's weight is 2 to the last bit."""
FALSE_ALARM_WEIGHT = 2 - np.exp(np.log(0.5) / 5 * np.sqrt(np.arange(FAR * FAR + 1)))
"""By squared distance: 1 at the object, half of the way to 2 after 5 pixels."""


def _neighbours_by_distance() -> dict[int, list[tuple[int, int]]]:
    """Return the offsets (row, column) at each squared distance up to 18, by column, then row.

    18 = 3 * 3 + 3 * 3 is the farthest that the Gaussian of an object pixel reaches. The order is
    the rule by which scipy's exact distance transform, which the field's code uses, breaks ties.
    """
    table: dict[int, list[tuple[int, int]]] = {}
    reach = range(-RADIUS - 1, RADIUS + 2)
    for column in reach:
        for row in reach:
            squared = row * row + column * column
            if 0 < squared <= 2 * RADIUS * RADIUS:
                table.setdefault(squared, []).append((row, column))
    return dict(sorted(table.items()))


NEIGHBOURS = _neighbours_by_distance()
PAD = RADIUS + 1
GAUSSIAN = np.exp(-(np.arange(-RADIUS, RADIUS + 1) ** 2) / (2 * SIGMA**2))
GAUSSIAN /= GAUSSIAN.sum()


def weighted_fmeasure(saliency_HW: NDArray[np.float64], mask_HW: NDArray[np.bool_]) -> float:
    """Return the weighted F-measure with beta 1.

    Args:
        saliency_HW: map in 0..1, float64.
        mask_HW: bool, True on the object.

    Returns:
        0..1; 0 for an empty mask.
    """
    num_foreground = int(np.count_nonzero(mask_HW))
    if num_foreground == 0:
        return 0.0
    error_HW = np.abs(saliency_HW - mask_HW)
    if num_foreground == mask_HW.size:
        distance_HW: NDArray = np.zeros(mask_HW.shape, np.float32)
    else:
        # Exact but for the float32 root; its square is rounded to the integer that it was.
        distance_HW = cv2.distanceTransform(
            np.logical_not(mask_HW).view(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE
        )

    box = _object_box(mask_HW)
    mask_box, error_box = mask_HW[box], error_HW[box]
    spread_box = _spread_errors(error_box, mask_box, distance_HW[box])
    smooth_box = cv2.sepFilter2D(
        spread_box, cv2.CV_64F, GAUSSIAN, GAUSSIAN, borderType=cv2.BORDER_CONSTANT
    )
    object_error = float(np.minimum(error_box, smooth_box)[mask_box].sum())

    # A background pixel without error adds nothing.
    wrong_HW = (error_HW > 0) & ~mask_HW
    weights = FALSE_ALARM_WEIGHT[_squares(np.minimum(distance_HW[wrong_HW], FAR))]
    # Not a dot product: BLAS splits a long one by the number of threads, and so would the last bit.
    false_alarms = float((error_HW[wrong_HW] * weights).sum())

    hits = num_foreground - object_error
    recall = 1 - object_error / num_foreground
    precision = hits / (hits + false_alarms + EPS)
    return 2 * recall * precision / (recall + precision + EPS)


def _object_box(mask_HW: NDArray[np.bool_]) -> tuple[slice, slice]:
    """Return the object's bounding box, grown by the Gaussian's radius within the image."""
    box = []
    for axis in (1, 0):
        line = np.flatnonzero(mask_HW.any(axis=axis))
        box.append(slice(max(int(line[0]) - RADIUS, 0), int(line[-1]) + RADIUS + 1))
    return box[0], box[1]


def _squares(distances: NDArray[np.float32]) -> NDArray[np.int32]:
    return np.rint(distances * distances).astype(np.int32)


def _spread_errors(
    error_HW: NDArray[np.float64],
    mask_HW: NDArray[np.bool_],
    distance_HW: NDArray[np.float32],
) -> NDArray[np.float64]:
    """Give every background pixel near the object the error of its nearest object pixel.

    Pixels farther than the Gaussian reaches stay 0: no object pixel sees them.
    """
    spread = np.where(mask_HW, error_HW, 0.0)
    band = np.flatnonzero((distance_HW > 0) & (distance_HW < PAD + 0.5))
    squared = _squares(distance_HW.ravel()[band])
    width = mask_HW.shape[1] + 2 * PAD
    # Padded and flat, so that a neighbour is one addition away and never wraps into another row.
    inside = np.pad(mask_HW, PAD).ravel()
    padded_error = np.pad(error_HW, PAD).ravel()
    row, column = np.divmod(band, mask_HW.shape[1])
    position = (row + PAD) * width + column + PAD
    flat_spread = spread.ravel()
    for distance, offsets in NEIGHBOURS.items():
        chosen = np.flatnonzero(squared == distance)
        for row_offset, column_offset in offsets:
            if len(chosen) == 0:
                break
            source = position[chosen] + row_offset * width + column_offset
            hit = inside[source]
            flat_spread[band[chosen[hit]]] = padded_error[source[hit]]
            chosen = chosen[~hit]
    return spread
