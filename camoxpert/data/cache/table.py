"""The files of a disk cache, and the checks that decide whether it can be used.

``pixels.u8`` is one uint8 array (N, S, S, 4 + M), RGB, mask and the planes of M modalities;
``sizes.npy`` holds the original sizes; ``table.json`` records the files, settings and code version
that the rows were made from, the checksum of each row, the rows with void pixels, and the files
that could not be decoded under ``--unreadable skip`` (their rows are empty, their height is 0). A
cache is used only if all of this matches.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypedDict

import cv2
import numpy as np
import PIL

from camoxpert.data.files.manifest import Manifest
from camoxpert.errors import DataError
from camoxpert.runtime.host import usable_cores
from camoxpert.text import bullet_list, shorten

# Increase it when decoding or resizing changes, which makes older caches stale.
FORMAT = 3
CHANNELS = 4
# Checksums verified at every start, spread evenly over the rows; smaller caches: all of them.
VERIFIED_ROWS = 2048


@dataclass(frozen=True)
class PixelCache:
    """Decoded pairs of one data set.

    Attributes:
        pixels: uint8 (N, S, S, 4 + M), RGB, mask (0 or 255, VOID on unlabelled pixels) and the
            planes of M modalities (0 where nothing is known).
        sizes: original (height, width) of each, (N, 2).
        rows: (data set, name) -> row.
        path: file of the pixels; None if they are in memory only.
        digest: SHA-256 of the table beside it.
        unreadable: (data set, name) -> why its files could not be decoded; its row is empty.
        void: rows whose masks have void pixels.
    """

    pixels: np.ndarray
    sizes: np.ndarray
    rows: dict[tuple[str, str], int]
    path: Path | None = None
    digest: str = ""
    unreadable: dict[tuple[str, str], str] = field(default_factory=dict)
    void: frozenset[int] = frozenset()

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the path instead of gigabytes: a spawned worker maps the file again."""
        if self.path is None:
            values = (np.asarray(self.pixels), self.sizes, self.rows)
            return PixelCache, (*values, None, "", self.unreadable, self.void)
        return _reopened, (self.path.parent, self.digest)

    def of(self, manifest: Manifest) -> np.ndarray:
        """Return the rows of a manifest's pairs, in its order."""
        return np.array([self.rows[pair.dataset, pair.name] for pair in manifest.pairs], np.int64)

    def unreadable_of(self, manifest: Manifest) -> dict[int, str]:
        """Return which of a manifest's pairs could not be decoded, by position, and why."""
        if not self.unreadable:
            return {}
        keys = ((pair.dataset, pair.name) for pair in manifest.pairs)
        return {i: self.unreadable[key] for i, key in enumerate(keys) if key in self.unreadable}

    def require_sound(self, manifest: Manifest) -> None:
        """Raise DataError that lists the pairs of a manifest that could not be decoded."""
        bad = list(self.unreadable_of(manifest).values())
        if bad:
            raise DataError(
                f"{len(bad)} files could not be decoded when the cache was made with "
                f"--unreadable skip:\n{bullet_list(bad)}\nRepair, replace or remove them, or use "
                f"--unreadable skip again."
            )


class Description(TypedDict, total=False):
    """Everything the pixels of a cache depend on.

    Attributes:
        format: version of the cache format.
        side: side of the images in the rows, in pixels.
        max_pixels: larger images were refused.
        versions: versions of the decoders.
        modalities: planes behind RGB and mask, by name; absent: none.
        files: "data set/name" -> paths of image and mask, then size and modification time of each.
    """

    format: int
    side: int
    max_pixels: int
    versions: dict[str, str]
    files: dict[str, list[Any]]
    modalities: list[str]


def description(
    manifest: Manifest, side: int, max_pixels: int, modalities: Sequence[str] = ()
) -> Description:
    """Return everything that a cache of these pairs depends on."""
    files = {}
    for pair in manifest.pairs:
        files[f"{pair.dataset}/{pair.name}"] = [
            str(pair.image.resolve()),
            str(pair.mask.resolve()),
            *_state(pair.image),
            *_state(pair.mask),
            *(["any size"] if pair.any_size else []),
            *([] if pair.labeled else ["no mask"]),
            *(["no object"] if pair.labeled and pair.mask == pair.image else []),
            *(
                value
                for name, path in pair.modalities
                for value in (name, str(path.resolve()), *_state(path))
            ),
        ]
    versions = {"opencv": cv2.__version__, "pillow": PIL.__version__}
    found: Description = {
        "format": FORMAT,
        "side": side,
        "max_pixels": max_pixels,
        "versions": versions,
        "files": files,
    }
    if modalities:
        found["modalities"] = list(modalities)
    return found


