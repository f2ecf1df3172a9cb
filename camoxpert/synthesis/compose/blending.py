"""Lay an object over a background: its colours moved, its edge soft, its gradients kept."""

from __future__ import annotations

import cv2
import numpy as np

from camoxpert.synthesis.compose.colour import to_lab, to_rgb, transfer
from camoxpert.synthesis.compose.pyramid import fill_gaps
from camoxpert.synthesis.compose.records import Look

AROUND = 0.35
"""Width of the surroundings whose colours count, as a share of the root of the object's area."""


def blended(view: np.ndarray, pixels: np.ndarray, alpha: np.ndarray, look: Look) -> np.ndarray:
    """Return the picture with the object in it.

    Args:
        view: float32 (H, W, 3), RGB 0..1, the background.
        pixels: float32 (H, W, 3), RGB 0..1, the object; colours continue outside of it.
        alpha: float32 (H, W), its coverage.
        look: how it is fitted in.
    """
    inside = alpha > 0.5
    if not inside.any():
        return view.copy()
    around = surroundings(inside)
    lab, behind = to_lab(pixels), to_lab(view)
    moved = transfer(lab, lab[inside], behind[around], look.colour)
    if look.gradient:
        moved = moved + np.float32(look.gradient) * membrane(behind - moved, inside)
    soft = soft_edge(alpha, look.feather)[..., None]
    painted: np.ndarray = view + (to_rgb(moved) - view) * soft
    return painted


def surroundings(inside: np.ndarray) -> np.ndarray:
    """Return the ring around an object, bool (H, W); all of the rest where there is no ring."""
    reach = max(3, round(AROUND * float(inside.sum()) ** 0.5))
    disc = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * reach + 1,) * 2)
    ring = (cv2.dilate(inside.astype(np.uint8), disc) > 0) & ~inside
    return ring if ring.any() else np.ones_like(inside)


def membrane(difference: np.ndarray, inside: np.ndarray) -> np.ndarray:
    """Return the difference at an object's outline, spread smoothly over its inside.

    Adding it to an object makes it meet the background at the outline with its gradients kept:
    the correction of Poisson image editing (Perez et al. 2003), which is the solution of Laplace's
    equation, here approximated by ``fill_gaps``.

    Args:
        difference: float32 (H, W, 3), background minus object.
        inside: bool (H, W).
    """
    cross = cv2.getStructuringElement(cv2.MORPH_CROSS, (3, 3))
    outline = (cv2.dilate(inside.astype(np.uint8), cross) > 0) & ~inside
    if not outline.any():
        return np.zeros_like(difference)
    # Single pixels of grass must not paint streaks across the object.
    smooth = cv2.GaussianBlur(difference, (0, 0), 2.0)
    return fill_gaps(smooth, outline.astype(np.float32))


def soft_edge(alpha: np.ndarray, sigma: float) -> np.ndarray:
    """Return alpha with a softer edge; its contour of one half stays where it is on straight edges."""
    return cv2.GaussianBlur(alpha, (0, 0), sigma, borderType=cv2.BORDER_REPLICATE)
