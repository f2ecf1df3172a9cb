"""Choose where decoded data is cached, and whether it fits on the disk or in memory."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

from camoxpert.config import DataConfig
from camoxpert.data.cache.table import CHANNELS
from camoxpert.data.files.manifest import Manifest
from camoxpert.data.samples.augment import source_side
from camoxpert.runtime.host import available_memory

# Bytes that a cache leaves free on its disk, and the largest share of free memory it takes.
DISK_RESERVE = 1 << 30
MEMORY_SHARE = 0.5


def cache_bytes(manifest: Manifest, side: int, modalities: int = 0) -> int:
    """Return the size of a data set's decoded pixels, in bytes."""
    return len(manifest) * side * side * (CHANNELS + modalities)


def default_folder() -> Path:
    """Return the default cache folder: $CAMOXPERT_CACHE, or the user's cache folder."""
    named = os.environ.get("CAMOXPERT_CACHE")
    if named:
        return Path(named)
    base = os.environ.get("XDG_CACHE_HOME")
    try:
        return Path(base or Path.home() / ".cache") / "camoxpert"
    except RuntimeError:
        # The user of a container may have no home folder.
        return Path(tempfile.gettempdir()) / "camoxpert"


def cache_root(data: DataConfig) -> Path:
    """Return the folder of all disk caches."""
    return Path(data.cache_dir) if data.cache_dir else default_folder()


def cache_place(manifest: Manifest, data: DataConfig) -> Path:
    """Return the folder of the disk cache for these pairs."""
    return cache_root(data) / cache_name(manifest, source_side(data), data.beside_rgb)


def cache_name(manifest: Manifest, side: int, modalities: Sequence[str] = ()) -> str:
    """Return a cache name made of the data's path, the size of the rows and the modalities.

    A changed data set keeps its name, so the new cache replaces the old one.
    """
    roots = sorted({str(pair.image.parent.resolve()) for pair in manifest.pairs})
    digest = hashlib.sha256("\n".join(roots).encode(errors="surrogateescape")).hexdigest()[:10]
    safe = "".join(c if c.isalnum() or c in "-_." else "-" for c in manifest.dataset)[:40]
    return "-".join([safe, str(side), *modalities, digest])


def choose_cache(
    manifest: Manifest,
    data: DataConfig,
    *,
    epochs: int,
    forks: bool = True,
    processes: int = 1,
) -> tuple[str, str]:
    """Resolve ``--cache auto``; return none, ram or disk, and the reason.

    Args:
        manifest: every pair of the training data, validation included.
        data: settings.
        epochs: number of epochs of the run.
        forks: workers are forked and share this process's memory, so one copy serves them all.
        processes: training processes on this machine; each would keep its own copy in memory.
    """
    mode = "disk" if data.strict_cache else data.cache
    needed = cache_bytes(manifest, source_side(data), len(data.beside_rgb))
    words = f"{needed / 1e9:.2f} GB"
    copies = words if processes == 1 else f"{words} in each of {processes} processes"
    if mode != "auto":
        asked = copies if mode == "ram" else words
        return mode, f"{asked}, as asked" if mode != "none" else "as asked"
    if epochs == 1:
        return "none", "one epoch reads every file once anyway"
    free = free_disk(cache_place(manifest, data))
    if free is not None and needed + DISK_RESERVE <= free:
        return "disk", f"{words} of {free / 1e9:.0f} GB free"
    memory = available_memory()
    if forks and memory is not None and processes * needed <= MEMORY_SHARE * memory:
        return (
            "ram",
            f"{copies} of {memory / 1e9:.0f} GB of free memory; the disk is full or read-only",
        )
    return "none", f"{words} fit neither on the disk nor in memory; every epoch decodes all files"


def free_disk(folder: Path) -> int | None:
    """Return the free bytes on the disk of ``folder``; None if it cannot be written."""
    lock = folder / ".lock"
    if lock.exists() and not os.access(lock, os.W_OK):
        # Another user's cache: it can be read but not rebuilt.
        return None
    for place in (folder, *folder.parents):
        if place.exists():
            return shutil.disk_usage(place).free if os.access(place, os.W_OK) else None
    return None
