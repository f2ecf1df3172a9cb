"""The cheap check of every file before hours are spent: headers, ends and sizes."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from camoxpert.data.files.image_io import MAX_PIXELS, pair_orientation, probe, require_whole
from camoxpert.data.files.manifest import Manifest, Pair
from camoxpert.data.unreadable import listed
from camoxpert.errors import DataError

# Pairs whose headers are read before somebody may stop it.
CHECKED_AT_ONCE = 256


def unreadable_pairs(
    manifest: Manifest,
    *,
    max_pixels: int = MAX_PIXELS,
    check_stop: Callable[[], None] = lambda: None,
) -> list[tuple[Pair, str]]:
    """Check every header, the ends of the files and the sizes of each pair; decode nothing.

    Args:
        manifest: the pairs.
        max_pixels: larger images are refused.
        check_stop: called often; raises to stop.

    Returns:
        The pairs that cannot be used, and why.
    """

    def fault(pair: Pair) -> str | None:
        try:
            heads = [probe(path, max_pixels=max_pixels) for path in (pair.image, pair.mask)]
            pair_orientation(*heads, image_path=pair.image, mask_path=pair.mask)
            for path, head in zip((pair.image, pair.mask), heads, strict=True):
                require_whole(path, head)
        except DataError as error:
            return str(error)
        return None

    found = []
    with ThreadPoolExecutor(max_workers=8) as pool:
        # A part at a time: leaving the pool waits for all that it was given.
        for start in range(0, len(manifest), CHECKED_AT_ONCE):
            check_stop()
            part = manifest.pairs[start : start + CHECKED_AT_ONCE]
            found += [
                (pair, text) for pair, text in zip(part, pool.map(fault, part), strict=True) if text
            ]
    return found


def require_readable(
    manifest: Manifest,
    *,
    max_pixels: int = MAX_PIXELS,
    check_stop: Callable[[], None] = lambda: None,
) -> None:
    """Check files as ``unreadable_pairs`` does, before hours are spent.

    Raises:
        DataError: one error that lists up to ten faulty files.
    """
    faults = unreadable_pairs(manifest, max_pixels=max_pixels, check_stop=check_stop)
    if faults:
        raise DataError(
            f"{len(faults)} of {len(manifest)} pairs of {manifest.dataset} cannot be used:\n"
            f"{listed([text for _, text in faults])}\n"
            "Repair, replace or remove these files (image and mask), or use --unreadable skip."
        )
