"""Decoded pairs on disk or in memory: what an epoch reads instead of JPEGs.

One array of uint8 (N, S, S, 4), RGB and mask, shared by workers and ranks. It lives outside the
data
set,
in a folder named after the data; a table beside it says from which files, with which settings and
by
which code it was made, so that a cache of anything else is never used. Rows carry checksums; the
table
is written last and at once. A build that was killed continues where it stopped.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import mmap
import os
import shutil
import tempfile
import zlib
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import cv2
import numpy as np
import PIL

from camoxpert.data.augment import resize_pair
from camoxpert.data.image_io import read_pair
from camoxpert.data.manifest import Manifest, Pair
from camoxpert.data.resources import available_memory, usable_cores
from camoxpert.errors import DataError

# Raise it when decoding or resizing changes: older caches are then stale.
FORMAT = 1
CHANNELS = 4
# Rows whose checksums every start looks at, spread evenly; all of them in smaller sets.
VERIFIED_ROWS = 2048
# Free space that a cache leaves on its disk, and the share of free memory it takes at most.
DISK_RESERVE = 1 << 30
MEMORY_SHARE = 0.5

Say = Callable[[str], None]
Track = Callable[[Iterable[Any], int, str], Iterable[Any]]


@dataclass(frozen=True)
class PixelCache:
    """Decoded pairs of one data set.

    Attributes:
        pixels: uint8 (N, S, S, 4), RGB and mask (0 or 255).
        sizes: original (height, width) of each, (N, 2).
        rows: row of each (data set, name).
        path: file of the pixels; None where they live in memory alone.
    """

    pixels: np.ndarray
    sizes: np.ndarray
    rows: dict[tuple[str, str], int]
    path: Path | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the file's name, not its gigabytes: a spawned worker maps it again."""
        if self.path is None:
            return PixelCache, (np.asarray(self.pixels), self.sizes, self.rows)
        return _reopened, (self.path, self.pixels.shape, self.sizes, self.rows)

    def of(self, manifest: Manifest) -> np.ndarray:
        """Return the rows of a manifest's pairs, in its order."""
        return np.array([self.rows[pair.dataset, pair.name] for pair in manifest.pairs], np.int64)


def cache_bytes(manifest: Manifest, side: int) -> int:
    """Return the size of the pixels of a data set."""
    return len(manifest) * side * side * CHANNELS


def default_folder() -> Path:
    """Return where caches live unless told otherwise: $CAMOXPERT_CACHE, or the user's cache
    folder."""
    named = os.environ.get("CAMOXPERT_CACHE")
    if named:
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "camoxpert"


def choose_cache(
    mode: str, manifest: Manifest, side: int, *, folder: Path, epochs: int
) -> tuple[str, str]:
    """Resolve ``--cache auto``; return none, ram or disk, and why."""
    needed = cache_bytes(manifest, side)
    words = f"{needed / 1e9:.2f} GB"
    if mode != "auto":
        return mode, f"{words}, as asked" if mode != "none" else "as asked"
    if epochs == 1:
        return "none", "one epoch reads every file once anyway"
    free = free_disk(folder)
    if free is not None and needed + DISK_RESERVE <= free:
        return "disk", f"{words} of {free / 1e9:.0f} GB free"
    memory = available_memory()
    if memory is not None and needed <= MEMORY_SHARE * memory:
        return "ram", f"{words} of {memory / 1e9:.0f} GB of free memory; the disk is too full"
    return "none", f"{words} fit neither on the disk nor in memory: every epoch decodes"


def free_disk(folder: Path) -> int | None:
    """Return the free bytes where ``folder`` is or would be made; None where it cannot be."""
    for place in (folder, *folder.parents):
        if place.exists():
            return shutil.disk_usage(place).free if os.access(place, os.W_OK) else None
    return None


