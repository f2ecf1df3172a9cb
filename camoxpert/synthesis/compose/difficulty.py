"""Score how hard an object is to see: how little its histograms differ from its surroundings'.

    difficulty = 1 - sqrt(mean of the Jensen-Shannon divergences of L, a, b and the gradient)

Histograms are of the object's pixels and of a ring of a quarter of its size around it. The
Jensen-Shannon divergence in bits (Lin 1991) is 0 for equal and 1 for disjoint histograms; its root
is a metric (Endres and Schindelin 2003). Distances between the histograms of an object and of what
surrounds it are how data sets describe contrast (Li et al. 2014, "The Secrets of Salient Object
Segmentation"; Fan et al. 2020, "Camouflaged Object Detection"). Few pixels make any two histograms
differ; what equal distributions would give on average is subtracted.
"""

from __future__ import annotations

import math

import cv2
import numpy as np

RING = 0.25
"""Width of the ring as a share of the root of the object's area."""
LEAST_RING = 3
BINS = {"L": (0, 100, 25), "a": (-60, 60, 30), "b": (-60, 60, 30), "gradient": (0, 30, 20)}
"""Lower end, upper end and number of bins of each histogram; values beyond go into the outermost."""


def difficulty(image: np.ndarray, mask: np.ndarray, other: np.ndarray | None = None) -> float:
    """Return the difficulty of an object, 0 (easy) to 1 (like its surroundings).

    Args:
        image: uint8 (H, W, 3) RGB.
        mask: (H, W), above 0 on the object.
        other: (H, W), bool: pixels that count as neither, such as other objects.

    Raises:
        ValueError: an empty mask, or one without surroundings.
    """
    inside = mask > 0
    area = int(inside.sum())
    reach = max(LEAST_RING, round(RING * math.sqrt(area)))
    disc = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * reach + 1,) * 2)
    ring = (cv2.dilate(inside.astype(np.uint8), disc) > 0) & ~inside
    if other is not None:
        ring &= ~other
    if not area or not ring.any():
        raise ValueError("The difficulty needs an object and surroundings.")
    planes = _planes(image)
    return 1 - math.sqrt(
        float(np.mean([_divergence(p[inside], p[ring], *BINS[n]) for n, p in planes.items()]))
    )


def _planes(image: np.ndarray) -> dict[str, np.ndarray]:
    lab = cv2.cvtColor(image.astype(np.float32) / 255, cv2.COLOR_RGB2LAB)
    light = np.ascontiguousarray(lab[..., 0])
    dx, dy = cv2.Scharr(light, cv2.CV_32F, 1, 0) / 32, cv2.Scharr(light, cv2.CV_32F, 0, 1) / 32
    return {"L": light, "a": lab[..., 1], "b": lab[..., 2], "gradient": cv2.magnitude(dx, dy)}


def _divergence(first: np.ndarray, second: np.ndarray, low: float, high: float, bins: int) -> float:
    """Return the Jensen-Shannon divergence of two samples in bits, less what chance alone gives."""
    counts = []
    for values in (first, second):
        numbers = ((values - low) * (bins / (high - low))).astype(np.int32)
        counts.append(np.bincount(np.clip(numbers, 0, bins - 1), minlength=bins))
    p, q = (number / number.sum() for number in counts)
    middle = (p + q) / 2
    used = middle > 0
    divergence = _entropy(middle[used]) - (_entropy(p[p > 0]) + _entropy(q[q > 0])) / 2
    # Second-order expectation for equal distributions, as Grosse et al. 2002 derive it.
    chance = (used.sum() - 1) / (8 * math.log(2)) * (1 / len(first) + 1 / len(second))
    return min(max(float(divergence - chance), 0.0), 1.0)


def _entropy(shares: np.ndarray) -> float:
    return float(-(shares * np.log2(shares)).sum())
