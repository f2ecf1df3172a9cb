"""Spread values that are known at some pixels smoothly over all others."""

from __future__ import annotations

import cv2
import numpy as np

BLOCK = 4
"""Pixels along the side of a block of the finest level."""
EMPTY = 1e-4
KNOWN = 0.1
"""Weight from which a pixel counts as known."""
RELAXATIONS = 6
CROSS = np.array([[0, 1, 0], [1, 0, 1], [0, 1, 0]], np.float32) / 4


def spread(values: np.ndarray, known: np.ndarray) -> np.ndarray:
    """Return known values averaged over blocks of four pixels and spread smoothly over all pixels.

    Pull-push (Gortler et al. 1996, "The Lumigraph", section 3.4): known values are averaged down a
    pyramid until every pixel has some, and the way back fills each level from the coarser one. It
    approximates the membrane of Poisson editing (Perez et al. 2003), as convolution pyramids do
    (Farbman et al. 2011), in time proportional to the pixels. It is linear in the values.

    Args:
        values: float32 (H, W, C).
        known: bool (H, W).
    """
    height, width, channels = values.shape
    rows, columns = -(-height // BLOCK), -(-width // BLOCK)
    places = np.flatnonzero(known)
    blocks = (places // width // BLOCK) * columns + places % width // BLOCK
    found = values.reshape(-1, channels)[places]
    sums = [np.bincount(blocks, found[:, c], rows * columns) for c in range(channels)]
    number = np.bincount(blocks, minlength=rows * columns).astype(np.float32)
    weight = (number / BLOCK**2).reshape(rows, columns)
    total = (np.stack(sums, 1).astype(np.float32) / BLOCK**2).reshape(rows, columns, channels)
    coarse = _filled(total, weight).astype(np.float32)
    size = columns * BLOCK, rows * BLOCK
    return cv2.resize(coarse, size, interpolation=cv2.INTER_LINEAR)[:height, :width]


def _filled(known: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Return values at every pixel; ``known`` are values times weights."""
    rows, columns = weight.shape
    # A thin line keeps little of its weight at each level; it is known all the same.
    trust = np.minimum(weight / KNOWN, 1)[..., None]
    fixed = known / np.maximum(weight, EMPTY)[..., None] * trust
    if min(rows, columns) <= 2 or trust.min() >= 1:
        mean = known.sum((0, 1)) / max(float(weight.sum()), EMPTY)
        return fixed + mean * (1 - trust)
    smaller = cv2.pyrDown(known).reshape(-(-rows // 2), -(-columns // 2), -1)
    coarse = _filled(smaller, cv2.pyrDown(weight)).astype(np.float32)
    unknown = 1 - trust
    result = fixed + cv2.pyrUp(coarse, dstsize=(columns, rows)).reshape(known.shape) * unknown
    for _ in range(RELAXATIONS):
        # Towards Laplace's equation: each unknown pixel becomes the mean of its neighbours.
        result = cv2.filter2D(result, -1, CROSS, borderType=cv2.BORDER_REPLICATE)
        result = fixed + result.reshape(known.shape) * unknown
    return result