def open_cache(
    manifest: Manifest,
    side: int,
    *,
    mode: str,
    folder: Path,
    max_pixels: int,
    strict: bool = False,
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
        say: receives one line: hit, miss, stale or corrupt, and why.
        track: wraps the build's iterations for a progress bar.
        check_stop: called while building; raises to stop.

    Raises:
        DataError: a file cannot be read, the disk is too small, or ``strict`` and no hit.
    """
    if mode == "ram":
        say(f"            {len(manifest)} pairs are decoded now, anew in every run")
        shape = (len(manifest), side, side, CHANNELS)
        # Anonymous and shared: forked workers read the same pages.
        pixels = np.frombuffer(mmap.mmap(-1, max(1, int(np.prod(shape)))), np.uint8)
        pixels = pixels[: int(np.prod(shape))].reshape(shape)
        sizes = np.zeros((len(manifest), 2), np.int32)
        todo = list(range(len(manifest)))
        decoded = _decode(manifest, todo, pixels, sizes, max_pixels, check_stop)
        for _ in track(decoded, len(todo), "decoding"):
            pass
        return PixelCache(pixels, sizes, _rows(manifest))
    place = folder / cache_name(manifest, side)
    wanted = description(manifest, side, max_pixels)
    verdict = judge(place, wanted)
    if verdict:
        if strict:
            raise DataError(
                f"--strict-cache: there is no cache to use in {place}: {verdict}. Run once without "
                f"--strict-cache to build it."
            )
        say(f"            {verdict}; decoding into {place}")
        build(
            place,
            wanted,
            manifest,
            max_pixels=max_pixels,
            say=say,
            track=track,
            check_stop=check_stop,
        )
        verdict = judge(place, wanted)
        if verdict:
            raise DataError(f"The cache in {place} was built and is not sound: {verdict}.")
    else:
        say(f"            hit: {place}")
    shape = (len(manifest), side, side, CHANNELS)
    path = place / "pixels.u8"
    sizes = np.load(place / "sizes.npy", allow_pickle=False)
    return PixelCache(_mapped(path, shape), sizes, _rows(manifest), path)


def inspect_cache(manifest: Manifest, side: int, folder: Path, max_pixels: int) -> str:
    """Say why there is no disk cache to use (see ``judge``); "" where there is one."""
    place = folder / cache_name(manifest, side)
    return judge(place, description(manifest, side, max_pixels))


def cache_name(manifest: Manifest, side: int) -> str:
    """Name a cache after the data's place and the size of its rows: a changed data set finds its
    old
    cache, and replaces it."""
    roots = sorted({str(pair.image.parent.resolve()) for pair in manifest.pairs})
    digest = hashlib.sha256("\n".join(roots).encode()).hexdigest()[:10]
    safe = "".join(c if c.isalnum() or c in "-_." else "-" for c in manifest.dataset)[:40]
    return f"{safe}-{side}-{digest}"


def description(manifest: Manifest, side: int, max_pixels: int) -> dict[str, Any]:
    """Return everything the pixels of a cache depend on."""
    files = {}
    for pair in manifest.pairs:
        stats = [path.stat() for path in (pair.image, pair.mask)]
        files[f"{pair.dataset}/{pair.name}"] = [
            str(pair.image.resolve()),
            str(pair.mask.resolve()),
            *(number for stat in stats for number in (stat.st_size, stat.st_mtime_ns)),
        ]
    versions = {"opencv": cv2.__version__, "pillow": PIL.__version__}
    return {
        "format": FORMAT,
        "side": side,
        "max_pixels": max_pixels,
        "versions": versions,
        "files": files,
    }


def judge(place: Path, wanted: dict[str, Any]) -> str:
    """Say why the cache in ``place`` cannot be used (miss, stale or corrupt); "" where it can."""
    try:
        found = json.loads((place / "table.json").read_text())
    except FileNotFoundError:
        if (place / "building.json").exists():
            return "miss: an earlier build did not finish; it continues"
        return "miss: nothing was built for this data and size yet"
    except (OSError, ValueError) as error:
        return f"corrupt: its table cannot be read ({error})"
    if not isinstance(found, dict) or "checksums" not in found:
        return "corrupt: its table is incomplete"
    stale = difference(found, wanted)
    if stale:
        return f"stale: {stale}"
    return damage(place, found)


def difference(found: dict[str, Any], wanted: dict[str, Any]) -> str:
    """Say what a table's description has other than the one wanted; "" where nothing."""
    names = {
        "format": "made by another version of this program",
        "side": "another image size",
        "max_pixels": "another data.max_pixels",
        "versions": "other versions of the decoders",
    }
    for key, words in names.items():
        if found.get(key) != wanted[key]:
            return f"{words} ({found.get(key)}, now {wanted[key]})"
    old, new = found.get("files", {}), wanted["files"]
    if list(old) == list(new) and old == new:
        return ""
    changed = [name for name in new if name in old and old[name] != new[name]]
    parts = []
    for words, some in (
        ("changed", changed),
        ("new", [name for name in new if name not in old]),
        ("gone", [name for name in old if name not in new]),
    ):
        if some:
            parts.append(f"{len(some)} {words} ({some[0]}{', ...' if len(some) > 1 else ''})")
    return "files " + (", ".join(parts) if parts else "in another order")


def damage(place: Path, table: dict[str, Any]) -> str:
    """Say how the pixels differ from their checksums; "" where they do not."""
    checksums, side = table["checksums"], table["side"]
    row = side * side * CHANNELS
    path = place / "pixels.u8"
    try:
        size = path.stat().st_size
        sizes = np.load(place / "sizes.npy", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        return f"corrupt: {error}"
    if size != row * len(checksums) or sizes.shape != (len(checksums), 2):
        return f"corrupt: it holds {size} bytes instead of {row * len(checksums)}"
    if not checksums:
        return ""
    pixels = np.memmap(path, np.uint8, "r", shape=(len(checksums), row))
    count = min(len(checksums), VERIFIED_ROWS)
    looked_at = np.linspace(0, len(checksums) - 1, count).astype(int)
    with ThreadPoolExecutor(usable_cores()) as pool:
        sums = pool.map(lambda index: _checksum(pixels[index]), looked_at)
        for index, checksum in zip(looked_at, sums, strict=True):
            if checksum != checksums[index]:
                return f"corrupt: row {index} does not match its checksum"
    return ""


def build(
    place: Path,
    wanted: dict[str, Any],
    manifest: Manifest,
    *,
    max_pixels: int,
    say: Say,
    track: Track,
    check_stop: Callable[[], None],
) -> None:
    """Decode every pair into ``place``; continue an unfinished build of the same description."""
    side, count = wanted["side"], len(manifest)
    needed = cache_bytes(manifest, side)
    with locked(place, say):
        if not judge(place, wanted):
            # Another process built it while this one waited.
            return
        started = _read_json(place / "building.json")
        progress = place / "progress.u4"
        same = started is not None and not difference(started, wanted)
        if not (same and progress.exists() and (place / "pixels.u8").exists()):
            for name in ("table.json", "building.json", "pixels.u8", "sizes.npy", "progress.u4"):
                (place / name).unlink(missing_ok=True)
            free = free_disk(place) or 0
            if needed + DISK_RESERVE // 4 > free:
                raise DataError(
                    f"The cache needs {needed / 1e9:.1f} GB and {place.parent} has "
                    f"{free / 1e9:.1f} GB free. Give another folder with --cache-dir, or use "
                    f"--cache "
                    f"ram or none."
                )
            try:
                _allocate(place / "pixels.u8", needed)
                _allocate(progress, 3 * 4 * count)
            except OSError as error:
                raise DataError(f"The cache cannot be written in {place}: {error}.") from error
            write_json(place / "building.json", wanted)
        shape = (count, side, side, CHANNELS)
        pixels = np.memmap(place / "pixels.u8", np.uint8, "r+", shape=shape)
        # Per row: checksum, height, width; a height of 0 says not done.
        table = np.memmap(progress, np.uint32, "r+", shape=(count, 3))
        todo = []
        for index in range(count):
            if table[index, 1] and _checksum(pixels[index]) != table[index, 0]:
                # Written to disk in another order than they were made, when the power failed.
                table[index] = 0
            if not table[index, 1]:
                todo.append(index)
        if 0 < len(todo) < count:
            say(f"            {count - len(todo)} of {count} pairs are there already")
        sizes = np.zeros((count, 2), np.int32)
        decoded = _decode(manifest, todo, pixels, sizes, max_pixels, check_stop)
        for index in track(decoded, len(todo), "decoding"):
            table[index] = (_checksum(pixels[index]), *sizes[index])
        pixels.flush()
        table.flush()
        _save_array(place / "sizes.npy", np.asarray(table[:, 1:], np.int32))
        write_json(place / "table.json", {**wanted, "checksums": table[:, 0].tolist()})
        (place / "building.json").unlink(missing_ok=True)
        del table
        progress.unlink(missing_ok=True)


@contextmanager
def locked(place: Path, say: Say) -> Any:
    """Hold a cache's lock; the kernel drops it when the process dies, however it dies."""
    try:
        place.mkdir(parents=True, exist_ok=True)
        file: IO[str] = (place / ".lock").open("w")
    except OSError as error:
        raise DataError(
            f"The cache folder {place} cannot be written: {error}. Give another with --cache-dir, "
            f"or "
            f"use --cache none."
        ) from error
    try:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            say("            another process is building this cache; waiting for it")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
    finally:
        file.close()


def _decode(
    manifest: Manifest,
    todo: Sequence[int],
    pixels: np.ndarray,
    sizes: np.ndarray,
    max_pixels: int,
    check_stop: Callable[[], None],
) -> Iterable[int]:
    """Decode rows in threads (the decoders release the interpreter's lock); yield those done.

    Raises:
        DataError: one error that lists up to ten unreadable files, after all others are decoded.
    """
    side = pixels.shape[1]

    def one(index: int) -> str:
        pair: Pair = manifest.pairs[index]
        try:
            image, mask = read_pair(pair.image, pair.mask, max_pixels=max_pixels, at_least=side)
        except DataError as error:
            return str(error)
        sizes[index] = mask.shape
        small, binary = resize_pair(image, mask, side)
        pixels[index, :, :, :3] = small
        pixels[index, :, :, 3] = binary
        return ""

    faults = []
    chunk = 8 * usable_cores()
    with ThreadPoolExecutor(usable_cores()) as pool:
        for start in range(0, len(todo), chunk):
            check_stop()
            part = todo[start : start + chunk]
            for index, fault in zip(part, pool.map(one, part), strict=True):
                if fault:
                    faults.append(fault)
                else:
                    yield index
    if faults:
        more = f"\n... and {len(faults) - 10} more" if len(faults) > 10 else ""
        listed = "\n".join(f"  {text}" for text in faults[:10])
        raise DataError(f"{len(faults)} files cannot be decoded:\n{listed}{more}")


def _checksum(row: np.ndarray) -> int:
    return zlib.crc32(np.ascontiguousarray(row).data)


def _mapped(path: Path, shape: tuple[int, ...]) -> np.ndarray:
    if not np.prod(shape):
        return np.zeros(shape, np.uint8)
    return np.memmap(path, np.uint8, "r", shape=shape)


def _reopened(
    path: Path, shape: tuple[int, ...], sizes: np.ndarray, rows: dict[tuple[str, str], int]
) -> PixelCache:
    return PixelCache(_mapped(path, shape), sizes, rows, path)


def _rows(manifest: Manifest) -> dict[tuple[str, str], int]:
    return {(pair.dataset, pair.name): row for row, pair in enumerate(manifest.pairs)}


def _allocate(path: Path, size: int) -> None:
    """Make a file of ``size`` bytes whose space is truly reserved: a full disk says so now, not as
    a
    bus error later."""
    with path.open("wb") as file:
        if size:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, size)
            else:
                file.truncate(size)


def write_json(path: Path, value: Any) -> None:
    """Write JSON whole or not at all."""
    _write_whole(path, lambda file: file.write(json.dumps(value).encode()))


def _save_array(path: Path, array: np.ndarray) -> None:
    _write_whole(path, lambda file: np.save(file, array))


def _write_whole(path: Path, write: Callable[[IO[bytes]], Any]) -> None:
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=".", suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None
