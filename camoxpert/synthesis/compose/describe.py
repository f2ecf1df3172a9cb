"""Describe how a region looks: statistics of its colours in Lab and of its gradients.

A picture becomes a grid of cells with the means of a few planes. The features of any region are
then found from sums of cells, for windows of a background as for an object's outline.
"""

from __future__ import annotations

import math

import cv2
import numpy as np

CELLS = 16
"""Cells along the shorter side of a picture."""
MOST_CELLS = 48
"""Cells along the longer side, at most."""
CELL = 8
"""Pixels along a cell: pictures are compared at 128 pixels of their shorter side."""
DIRECTIONS = 8
PLANES = 6 + 2 + DIRECTIONS
FEATURES = 6 + 2 + DIRECTIONS
"""Numbers that describe a region: mean and deviation of L, a and b; the logarithm of the mean
gradient at two scales; the share of each of eight directions in the gradient."""
WEIGHTS = np.array([1.0] * 3 + [0.7] * 3 + [1.2] * 2 + [0.5] * DIRECTIONS, np.float32)
"""What a feature counts in a comparison, in standard deviations over all windows."""


def plane_grid(image: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Return the means of the planes over the cells of a picture, float32 (rows, columns, PLANES).

    Args:
        image: uint8 (H, W, 3) RGB.
        shape: rows and columns, as ``grid_shape`` returns them.
    """
    rows, columns = shape
    small = cv2.resize(image, (columns * CELL, rows * CELL), interpolation=cv2.INTER_AREA)
    means = [
        cv2.resize(np.ascontiguousarray(part), (columns, rows), interpolation=cv2.INTER_AREA)
        for part in np.split(_planes(small), PLANES // 4, axis=2)
    ]
    return np.concatenate(means, 2)


def grid_shape(height: int, width: int) -> tuple[int, int]:
    """Return rows and columns of the grid of a picture of this size."""
    cells = CELLS / min(height, width)
    rows, columns = (max(CELLS, min(round(side * cells), MOST_CELLS)) for side in (height, width))
    return rows, columns


def object_features(pixels: np.ndarray, side: int) -> np.ndarray:
    """Return the features of an object, float32 (FEATURES,).

    Args:
        pixels: uint8 (h, w, 4), RGB and alpha, see ``cutting.Cutout``.
        side: shorter side of the picture that it comes from, pixels; the object is described at
            the scale at which that picture would be.
    """
    scale = min(CELLS * CELL / side, 1.0)
    size = tuple(max(8, round(length * scale)) for length in pixels.shape[1::-1])
    small = cv2.resize(pixels, size, interpolation=cv2.INTER_AREA)
    weight = (small[..., 3] > 127).astype(np.float32)
    if not weight.any():
        weight = small[..., 3].astype(np.float32)
    sums = (_planes(np.ascontiguousarray(small[..., :3])) * weight[..., None]).sum((0, 1))
    return features_of(sums / weight.sum())


def features_of(means: np.ndarray) -> np.ndarray:
    """Return features from the means of planes, (..., PLANES) -> float32 (..., FEATURES)."""
    colour, squares = means[..., :3], means[..., 3:6]
    deviation = np.sqrt(np.maximum(squares - colour**2, 0))
    gradients = np.log(means[..., 6:8] + 1)
    directions = means[..., 8:]
    shares = directions / (directions.sum(-1, keepdims=True) + 1e-3)
    return np.concatenate([colour, deviation, gradients, shares], -1).astype(np.float32)


def _planes(image: np.ndarray) -> np.ndarray:
    """Return the planes at every pixel, float32 (H, W, PLANES), of which means are taken."""
    lab = cv2.cvtColor(image.astype(np.float32) / 255, cv2.COLOR_RGB2LAB)
    light = np.ascontiguousarray(lab[..., 0])
    size, angle = cv2.cartToPolar(*_gradient(light))
    slow = cv2.magnitude(*_gradient(cv2.GaussianBlur(light, (0, 0), 2.0)))
    number = (angle * np.float32(DIRECTIONS / math.pi)).astype(np.uint8) % DIRECTIONS
    planes = [lab, lab**2, size[..., None], slow[..., None]]
    planes += [(size * (number == k))[..., None] for k in range(DIRECTIONS)]
    return np.concatenate(planes, 2)


def _gradient(light: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the change per pixel to the right and down."""
    across, down = (cv2.Scharr(light, cv2.CV_32F, x, 1 - x, scale=1 / 32) for x in (1, 0))
    return across, down
