"""Turn the levels of a mask file into 0, VOID and 255, or raise an error if it is not a mask.

Every rule here exists because a common encoding would otherwise read as all background or all
object, and a run would train on it without a warning.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from camoxpert.data.files.labels import (
    BRIGHT,
    DARK,
    VOC_VOID,
    VOID,
    colour_labels,
    count_levels,
    has_void,
    label_map,
)
from camoxpert.data.files.png import wide_planes
from camoxpert.errors import DataError

# Formats whose small values may be noise of the compression.
LOSSY = ("JPEG", "MPO", "WEBP", "AVIF", "JPEG2000")
# Values that a mask without any background may consist of.
FULL_LEVELS = (1, 255, 65535)


def binary_mask(image: Image.Image, path: Path) -> np.ndarray:
    """Return the mask stored in a loaded picture.

    Args:
        image: decoded, not yet turned by EXIF.
        path: its file, for messages and for the 16-bit planes that Pillow cuts to 8 bits.

    Returns:
        uint8 (H, W), 0 and 255; VOID where a label map says that nobody labelled the pixel.

    Raises:
        DataError: the picture is not a mask.
    """
    stored = stored_levels(image, path)
    labels = stored.labels(path)
    return labels if labels is not None else cut_levels(stored.levels, path, lossy=stored.lossy)


@dataclass(frozen=True)
class StoredLevels:
    """The channel of a picture that holds the mask, as it is stored.

    Attributes:
        levels: (H, W), bool or any number type.
        lossy: small values may be noise of the file's compression rather than labels.
        void: level 255 is known to be void, by the colour that PASCAL VOC gives it.
    """

    levels: np.ndarray
    lossy: bool = False
    void: bool = False

    def labels(self, path: Path) -> np.ndarray | None:
        """Return a label map as uint8 (H, W) of 0, VOID and 255; None for other masks.

        Raises:
            DataError: a label map whose void cannot be told from its objects, or without a label.
        """
        if self.void:
            if (self.levels == 255).all():
                raise DataError(f"No pixel of the mask {path} is labelled: it is void everywhere.")
            table = np.full(256, 255, np.uint8)
            table[0], table[255] = 0, VOID
            return np.ascontiguousarray(cv2.LUT(self.levels, table))
        return None if self.lossy else label_map(self.levels, path)


def stored_levels(image: Image.Image, path: Path) -> StoredLevels:
    """Return the channel that holds the mask.

    Label maps in colours give labels: 1 for a colour, 254 for white, 255 for PASCAL VOC's void.
    """
    lossy = image.format in LOSSY
    if image.mode == "P":
        levels = _palette_levels(image, path)
        void = levels.dtype == np.uint8 and tuple(_palette(image)[255]) == VOC_VOID
        return StoredLevels(levels, void=void and bool((levels == 255).any()))
    if image.mode == "1":
        # Pillow's own array holds 255 for True, which shows in every view of it as bytes.
        return StoredLevels(np.asarray(image.convert("L")) > 127)
    if image.mode == "L" or image.mode.startswith(("I", "F")):
        return StoredLevels(np.asarray(image), lossy)
    planes = wide_planes(path) if image.format == "PNG" else None
    if planes is None:
        has_alpha = image.mode in ("RGBA", "LA", "PA")
        planes = np.asarray(image.convert("RGBA" if has_alpha else "RGB"))
    labels = None if lossy else colour_labels(planes)
    if labels is not None:
        return StoredLevels(labels, void=bool((labels == 255).any()))
    return StoredLevels(_strongest(planes, path), lossy)


def cut_levels(levels: np.ndarray, path: Path, *, lossy: bool) -> np.ndarray:
    """Turn levels into 0 and 255, or raise a DataError that names them.

    Args:
        levels: (H, W), not a label map.
        path: file, for messages.
        lossy: the file's small values are noise rather than labels.
    """
    if levels.dtype == bool:
        return np.where(levels, np.uint8(255), np.uint8(0))
    if levels.dtype == np.uint8:
        # The rule depends on levels only: apply it to 256 of them instead of a million pixels.
        counts = count_levels(levels)
        table = _cut(np.arange(256, dtype=np.uint8), counts, path, lossy=lossy)
        return np.ascontiguousarray(cv2.LUT(levels, table))
    return _cut(levels, None, path, lossy=lossy)


def _cut(levels: np.ndarray, counts: np.ndarray | None, path: Path, *, lossy: bool) -> np.ndarray:
    """Cut levels of any shape; ``counts``: pixels of each level, where the levels are a table."""
    values = np.unique(levels) if counts is None else np.flatnonzero(counts)
    if len(values) == 1 and (values[0] == 0 or values[0] in FULL_LEVELS):
        return np.full(levels.shape, 255 if values[0] else 0, np.uint8)
    if len(values) == 2 and values[0] == 0 and not lossy:
        # Labels of any kind, 0/1 and 0/38 as well as 0/255.
        return np.where(levels == 0, np.uint8(0), np.uint8(255))
    top = 65535 if values[-1] > 255 else 255
    dark, bright = levels < top * DARK, levels > top * BRIGHT
    # Blur from JPEG or antialiasing touches outlines only; a photograph is grey all over.
    share_dark, share_bright = (np.average(part, weights=counts) for part in (dark, bright))
    between = 1.0 - (share_dark + share_bright)
    all_object = values[0] > top * 0.97
    if between > 0.1 or not share_bright or not (share_dark or all_object):
        raise DataError(_refusal(values, float(between), path))
    return np.where(levels > top * (128 / 255), np.uint8(255), np.uint8(0))


def _palette(image: Image.Image) -> np.ndarray:
    """Return the colours of a palette, uint8 (256, 3); entries that it lacks are black."""
    table = np.zeros((256, 3), np.uint8)
    entries = np.array(image.getpalette("RGB") or [], np.uint8).reshape(-1, 3)
    table[: len(entries)] = entries
    return table


def _palette_levels(image: Image.Image, path: Path) -> np.ndarray:
    """Read a palette by its colours where they are grey, otherwise by its indices.

    Grey palettes come from programs that reduce colours, in any order: white may well be entry 0.
    Coloured ones are label maps, whose background is black, or entry 0. Indices also count where
    the colours do not tell a label from the background: programs that write label maps without a
    palette make every entry black.
    """
    indices: np.ndarray = np.asarray(image)
    used = np.flatnonzero(count_levels(indices))
    table = _palette(image)
    colours = table[used]
    alike = (colours == colours[0]).all()
    if "transparency" in image.info and alike:
        planes = np.asarray(image.convert("RGBA"))
        if planes[..., 3].min() < planes[..., 3].max():
            return _strongest(planes, path)
    if _hides_labels(table, used):
        return indices
    if (colours == colours[:, :1]).all():
        grey: np.ndarray = table[indices][..., 0]
        return grey
    if len(used) > 2 or (used[-1] == 255 and tuple(table[255]) == VOC_VOID):
        return indices
    black = used[(colours == 0).all(axis=1)]
    if len(black) or used[0] == 0:
        indices = (indices != (black[0] if len(black) else 0)).astype(np.uint8)
    return indices


def _hides_labels(table: np.ndarray, used: np.ndarray) -> bool:
    """Return whether a used entry other than 0 has the colour of entry 0, the background.

    Where the background is not black, that is so only if all used entries look alike: a program
    that reduces colours may well write white twice.
    """
    same = (table[used] == table[0]).all(axis=1) & (used > 0)
    return bool(same.any()) and bool((table[0] == 0).all() or (same | (used == 0)).all())


def _strongest(planes: np.ndarray, path: Path) -> np.ndarray:
    """Return the strongest colour channel, or alpha where only alpha varies."""
    colour: np.ndarray = planes[..., :3].max(axis=2)
    if colour.min() < colour.max():
        return colour
    if planes.shape[2] == 4 and planes[..., 3].min() < planes[..., 3].max():
        alpha: np.ndarray = planes[..., 3]
        return alpha
    if (planes[..., :3] != planes[:1, :1, :3]).any():
        # For example red on white: equally strong everywhere, so the object cannot be told.
        raise DataError(
            f"The mask {path} has several colours of equal strength and no black background. "
            "Save it as black and white."
        )
    return colour


def _refusal(values: np.ndarray, between: float, path: Path) -> str:
    shown = ", ".join(f"{value:g}" for value in values[:6]) + (" ..." if len(values) > 6 else "")
    if len(values) <= 2:
        return (
            f"The mask {path} has the values {shown}; background must be 0 and the object 255 or "
            "1. Is it a label map or a photograph?"
        )
    return (
        f"{path} is not a binary mask: {len(values)} values ({shown}), {between:.0%} of the pixels "
        "are neither dark nor bright. Is it a photograph or a label map? Masks must contain "
        "0 and 255, or 0 and 1."
    )


def encoding_of(image: Image.Image, path: Path) -> str:
    """Return how a loaded picture stores its mask, in words for a table."""
    stored = stored_levels(image, path)
    labels = stored.labels(path)
    if labels is not None:
        return "label map" + (" with void" if has_void(labels) else "")
    if image.mode == "1":
        return "1-bit"
    if image.mode == "P":
        return "palette"
    if image.mode.startswith(("I", "F")):
        return "16-bit" if image.mode.startswith("I") else "floating point"
    if image.format == "JPEG":
        return "JPEG"
    if image.mode in ("RGBA", "LA"):
        planes = np.asarray(image.convert("RGBA"))
        if planes[..., :3].min() == planes[..., :3].max():
            return "alpha"
    levels = stored.levels
    if levels.dtype != np.uint8:
        return "16-bit"
    used = np.flatnonzero(count_levels(levels))
    if len(used) > 2:
        return "grey outline"
    colour = "" if image.mode == "L" else " in colour"
    low, high = (int(used[0]), int(used[-1]))
    return (f"all {low}" if low == high else f"{low}/{high}") + colour
