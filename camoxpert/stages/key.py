"""What the result of a stage depends on, and what differs between two stages, in words."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import camoxpert
from camoxpert import __version__
from camoxpert.config import Config
from camoxpert.data.files.folds import read_splits
from camoxpert.runs.identity import FILES, PLACES, file_hashes, what_is_trained
from camoxpert.stages.chain import INIT_FROM
from camoxpert.text import shorten
from camoxpert.training.data import hash_of_data

FORMAT = 1
SPLITS, FOLD = "data.splits", "data.fold"
LEARNING = (
    *("config", "data", "losses.py", "metrics", "models", "synthesis", "training"),
    *("inference/score.py", "runtime/device.py"),
)
"""The parts of the program that decide what is learned: a change in them makes a stage stale."""


@dataclass(frozen=True)
class Facts:
    """Everything that the result of a stage depends on.

    Attributes:
        settings: those that decide what is learned, by dotted path.
        files: sha256 of the files that settings name, by dotted path.
        data: hash of the training data.
        splits: hash of the folds, one of which is held out; "" without folds.
        code: hash of the program's parts that decide what is learned.
        parent: key of the stage before, or "".
    """

    settings: Mapping[str, Any]
    files: Mapping[str, str]
    data: str
    splits: str
    code: str
    parent: str

    @property
    def key(self) -> str:
        """Name of the result in the cache."""
        text = json.dumps(self.to_dict(), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        values = {name: getattr(self, name) for name in self.__dataclass_fields__}
        plain: dict[str, Any] = json.loads(json.dumps({"format": FORMAT, **values}))
        return plain


def facts_of(config: Config, parent: str) -> Facts:
    """Return what a stage depends on.

    Args:
        config: its settings.
        parent: key of the stage before, whose weights it starts from; "": the first.

    Raises:
        DataError, ConfigError: the data cannot be found.
    """
    apart = {*FILES, *PLACES, SPLITS}
    settings = {path: v for path, v in what_is_trained(config).items() if path not in apart}
    files = file_hashes(config)
    files.pop(SPLITS, None)
    if parent:
        # The weights of another machine for the same stage are as good.
        files.pop(INIT_FROM, None)
    splits = read_splits(Path(config.data.splits)).digest if config.data.splits else ""
    return Facts(settings, files, hash_of_data(config), splits, code_digest(), parent)


@functools.cache
def code_digest() -> str:
    """Return the version of the program and a hash of what decides what is learned."""
    root = Path(camoxpert.__file__).parent
    digest = hashlib.sha256()
    for part in LEARNING:
        place = root / part
        for file in sorted(place.rglob("*.py")) if place.is_dir() else [place]:
            digest.update(f"{file.relative_to(root).as_posix()}\n".encode())
            digest.update(file.read_bytes())
    return f"{__version__} {digest.hexdigest()[:12]}"


def differences(old: Mapping[str, Any], new: Facts) -> list[str]:
    """Return what differs between a kept stage and one that is wanted, in words.

    Args:
        old: what ``Facts.to_dict`` returned.
        new: of the wanted one.
    """
    now = new.to_dict()
    words = []
    before: Mapping[str, Any] = old.get("settings") or {}
    for path in sorted({*before, *now["settings"]}):
        one, other = before.get(path), now["settings"].get(path)
        if one != other:
            words.append(f"{path} differs ({_shown(one)} -> {_shown(other)})")
    files: Mapping[str, Any] = old.get("files") or {}
    words += [
        f"the content of {path} differs"
        for path in sorted({*files, *now["files"]})
        if files.get(path) != now["files"].get(path)
    ]
    names = {"data": "the training data", "splits": "the folds", "parent": "the stage before it"}
    words += [
        f"{text} differ{'' if name == 'splits' else 's'}"
        for name, text in names.items()
        if old.get(name) != now[name]
    ]
    if old.get("code") != now["code"]:
        words.append(f"the program differs ({_shown(old.get('code'))} -> {now['code']})")
    return words


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return shorten(value, 3) or "none"
    return "unset" if value in (None, "") else str(value)