def channels_of(table: Mapping[str, Any]) -> int:
    """Return the channels of a cache's rows: RGB and mask, then a plane for each modality."""
    return CHANNELS + len(table.get("modalities", ()))


def judge(place: Path, wanted: Description) -> str:
    """Return why the cache in ``place`` cannot be used: miss, stale or corrupt; "" if it can."""
    try:
        found = json.loads((place / "table.json").read_text())
    except FileNotFoundError:
        if (place / "building.json").exists():
            return "miss: an earlier build did not finish and is resumed"
        return "miss: nothing was built for this data and size yet"
    except (OSError, ValueError) as error:
        return f"corrupt: its table cannot be read ({error})"
    if not isinstance(found, dict) or "checksums" not in found:
        return "corrupt: its table is incomplete"
    stale = difference(found, wanted)
    if stale:
        return f"stale: {stale}"
    return damage(place, found)


def difference(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    """Return how a table differs from the wanted description; "" if it does not."""
    names = {
        "format": "made by another version of this program",
        "side": "another image size",
        "max_pixels": "another data.max_pixels",
        "versions": "other versions of the decoders",
    }
    for key, words in names.items():
        if found.get(key) != wanted[key]:
            return f"{words} ({found.get(key)}, now {wanted[key]})"
    if found.get("modalities", []) != wanted.get("modalities", []):
        return f"other modalities ({found.get('modalities')}, now {wanted.get('modalities')})"
    old, new = found.get("files", {}), wanted["files"]
    changed = [name for name in new if name in old and old[name] != new[name]]
    added = [name for name in new if name not in old]
    if not changed and not added:
        # Additional pairs in the cache (left out by a clean list) do no harm.
        return ""
    parts = []
    gone = [name for name in old if name not in new]
    for words, files in (("changed", changed), ("new", added), ("gone", gone)):
        if files:
            parts.append(f"{len(files)} {words} ({shorten(files, 1)})")
    return "files " + ", ".join(parts)


def damage(place: Path, table: Mapping[str, Any]) -> str:
    """Return how the pixels differ from their checksums; "" if they do not."""
    checksums, side = table["checksums"], table["side"]
    row = side * side * channels_of(table)
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
        sums = pool.map(lambda index: checksum(pixels[index]), looked_at)
        for index, found in zip(looked_at, sums, strict=True):
            if found != checksums[index]:
                return f"corrupt: row {index} does not match its checksum"
    return ""


def checksum(row: np.ndarray) -> int:
    """Return the CRC-32 of a row's bytes."""
    return zlib.crc32(np.ascontiguousarray(row).data)


def map_cache(place: Path, digest: str = "") -> PixelCache:
    """Memory-map a cache that ``judge`` accepted.

    Args:
        place: folder of the cache.
        digest: expected SHA-256 of its table; empty: any.

    Raises:
        DataError: the cache has been replaced.
    """
    data = (place / "table.json").read_bytes()
    found = hashlib.sha256(data).hexdigest()
    if digest and digest != found:
        raise DataError(
            f"The cache in {place} was replaced by another run while this one was using it. "
            f"Start this run again."
        )
    table = json.loads(data)
    names = list(table["files"])
    shape = (len(names), table["side"], table["side"], channels_of(table))
    pixels: np.ndarray = np.zeros(shape, np.uint8)
    if names:
        pixels = np.memmap(place / "pixels.u8", np.uint8, "r", shape=shape)
    sizes = np.load(place / "sizes.npy", allow_pickle=False)
    rows = {_pair_key(name): row for row, name in enumerate(names)}
    unreadable = {_pair_key(name): why for name, why in table.get("unreadable", {}).items()}
    void = frozenset(table.get("void", ()))
    return PixelCache(pixels, sizes, rows, place / "pixels.u8", found, unreadable, void)


def _state(path: Path) -> tuple[int, int]:
    """Return a file's size and modification time; (-1, -1) if it is missing."""
    try:
        found = path.stat()
    except OSError:
        return -1, -1
    return found.st_size, found.st_mtime_ns


def _reopened(place: Path, digest: str) -> PixelCache:
    return map_cache(place, digest)


def _pair_key(name: str) -> tuple[str, str]:
    dataset, _, stem = name.partition("/")
    return dataset, stem
