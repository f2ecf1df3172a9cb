"""Examine one pair closely: its faults, its mask and the objects in it."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np

from camoxpert import console
from camoxpert.data.files.image_io import (
    MAX_PIXELS,
    ImageHeader,
    pair_orientation,
    probe,
    read_image,
    read_mask_as,
)
from camoxpert.data.files.labels import VOID
from camoxpert.data.files.pairing import Pair
from camoxpert.errors import DataError
from camoxpert.metrics.groups import SIZES, size_class
from camoxpert.metrics.scoring import count_objects
from camoxpert.runtime.host import usable_cores

THUMB = 160
EXPECTED = {
    ".jpg": "JPEG",
    ".jpeg": "JPEG",
    ".png": "PNG",
    ".bmp": "BMP",
    ".tif": "TIFF",
    ".tiff": "TIFF",
    ".webp": "WEBP",
}


@dataclass
class PairFacts:
    """What was found out about a pair.

    Attributes:
        pair: its files.
        split: train, test or all.
        faults: sentences; a pair with any cannot be used.
        image_format: format and mode of the image file.
        encoding: how the mask is stored.
        oddities: what is unusual but read correctly.
        size: (height, width), upright.
        share: share of the labelled pixels that are object, 0..1.
        void: share of the pixels that nobody labelled.
        border: share of the pixels at the edge of the image that are object.
        objects: connected objects, specks left out.
        thumb, thumb_mask: small copies for the contact sheet.
    """

    pair: Pair
    split: str
    faults: list[str] = field(default_factory=list)
    image_format: str = ""
    encoding: str = ""
    oddities: list[str] = field(default_factory=list)
    size: tuple[int, int] = (0, 0)
    share: float = 0.0
    void: float = 0.0
    border: float = 0.0
    objects: int = 0
    thumb: np.ndarray | None = None
    thumb_mask: np.ndarray | None = None

    @property
    def size_class(self) -> str:
        """Return the name of the object's size."""
        return SIZES[size_class(self.share)]


class MaskShape(NamedTuple):
    """What the checks of masks look at, as shares 0..1.

    Attributes:
        share: of the labelled pixels that are object.
        void: of the pixels that nobody labelled.
        border: of the pixels at the edge of the image that are object.
    """

    share: float
    void: float
    border: float

    @property
    def inverted(self) -> bool:
        """Return whether the object surrounds the image, as in a mask with swapped values."""
        return self.border > 0.9 and 0.5 < self.share < 1


def mask_shape(mask: np.ndarray) -> MaskShape:
    """Return what the checks look at in a decoded mask."""
    objects, void = float((mask == 255).mean()), float((mask == VOID).mean())
    edge = np.concatenate([mask[0], mask[-1], mask[:, 0], mask[:, -1]])
    # A mask without any labelled pixel is refused when it is read.
    return MaskShape(objects / (1 - void), void, float((edge == 255).mean()))


def inspect_pair(
    pair: Pair, split: str, *, max_pixels: int = MAX_PIXELS, picture: bool = True
) -> PairFacts:
    """Decode a pair strictly and describe it; faults are listed, not raised.

    Args:
        pair: its files.
        split: train, test or all.
        max_pixels: larger images are refused.
        picture: keep small copies of image and mask.
    """
    facts = PairFacts(pair, split)
    image = mask = None
    turn = True
    heads = []
    for path in (pair.image, pair.mask):
        try:
            heads.append(probe(path, max_pixels=max_pixels))
        except DataError as error:
            facts.faults.append(str(error))
    if len(heads) == 2:
        try:
            turn = pair_orientation(
                *heads, image_path=pair.image, mask_path=pair.mask, any_size=pair.any_size
            )
        except DataError as error:
            facts.faults.append(str(error))
        head, mask_head = heads
        facts.image_format = f"{head.format} {head.mode}"
        if head.format != EXPECTED.get(pair.image.suffix.lower(), head.format):
            facts.oddities.append(f"{head.format} named {pair.image.suffix}")
        if head.orientation != 1:
            facts.oddities.append(_turned(head, mask_head, turn=turn))
        if head.upright != mask_head.upright and turn and not facts.faults:
            facts.oddities.append("the mask has another size and is resized (--resize bilinear)")
        if mask_head.orientation != 1:
            facts.oddities.append("the mask has an EXIF orientation")
    if not facts.faults:
        try:
            image = read_image(
                pair.image, max_pixels=max_pixels, apply_orientation=turn, strict=True
            )
        except DataError as error:
            facts.faults.append(str(error))
        try:
            mask, facts.encoding = read_mask_as(
                pair.mask, max_pixels=max_pixels, apply_orientation=turn
            )
        except DataError as error:
            facts.faults.append(str(error))
    if mask is not None:
        facts.size = (mask.shape[0], mask.shape[1])
        shape = mask_shape(mask)
        facts.share, facts.void, facts.border = shape.share, shape.void, shape.border
        facts.objects = count_objects(mask == 255)
    if picture and image is not None and mask is not None:
        side = max(image.shape[:2])
        size = tuple(max(1, round(n * THUMB / side)) for n in image.shape[1::-1])
        facts.thumb = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
        shown = np.where(mask == 255, np.uint8(255), np.uint8(0))
        facts.thumb_mask = cv2.resize(shown, size, interpolation=cv2.INTER_AREA)
    return facts


