"""Cut objects out of pictures, with soft edges that carry nothing of the old background."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from PIL import Image, ImageOps

from camoxpert.data.files.image_io import UNLIMITED, probe
from camoxpert.data.files.png import require_checksums
from camoxpert.errors import DataError
from camoxpert.synthesis.compose.reading import read_masked

MARGIN = 4
"""Pixels around a cut-out's box, so that its soft edge has room."""
RIM = 1
"""Width in pixels of the edge whose colours are mixed with the old background."""
NEARBY = 0.02
"""Parts closer than this share of the picture's shorter side belong to one object."""
SEPARATE = 0.1
"""Share of the largest object from which another part is an object of its own."""
TOUCHES = 0.05
"""Share of an object's box along a picture's edge from which it is cut off by that edge."""
LARGEST = 1024
"""Pixels of a picture's shorter side from which it may be decoded smaller."""
SOFT = 0.6
"""Sigma of the Gaussian that softens a hard outline; the contour of 0.5 stays in its place."""


@dataclass(frozen=True)
class Cutout:
    """An object without its background.

    Attributes:
        pixels: uint8 (h, w, 4), RGB and alpha. Where alpha is 0 the colours continue the object's.
        sides: whether the picture's left, top, right and bottom edge cuts the object off.
    """

    pixels: np.ndarray
    sides: tuple[bool, bool, bool, bool]


def cut_objects(
    image: np.ndarray, mask: np.ndarray, *, rim: int = RIM, part: int | None = None
) -> list[Cutout]:
    """Cut every object of a picture, the largest first; with ``part`` only that one.

    Parts of a mask that are nearly connected are one object: a branch in front of an animal must
    not make two of it. Small parts far from all others belong to the nearest object.

    Args:
        image: uint8 (H, W, 3) RGB.
        mask: uint8 (H, W), 255 on objects; other values are not cut.
        rim: see ``clean_edge``.

    Returns:
        [] for an empty mask.
    """
    cutouts = []
    parts = split_objects(mask == 255)
    for one in parts if part is None else parts[part : part + 1]:
        top, left, bottom, right = box = box_of(one)
        sides = _sides(one, box)
        margins = [(MARGIN, MARGIN), (MARGIN, MARGIN)]
        hard = np.pad(one[top:bottom, left:right], margins)
        # Where the picture ends the object continues: its cut must not become a soft edge.
        _continue(hard, sides)
        alpha = cv2.GaussianBlur(hard.astype(np.float32), (0, 0), SOFT)
        rgb = np.pad(image[top:bottom, left:right], [*margins, (0, 0)], "edge")
        levels = np.rint(alpha * 255).astype(np.uint8)
        cutouts.append(Cutout(np.dstack([clean_edge(rgb, hard, rim=rim), levels]), sides))
    return cutouts


def split_objects(mask: np.ndarray) -> list[np.ndarray]:
    """Divide a mask (H, W), bool, into its objects, the largest first; see ``cut_objects``."""
    if not mask.any():
        return []
    binary = mask.astype(np.uint8)
    reach = max(1, round(NEARBY * min(mask.shape) / 2))
    disc = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * reach + 1,) * 2)
    number, groups = cv2.connectedComponents(cv2.dilate(binary, disc))
    labels = np.where(mask, groups, 0)
    areas = np.bincount(labels.ravel(), minlength=number)[1:]
    large = 1 + np.flatnonzero(areas >= SEPARATE * areas.max())
    large = large[np.argsort(-areas[large - 1], kind="stable")]
    if len(large) == 1:
        return [mask]
    if len(large) < number - 1:
        # The nearest pixel of a large object says to which of them a small part belongs.
        labels = np.where(mask, labels.ravel()[nearest_pixel(np.isin(labels, large))], 0)
    return [labels == label for label in large]


def read_cutout(path: str | Path, *, rim: int = RIM) -> Cutout:
    """Read an RGBA picture as a cut-out.

    Raises:
        DataError: unreadable, without transparency, or without a pixel that is more than half
            opaque.
    """
    probe(path, max_pixels=UNLIMITED)
    try:
        require_checksums(Path(path))
        with Image.open(path) as picture:
            if "A" not in picture.getbands() and "transparency" not in picture.info:
                raise DataError(
                    f"{path} has no transparency, so its object cannot be told from its "
                    "background. Save it as RGBA, or give the folder of its masks."
                )
            pixels = np.asarray(ImageOps.exif_transpose(picture).convert("RGBA"))
    except (OSError, SyntaxError, ValueError) as error:
        raise DataError(f"{path} cannot be read: {error}.") from error
    alpha = pixels[..., 3]
    if not (alpha > 127).any():
        raise DataError(f"{path} is transparent everywhere: it holds no object.")
    if (alpha > 127).all():
        raise DataError(f"{path} is opaque everywhere: it holds no outline of an object.")
    top, left, bottom, right = box_of(alpha > 0)
    sides = _sides(alpha > 127, (top, left, bottom, right))
    margins = [(MARGIN, MARGIN), (MARGIN, MARGIN)]
    soft = np.pad(alpha[top:bottom, left:right], margins)
    _continue(soft, sides)
    rgb = np.pad(pixels[top:bottom, left:right, :3], [*margins, (0, 0)], "edge")
    return Cutout(np.dstack([clean_edge(rgb, soft > 127, rim=rim), soft]), sides)


