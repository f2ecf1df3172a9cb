"""Check every file cheaply before training starts: headers, file ends and sizes."""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor

from camoxpert import stop
from camoxpert.data.files.image_io import MAX_PIXELS, pair_orientation, probe, require_whole
from camoxpert.data.files.manifest import Manifest
from camoxpert.data.files.modalities import require_whole_file
from camoxpert.data.files.pairing import Pair
from camoxpert.errors import DataError
from camoxpert.text import bullet_list

# Pairs whose headers are read between two checks of the deadline.
CHECKED_AT_ONCE = 256


def unreadable_pairs(manifest: Manifest, *, max_pixels: int = MAX_PIXELS) -> list[tuple[Pair, str]]:
    """Check the headers, file ends and sizes of all pairs; decode nothing.

    Args:
        manifest: the pairs.
        max_pixels: larger images are refused.

    Returns:
        The pairs that cannot be used, each with the reason.

    Raises:
        Stopped: Ctrl-C, SIGTERM or the deadline.
    """

    def fault(pair: Pair) -> str | None:
        try:
            heads = [probe(path, max_pixels=max_pixels) for path in (pair.image, pair.mask)]
            pair_orientation(
                *heads, image_path=pair.image, mask_path=pair.mask, any_size=pair.any_size
            )
            for path, head in zip((pair.image, pair.mask), heads, strict=True):
                require_whole(path, head)
            for _, path in pair.modalities:
                require_whole_file(path, max_pixels=max_pixels)
        except DataError as error:
            return str(error)
        return None

    found = []
    with ThreadPoolExecutor(max_workers=8) as pool:
        # In parts: leaving the pool waits for everything that was submitted.
        for start in range(0, len(manifest), CHECKED_AT_ONCE):
            stop.check()
            part = manifest.pairs[start : start + CHECKED_AT_ONCE]
            found += [
                (pair, text) for pair, text in zip(part, pool.map(fault, part), strict=True) if text
            ]
    return found


def other_sizes(manifest: Manifest) -> list[str]:
    """Return ``name (80x60, mask 82x61)`` for each pair that is accepted with different sizes."""

    def sizes(pair: Pair) -> str:
        try:
            image, mask = (probe(path, max_pixels=sys.maxsize) for path in (pair.image, pair.mask))
        except DataError:
            return ""
        same = image.upright == mask.upright
        same = same or (image.height, image.width) == (mask.height, mask.width)
        shown = f"{image.width}x{image.height}, mask {mask.width}x{mask.height}"
        return "" if same else f"{pair.name} ({shown})"

    accepted = [pair for pair in manifest.pairs if pair.any_size]
    with ThreadPoolExecutor(max_workers=8) as pool:
        return [text for text in pool.map(sizes, accepted) if text]


def require_readable(manifest: Manifest, *, max_pixels: int = MAX_PIXELS) -> None:
    """Check files as ``unreadable_pairs`` does, and raise if any is faulty.

    Raises:
        DataError: one error that lists up to ten faulty files.
        Stopped: Ctrl-C, SIGTERM or the deadline.
    """
    faults = unreadable_pairs(manifest, max_pixels=max_pixels)
    if faults:
        raise DataError(
            f"{len(faults)} of {len(manifest)} pairs of {manifest.dataset} cannot be used:\n"
            f"{bullet_list([text for _, text in faults])}\n"
            "Repair, replace or remove these files (image and mask), or use --unreadable skip."
        )