def _turned(image: ImageHeader, mask: ImageHeader, *, turn: bool) -> str:
    """Return what EXIF does to an image that it turns, and what the sizes say of its mask."""
    if not turn:
        return "EXIF ignored: the mask fits the stored pixels"
    if mask.orientation != 1:
        return "both turned by EXIF"
    if (image.height, image.width) == (mask.height, mask.width):
        # Square, mirrored, or upside down.
        return "turned by EXIF, and the sizes cannot tell whether the mask was drawn on it so"
    return "turned by EXIF, as the mask was drawn"


def small_picture(path: Path, *, max_pixels: int) -> np.ndarray:
    """Return a small copy of an image, for a page."""
    image = read_image(path, max_pixels=max_pixels, at_least=THUMB)
    scale = THUMB / max(image.shape[:2])
    size = [max(1, round(n * scale)) for n in image.shape[1::-1]]
    small: np.ndarray = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
    return small


def inspect_pairs(
    pairs: Sequence[tuple[Pair, str]], *, max_pixels: int, pictures: int
) -> list[PairFacts]:
    """Inspect (pair, split) items in threads; the results keep their order.

    In every data set and split, ``pictures`` items, spread evenly, keep small copies for the
    contact sheet.
    """
    parts: dict[tuple[str, str], list[int]] = {}
    for index, (pair, split) in enumerate(pairs):
        parts.setdefault((pair.dataset, split), []).append(index)
    shown = {
        i for part in parts.values() for i in part[:: max(1, len(part) // pictures)][:pictures]
    }

    def one(index: int) -> PairFacts:
        return inspect_pair(*pairs[index], max_pixels=max_pixels, picture=index in shown)

    with ThreadPoolExecutor(usable_cores()) as pool:
        inspected = pool.map(one, range(len(pairs)))
        return list(console.track(inspected, "decoding pairs", total=len(pairs)))


def identical_files(paths: Sequence[Path]) -> list[list[int]]:
    """Return groups of positions of files with the same bytes; read only files of equal size."""
    by_size: dict[int, list[int]] = {}
    for index, path in enumerate(paths):
        # A link to a missing file is a fault of its own, and no copy of anything.
        if path.is_file():
            by_size.setdefault(path.stat().st_size, []).append(index)
    groups: dict[bytes, list[int]] = {}
    for same in by_size.values():
        for index in same if len(same) > 1 else ():
            digest = hashlib.sha256(paths[index].read_bytes()).digest()
            groups.setdefault(digest, []).append(index)
    return [group for group in groups.values() if len(group) > 1]


def copies_among(pairs: Sequence[Pair], others: Sequence[Pair]) -> dict[int, int]:
    """Return position of a pair -> that of the first of the others whose image has the same
    bytes."""
    first = len(pairs)
    found: dict[int, int] = {}
    for group in identical_files([pair.image for pair in (*pairs, *others)]):
        known = [index - first for index in group if index >= first]
        if known:
            found |= dict.fromkeys([index for index in group if index < first], min(known))
    return found
