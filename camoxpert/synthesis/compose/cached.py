"""Describe objects and backgrounds once: what was found in a file is kept until it changes.

One file holds everything, a record for each picture under the key of what it was made from: path,
size and modification time of image and mask. Files that were added or changed are described, all
others are taken as they are.
"""

from __future__ import annotations

import hashlib
import json
import zipfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from camoxpert import console
from camoxpert.data.files.image_io import UNLIMITED, probe
from camoxpert.files import why_unwritable, write_whole
from camoxpert.runtime.host import usable_cores
from camoxpert.synthesis.compose.backgrounds import (
    BackgroundEntry,
    BackgroundIndex,
    Described,
    describe,
    index_of,
)
from camoxpert.synthesis.compose.describe import CELL, CELLS
from camoxpert.synthesis.compose.library import (
    ListedPicture,
    ObjectEntry,
    ObjectLibrary,
    library_of,
    list_objects,
    read_picture,
)
from camoxpert.synthesis.compose.reading import read_masked

FORMAT = 2
"""Increase it when what is described or how changes, which makes older caches stale."""


@dataclass(frozen=True)
class Source:
    """A picture that gives objects or serves as a background.

    Attributes:
        name: unique among the pictures of its kind.
        image: file.
        mask: file; "" for an RGBA picture, or a background that shows no object.
    """

    name: str
    image: str
    mask: str = ""


@dataclass(frozen=True)
class Record:
    """What is kept of a picture: values for JSON and arrays."""

    facts: dict[str, Any]
    arrays: dict[str, np.ndarray]


def objects_of(sources: Sequence[Source], cache: Path | None = None) -> tuple[ObjectLibrary, str]:
    """Return the objects of pictures, and whether the cache had them.

    Args:
        sources: the pictures.
        cache: a folder for the descriptions; None keeps nothing.

    Returns:
        The library, and "hit", "miss: why", "stale: why" or "corrupt: why".

    Raises:
        DataError: a file is missing or damaged.
        Stopped: Ctrl-C, SIGTERM or the deadline.
    """

    def look(source: Source) -> Record:
        listed = list_objects(read_picture(source.name, source.image, source.mask))
        facts = {"left_out": listed.left_out, "entries": [asdict(e) for e in listed.entries]}
        return Record(facts, {"features": listed.features})

    records, verdict = _records(sources, cache, "objects", look, "cutting objects")
    pictures = []
    for record in records:
        entries = [
            ObjectEntry(**{**entry, "sides": tuple(entry["sides"])})
            for entry in record.facts["entries"]
        ]
        pictures.append(
            ListedPicture(tuple(entries), record.arrays["features"], record.facts["left_out"])
        )
    return library_of(pictures), verdict


def backgrounds_of(
    sources: Sequence[Source], cache: Path | None = None
) -> tuple[BackgroundIndex, str]:
    """Return the index of backgrounds, and whether the cache had it; as ``objects_of``."""

    def look(source: Source) -> Record:
        image, mask = read_masked(source.image, source.mask, at_least=CELLS * CELL)
        size = probe(source.image, max_pixels=UNLIMITED).upright
        if (image.shape[0] > image.shape[1]) != (size[0] > size[1]):
            # Stored as its mask is: the rotation of its EXIF was not applied.
            size = size[1], size[0]
        described = describe(
            source.name, image, mask, source=source.image, mask_source=source.mask, size=size
        )
        facts = {"entry": asdict(described.entry), "grid": list(described.taken.shape)}
        return Record(
            facts,
            {
                "taken": described.taken.ravel(),
                "windows": described.windows.astype(np.uint8),
                "features": described.features,
            },
        )

    records, verdict = _records(sources, cache, "backgrounds", look, "describing backgrounds")
    return index_of(
        Described(
            BackgroundEntry(**record.facts["entry"]),
            record.arrays["taken"].reshape(record.facts["grid"]),
            record.arrays["windows"].astype(np.int32),
            record.arrays["features"],
        )
        for record in records
    ), verdict


def _records(
    sources: Sequence[Source],
    cache: Path | None,
    kind: str,
    look: Callable[[Source], Record],
    doing: str,
) -> tuple[list[Record], str]:
    """Return a record for each source, from the cache where it has one."""
    keys = [_key(source) for source in sources]
    known: dict[str, Record] = {}
    verdict = "miss: no cache folder was given"
    if cache is not None:
        known, verdict = _load(cache / f"{kind}.npz")
    todo = {key: source for key, source in zip(keys, sources, strict=True) if key not in known}
    if not todo:
        return [known[key] for key in keys], verdict
    if known:
        verdict = f"stale: {len(todo)} of {len(sources)} pictures are new or were changed"
    with ThreadPoolExecutor(usable_cores()) as pool:
        found = console.track(pool.map(look, todo.values()), doing, total=len(todo))
        known |= dict(zip(todo, found, strict=True))
    records = [known[key] for key in keys]
    if cache is not None:
        _save(cache / f"{kind}.npz", dict(zip(keys, records, strict=True)))
    return records, verdict


def _key(source: Source) -> str:
    """Return a digest of everything that the record of a picture depends on."""
    state: list[object] = [FORMAT, cv2.__version__, source.name]
    for file in (source.image, source.mask):
        if file:
            status = Path(file).stat() if Path(file).exists() else None
            state += [file, status and status.st_size, status and status.st_mtime_ns]
    return hashlib.sha256(json.dumps(state).encode()).hexdigest()


def _save(path: Path, records: dict[str, Record]) -> None:
    """Write records; without room on the disk they are only not kept."""
    names = list(next(iter(records.values())).arrays)
    arrays = {n: np.concatenate([r.arrays[n] for r in records.values()]) for n in names}
    table = {
        key: [record.facts, [len(record.arrays[n]) for n in names]]
        for key, record in records.items()
    }
    arrays["table"] = np.frombuffer(json.dumps([names, table]).encode(), np.uint8)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, lambda file: np.savez(file, **arrays))
    except OSError as error:
        console.warn(f"{path} could not be written ({why_unwritable(error)}): nothing is cached.")


def _load(path: Path) -> tuple[dict[str, Record], str]:
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        names, table = json.loads(arrays["table"].tobytes())
        ends = dict.fromkeys(names, 0)
        records = {}
        for key, (facts, lengths) in table.items():
            parts = {}
            for name, length in zip(names, lengths, strict=True):
                parts[name] = arrays[name][ends[name] : ends[name] + length]
                ends[name] += length
            records[key] = Record(facts, parts)
    except FileNotFoundError:
        return {}, "miss: nothing was described yet"
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
        return {}, f"corrupt: {error}"
    if any(ends[name] != len(arrays[name]) for name in names):
        return {}, "corrupt: its table does not match its arrays"
    return records, "hit"