def read_objects(
    source: str | Path, mask: str | Path = "", *, part: int | None = None
) -> tuple[list[Cutout], tuple[int, int]]:
    """Read a picture and cut its objects, or object ``part``; without a mask it is RGBA.

    Returns:
        The objects, and height and width of the picture in their pixels, (0, 0) for RGBA. Large
        photographs are reduced first: objects are never needed at their full size.

    Raises:
        DataError: a file is missing or damaged, or an RGBA picture holds no object.
    """
    if not mask:
        return [read_cutout(source)], (0, 0)
    image, found = read_masked(source, mask, at_least=LARGEST)
    assert found is not None
    height, width = found.shape
    return cut_objects(image, found, part=part), (height, width)


def clean_edge(rgb: np.ndarray, solid: np.ndarray, *, rim: int = RIM) -> np.ndarray:
    """Replace colours mixed with the old background by those of the object's inside.

    The outermost ``rim`` pixels of an object and everything outside continue the colours within,
    so that a soft edge laid over another background shows no halo of the old one.

    Args:
        rgb: uint8 (H, W, 3).
        solid: (H, W), bool, the object.
        rim: pixels.

    Returns:
        uint8 (H, W, 3), equal to ``rgb`` inside of the rim.
    """
    core = solid
    if rim:
        cross = cv2.getStructuringElement(cv2.MORPH_CROSS, (3, 3))
        # Beyond the array the object is taken to continue: its cut is no edge.
        core = cv2.erode(solid.astype(np.uint8), cross, iterations=rim) > 0
    # Limbs thinner than the rim keep what they have.
    kept = core if core.any() else solid
    thin = solid & ~_near(kept, 2 * rim + 1)
    kept = kept | thin
    return rgb.reshape(-1, 3)[nearest_pixel(kept)]


def nearest_pixel(mask: np.ndarray) -> np.ndarray:
    """Return the flat index of the nearest pixel of a mask for every pixel, (H, W)."""
    _, labels = cv2.distanceTransformWithLabels(
        (~mask).view(np.uint8), cv2.DIST_L2, 5, labelType=cv2.DIST_LABEL_PIXEL
    )
    positions = np.zeros(int(labels.max()) + 1, np.intp)
    where = np.flatnonzero(mask)
    positions[labels.ravel()[where]] = where
    return positions[labels]


def _near(mask: np.ndarray, reach: int) -> np.ndarray:
    disc = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * reach + 1,) * 2)
    return cv2.dilate(mask.astype(np.uint8), disc) > 0


def box_of(mask: np.ndarray) -> tuple[int, int, int, int]:
    """Return top, left, bottom and right of the box around a mask; the latter two are excluded."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return int(rows[0]), int(columns[0]), int(rows[-1]) + 1, int(columns[-1]) + 1


def _sides(part: np.ndarray, box: tuple[int, int, int, int]) -> tuple[bool, bool, bool, bool]:
    """Return which edges of the picture cut an object off: left, top, right, bottom."""
    height, width = box[2] - box[0], box[3] - box[1]
    edges = ((part[:, 0], height), (part[0], width), (part[:, -1], height), (part[-1], width))
    left, top, right, bottom = (
        bool(edge.sum() >= max(3, TOUCHES * length)) for edge, length in edges
    )
    return left, top, right, bottom


def _continue(alpha: np.ndarray, sides: tuple[bool, bool, bool, bool]) -> None:
    """Repeat the outermost lines of a padded cut-out beyond the sides that cut it, in place."""
    left, top, right, bottom = sides
    if left:
        alpha[:, :MARGIN] = alpha[:, MARGIN : MARGIN + 1]
    if right:
        alpha[:, -MARGIN:] = alpha[:, -MARGIN - 1 : -MARGIN]
    if top:
        alpha[:MARGIN] = alpha[MARGIN]
    if bottom:
        alpha[-MARGIN:] = alpha[-MARGIN - 1]
