"""List the objects that can be pasted; their pixels are read when they are needed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from camoxpert.errors import DataError
from camoxpert.synthesis.compose.cutting import Cutout, cut_objects, read_objects
from camoxpert.synthesis.compose.describe import FEATURES, object_features

SMALLEST = 400
"""Fewest pixels of an object that is worth pasting."""


@dataclass(frozen=True)
class ObjectEntry:
    """What is known of an object without its pixels.

    Attributes:
        name: of its picture, followed by #2, #3 ... for further objects in it.
        source, mask: files of the picture and its mask; mask "" for an RGBA picture.
        part: which object of the picture, from 0.
        height, width: of its cut-out, pixels.
        area: pixels of the object.
        share: of its picture that it covers; 0 if it comes without one.
        sides: edges of its picture that cut it off: left, top, right, bottom.
    """

    name: str
    source: str
    mask: str
    part: int
    height: int
    width: int
    area: int
    share: float
    sides: tuple[bool, bool, bool, bool]


@dataclass(frozen=True)
class ObjectLibrary:
    """Objects with their features.

    Attributes:
        entries: ordered as the pictures were given.
        features: float32 (N, FEATURES), see ``describe.py``.
        left_out: why objects were not taken -> how many.
    """

    entries: tuple[ObjectEntry, ...]
    features: np.ndarray
    left_out: dict[str, int]

    def __len__(self) -> int:
        return len(self.entries)


@dataclass(frozen=True)
class CutPicture:
    """The objects of one picture.

    Attributes:
        name, source, mask: of the picture, see ``ObjectEntry``.
        height, width: of the picture, pixels; 0 for RGBA pictures, which are nothing but an object.
        cutouts: its objects.
    """

    name: str
    source: str
    mask: str
    height: int
    width: int
    cutouts: Sequence[Cutout]


@dataclass(frozen=True)
class ListedPicture:
    """What is known of the objects of one picture without their pixels; as ``ObjectLibrary``."""

    entries: tuple[ObjectEntry, ...]
    features: np.ndarray
    left_out: dict[str, int]


def cut_picture(
    name: str, image: np.ndarray, mask: np.ndarray, *, source: str = "", mask_source: str = ""
) -> CutPicture:
    """Cut the objects of a picture in memory: uint8 (H, W, 3) and (H, W)."""
    height, width = mask.shape
    return CutPicture(name, source, mask_source, height, width, cut_objects(image, mask))


def read_picture(name: str, source: str, mask: str = "") -> CutPicture:
    """Read and cut the objects of a picture; without a mask it is an RGBA picture."""
    cutouts, size = read_objects(source, mask)
    return CutPicture(name, source, mask, *size, cutouts)


def list_objects(picture: CutPicture, *, smallest: int = SMALLEST) -> ListedPicture:
    """Return the objects of a picture that are worth pasting, with the reasons for the others.

    Args:
        picture: the objects.
        smallest: fewest pixels of one.
    """
    entries: list[ObjectEntry] = []
    features: list[np.ndarray] = []
    left_out: Counter[str] = Counter()
    if not picture.cutouts:
        left_out["pictures without an object"] += 1
    for part, cutout in enumerate(picture.cutouts):
        area = int((cutout.pixels[..., 3] > 127).sum())
        reason = unfit(cutout, area, smallest=smallest)
        if reason:
            left_out[reason] += 1
            continue
        name = picture.name if part == 0 else f"{picture.name}#{part + 1}"
        height, width = cutout.pixels.shape[:2]
        share = area / (picture.height * picture.width) if picture.height else 0.0
        entries.append(
            ObjectEntry(
                name, picture.source, picture.mask, part, height, width, area, share, cutout.sides
            )
        )
        # An RGBA picture is described at its own scale.
        side = min(picture.height, picture.width) or max(height, width)
        features.append(object_features(cutout.pixels, side))
    rows = np.stack(features) if features else np.zeros((0, FEATURES), np.float32)
    return ListedPicture(tuple(entries), rows, dict(left_out))


def library_of(pictures: Iterable[CutPicture | ListedPicture]) -> ObjectLibrary:
    """Return the objects of all pictures, in their order."""
    listed = [p if isinstance(p, ListedPicture) else list_objects(p) for p in pictures]
    left_out: Counter[str] = Counter()
    for picture in listed:
        left_out.update(picture.left_out)
    features = [picture.features for picture in listed] or [np.zeros((0, FEATURES), np.float32)]
    entries = tuple(entry for picture in listed for entry in picture.entries)
    return ObjectLibrary(entries, np.concatenate(features), dict(left_out))


def unfit(cutout: Cutout, area: int, *, smallest: int = SMALLEST) -> str:
    """Return why an object is not pasted; "" if it is."""
    left, top, right, bottom = cutout.sides
    if area < smallest:
        return f"objects under {smallest} pixels"
    if (left and right) or (top and bottom):
        return "objects that reach from edge to edge of their picture"
    return ""


def read_object(entry: ObjectEntry) -> np.ndarray:
    """Read the pixels of an object: uint8 (h, w, 4).

    Raises:
        DataError: its files are missing, damaged or were changed.
    """
    cutouts, _ = read_objects(entry.source, entry.mask, part=entry.part)
    if not cutouts:
        raise DataError(
            f"{entry.mask} no longer shows object {entry.part + 1}: it was changed after the "
            "objects were listed. Run the command again."
        )
    return cutouts[0].pixels
