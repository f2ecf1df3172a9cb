"""Build the cache: decoded pairs on disk or in memory, which epochs read instead of JPEGs.

One uint8 array (N, S, S, 4 + M), RGB, mask and the planes of M modalities, is shared by workers and
ranks. It is stored outside the data set, in a folder named after the data. A table beside it
records the files, settings and code version it was made from, so that a cache of anything else is
never used. Rows have checksums; the table is written last, atomically. A build that was killed
resumes where it stopped.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from camoxpert import console, stop
from camoxpert.config import DataConfig
from camoxpert.data.cache.choice import DISK_RESERVE, cache_bytes, cache_place, free_disk
from camoxpert.data.cache.table import (
    CHANNELS,
    Description,
    PixelCache,
    channels_of,
    checksum,
    description,
    judge,
    map_cache,
)
from camoxpert.data.files.labels import has_void
from camoxpert.data.files.manifest import Manifest
from camoxpert.data.samples.augment import source_side
from camoxpert.data.samples.decode import decode_pair
from camoxpert.errors import DataError
from camoxpert.files import lock, read_json, write_json, write_whole
from camoxpert.runtime.host import available_memory, usable_cores
from camoxpert.text import bullet_list

PROGRESS_COLUMNS = 4


def find_cache(manifest: Manifest, data: DataConfig) -> tuple[PixelCache | None, str]:
    """Return the disk cache that holds these pairs, if there is one; write nothing.

    Returns:
        The cache and "", or None and the reason, which starts with miss, stale or corrupt.

    Raises:
        DataError: ``data.unreadable`` is error, and the cache lists pairs that could not be
            decoded.
    """
    place = cache_place(manifest, data)
    verdict = judge(place, _described(manifest, data))
    if verdict:
        return None, verdict
    try:
        found = map_cache(place)
    except (OSError, ValueError, EOFError, KeyError) as error:
        return None, f"corrupt: {error}"
    if data.unreadable == "error":
        found.require_sound(manifest)
    return found, ""


def open_cache(manifest: Manifest, data: DataConfig, *, mode: str) -> PixelCache:
    """Return the decoded pairs of ``manifest``, from the cache or by decoding them now.

    Prints one decision: hit, miss, stale or corrupt, and why.

    Args:
        manifest: every pair of the training data, validation included.
        data: settings. With ``strict_cache`` a disk cache that is missing, incomplete or stale is
            an error. With ``unreadable`` skip, rows of files that cannot be decoded stay empty and
            are listed in the cache.
        mode: disk or ram.

    Raises:
        DataError: a file cannot be read, memory or disk is too small, or ``strict_cache`` is set
            and there is no hit.
        Stopped: Ctrl-C, SIGTERM or the deadline.
    """
    if mode == "ram":
        return _in_memory(manifest, data)
    place = cache_place(manifest, data)
    found, verdict = find_cache(manifest, data)
    if found is not None:
        console.decide("", f"hit: {place}")
        return found
    if data.strict_cache:
        raise DataError(
            f"--strict-cache: there is no usable cache in {place}: {verdict}. Run once without "
            f"--strict-cache to build it."
        )
    console.decide("", f"{verdict}; decoding into {place}")
    wanted = _described(manifest, data)
    with ExitStack() as stack:
        try:
            place.mkdir(parents=True, exist_ok=True)
            stack.enter_context(lock(place / ".lock", waiting=_say_waiting))
        except OSError as error:
            raise DataError(
                f"The cache folder {place} cannot be written: {error}. Give another with "
                f"--cache-dir, or use --cache none."
            ) from error
        # Another process may have built it while this one waited.
        if judge(place, wanted):
            _build(place, wanted, manifest, data)
        # Still under the lock: no process can replace the files between judging and mapping them.
        made = map_cache(place)
    if data.unreadable == "error":
        made.require_sound(manifest)
    return made


def _described(manifest: Manifest, data: DataConfig) -> Description:
    return description(manifest, source_side(data), data.max_pixels, data.beside_rgb)


def _say_waiting() -> None:
    console.decide("", "another process is building this cache; waiting for it")


def _in_memory(manifest: Manifest, data: DataConfig) -> PixelCache:
    side = source_side(data)
    needed, free = cache_bytes(manifest, side, len(data.beside_rgb)), available_memory()
    if free is not None and needed > free:
        raise DataError(
            f"--cache ram needs {needed / 1e9:.1f} GB, but only {free / 1e9:.1f} GB of memory are "
            f"free. Use --cache disk or none."
        )
    console.decide("", f"{len(manifest)} pairs are decoded now, and again in every run")
    shape = (len(manifest), side, side, CHANNELS + len(data.beside_rgb))
    # Anonymous and shared: forked workers read the same pages.
    pixels = np.frombuffer(mmap.mmap(-1, max(1, needed)), np.uint8)[:needed].reshape(shape)
    sizes = np.zeros((len(manifest), 2), np.int32)
    todo = list(range(len(manifest)))
    faults: dict[int, str] = {}
    void = np.zeros(len(manifest), bool)
    decoded = _decode(manifest, todo, pixels, sizes, void, faults, data)
    for _ in console.track(decoded, "decoding", total=len(todo)):
        pass
    if data.unreadable == "error":
        _require_none(faults)
    keys = [(pair.dataset, pair.name) for pair in manifest.pairs]
    rows = {key: row for row, key in enumerate(keys)}
    bad = {keys[row]: why for row, why in sorted(faults.items())}
    return PixelCache(pixels, sizes, rows, unreadable=bad, void=_positions(void))


def _build(place: Path, wanted: Description, manifest: Manifest, data: DataConfig) -> None:
    """Decode every pair into ``place``; the caller holds its lock.

    An unfinished build of the same description is resumed.
    """
    side, count = wanted["side"], len(manifest)
    progress = place / "progress.u4"
    _allocate_unless_begun(place, wanted, count)
    shape = (count, side, side, channels_of(wanted))
    pixels = np.memmap(place / "pixels.u8", np.uint8, "r+", shape=shape)
    # Per row: checksum, height, width, whether the mask has void; a height of 0 means not done.
    table = np.memmap(progress, np.uint32, "r+", shape=(count, PROGRESS_COLUMNS))
    todo = []
    for index in range(count):
        if table[index, 1] and checksum(pixels[index]) != table[index, 0]:
            # After a power cut: the table may have reached the disk before the pixels.
            table[index] = 0
        if not table[index, 1]:
            todo.append(index)
    if 0 < len(todo) < count:
        console.decide("", f"{count - len(todo)} of {count} pairs are already decoded")
    sizes, void = np.zeros((count, 2), np.int32), np.zeros(count, bool)
    faults: dict[int, str] = {}
    decoded = _decode(manifest, todo, pixels, sizes, void, faults, data)
    for index in console.track(decoded, "decoding", total=len(todo)):
        table[index] = (checksum(pixels[index]), *sizes[index], void[index])
    if data.unreadable == "error":
        _require_none(faults)
    for index in faults:
        # Their height stays 0. The row is cleared: an earlier build may have left pixels in it.
        pixels[index] = 0
        table[index] = (checksum(pixels[index]), 0, 0, 0)
    pixels.flush()
    table.flush()
    original = np.asarray(table[:, 1:3], np.int32)
    write_whole(place / "sizes.npy", lambda file: np.save(file, original), durable=True)
    names = list(wanted["files"])
    bad = {names[index]: why for index, why in sorted(faults.items())}
    checksums = table[:, 0].tolist()
    found = {"checksums": checksums, "unreadable": bad, "void": sorted(_positions(table[:, 3]))}
    write_json(place / "table.json", {**wanted, **found})
    (place / "building.json").unlink(missing_ok=True)
    del table
    progress.unlink(missing_ok=True)


def _allocate_unless_begun(place: Path, wanted: Description, count: int) -> None:
    """Reserve the files of a build, unless one of the same description was started there."""
    files = [place / name for name in ("pixels.u8", "progress.u4")]
    if read_json(place / "building.json") == wanted and all(file.exists() for file in files):
        return
    for name in ("table.json", "building.json", "pixels.u8", "sizes.npy", "progress.u4"):
        (place / name).unlink(missing_ok=True)
    row = wanted["side"] ** 2 * channels_of(wanted)
    free = free_disk(place) or 0
    if count * row + DISK_RESERVE // 4 > free:
        raise DataError(
            f"The cache needs {count * row / 1e9:.1f} GB, but {place.parent} has {free / 1e9:.1f} "
            f"GB free. Give another folder with --cache-dir, or use --cache ram or none."
        )
    try:
        for file, size in zip(files, (row, PROGRESS_COLUMNS * 4), strict=True):
            _allocate(file, count * size)
    except OSError as error:
        raise DataError(
            f"The cache cannot be written in {place}: {error}. Give another folder with "
            f"--cache-dir, or use --cache ram or none."
        ) from error
    write_json(place / "building.json", wanted)


def _decode(
    manifest: Manifest,
    todo: Sequence[int],
    pixels: np.ndarray,
    sizes: np.ndarray,
    void: np.ndarray,
    faults: dict[int, str],
    data: DataConfig,
) -> Iterable[int]:
    """Decode rows in threads (the decoders release the GIL).

    Yields the indices of decoded rows; the others are added to ``faults`` with the reason.
    """
    side = pixels.shape[1]

    def one(index: int) -> str:
        try:
            found, mask = decode_pair(
                manifest.pairs[index], side, data.beside_rgb, max_pixels=data.max_pixels
            )
        except DataError as error:
            return str(error)
        sizes[index] = mask.shape
        pixels[index] = found
        void[index] = has_void(mask)
        return ""

    chunk = 8 * usable_cores()
    with ThreadPoolExecutor(usable_cores()) as pool:
        for start in range(0, len(todo), chunk):
            stop.check()
            part = todo[start : start + chunk]
            for index, fault in zip(part, pool.map(one, part), strict=True):
                if fault:
                    faults[index] = fault
                else:
                    yield index


def _positions(flags: np.ndarray) -> frozenset[int]:
    return frozenset(np.flatnonzero(flags).tolist())


def _require_none(faults: Mapping[int, str]) -> None:
    """Raise one DataError that lists up to ten unreadable files."""
    if faults:
        reasons = [faults[row] for row in sorted(faults)]
        raise DataError(
            f"{len(faults)} files cannot be decoded:\n{bullet_list(reasons)}\n"
            "Repair, replace or remove them, or use --unreadable skip."
        )


def _allocate(path: Path, size: int) -> None:
    """Create a file of ``size`` bytes and reserve its space on the disk.

    A full disk then raises OSError here instead of a bus error later.
    """
    with path.open("wb") as file:
        if size:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, size)
            else:
                file.truncate(size)
