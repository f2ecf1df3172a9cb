"""Results of costly stages, kept by what they depend on: the content of files and the settings.

An entry is ``DIR/STAGE/KEY[:2]/KEY-SETTINGS.bin``: a hash and the array behind it. ``KEY`` is made
from the contents of the files, ``SETTINGS`` from what the stage does with them. Moving or renaming
data changes nothing; a changed file or setting is another entry.
"""

from __future__ import annotations

import hashlib
import io
import json
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from camoxpert import console
from camoxpert.data.cache.choice import DISK_RESERVE, free_disk
from camoxpert.errors import ConfigError
from camoxpert.files import write_bytes
from camoxpert.text import bullet_list, count

HIT = "hit"
NOT_MADE, OTHER_SETTINGS = "miss: not made yet", "miss: made with other settings"
CORRUPT = "corrupt: rebuilt"
OFF = "miss: not cached"
DIGEST_BYTES = 16


@dataclass(frozen=True)
class StageCache:
    """The kept results of one stage; shared by threads and processes.

    Attributes:
        folder: of all stages; None: nothing is kept.
        stage: name.
        settings: hash of what the stage does, see ``settings_key``.
    """

    folder: Path | None
    stage: str
    settings: str

    def path(self, key: str) -> Path:
        """Return the file of an entry."""
        assert self.folder is not None
        return self.folder / self.stage / key[:2] / f"{key}-{self.settings}.bin"

    def find(self, key: str) -> tuple[NDArray[Any] | None, str]:
        """Return a kept array, or None, and what to say: hit, or a miss and why."""
        if self.folder is None:
            return None, OFF
        path = self.path(key)
        try:
            data = path.read_bytes()
        except OSError:
            return None, self._why(path, key)
        digest, content = data[:DIGEST_BYTES], data[DIGEST_BYTES:]
        if _digest(content) != digest:
            return None, CORRUPT
        return np.load(io.BytesIO(content), allow_pickle=False), HIT

    def keep(self, key: str, array: NDArray[Any]) -> None:
        """Keep an array; a full disk costs the entry, not the run."""
        if self.folder is None:
            return
        buffer = io.BytesIO()
        np.save(buffer, array)
        content = buffer.getvalue()
        try:
            write_bytes(self.path(key), _digest(content) + content)
        except OSError as error:
            _warn_once(f"{self.path(key).parent} cannot be written: {error.strerror or error}")

    def holds(self, key: str) -> str:
        """Return hit, or why there is no entry, without reading it."""
        if self.folder is None:
            return OFF
        path = self.path(key)
        return HIT if path.is_file() else self._why(path, key)

    def _why(self, path: Path, key: str) -> str:
        try:
            others = any(path.parent.glob(f"{key}-*.bin"))
        except OSError:
            others = False
        return OTHER_SETTINGS if others else NOT_MADE


_warned = threading.Event()


def _warn_once(text: str) -> None:
    """Warn of the first result that cannot be kept."""
    if not _warned.is_set():
        _warned.set()
        console.warn(f"results of stages are not cached any more: {text}")


def _digest(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=DIGEST_BYTES).digest()


def content_key(*parts: object) -> str:
    """Return the key of an entry: hashes of files, and what else its content depends on."""
    return hashlib.sha256("\n".join(map(str, parts)).encode()).hexdigest()[:32]


def settings_key(stage: Mapping[str, Any]) -> str:
    """Return the hash of what a stage does: its version and its settings."""
    return hashlib.sha256(json.dumps(stage, sort_keys=True).encode()).hexdigest()[:12]


def choose_folder(mode: str, folder: Path, needed: int) -> Path | None:
    """Return where stages are cached, None for nowhere, and say why.

    Args:
        mode: auto, disk or none.
        folder: of the caches.
        needed: bytes of all entries, estimated.
    """
    size = f"{needed / 1e9:.2f} GB"
    if mode == "none":
        console.decide("stage cache", "none, as asked")
        return None
    free = free_disk(folder)
    if mode == "auto" and (free is None or needed + DISK_RESERVE > free):
        why = "cannot be written" if free is None else f"has {free / 1e9:.0f} GB free, too few"
        console.decide("stage cache", f"none: about {size}, and {folder} {why}")
        return None
    console.decide("stage cache", f"about {size} in {folder}")
    return folder


def require_hits(stage: str, missing: Sequence[tuple[object, str]]) -> None:
    """Raise ConfigError if results of a stage are not there, under ``--strict-cache``.

    Args:
        stage: name.
        missing: (file, why) of each miss.
    """
    if missing:
        listed = bullet_list([f"{name}: {why}" for name, why in missing])
        raise ConfigError(
            f"--strict-cache: the stage {stage} has no cached result for "
            f"{count(len(missing), 'source')}:\n{listed}\nRun once without --strict-cache, or name "
            "the cache with --cache-dir."
        )
