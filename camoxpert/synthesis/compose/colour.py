"""Give an object the colours of its surroundings."""

from __future__ import annotations

import cv2
import numpy as np

SPREAD = (0.4, 2.5)
"""Least and largest factor of a colour's deviation: flat surroundings do not erase an object."""


def to_lab(rgb: np.ndarray) -> np.ndarray:
    """Return Lab of RGB in 0..1, float32 (..., 3): L in 0..100."""
    return cv2.cvtColor(rgb, cv2.COLOR_RGB2LAB)


def to_rgb(lab: np.ndarray) -> np.ndarray:
    """Return RGB in 0..1 of Lab, float32; colours that no screen shows are cut."""
    return np.clip(cv2.cvtColor(lab, cv2.COLOR_LAB2RGB), 0, 1)


def transfer(
    lab: np.ndarray, inside: np.ndarray, surroundings: np.ndarray, strength: float
) -> np.ndarray:
    """Move the colours of an object towards those of its surroundings.

    Mean and deviation of each channel of Lab are matched (Reinhard et al. 2001, "Color Transfer
    between Images") and the result is mixed with the original.

    Args:
        lab: float32 (H, W, 3), the object and around it.
        inside: float32 (N, 3), its colours.
        surroundings: float32 (M, 3), colours around it.
        strength: 0 keeps the object's colours, 1 gives it those of its surroundings.
    """
    if strength == 0 or not len(inside) or not len(surroundings):
        return lab
    own, other = inside.mean(0), surroundings.mean(0)
    factor = np.clip(surroundings.std(0) / np.maximum(inside.std(0), 1.0), *SPREAD)
    moved = (lab - own) * factor + other
    return lab + np.float32(strength) * (moved - lab)
