"""Size classes of the objects in training masks, kept in the cache folder."""

from __future__ import annotations

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor

from camoxpert import console
from camoxpert.config import DataConfig
from camoxpert.data.cache.choice import cache_root
from camoxpert.data.files.image_io import read_mask_as
from camoxpert.data.files.manifest import Manifest
from camoxpert.data.files.pairing import Pair
from camoxpert.doctor.inspect import mask_shape
from camoxpert.errors import DataError
from camoxpert.files import read_json, write_json
from camoxpert.metrics.groups import size_class
from camoxpert.runtime.host import usable_cores

VERSION = 1
"""Increased when the classes change."""
UNKNOWN = -1
"""Class of a mask that cannot be read: naming it is left to the checks of files."""


def object_sizes(manifest: Manifest, data: DataConfig, *, write: bool = True) -> list[int]:
    """Return the size class of every pair's object: a position in ``metrics.groups.SIZES``.

    Each mask is decoded once; the classes are kept under a name made from names, sizes and times of
    the mask files.

    Args:
        manifest: the training data.
        data: settings.
        write: keep the result.
    """
    states = [_state(pair) for pair in manifest.pairs]
    key = hashlib.sha256(json.dumps([VERSION, states]).encode()).hexdigest()[:16]
    path = cache_root(data) / "sizes" / f"{key}.json"
    kept = read_json(path).get("sizes")
    if isinstance(kept, list) and len(kept) == len(manifest):
        return [int(size) for size in kept]

    def one(pair: Pair) -> int:
        if pair.mask == pair.image:
            return 0
        try:
            mask, _ = read_mask_as(pair.mask, max_pixels=data.max_pixels)
        except DataError:
            return UNKNOWN
        return size_class(mask_shape(mask).share)

    with ThreadPoolExecutor(usable_cores()) as pool:
        found = pool.map(one, manifest.pairs)
        sizes = list(console.track(found, "object sizes", total=len(manifest)))
    if write:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json(path, {"sizes": sizes})
        except OSError as error:
            console.decide("", f"object sizes are not kept: {path.parent}: {error.strerror}")
    return sizes


def _state(pair: Pair) -> list[object]:
    """Return what tells whether a mask is the one that was looked at."""
    try:
        found = pair.mask.stat()
    except OSError:
        return [str(pair.mask), 0, 0]
    return [str(pair.mask.resolve()), found.st_size, found.st_mtime_ns]
