"""Results of stages in the cache folder: found by key, verified, and explained where they miss.

``CACHE/stages/KEY/`` holds ``best.pt`` with its ``index.json``, as a run's checkpoints do, and
``stage.json``, which is written last and says what the result depends on.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from camoxpert import console
from camoxpert.errors import CheckpointError, DataError
from camoxpert.files import file_digest, lock, read_json, write_json, write_whole
from camoxpert.runs.checkpoint import BEST, INDEX, IndexEntry, load_checkpoint
from camoxpert.runs.records import read_info
from camoxpert.stages.key import Facts, differences
from camoxpert.text import count, shorten

FOLDER, MARKER = "stages", "stage.json"


@dataclass(frozen=True)
class Found:
    """A look into the cache.

    Attributes:
        weights: the kept weights; None: there are none to use.
        verdict: ``hit``, ``miss: why`` or ``corrupt: what``.
        seconds: what training them took.
    """

    weights: Path | None
    verdict: str
    seconds: float = 0.0


def find(root: Path, facts: Facts) -> Found:
    """Look for the result of a stage.

    Args:
        root: cache folder.
        facts: what it depends on.
    """
    folder = root / FOLDER / facts.key
    if not folder.is_dir() or not any((folder / name).exists() for name in (MARKER, BEST)):
        return Found(None, f"miss: {_nearest(root, facts)}")
    kept = read_json(folder / MARKER)
    weights = folder / BEST
    if kept.get("facts") != facts.to_dict():
        return Found(None, f"corrupt: {folder / MARKER} is damaged or missing")
    if not weights.is_file():
        return Found(None, f"corrupt: {weights} is missing")
    if file_digest(weights) != kept.get("sha256"):
        return Found(None, f"corrupt: {weights} differs from what was written (sha256)")
    seconds = float(kept.get("seconds") or 0.0)
    return Found(weights, f"hit: {folder}", seconds)


def keep(root: Path, facts: Facts, run: Path, *, name: str, seconds: float) -> Path:
    """Keep the weights of a finished run as the result of a stage; return their file.

    Args:
        root: cache folder.
        facts: what they depend on.
        run: the run folder.
        name: of the stage.
        seconds: what the training took.

    Raises:
        CheckpointError: the weights are missing or damaged.
        DataError: the cache folder cannot be written.
    """
    source = run / "checkpoints" / BEST
    step = load_checkpoint(source).values["state"]["step"]
    folder = root / FOLDER / facts.key
    weights = folder / BEST
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / MARKER).unlink(missing_ok=True)
        with source.open("rb") as file:
            write_whole(weights, lambda out: shutil.copyfileobj(file, out), durable=True)
        digest = file_digest(weights)
        if digest != file_digest(source):
            raise CheckpointError(f"{weights} is not what was copied from {source}.")
        size = weights.stat().st_size
        entry: IndexEntry = {"file": BEST, "step": step, "bytes": size, "sha256": digest}
        _write_index(folder, entry)
        about: dict[str, Any] = {
            "name": name,
            "facts": facts.to_dict(),
            "sha256": digest,
            "seconds": seconds,
            "run": str(run),
            "versions": dict(read_info(run).get("versions", {})),
        }
        write_json(folder / MARKER, about)
    except OSError as error:
        raise DataError(
            f"The result of stage {name} cannot be kept in {folder}: {error}. Give another cache "
            f"folder with --cache-dir; its run is in {run}."
        ) from error
    return weights


@contextmanager
def held(root: Path, key: str) -> Iterator[None]:
    """Hold a stage for the block: of several processes that want it, one trains it."""

    def waiting() -> None:
        console.note("stage       another process trains it: waiting")

    folder = root / FOLDER
    with contextlib.ExitStack() as stack:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            stack.enter_context(lock(folder / f"{key}.lock", waiting=waiting))
        except OSError as error:
            raise DataError(
                f"The cache folder {folder} cannot be written: {error}. Give another with "
                f"--cache-dir."
            ) from error
        yield


def _write_index(folder: Path, entry: IndexEntry) -> None:
    import json

    write_whole(folder / INDEX, lambda file: file.write(json.dumps([entry], indent=1).encode()))


def _nearest(root: Path, facts: Facts) -> str:
    """Return in what the kept stage that is nearest differs."""
    folders = sorted((root / FOLDER).glob("*/")) if (root / FOLDER).is_dir() else []
    found = []
    for folder in folders:
        kept = read_json(folder / MARKER)
        if isinstance(kept.get("facts"), dict):
            words = differences(kept["facts"], facts)
            found.append((len(words), folder.name, words, str(kept.get("name", ""))))
    if not found:
        return "no stage is kept yet"
    _, key, words, name = min(found)
    more = f" ({count(len(found), 'stage')} kept)" if len(found) > 1 else ""
    return f"{shorten(words, 3) or 'another format'} from {name or key}{more}"
