"""Tell label maps (a number for each object) from grey masks, and find their unlabelled pixels.

A label map looks like a grey mask to a rule of levels: 0, 1 and 255 are two dark levels and a white
one, yet in PASCAL VOC's masks 1 is the object and 255 the outline that nobody labelled. What tells
them apart is where the levels lie. A blurred outline passes through its grey levels, so each of
its pixels touches a darker and a brighter one; a label covers an area.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from camoxpert.errors import DataError

VOID = 127
"""Value of unlabelled pixels in a decoded mask; code that knows nothing of them sees background."""

# Levels up to the first fraction of full scale are dark, above the second one bright.
DARK, BRIGHT = 0.25, 0.75
VOC_VOID = (224, 224, 192)
"""Colour of the unlabelled pixels in PASCAL VOC's palette."""
MOST_COLOURS = 64
FEW_LEVELS = 8
# Share of a level's pixels between a darker and a brighter one from which it is an outline.
OUTLINE = 0.5
# Labels that cover less than this share of the white pixels may be specks.
SPECKS = 0.02
# The band of a trimap is grey: these fractions of full scale.
TRIMAP = (0.37, 0.63)


class _Around(NamedTuple):
    """How the white pixels lie around the labels, as shares 0..1."""

    enclosed: float
    """Of the pixels beside a label: white."""
    near: float
    """Of the white pixels: within an outline's width of a label."""


def count_levels(
    levels_HW: NDArray[np.uint8], where_HW: NDArray[np.uint8] | None = None
) -> NDArray[np.float32]:
    """Return how many pixels have each of the 256 levels, (256,), exact below 2^24 pixels a level.

    Args:
        levels_HW: grey levels, codes or indices.
        where_HW: only pixels where this is not 0 are counted; None: all.
    """
    # OpenCV 4 returns a column, OpenCV 5 one axis.
    return np.ravel(cv2.calcHist([levels_HW], [0], where_HW, [256], [0, 256])).astype(np.float32)


def label_map(levels: NDArray[Any], path: Path) -> NDArray[np.uint8] | None:
    """Return a label map as a mask of 0, VOID and 255; None for grey masks and photographs.

    Labels are objects. White beside low labels is void where it lies around them, as in PASCAL VOC.

    Args:
        levels: (H, W), any integer type, from a lossless file.
        path: file, for messages.

    Raises:
        DataError: labels beside white areas, which may be void or another object.
    """
    coded = _codes(levels)
    if coded is None:
        return None
    codes, values = coded
    present = np.flatnonzero(count_levels(codes))
    full = 65535 if values[present[-1]] > 255 else 255
    middle = [code for code in present if 0 < values[code] < full]
    with_background = bool(values[present[0]] == 0)
    if values[present[0]] < 0 or not middle or (with_background and len(present) == 2):
        return None
    if not _are_areas(codes, middle):
        return None
    ids = [code for code in middle if values[code] <= BRIGHT * full]
    marks = [code for code in present if values[code] > BRIGHT * full]
    if not ids:
        return None
    if not marks:
        return _painted(codes, ids, []) if with_background else None
    meaning = _meaning(codes, values, ids, marks, full=full, with_background=with_background)
    if meaning == "unclear":
        shown = ", ".join(f"{values[code]:g}" for code in present[:6])
        raise DataError(
            f"The mask {path} looks like a label map ({shown}{', ...' * (len(present) > 6)}), but "
            f"{full} may be unlabelled pixels or an object there: it covers areas that do not "
            f"outline the other labels. Save objects as 1 and the rest as 0, or as 0 and 255."
        )
    if meaning == "void":
        return _painted(codes, ids, marks)
    return _painted(codes, ids + marks, []) if meaning == "objects" else None


def colour_labels(planes: NDArray[Any]) -> NDArray[np.uint8] | None:
    """Return the labels of a map that was saved in colours; None for other pictures.

    Args:
        planes: (H, W, 3 or 4) of a lossless file.

    Returns:
        uint8 (H, W): 0 black, 1 a colour, 254 white, 255 the void colour of PASCAL VOC.
    """
    colours = planes[..., :3]
    if planes.dtype != np.uint8 or (colours == colours[..., :1]).all():
        return None
    packed = colours.astype(np.uint32) @ np.array([1 << 16, 1 << 8, 1], np.uint32)
    used = np.unique(packed)
    if not 2 < len(used) <= MOST_COLOURS or used[0] != 0:
        return None
    strongest = np.ascontiguousarray(colours.max(axis=2))
    middle = [level for level in np.unique(strongest) if 0 < level < 255]
    if not _are_areas(strongest, middle):
        return None
    void = (VOC_VOID[0] << 16) + (VOC_VOID[1] << 8) + VOC_VOID[2]
    labels = (packed > 0).astype(np.uint8)
    labels[packed == 0xFFFFFF] = 254
    labels[packed == void] = 255
    return labels


def has_void(mask: NDArray[Any]) -> bool:
    """Return whether a decoded mask has unlabelled pixels."""
    return bool(cv2.countNonZero(cv2.inRange(mask, VOID, VOID)))


def split_void(mask: NDArray[Any]) -> tuple[NDArray[np.bool_], NDArray[np.bool_] | None]:
    """Return where a decoded mask has the object, and where void; None if it has none."""
    return mask > VOID, (mask == VOID) if has_void(mask) else None


