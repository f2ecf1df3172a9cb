"""Images without masks, as pairs whose masks say that nobody labelled a pixel."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from camoxpert.data.files.image_io import MAX_PIXELS, probe, read_image, read_pair
from camoxpert.data.files.labels import VOID
from camoxpert.data.files.listing import endings, list_files
from camoxpert.data.files.manifest import Manifest
from camoxpert.data.files.pairing import Pair, by_name, group_of
from camoxpert.errors import DataError
from camoxpert.files import why_missing
from camoxpert.text import count

NO_IMAGES = Manifest((), "", "unlabeled", "")
"""The manifest of a run without such images."""


def find_unlabeled(folder: str | Path) -> Manifest:
    """Return the images of a folder and its sub-folders; an empty path gives an empty manifest.

    Raises:
        DataError: there is no such folder, no image in it, or two images share a name.
    """
    if not str(folder):
        return NO_IMAGES
    place = Path(folder)
    named, notes = images_below(place, flag="--unlabeled")
    # A name that no data set has: the same image may be among the labelled ones.
    dataset = f"unlabeled {place.resolve().name}"
    pairs = tuple(
        Pair(name, path, path, dataset, group_of(name), labeled=False)
        for name, path in sorted(named.items())
    )
    return Manifest(pairs, dataset, "unlabeled", "folder of images", 0, notes)


def images_below(place: Path, *, flag: str) -> tuple[dict[str, Path], tuple[str, ...]]:
    """Return the images of a folder and its sub-folders by name, and notes about other files.

    Args:
        place: the folder.
        flag: names it in errors.

    Raises:
        DataError: there is no such folder, no image in it, or two images share a name.
    """
    if not place.is_dir():
        raise DataError(f"{flag}: {why_missing(place, 'folder')}")
    listing = list_files(place, nested=True)
    named, doubled = by_name(listing.images, place)
    if doubled:
        raise DataError(
            f"{flag}: {doubled[0][0]} and {doubled[0][1]} have the same name. Remove one of them."
        )
    if not named:
        held = f" It holds {endings(listing.others)}." if listing.others else ""
        raise DataError(f"{flag}: {place} holds no images.{held}")
    if not listing.others:
        return named, ()
    note = (
        f"{count(len(listing.others), 'file')} in {place} are not images of a known kind and "
        f"are not used: {endings(listing.others)}"
    )
    return named, (note,)


def joined(real: Manifest, *others: Manifest) -> Manifest:
    """Return the pairs of all: real ones first, those of the others in the order given."""
    if not any(map(len, others)):
        return real
    return replace(real, pairs=sum((part.pairs for part in others), start=real.pairs))


def read_files(
    pair: Pair, *, max_pixels: int = MAX_PIXELS, at_least: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Read the files of a pair as ``read_pair`` does; without a mask every pixel is void, or
    background in an image that has no object.

    Args:
        pair: its files.
        max_pixels, at_least: see ``read_pair``.

    Raises:
        DataError: as ``read_pair``.
    """
    if pair.mask != pair.image:
        return read_pair(
            pair.image,
            pair.mask,
            any_size=pair.any_size,
            max_pixels=max_pixels,
            at_least=at_least,
        )
    image = read_image(pair.image, max_pixels=max_pixels, at_least=at_least)
    fill = 0 if pair.empty else VOID
    return image, np.full(probe(pair.image, max_pixels=max_pixels).upright, fill, np.uint8)
