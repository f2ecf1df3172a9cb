"""Decoded pairs on disk or in memory: what an epoch reads instead of JPEGs.

One array of uint8 (N, S, S, 4), RGB and mask, shared by workers and ranks. It lives outside the
data set, in a folder named after the data; a table beside it says from which files, with which
settings and by which code it was made, so that a cache of anything else is never used. Rows carry
checksums; the table is written last and at once. A build that was killed continues where it
stopped.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import mmap
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np

from camoxpert.data.cache.table import (
    CHANNELS,
    PixelCache,
    checksum,
    description,
    judge,
    map_cache,
)
from camoxpert.data.files.image_io import read_pair
from camoxpert.data.files.manifest import Manifest, Pair
from camoxpert.data.samples.augment import square_pair
from camoxpert.data.unreadable import listed
from camoxpert.errors import DataError
from camoxpert.files import write_bytes, write_whole
from camoxpert.runtime.host import available_memory, usable_cores

# Free space that a cache leaves on its disk, and the share of free memory it takes at most.
DISK_RESERVE = 1 << 30
MEMORY_SHARE = 0.5

Say = Callable[[str], None]
Track = Callable[[Iterable[Any], int, str], Iterable[Any]]


def cache_bytes(manifest: Manifest, side: int) -> int:
    """Return the size of the pixels of a data set."""
    return len(manifest) * side * side * CHANNELS


def default_folder() -> Path:
    """Return where caches live unless told otherwise: $CAMOXPERT_CACHE, or the user's cache
    folder."""
    named = os.environ.get("CAMOXPERT_CACHE")
    if named:
        return Path(named)
    base = os.environ.get("XDG_CACHE_HOME")
    try:
        return Path(base or Path.home() / ".cache") / "camoxpert"
    except RuntimeError:
        # A container's user may have no home.
        return Path(tempfile.gettempdir()) / "camoxpert"


def choose_cache(
    mode: str,
    manifest: Manifest,
    side: int,
    *,
    folder: Path,
    epochs: int,
    forks: bool = True,
    processes: int = 1,
) -> tuple[str, str]:
    """Resolve ``--cache auto``; return none, ram or disk, and why.

    Args:
        mode: as asked.
        manifest, side, folder: as ``open_cache`` takes them.
        epochs: of the run.
        forks: workers see this process's memory, so that one copy in it serves all.
        processes: training processes on this machine; each would keep its own copy in memory.
    """
    needed = cache_bytes(manifest, side)
    words = f"{needed / 1e9:.2f} GB"
    copies = words if processes == 1 else f"{words} in each of {processes} processes"
    if mode != "auto":
        asked = copies if mode == "ram" else words
        return mode, f"{asked}, as asked" if mode != "none" else "as asked"
    if epochs == 1:
        return "none", "one epoch reads every file once anyway"
    free = free_disk(folder / cache_name(manifest, side))
    if free is not None and needed + DISK_RESERVE <= free:
        return "disk", f"{words} of {free / 1e9:.0f} GB free"
    memory = available_memory()
    if forks and memory is not None and processes * needed <= MEMORY_SHARE * memory:
        return "ram", f"{copies} of {memory / 1e9:.0f} GB of free memory; the disk cannot take it"
    return "none", f"{words} fit neither on the disk nor in memory: every epoch decodes"


def free_disk(folder: Path) -> int | None:
    """Return the free bytes where ``folder`` is or would be made; None where it cannot be."""
    lock = folder / ".lock"
    if lock.exists() and not os.access(lock, os.W_OK):
        # Somebody else's cache: it can be read, not rebuilt.
        return None
    for place in (folder, *folder.parents):
        if place.exists():
            return shutil.disk_usage(place).free if os.access(place, os.W_OK) else None
    return None


def find_cache(
    manifest: Manifest, side: int, folder: Path, max_pixels: int, *, unreadable: str = "error"
) -> tuple[PixelCache | None, str]:
    """Look for a disk cache of (at least) these pairs; write nothing.

    Returns:
        The cache and "", or None and why there is none to use: miss, stale or corrupt.

    Raises:
        DataError: ``unreadable`` is error, and the cache was made over files it could not decode.
    """
    place = folder / cache_name(manifest, side)
    wanted = description(manifest, side, max_pixels)
    verdict = judge(place, wanted)
    if verdict:
        return None, verdict
    try:
        found = map_cache(place)
    except (OSError, ValueError, EOFError, KeyError) as error:
        return None, f"corrupt: {error}"
    if unreadable == "error":
        found.require_sound(manifest)
    return found, ""


def open_cache(
    manifest: Manifest,
    side: int,
    *,
    mode: str,
    folder: Path,
    max_pixels: int,
    strict: bool = False,
    unreadable: str = "error",
    say: Say,
    track: Track,
    check_stop: Callable[[], None] = lambda: None,
) -> PixelCache:
    """Return the decoded pairs of ``manifest``, from the cache or by decoding them now.

    Args:
        manifest: every pair of the training data, validation included.
        side: side of the decoded squares.
        mode: disk or ram.
        folder: holds the caches of all data sets.
        max_pixels: as for training.
        strict: a disk cache that is not there, complete and fresh is an error.
        unreadable: error, or skip: rows of files that cannot be decoded stay empty and are listed
            in the cache.
        say: receives one line: hit, miss, stale or corrupt, and why.
        track: wraps the build's iterations for a progress bar.
        check_stop: called while building; raises to stop.

    Raises:
        DataError: a file cannot be read, memory or disk are too small, or ``strict`` and no hit.
    """
    if mode == "ram":
        return _in_memory(manifest, side, max_pixels, unreadable, say, track, check_stop)
    place = folder / cache_name(manifest, side)
    found, verdict = find_cache(manifest, side, folder, max_pixels, unreadable=unreadable)
    if found is not None:
        say(f"            hit: {place}")
        return found
    if strict:
        raise DataError(
            f"--strict-cache: there is no cache to use in {place}: {verdict}. Run once without "
            f"--strict-cache to build it."
        )
    say(f"            {verdict}; decoding into {place}")
    wanted = description(manifest, side, max_pixels)
    with locked(place, say, check_stop):
        # Another process may have built it while this one waited.
        if judge(place, wanted):
            build(
                place,
                wanted,
                manifest,
                max_pixels=max_pixels,
                unreadable=unreadable,
                say=say,
                track=track,
                check_stop=check_stop,
            )
        # Still under the lock: nobody replaces the files between the table and the map.
        made = map_cache(place)
    if unreadable == "error":
        made.require_sound(manifest)
    return made


def _in_memory(
    manifest: Manifest,
    side: int,
    max_pixels: int,
    unreadable: str,
    say: Say,
    track: Track,
    check_stop: Callable[[], None],
) -> PixelCache:
    needed, free = cache_bytes(manifest, side), available_memory()
    if free is not None and needed > free:
        raise DataError(
            f"--cache ram needs {needed / 1e9:.1f} GB and {free / 1e9:.1f} GB of memory are free. "
            f"Use --cache disk or none."
        )
    say(f"            {len(manifest)} pairs are decoded now, anew in every run")
    shape = (len(manifest), side, side, CHANNELS)
    # Anonymous and shared: forked workers read the same pages.
    pixels = np.frombuffer(mmap.mmap(-1, max(1, needed)), np.uint8)[:needed].reshape(shape)
    sizes = np.zeros((len(manifest), 2), np.int32)
    todo = list(range(len(manifest)))
    faults: dict[int, str] = {}
    decoded = _decode(manifest, todo, pixels, sizes, faults, max_pixels, check_stop)
    for _ in track(decoded, len(todo), "decoding"):
        pass
    if unreadable == "error":
        _require_none(faults)
    keys = [(pair.dataset, pair.name) for pair in manifest.pairs]
    rows = {key: row for row, key in enumerate(keys)}
    bad = {keys[row]: why for row, why in sorted(faults.items())}
    return PixelCache(pixels, sizes, rows, unreadable=bad)


def cache_name(manifest: Manifest, side: int) -> str:
    """Name a cache after the data's place and the size of its rows: a changed data set finds its
    old cache, and replaces it."""
    roots = sorted({str(pair.image.parent.resolve()) for pair in manifest.pairs})
    digest = hashlib.sha256("\n".join(roots).encode()).hexdigest()[:10]
    safe = "".join(c if c.isalnum() or c in "-_." else "-" for c in manifest.dataset)[:40]
    return f"{safe}-{side}-{digest}"


def build(
    place: Path,
    wanted: dict[str, Any],
    manifest: Manifest,
    *,
    max_pixels: int,
    unreadable: str,
    say: Say,
    track: Track,
    check_stop: Callable[[], None],
) -> None:
    """Decode every pair into ``place``, whose lock is held; continue an unfinished build of the
    same description."""
    side, count = wanted["side"], len(manifest)
    needed = cache_bytes(manifest, side)
    started = _read_json(place / "building.json")
    progress = place / "progress.u4"
    same = started is not None and started == wanted
    if not (same and progress.exists() and (place / "pixels.u8").exists()):
        for name in ("table.json", "building.json", "pixels.u8", "sizes.npy", "progress.u4"):
            (place / name).unlink(missing_ok=True)
        free = free_disk(place) or 0
        if needed + DISK_RESERVE // 4 > free:
            raise DataError(
                f"The cache needs {needed / 1e9:.1f} GB and {place.parent} has {free / 1e9:.1f} "
                f"GB free. Give another folder with --cache-dir, or use --cache ram or none."
            )
        try:
            _allocate(place / "pixels.u8", needed)
            _allocate(progress, 3 * 4 * count)
        except OSError as error:
            raise DataError(f"The cache cannot be written in {place}: {error}.") from error
        _write_json(place / "building.json", wanted)
    shape = (count, side, side, CHANNELS)
    pixels = np.memmap(place / "pixels.u8", np.uint8, "r+", shape=shape)
    # Per row: checksum, height, width; a height of 0 says not done.
    table = np.memmap(progress, np.uint32, "r+", shape=(count, 3))
    todo = []
    for index in range(count):
        if table[index, 1] and checksum(pixels[index]) != table[index, 0]:
            # Written to disk in another order than they were made, when the power failed.
            table[index] = 0
        if not table[index, 1]:
            todo.append(index)
    if 0 < len(todo) < count:
        say(f"            {count - len(todo)} of {count} pairs are there already")
    sizes = np.zeros((count, 2), np.int32)
    faults: dict[int, str] = {}
    decoded = _decode(manifest, todo, pixels, sizes, faults, max_pixels, check_stop)
    for index in track(decoded, len(todo), "decoding"):
        table[index] = (checksum(pixels[index]), *sizes[index])
    if unreadable == "error":
        _require_none(faults)
    for index in faults:
        # Their height stays 0. What an earlier build left in the row must not pass for a sample.
        pixels[index] = 0
        table[index] = (checksum(pixels[index]), 0, 0)
    pixels.flush()
    table.flush()
    original = np.asarray(table[:, 1:], np.int32)
    write_whole(place / "sizes.npy", lambda file: np.save(file, original), durable=True)
    names = list(wanted["files"])
    bad = {names[index]: why for index, why in sorted(faults.items())}
    checksums = table[:, 0].tolist()
    _write_json(place / "table.json", {**wanted, "checksums": checksums, "unreadable": bad})
    (place / "building.json").unlink(missing_ok=True)
    del table
    progress.unlink(missing_ok=True)


@contextmanager
def locked(place: Path, say: Say, check_stop: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Hold a cache's lock; the kernel drops it when the process dies, however it dies."""
    try:
        place.mkdir(parents=True, exist_ok=True)
        # A link somebody planted under this name is refused, not followed.
        handle = os.open(place / ".lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
        file: IO[str] = os.fdopen(handle, "w")
    except OSError as error:
        raise DataError(
            f"The cache folder {place} cannot be written: {error}. Give another with --cache-dir, "
            f"or use --cache none."
        ) from error
    try:
        waiting = False
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if not waiting:
                    say("            another process is building this cache; waiting for it")
                waiting = True
            except OSError:
                # A file system without locks: nobody can claim anything there.
                break
            # Not in one long call: Ctrl-C and the deadline are looked at here, too.
            check_stop()
            time.sleep(0.1)
        yield
    finally:
        file.close()


def _decode(
    manifest: Manifest,
    todo: Sequence[int],
    pixels: np.ndarray,
    sizes: np.ndarray,
    faults: dict[int, str],
    max_pixels: int,
    check_stop: Callable[[], None],
) -> Iterable[int]:
    """Decode rows in threads (the decoders release the interpreter's lock); yield those done, and
    put why others cannot be decoded into ``faults``."""
    side = pixels.shape[1]

    def one(index: int) -> str:
        pair: Pair = manifest.pairs[index]
        try:
            image, mask = read_pair(pair.image, pair.mask, max_pixels=max_pixels, at_least=side)
        except DataError as error:
            return str(error)
        sizes[index] = mask.shape
        pixels[index] = square_pair(image, mask, side)
        return ""

    chunk = 8 * usable_cores()
    with ThreadPoolExecutor(usable_cores()) as pool:
        for start in range(0, len(todo), chunk):
            check_stop()
            part = todo[start : start + chunk]
            for index, fault in zip(part, pool.map(one, part), strict=True):
                if fault:
                    faults[index] = fault
                else:
                    yield index


def _require_none(faults: Mapping[int, str]) -> None:
    """Raise one DataError that lists up to ten unreadable files."""
    if faults:
        reasons = [faults[row] for row in sorted(faults)]
        raise DataError(f"{len(faults)} files cannot be decoded:\n{listed(reasons)}")


def _allocate(path: Path, size: int) -> None:
    """Make a file of ``size`` bytes whose space is truly reserved: a full disk says so now, not as
    a bus error later."""
    with path.open("wb") as file:
        if size:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, size)
            else:
                file.truncate(size)


def _write_json(path: Path, value: Any) -> None:
    write_bytes(path, json.dumps(value).encode(), durable=True)


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None
