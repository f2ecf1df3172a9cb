"""Two measures of the outline: Boundary IoU, and the effort a human needs to correct a mask.

Both take binary maps (value > 0.5), not histograms, because they depend on pixel positions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from camoxpert.errors import ConfigError

CROSS = cv2.getStructuringElement(cv2.MORPH_CROSS, (3, 3))
"""A pixel and its four neighbours: the disk of radius 1."""

Mask = NDArray[np.bool_]


def boundary_iou(prediction_HW: Mask, mask_HW: Mask, *, dilation_ratio: float = 0.02) -> float:
    """Return the IoU of the two inner boundary bands (Cheng et al., CVPR 2021, equation 2).

    Args:
        prediction_HW: bool, True where the object was found.
        mask_HW: bool, True on the object.
        dilation_ratio: width of the band as a fraction of the image diagonal; the band is at least
            one pixel wide.

    Returns:
        0..1; 0 where both bands are empty.
    """
    width = max(1, round(dilation_ratio * math.hypot(*mask_HW.shape)))
    ours, theirs = (_boundary_band(each, width) for each in (prediction_HW, mask_HW))
    union = np.count_nonzero(ours | theirs)
    return np.count_nonzero(ours & theirs) / union if union else 0.0


def _boundary_band(mask_HW: Mask, width: int) -> Mask:
    """Return the object's pixels within ``width`` of its outline; the image's border is outline."""
    # A border of background, so that an object cut off by the image border has an outline there.
    padded = cv2.copyMakeBorder(mask_HW.view(np.uint8), 1, 1, 1, 1, cv2.BORDER_CONSTANT, value=0)
    inner = cv2.erode(padded, np.ones((3, 3), np.uint8), iterations=width)
    band_HW: Mask = mask_HW & (inner[1:-1, 1:-1] == 0)
    return band_HW


def human_correction_effort(
    prediction_HW: Mask, mask_HW: Mask, *, relax: int = 5, epsilon: float = 2.0
) -> int:
    """Return how many clicks correct the map (Qin et al., DIS, ECCV 2022, section 5).

    Wrong regions thinner than about ``2 * relax`` pixels are forgiven, unless the object's skeleton
    runs through them. The other wrong regions cost one click for each polygon corner on their
    border with the object (false alarms) or the background (misses); a region without such a border
    costs one click.

    Args:
        prediction_HW: bool, True where the object was found.
        mask_HW: bool, True on the object.
        relax: number of erosions that a wrong region must survive to count.
        epsilon: tolerance of the polygons (Douglas and Peucker, 1973), pixels.

    Returns:
        Number of clicks, 0 for a perfect map.

    Raises:
        ConfigError: scikit-image, which computes the skeleton, is not installed.
    """
    try:
        from skimage.morphology import skeletonize
    except ImportError as error:
        raise ConfigError(
            "The measure HCE needs scikit-image: pip install 'camoxpert[metrics]'."
        ) from error
    skeleton = skeletonize(mask_HW).astype(bool)
    hit = prediction_HW & mask_HW
    invented, missed = prediction_HW & ~mask_HW, mask_HW & ~prediction_HW
    core = _filtered(cv2.erode, prediction_HW | mask_HW, iterations=relax)
    grave_invented = invented & _regrow(invented & core, ~mask_HW, relax)
    grave_missed = missed & _regrow(missed & core, ~prediction_HW, relax)
    grave_missed |= skeleton & ~hit
    right = ~(hit | grave_invented | grave_missed)
    return _clicks(grave_invented, hit | grave_missed, epsilon) + _clicks(
        grave_missed, right, epsilon
    )


def _filtered(operation: Callable[..., Any], mask_HW: Mask, *, iterations: int = 1) -> Mask:
    done_HW = operation(mask_HW.view(np.uint8), CROSS, iterations=iterations)
    filtered_HW: Mask = done_HW.view(np.bool_)
    return filtered_HW


def _regrow(seed_HW: Mask, allowed_HW: Mask, steps: int) -> Mask:
    """Grow a region by ``steps`` pixels, within ``allowed_HW``."""
    for _ in range(steps):
        seed_HW = _filtered(cv2.dilate, seed_HW) & allowed_HW
    return seed_HW


def _clicks(region_HW: Mask, beside_HW: Mask, epsilon: float) -> int:
    """Count polygon corners along ``beside_HW``, and each region that does not touch it as one."""
    near = _filtered(cv2.dilate, np.ascontiguousarray(beside_HW))
    num_labels, labels = cv2.connectedComponents(region_HW.view(np.uint8), connectivity=8)
    alone = np.ones(num_labels, bool)
    alone[0] = False
    visited = np.zeros(region_HW.shape, bool)
    corners = 0
    contours, _ = cv2.findContours(region_HW.view(np.uint8), cv2.RETR_TREE, cv2.CHAIN_APPROX_NONE)
    for contour in contours:
        column, row = contour[:, 0, 0], contour[:, 0, 1]
        # A thin region's outline passes the same pixel twice; it counts once.
        first = np.zeros(len(contour), bool)
        first[np.unique(row * region_HW.shape[1] + column, return_index=True)[1]] = True
        kept = near[row, column] & ~visited[row, column] & first
        visited[row[kept], column[kept]] = True
        alone[labels[row[kept], column[kept]]] = False
        runs = list(_runs(np.asarray(contour, np.int32), kept))
        if len(runs) > 1 and np.abs(runs[0][0] - runs[-1][-1]).max() == 1:
            # The contour starts in the middle of a run: join the two halves.
            runs[-1] = np.concatenate([runs[-1], runs.pop(0)[::-1]])
        corners += sum(len(cv2.approxPolyDP(run, epsilon, False)) for run in runs)
    return corners + int(np.count_nonzero(alone))


def _runs(contour: NDArray[np.int32], kept: Mask) -> Iterator[NDArray[np.int32]]:
    """Yield the stretches of a contour whose points are all kept."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], kept, [False]]).astype(np.int8)))
    for start, stop in zip(edges[::2], edges[1::2], strict=True):
        yield contour[start:stop]