def void_planes(mask: NDArray[Any]) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Return the planes of objects and of void of a decoded mask, 0 and 255, to be resampled."""
    planes = ((mask == value).view(np.uint8) * np.uint8(255) for value in (255, VOID))
    objects, void = planes
    return objects, void


def join_void(objects: NDArray[np.uint8], void: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return a mask of 0, VOID and 255 from resampled planes of objects and of void, 0..255 each.

    A pixel that is void by half is void. Otherwise the majority of its labelled part decides;
    without void that is the usual cut at one half.
    """
    labelled = 2 * objects.astype(np.int16) + void > 254
    joined = np.where(labelled, np.uint8(255), np.uint8(0))
    joined[void > 127] = VOID
    return joined


def _codes(levels: NDArray[Any]) -> tuple[NDArray[np.uint8], NDArray[Any]] | None:
    """Return levels as uint8 codes in their order, and the value of each code."""
    if levels.dtype == np.uint8:
        return np.ascontiguousarray(levels), np.arange(256)
    if levels.dtype == bool or not np.issubdtype(levels.dtype, np.integer):
        return None
    values, codes = np.unique(levels, return_inverse=True)
    if len(values) > 256:
        return None
    return codes.reshape(levels.shape).astype(np.uint8), values


def _are_areas(codes: NDArray[np.uint8], middle: list[Any]) -> bool:
    """Return whether the middle levels cover areas, which blur and antialiasing do not."""
    if not middle:
        return True
    between = _between(codes, 3)
    counts = count_levels(codes)[middle]
    ramps = count_levels(codes, between)[middle]
    # Each level has a vote: a label map has few outline levels, a noisy or blurred mask dozens.
    if np.mean(ramps < OUTLINE * counts) < 0.75:
        return False
    if len(middle) <= FEW_LEVELS:
        return True
    # A gentle slope has areas of one level as well, but its neighbours differ by one or two.
    steps = np.abs(np.diff(codes.astype(np.int16), axis=1))
    return bool(np.median(steps[steps > 0]) > 2) if steps.any() else True


def _between(codes: NDArray[np.uint8], side: int) -> NDArray[np.uint8]:
    """Return where a pixel has both a darker and a brighter one within a square window."""
    window = np.ones((side, side), np.uint8)
    darker, brighter = cv2.erode(codes, window) < codes, cv2.dilate(codes, window) > codes
    return (darker & brighter).view(np.uint8)


def _meaning(
    codes: NDArray[np.uint8],
    values: NDArray[Any],
    ids: list[Any],
    marks: list[Any],
    *,
    full: int,
    with_background: bool,
) -> str:
    """Return what white is beside labels: void, objects, unclear, or grey (no label map at all)."""
    labelled, white = (np.isin(codes, part).view(np.uint8) for part in (ids, marks))
    around = _around(labelled, white)
    low = values[ids[-1]] <= DARK * full
    if not with_background:
        return "void" if low and around.near >= 0.9 else "grey"
    num_labelled, num_white = cv2.countNonZero(labelled), cv2.countNonZero(white)
    if num_labelled < SPECKS * num_white:
        # Stray pixels of a drawing tool; but a solid patch within white may be the one labelled
        # object of a picture that is void for the most part.
        solid = cv2.countNonZero(cv2.erode(labelled, np.ones((3, 3), np.uint8)))
        return "unclear" if solid and around.enclosed >= 0.9 else "grey"
    if around.enclosed >= 0.9 and (low or around.near >= 0.25):
        return "void"
    # The levels of an outline that was enlarged cover small areas, two or three pixels wide.
    outline = cv2.countNonZero(_between(codes, 5) & labelled) >= OUTLINE * num_labelled
    of_full_scale = bool(values[marks[-1]] == full)
    mostly = low and of_full_scale and around.enclosed >= 0.5 and around.near >= 0.5
    thin = (low or not of_full_scale) and around.enclosed >= 0.25 and around.near >= 0.9
    if (mostly or thin) and not outline:
        return "void"
    trimap = len(ids) == 1 and TRIMAP[0] * full < values[ids[0]] < TRIMAP[1] * full
    if outline or (trimap and of_full_scale):
        return "grey"
    return "unclear" if of_full_scale else "objects"


def _around(labelled: NDArray[np.uint8], white: NDArray[np.uint8]) -> _Around:
    grown: NDArray[Any] = cv2.dilate(labelled, np.ones((3, 3), np.uint8))
    beside = grown & ~labelled & 1
    reach = max(6.0, 0.01 * float(np.hypot(*labelled.shape)))
    distance = cv2.distanceTransform(labelled ^ 1, cv2.DIST_L2, cv2.DIST_MASK_5)
    within: NDArray[Any] = cv2.inRange(distance, 0, reach)
    near = cv2.countNonZero(within & white)
    num_beside = cv2.countNonZero(beside)
    return _Around(
        enclosed=cv2.countNonZero(beside & white) / num_beside if num_beside else 0.0,
        near=near / cv2.countNonZero(white),
    )


def _painted(codes: NDArray[np.uint8], objects: list[Any], void: list[Any]) -> NDArray[np.uint8]:
    table = np.zeros(256, np.uint8)
    table[objects], table[void] = 255, VOID
    painted: NDArray[np.uint8] = np.ascontiguousarray(cv2.LUT(codes, table))
    return painted
