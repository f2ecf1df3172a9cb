"""Lay an object over a background: its colours moved, its edge soft, its gradients kept."""

from __future__ import annotations

import math
from dataclasses import dataclass

import cv2
import numpy as np

from camoxpert.synthesis.compose.colour import colour_map
from camoxpert.synthesis.compose.pyramid import spread
from camoxpert.synthesis.compose.records import Look

AROUND = 0.35
"""Width of the surroundings whose colours count, as a share of the root of the object's area."""
LEAST_CONTRAST = 0.5
"""Smallest factor by which an object's contrast is lowered."""
SAMPLES = 2000
"""Most pixels whose colours stand for those of a region."""
BLURS = (0.6, 0.9, 1.3, 1.8, 2.5)
"""Sigmas of which one puts an object out of focus like its surroundings."""
SHARPER = 1.15
"""Factor from which an object is sharper than its surroundings."""


@dataclass(frozen=True)
class Scene:
    """An object in front of its background, with what every candidate needs.

    Attributes:
        view: float32 (H, W, 3), RGB 0..1, the background.
        pixels: float32 (H, W, 3), RGB 0..1, the object, whose colours continue outside of it.
        coverage: float32 (H, W), of the object.
        inside, around: float32 (N, 3), colours of the object and of its surroundings, a sample.
        core: places of the sample of the object, indices into its pixels.
        membranes: the background's and the object's colours at the outline, spread over the
            inside, float32 (H, W, 3) each; None if no candidate needs them.
    """

    view: np.ndarray
    pixels: np.ndarray
    coverage: np.ndarray
    inside: np.ndarray
    around: np.ndarray
    core: np.ndarray
    membranes: tuple[np.ndarray, np.ndarray] | None


def scene_of(
    view: np.ndarray,
    pixels: np.ndarray,
    coverage: np.ndarray,
    around: np.ndarray,
    *,
    gradient: bool,
) -> Scene:
    """Return a scene; see there. ``gradient``: a candidate is blended in the gradient domain."""
    inside = coverage > 0.5
    both = (membrane(view, inside), membrane(pixels, inside)) if gradient else None
    core = sample(inside)
    colours = pixels.reshape(-1, 3)[core]
    return Scene(view, pixels, coverage, colours, around, core, both)


def blended(scene: Scene, look: Look) -> np.ndarray:
    """Return the background with the object in it, float32 (H, W, 3), RGB 0..1.

    Everything but the last step is linear in the colours, so the membranes of background and
    object, found once, serve candidates of every strength.
    """
    matrix, offset = colour_map(scene.inside, scene.around, look.colour)
    moved = _mapped(scene.pixels, matrix, offset)
    if look.gradient and scene.membranes is not None:
        behind, own = scene.membranes
        moved += np.float32(look.gradient) * (behind - _mapped(own, matrix, offset))
    _fit_range(moved, scene.core)
    np.clip(moved, 0, 1, out=moved)
    moved -= scene.view
    # Of three equal planes: numpy takes 1.7 times as long to repeat one along a new axis.
    moved *= cv2.merge([scene.coverage] * 3)
    moved += scene.view
    return moved


