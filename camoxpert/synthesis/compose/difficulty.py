"""Score how hard an object is to see: how little its histograms differ from its surroundings'.

    difficulty = 1 - sqrt(mean of the Jensen-Shannon divergences of L, a, b and the gradient)

Histograms are of the object's pixels and of a ring of a quarter of its size around it. The
Jensen-Shannon divergence in bits (Lin 1991) is 0 for equal and 1 for disjoint histograms; its root
is a metric (Endres and Schindelin 2003). Distances between the histograms of an object and of what
surrounds it are how data sets describe contrast (Li et al. 2014, "The Secrets of Salient Object
Segmentation"; Fan et al. 2020, "Camouflaged Object Detection"). Few pixels make any two histograms
differ: what equal distributions would give on average is subtracted.
"""

from __future__ import annotations

import math

import cv2
import numpy as np

from camoxpert.synthesis.compose.blending import ring_around

RING = 0.25
"""Width of the ring as a share of the root of the object's area."""
LEAST_RING = 3
BINS = 32
RANGES = ((0, 256), (64, 192), (64, 192), (0, 128))
"""Of L, a, b and the gradient, in OpenCV's 8-bit Lab; values beyond go into the outermost bins."""
TABLES = tuple(
    np.clip((np.arange(256) - low) * BINS // (high - low), 0, BINS - 1).astype(np.uint8)
    for low, high in RANGES
)
"""Level -> bin."""


def difficulty(image: np.ndarray, mask: np.ndarray, other: np.ndarray | None = None) -> float:
    """Return the difficulty of an object, 0 (easy) to 1 (like its surroundings).

    Args:
        image: uint8 (H, W, 3) RGB.
        mask: (H, W), above 0 on the object.
        other: (H, W), bool: pixels that count as neither, such as other objects, unless nothing
            else surrounds the object.

    Raises:
        ValueError: an empty mask, or one without surroundings.
    """
    inside = mask > 0
    area = int(inside.sum())
    ring = ring_around(inside, max(LEAST_RING, RING * math.sqrt(area)))
    if other is not None and (ring & ~other).any():
        ring &= ~other
    around = int(ring.sum())
    if not area or not around:
        raise ValueError("The difficulty needs an object and surroundings.")
    # 2 inside, 1 around, 0 elsewhere: one count serves both histograms.
    part = (2 * inside.view(np.uint8) + ring.view(np.uint8)) * np.uint8(BINS)
    divergences = []
    for plane, table in zip(_planes(image), TABLES, strict=True):
        counts = np.bincount((cv2.LUT(plane, table) + part).ravel(), minlength=3 * BINS)
        p, q = counts[2 * BINS :] / area, counts[BINS : 2 * BINS] / around
        divergences.append(_divergence(p, q, 1 / area + 1 / around))
    return 1 - math.sqrt(float(np.mean(divergences)))


def _planes(image: np.ndarray) -> list[np.ndarray]:
    """Return L, a, b and the size of L's gradient, uint8."""
    planes = list(cv2.split(cv2.cvtColor(image, cv2.COLOR_RGB2LAB)))
    across, down = (cv2.Sobel(planes[0], cv2.CV_32F, x, 1 - x) for x in (1, 0))
    gradient = cv2.convertScaleAbs(cv2.magnitude(across, down), alpha=0.25)
    return [*planes, gradient]


def _divergence(p: np.ndarray, q: np.ndarray, chance: float) -> float:
    """Return the Jensen-Shannon divergence in bits, less what chance alone gives on average.

    The latter is the second-order expectation for two samples of one distribution (Grosse et al.
    2002, "Analysis of symbolic sequences using the Jensen-Shannon divergence").
    """
    middle = (p + q) / 2
    divergence = _entropy(middle) - (_entropy(p) + _entropy(q)) / 2
    expected = (np.count_nonzero(middle) - 1) / (8 * math.log(2)) * chance
    return min(max(divergence - expected, 0.0), 1.0)


def _entropy(shares: np.ndarray) -> float:
    used = shares[shares > 0]
    return float(-(used * np.log2(used)).sum())
