"""What makes two runs the same: settings compared by meaning, files by content and not by path."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from camoxpert.config import Config, get_setting, leaves
from camoxpert.errors import CheckpointError
from camoxpert.files import file_digest
from camoxpert.runs.checkpoint import resolve_checkpoint
from camoxpert.runs.hub import is_hub_name

# Settings that say how long, how fast or where, not what is trained.
FREE = (
    "data.test_roots",
    "data.num_workers",
    "data.persistent_workers",
    "data.prefetch_factor",
    "data.pin_memory",
    "data.start_method",
    "data.worker_timeout",
    "data.allow_outside",
    "data.unreadable",
    "data.max_unreadable",
    "data.cache",
    "data.cache_dir",
    "data.strict_cache",
    "train.device",
    "train.max_hours",
    "train.resume",
    "train.allow_data_change",
    "train.process_timeout",
)
ROOTS, SYNTHETIC, UNLABELED = "data.roots", "data.synthetic", "data.unlabeled"
NEGATIVES = "data.negatives"
PLACES = frozenset((ROOTS, SYNTHETIC, NEGATIVES, UNLABELED))
"""Settings that name training data: moved data is the same, and the caller compares it."""
TEACHER = "data.teacher"
REFERENCES = "data.episodes.references"
FILES = (
    *("data.clean_list", TEACHER, "model.weights", "model.init_from"),
    *("model.support.weights", REFERENCES, "data.splits"),
)
"""Settings that name a file, a model or a folder of maps; its content counts."""
MODELS = ("model.init_from", TEACHER)
"""Those that name a model, which may be on the Hub."""


def what_is_trained(config: Config) -> dict[str, Any]:
    """Return the settings that decide what a run learns, by dotted path.

    Spellings of one path (``data/``, ``./data``) are made equal.
    """
    values = {
        leaf.path: get_setting(config, leaf.path)
        for leaf in leaves()
        if leaf.path not in FREE and not leaf.path.startswith("run.")
    }
    for path in (ROOTS, SYNTHETIC, NEGATIVES):
        values[path] = tuple(os.path.normpath(root) for root in values[path])
    named = {*FILES, UNLABELED}
    return values | {path: os.path.normpath(values[path]) for path in named if values[path]}


def same_place(one: str, other: str) -> bool:
    """Return whether two paths name one place, through links and from the working folder."""
    return bool(one) and bool(other) and os.path.realpath(one) == os.path.realpath(other)


def file_hashes(config: Config, before: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return dotted path -> sha256 of the files that settings name.

    Args:
        config: settings.
        before: those recorded by the run that is continued, for files that are gone: a stopped run
            needs them no longer.
    """
    found: dict[str, str] = {}
    for path in FILES:
        value = get_setting(config, path)
        file = None
        if path in MODELS and is_hub_name(value):
            file = _on_the_hub(value, gone=bool(before and path in before))
        elif value and Path(value).exists():
            file = resolve_checkpoint(Path(value)) if path == "model.init_from" else Path(value)
        if file is not None and path == TEACHER:
            model = model_file(file)
            found[path] = folder_digest(file) if model is None else file_digest(model)
        elif file is not None and path == REFERENCES and file.is_dir():
            found[path] = folder_digest(file)
        elif file is not None and file.is_file():
            found[path] = file_digest(file)
        elif value and before and path in before:
            found[path] = before[path]
    return found


def _on_the_hub(name: str, *, gone: bool) -> Path | None:
    """Return the file of a model on the Hub; None for one that may be gone and is."""
    try:
        return resolve_checkpoint(Path(name))
    except CheckpointError:
        if gone:
            return None
        raise


def model_file(path: Path) -> Path | None:
    """Return the checkpoint that a path names, or None for a folder without one: one of maps."""
    try:
        return resolve_checkpoint(path)
    except CheckpointError:
        if path.is_dir():
            return None
        raise


def folder_digest(folder: Path) -> str:
    """Return the sha256 of the names and contents of all files in a folder, hidden ones left
    out."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        if path.is_file() and not any(part.startswith(".") for part in name.parts):
            line = f"{name.as_posix()}\t{file_digest(path)}\n"
            digest.update(line.encode(errors="surrogateescape"))
    return digest.hexdigest()


def setting_differences(
    old: Config, new: Config, *, before: Mapping[str, str], now: Mapping[str, str]
) -> dict[str, str]:
    """Return what differs between the settings of two runs: dotted path -> change, in words.

    Paths that name one place are equal, and so are files of equal content; training data in other
    places are listed (see ``PLACES``), and the caller compares the data.

    Args:
        old, new: the settings.
        before, now: hashes of the files that they name; {} where unknown.
    """
    values = what_is_trained(old), what_is_trained(new)
    changed = {}
    for path in values[0]:
        one, other = values[0][path], values[1][path]
        if path in PLACES:
            old_places, new_places = ((v,) if isinstance(v, str) else v for v in (one, other))
            same = len(old_places) == len(new_places)
            same = same and all(map(same_place, old_places, new_places))
            if one != other and not same:
                changed[path] = f"{path}: {', '.join(old_places)} -> {', '.join(new_places)}"
        elif path in FILES and path in before and path in now:
            if before[path] != now[path]:
                same = one == other or same_place(one, other)
                what = f"{one} has other content now" if same else f"{one} -> {other}"
                changed[path] = f"{path}: {what}"
        elif one != other and not (path in FILES and same_place(one, other)):
            changed[path] = f"{path}: {one} -> {other}"
    return changed
