"""Which folder a run writes to, and which stopped run it continues.

The same command finds its own stopped run again; a finished run is never touched, and a new one
gets the next free name beside it.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from camoxpert.config import ALIASES, Config, leaves, load_config, quick_name
from camoxpert.errors import CheckpointError, ConfigError
from camoxpert.files import try_lock
from camoxpert.runs.checkpoint import Checkpoint, load_checkpoint
from camoxpert.runs.identity import (
    FREE,
    PLACES,
    file_hashes,
    setting_differences,
    what_is_trained,
)
from camoxpert.runs.records import RunInfo, read_info
from camoxpert.runs.store import CheckpointFolder

if TYPE_CHECKING:
    from filelock import FileLock


@dataclass
class RunFolder:
    """The folder of a run, owned by this process for as long as ``lock`` is held.

    Attributes:
        path: the folder; None until ``create`` for a new run.
        checkpoint: verified checkpoint to continue from, or None to start from step 0.
        info: ``run.json`` of the run that is continued, {} for a new one.
        notes: what the search found, a line each.
        lock: of the folder.
    """

    path: Path | None = None
    checkpoint: Checkpoint | None = None
    info: RunInfo = field(default_factory=RunInfo)
    notes: list[str] = field(default_factory=list)
    lock: FileLock | None = None

    def __getstate__(self) -> dict[str, Any]:
        # Sent to the other ranks of a run; the lock stays with the process that took it.
        return {**self.__dict__, "lock": None}

    def create(self, config: Config) -> Path:
        """Create the folder of a new run if it has none; remove leftovers of killed writes.

        Raises:
            ConfigError: the folder cannot be created.
        """
        while self.path is None:
            path = create_run_dir(Path(config.run.dir), run_name(config))
            self.lock = try_lock(path / ".lock")
            # None: the same command, started at the same moment, took the new folder.
            self.path = path if self.lock is not None else None
        for leftover in self.path.glob(".*.tmp"):
            leftover.unlink(missing_ok=True)
        return self.path

    def close(self) -> None:
        """Release the folder for other processes."""
        if self.lock is not None:
            self.lock.release()


BEFORE_RUN_JSON = ("config.yaml", "samples.csv")
"""Files that a run writes at its start before ``run.json``."""

# Settings added since the first version: at their defaults they do not count in names.
ADDED = (
    *("data.augment.corrupt", "data.augment.strength", "data.group_copies", "data.resize"),
    *("data.augment.relight", "data.augment.compose"),
    *("data.synthetic", "data.synthetic_share"),
    *("data.negatives", "data.negative_share", "data.calibration_fraction", "loss.presence"),
    *("data.teacher", "data.unlabeled", "data.unlabeled_share", "loss.teacher"),
    *("data.test_roots", "loss.size_balance", "loss.uncertainty", "model.decoder"),
    *("model.init_from", "model.upcycle_noise", "model.routing_grid", "model.presence"),
    "model.router_norm",
    *("model.support.encoder", "model.support.weights", "model.support.side"),
    *("model.support.pretrained", "data.episodes.dropout", "data.episodes.shots"),
    *("data.episodes.references", "data.modalities", "data.modality_dropout"),
    *("train.expert_dropout", "train.preset", "train.keep_rgb", "data.splits", "data.fold"),
    *("train.quick.data_fraction", "train.quick.limit_batches", "train.quick.overfit_batches"),
    *("optim.scale_lr", "optim.base_batch"),
)


def run_name(config: Config) -> str:
    """Name a run after its settings: equal settings, equal name. That of a quick run says so."""
    quick = quick_name(config.train.quick)
    if config.run.name:
        return "-".join([config.run.name, *([quick] if quick else [])])
    defaults = {leaf.path: leaf.default for leaf in leaves()}
    settings = {
        path: value
        for path, value in what_is_trained(config).items()
        if path not in ADDED or value != defaults[path]
    }
    # Settings removed since the first version count with their defaults: names stay the same.
    settings |= {old.path: old.neutral for old in ALIASES if old.target not in FREE}
    text = json.dumps(settings, sort_keys=True)
    digest = hashlib.sha256(text.encode()).hexdigest()[:8]
    return "-".join([_kind(config), *([quick] if quick else []), digest])


def _kind(config: Config) -> str:
    return f"{config.model.backbone}-{config.data.img_size}"


def create_run_dir(parent: Path, name: str) -> Path:
    """Create ``parent/name``, or name-2, name-3, ...: a run never overwrites another.

    Raises:
        ConfigError: a folder cannot be created there.
    """
    number = 1
    while True:
        path = parent / (name if number == 1 else f"{name}-{number}")
        try:
            path.mkdir(parents=True)
        except FileExistsError:
            number += 1
        except OSError as error:
            raise ConfigError(
                f"--checkpoint-dir: the run folder {path} cannot be created: {error}."
            ) from error
        else:
            return path


def find_run(config: Config, *, data_hash: Callable[[], str]) -> RunFolder:
    """Find and lock the stopped run that these settings continue; without one the path is None.

    Writes only the lock; ``RunFolder.create`` makes the folder of a new run.

    Args:
        config: settings.
        data_hash: returns the hash of the training data; called if a stopped run has these
            settings but its data lay elsewhere.

    Raises:
        CheckpointError: the run to continue has no usable checkpoint.
        ConfigError: the run folder that was named is in use by a live process.
    """
    wanted = config.train.resume
    if wanted not in ("auto", "never"):
        return _named_run(Path(wanted))
    notes: list[str] = []
    now = file_hashes(config) if wanted == "auto" else {}
    for folder in _candidates(config, now, data_hash) if wanted == "auto" else ():
        info = read_info(folder)
        # With --run-name the user names the run: what differs is then refused, not skipped.
        other = () if config.run.name else _other_files(info, now)
        if other:
            notes.append(f"run         {folder} started from another {' and '.join(other)}")
            continue
        if info.get("status") == "finished":
            notes.append(f"run         {folder} is finished and stays as it is")
            continue
        if not _is_run(folder):
            continue
        lock = _locked(folder)
        if lock is None:
            notes.append(f"run         {folder} is being trained by another process")
            continue
        checkpoint, problems = CheckpointFolder(folder / "checkpoints").newest()
        if checkpoint is None:
            notes.append(f"run         {folder} had saved nothing yet and restarts")
        return RunFolder(folder, checkpoint, info, notes + problems, lock)
    return RunFolder(notes=notes)


def _named_run(path: Path) -> RunFolder:
    if not path.exists():
        raise CheckpointError(f"--resume: there is no checkpoint or run folder {path}.")
    folder = path.parent.parent if path.is_file() else path
    if not (folder / "run.json").is_file():
        raise CheckpointError(
            f"--resume: {path} is not in a run folder, and a continued run writes into its own. "
            f"Give RUN or RUN/checkpoints/step_*.pt."
        )
    # Lock before looking inside: a half-written file of a live run is not a leftover.
    lock = _locked(folder)
    if lock is None:
        raise ConfigError(f"--resume: {folder} is being trained by another process.")
    problems: list[str] = []
    if path.is_file():
        checkpoint = load_checkpoint(path)
    else:
        newest, problems = CheckpointFolder(path / "checkpoints").newest()
        if newest is None:
            raise CheckpointError(f"--resume: {path} holds no checkpoint to continue from.")
        checkpoint = newest
    return RunFolder(folder, checkpoint, read_info(folder), problems, lock)


def _locked(folder: Path) -> FileLock | None:
    try:
        return try_lock(folder / ".lock")
    except OSError as error:
        raise CheckpointError(f"The run folder {folder} cannot be used: {error}.") from error


def _candidates(
    config: Config, now: Mapping[str, str], data_hash: Callable[[], str]
) -> Iterator[Path]:
    """Yield those of name, name-2, name-3, ... that exist, newest first; then stopped runs with
    the same settings under another name: their paths were written another way."""
    parent, name = Path(config.run.dir), run_name(config)
    if not parent.is_dir():
        return
    numbered = re.compile(re.escape(name) + r"-([2-9]|[1-9]\d+)")
    numbers = {
        path: int(match[1])
        for path in parent.iterdir()
        if (match := numbered.fullmatch(path.name)) and path.is_dir()
    }
    found = sorted(numbers, key=numbers.__getitem__, reverse=True)
    found += [parent / name] if (parent / name).is_dir() else []
    yield from found
    if config.run.name:
        return
    others = [
        path
        for path in sorted(parent.iterdir())
        if path.name.startswith(f"{_kind(config)}-") and path not in found
    ]
    for folder in others:
        info = read_info(folder)
        if info and info.get("status") != "finished" and _is_same(folder, info, config, now):
            if _elsewhere(folder, config) and info.get("data_hash") != data_hash():
                continue
            yield folder


def _is_same(folder: Path, info: RunInfo, config: Config, now: Mapping[str, str]) -> bool:
    """Return whether a run has the same settings, but for the place of its data."""
    old = _settings(folder)
    if old is None:
        return False
    before = recorded_hashes(info)
    return setting_differences(old, config, before=before, now=now).keys() <= PLACES


def _elsewhere(folder: Path, config: Config) -> bool:
    old = _settings(folder)
    changed = {} if old is None else setting_differences(old, config, before={}, now={})
    return old is None or not PLACES.isdisjoint(changed)


def _settings(folder: Path) -> Config | None:
    """Return the settings of a run, or None if they cannot be read."""
    try:
        return load_config(file=folder / "config.yaml")
    except (ConfigError, OSError):
        return None


def recorded_hashes(info: RunInfo) -> dict[str, str]:
    """Return the hashes of the files that a run started from, as its records say."""
    known = info.get("files")
    return {str(k): str(v) for k, v in known.items()} if isinstance(known, dict) else {}


def _other_files(info: RunInfo, now: Mapping[str, str]) -> list[str]:
    """Return the settings whose files have other content than those that a run started from."""
    before = recorded_hashes(info)
    return [path for path in before.keys() & now.keys() if before[path] != now[path]]


def _is_run(folder: Path) -> bool:
    """Return whether a run made this folder, rather than a user for other files."""
    if (folder / "run.json").is_file():
        return True
    # A run killed at its start: it writes run.json last, and each file under a hidden name first.
    others = {path.name for path in folder.iterdir()} - {".lock", *BEFORE_RUN_JSON}
    return all(name.startswith(".") and name.endswith(".tmp") for name in others)