def sample(where: np.ndarray) -> np.ndarray:
    """Return indices of at most ``SAMPLES`` pixels of a mask, evenly spread."""
    found = np.flatnonzero(where)
    return found[:: -(-len(found) // SAMPLES) or 1]


def _fit_range(colours: np.ndarray, core: np.ndarray) -> None:
    """Lower an object's contrast, in place, where its lights or shadows would be cut off."""
    if not len(core):
        return
    values = np.sort(colours.reshape(-1, 3)[core], axis=0)
    middle, few = values[len(values) // 2], len(values) // 50
    low, high = values[few], values[-1 - few]
    factor = min(
        float(((1 - middle) / np.maximum(high - middle, 1e-6)).min()),
        float((middle / np.maximum(middle - low, 1e-6)).min()),
    )
    if factor < 1:
        colours -= middle
        colours *= np.float32(max(factor, LEAST_CONTRAST))
        colours += middle


def surroundings(inside: np.ndarray) -> np.ndarray:
    """Return the ring around an object, bool (H, W); everything else where there is no ring."""
    ring = ring_around(inside, max(3.0, AROUND * math.sqrt(float(inside.sum()))))
    return ring if ring.any() else np.ones_like(inside)


def ring_around(inside: np.ndarray, width: float) -> np.ndarray:
    """Return which pixels lie outside of an object and at most ``width`` from it, bool (H, W)."""
    distance = cv2.distanceTransform((~inside).view(np.uint8), cv2.DIST_L2, 3)
    return (distance > 0) & (distance <= width)


def membrane(colours: np.ndarray, inside: np.ndarray) -> np.ndarray:
    """Return the colours at an object's outline, spread smoothly over its inside.

    Adding the membrane of (background - object) to an object makes it meet the background at its
    outline with its gradients kept: the correction of Poisson image editing (Perez et al. 2003),
    which is the solution of Laplace's equation, here approximated by ``spread``. OpenCV's
    seamlessClone was no help: it shrinks the mask by its own erosion, so that thin limbs vanish
    whose pixels stay labelled, changes pixels outside of the mask, and knows no strengths.

    Args:
        colours: float32 (H, W, C).
        inside: bool (H, W).
    """
    cross = cv2.getStructuringElement(cv2.MORPH_CROSS, (3, 3))
    outline = (cv2.dilate(inside.view(np.uint8), cross) > 0) & ~inside
    if not outline.any():
        return np.zeros_like(colours)
    return spread(colours, outline)


def focus(scene: np.ndarray, around: np.ndarray, pixels: np.ndarray, coverage: np.ndarray) -> float:
    """Return the sigma of the blur that makes an object no sharper than its surroundings, or 0.

    Sharpness is the ratio of the mean gradient to that after a Gaussian blur, which hardly depends
    on contrast.

    Args:
        scene: uint8 (H, W, 3), the background.
        around: bool (H, W), the surroundings in it.
        pixels: float32 (h, w, 3), RGB 0..1, the object.
        coverage: float32 (h, w).
    """
    core = cv2.erode((coverage > 0.5).view(np.uint8), np.ones((5, 5), np.uint8)) > 0
    if core.sum() < 50:
        return 0.0
    limit = SHARPER * _sharpness(_grey(scene).astype(np.float32), around)
    grey = _grey(pixels) * 255
    for sigma in (0.0, *BLURS):
        soft = cv2.GaussianBlur(grey, (0, 0), sigma) if sigma else grey
        if _sharpness(soft, core) <= limit:
            return sigma
    return BLURS[-1]


def soft_edge(alpha: np.ndarray, sigma: float) -> np.ndarray:
    """Return alpha with a softer edge; its contour of one half stays where it is straight."""
    return cv2.GaussianBlur(alpha, (0, 0), sigma, borderType=cv2.BORDER_REPLICATE)


def _mapped(colours: np.ndarray, matrix: np.ndarray, offset: np.ndarray) -> np.ndarray:
    return cv2.transform(np.ascontiguousarray(colours), np.column_stack([matrix, offset]))


def _grey(rgb: np.ndarray) -> np.ndarray:
    return cv2.cvtColor(rgb, cv2.COLOR_RGB2GRAY)


def _sharpness(grey: np.ndarray, where: np.ndarray) -> float:
    coarse = cv2.GaussianBlur(grey, (0, 0), 1.5)
    fine, slow = (
        cv2.magnitude(cv2.Sobel(g, cv2.CV_32F, 1, 0), cv2.Sobel(g, cv2.CV_32F, 0, 1))[where].mean()
        for g in (grey, coarse)
    )
    return float(fine / (slow + 0.02))
