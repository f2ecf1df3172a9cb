"""Images without any hidden object: folders of them, and pairs whose masks are black."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from camoxpert import stop
from camoxpert.data.files.image_io import MAX_PIXELS, probe, read_mask
from camoxpert.data.files.layouts import is_noncam
from camoxpert.data.files.manifest import Manifest
from camoxpert.data.files.pairing import Pair, group_of, path_stem
from camoxpert.data.files.roots import distinct_names
from camoxpert.data.files.unlabeled import images_below
from camoxpert.errors import DataError

NEGATIVES = "negatives"
NO_NEGATIVES = Manifest((), "", NEGATIVES, "")
"""The manifest of a run without such images."""
CHECKED_AT_ONCE = 256


def find_negatives(folders: Sequence[str | Path]) -> Manifest:
    """Return the images of folders and their sub-folders, as pairs without an object.

    Raises:
        DataError: a folder is missing or holds no images, two images share a name, or a folder is
            given twice.
    """
    if not folders:
        return NO_NEGATIVES
    places = [Path(folder) for folder in folders]
    real = [place.resolve() for place in places]
    twice = next((place for place in real if real.count(place) > 1), None)
    if twice is not None:
        raise DataError(f"--negatives: {twice} is given twice. Leave one out.")
    names = distinct_names(real)
    pairs: list[Pair] = []
    notes: list[str] = []
    for place, resolved in zip(places, real, strict=True):
        named, own_notes = images_below(place, flag="--negatives")
        notes += own_notes
        # A name that no data set has: the same image may be among the others.
        dataset = f"{NEGATIVES} {names[resolved]}"
        pairs += [
            # Below its folder: validation names images without their data sets.
            Pair(f"{names[resolved]}/{name}", path, path, dataset, group_of(name), empty=True)
            for name, path in sorted(named.items())
        ]
    dataset = "+".join(dict.fromkeys(pair.dataset for pair in pairs))
    return Manifest(tuple(pairs), dataset, NEGATIVES, "folder of images", 0, tuple(notes))


def empty_pairs(pairs: Sequence[Pair], *, max_pixels: int = MAX_PIXELS) -> frozenset[Pair]:
    """Return the pairs that have no object: NonCAM images by their names, others by their masks.

    Only masks that are small enough to be black are decoded. Unreadable ones are left to the checks
    that name them.

    Raises:
        Stopped: Ctrl-C, SIGTERM or the deadline.
    """

    def empty(pair: Pair) -> bool:
        if not pair.labeled or pair.empty or is_noncam(path_stem(pair.name)):
            return pair.labeled
        try:
            return (
                _may_be_black(pair.mask) and not read_mask(pair.mask, max_pixels=max_pixels).any()
            )
        except (DataError, OSError):
            return False

    found: list[Pair] = []
    with ThreadPoolExecutor(max_workers=8) as pool:
        for start in range(0, len(pairs), CHECKED_AT_ONCE):
            stop.check()
            part = pairs[start : start + CHECKED_AT_ONCE]
            found += [pair for pair, yes in zip(part, pool.map(empty, part), strict=True) if yes]
    return frozenset(found)


def _may_be_black(path: Path) -> bool:
    """Return whether a mask's file is as small as that of one value alone.

    Deflate shortens one value to 1/1032, of up to 8 bytes where a pixel has several channels, JPEG
    to 6 bits per block of 64 pixels; there is room for headers and metadata. Files without
    compression are all looked at.
    """
    size, head = path.stat().st_size, probe(path)
    pixels = head.width * head.height
    if head.format == "PNG":
        return size <= 4096 + pixels // (400 if head.mode in ("1", "L", "P") else 100)
    return size <= 4096 + pixels // 64 or head.format != "JPEG"


def marked(manifest: Manifest, empty: Collection[Pair]) -> Manifest:
    """Return a manifest whose pairs without an object say so."""
    if not empty:
        return manifest
    pairs = tuple(replace(p, empty=True) if p in empty else p for p in manifest.pairs)
    return replace(manifest, pairs=pairs)


def divided(manifest: Manifest) -> tuple[Manifest, Manifest]:
    """Return the pairs that may have an object, and those that say they have none."""
    empty = tuple(pair for pair in manifest.pairs if pair.empty)
    if not empty:
        return manifest, replace(NO_NEGATIVES, dataset=manifest.dataset)
    kept = tuple(pair for pair in manifest.pairs if not pair.empty)
    return replace(manifest, pairs=kept), replace(NO_NEGATIVES, pairs=empty)
