"""Read a source and its mask for the commands that change images one by one, and name the files."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from camoxpert.data.files.image_io import read_pair
from camoxpert.errors import DataError
from camoxpert.files import file_digest
from camoxpert.inference.ledger import as_fields
from camoxpert.inference.plan import Source, joined_digest, state_of
from camoxpert.runs.jobs import SourceFacts
from camoxpert.synthesis.compose.difficulty import difficulty
from camoxpert.synthesis.sources import SourceItem

SMALLEST_SIDE = 16
"""Pixels along the shorter side, below which form, shadows and texture mean nothing."""
ROLES = ("image", "mask", "depth")
"""Of the files of an item, in the provenance."""


@dataclass(frozen=True)
class Identity:
    """What a source was when it was read.

    Attributes:
        records: role, path and hash of each file, for the provenance.
        digest, state: of the files together, for the ledger.
    """

    records: list[dict[str, str]]
    digest: str | None
    state: SourceFacts


def read_object(
    item: SourceItem, size: int | None, *, max_pixels: int, what: str
) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Return the pixels of a source, uint8 (H, W, 3), and its mask, uint8 (H, W) of 0, VOID and
    255, with at least one pixel of an object.

    Args:
        item: an image that is made from it.
        size: longer side; larger sources are shrunk. None: as they are.
        max_pixels: larger sources are refused.
        what: is done, in messages: relight.

    Raises:
        DataError: there is no mask, a file cannot be read, the image is too small, or the mask
            shows no object.
    """
    if item.fault:
        raise DataError(f"No mask: {item.fault}")
    pair = read_pair(item.path, item.mask, max_pixels=max_pixels, any_size=item.any_size)
    pixels, mask = fitted(*pair, size)
    if min(mask.shape) < SMALLEST_SIDE:
        raise DataError(
            f"Too small: {mask.shape[1]}x{mask.shape[0]} pixels, and at least "
            f"{SMALLEST_SIDE} are needed along each side."
        )
    if not (mask == 255).any():
        raise DataError(f"The mask {item.mask} shows no object: there is nothing to {what}.")
    return pixels, mask


def identified(files: Sequence[Path], before: Source | None) -> Identity:
    """Return what the files of a source are; one that changed since ``before`` has no known state.

    Args:
        files: of a source, in the order of ROLES.
        before: their ``state_of`` before they were read.
    """
    digests = [file_digest(path) for path in files]
    records = [
        {"role": role, "path": str(path.resolve()), "sha256": digest}
        for role, path, digest in zip(ROLES, files, digests, strict=False)
    ]
    unchanged = state_of(files) == before
    return Identity(records, joined_digest(digests), as_fields(before if unchanged else None))


def index_of(name: str, variant: int) -> int:
    """Return the index of a draw: of the source's name, so that other sources change nothing."""
    digest = hashlib.sha256(f"{name}\n{variant}".encode(errors="surrogateescape")).digest()
    return int.from_bytes(digest[:6], "big")


def fitted(
    pixels: NDArray[np.uint8], mask: NDArray[np.uint8], size: int | None
) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Return image and mask of one size, the longer side at most ``size``; levels stay exact."""
    height, width = pixels.shape[:2]
    scale = 1.0 if size is None else min(1.0, size / max(height, width))
    shape = (max(1, round(width * scale)), max(1, round(height * scale)))
    if shape != (width, height):
        pixels = np.asarray(cv2.resize(pixels, shape, interpolation=cv2.INTER_AREA), np.uint8)
    if mask.shape != pixels.shape[:2]:
        nearest = cv2.resize(mask, shape, interpolation=cv2.INTER_NEAREST_EXACT)
        mask = np.asarray(nearest, np.uint8)
    return pixels, mask


def difficulty_of(pixels: NDArray[np.uint8], mask: NDArray[np.uint8]) -> float | None:
    """Return how hard an object is to see, 0..1; None without an object or surroundings."""
    inside = mask == 255
    try:
        return round(difficulty(pixels, inside, (mask > 0) & ~inside), 4)
    except ValueError:
        return None
