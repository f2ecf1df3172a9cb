"""Fill gaps smoothly: values known at some pixels are spread to all others."""

from __future__ import annotations

import cv2
import numpy as np

EMPTY = 1e-4


def fill_gaps(values: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Return values that equal the known ones and pass smoothly between them.

    Pull-push (Gortler et al. 1996, "The Lumigraph", section 3.4): known values are averaged down a
    pyramid until every pixel has some, and the way back fills each level from the coarser one. It
    approximates the membrane of Poisson editing (Perez et al. 2003), as convolution pyramids do
    (Farbman et al. 2011), in time proportional to the pixels.

    Args:
        values: float32 (H, W, C).
        weight: float32 (H, W), 0 (unknown) to 1 (known).
    """
    height, width = weight.shape
    if min(height, width) <= 2 or weight.min() >= 1 - EMPTY:
        total = max(float(weight.sum()), EMPTY)
        mean = (values * weight[..., None]).sum((0, 1)) / total
        return values * weight[..., None] + mean * (1 - weight[..., None])
    premultiplied = np.dstack([values * weight[..., None], weight])
    small = cv2.pyrDown(premultiplied)
    share = small[..., -1:]
    coarse = fill_gaps(small[..., :-1] / np.maximum(share, EMPTY), np.minimum(share[..., 0] * 4, 1))
    finer = cv2.pyrUp(coarse.astype(np.float32), dstsize=(width, height))
    finer = finer.reshape(values.shape)
    return values * weight[..., None] + finer * (1 - weight[..., None])
