"""Which folder a run writes to, and whether it continues a stopped one.

The same command finds its own stopped run again; a finished run is never touched, a new one gets
the next free name beside it.
"""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from camoxpert.config import ALIASES, Config, get_setting, leaves
from camoxpert.errors import CheckpointError, ConfigError
from camoxpert.files import write_rows
from camoxpert.runs.checkpoint import Checkpoint, CheckpointFolder, load_checkpoint
from camoxpert.runs.log import create_run_dir
from camoxpert.training.batching import MicroBatch
from camoxpert.training.data_setup import Data
from camoxpert.training.guards import try_lock

SAMPLES = "samples.csv"
# Settings that say how long, how fast or where, not what is trained.
FREE = (
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
# Settings that decide what the weights mean or which samples are which.
FIXED = ("model.", "data.", "train.seed")


@dataclass
class Opened:
    """A run folder this process owns.

    Attributes:
        path: the folder; it exists.
        resume: verified checkpoint to continue from, or None to start anew.
        notes: lines for the user.
        lock: kept open for the life of the run.
    """

    path: Path
    resume: Checkpoint | None
    notes: list[str]
    lock: IO[str] | None


def run_name(config: Config) -> str:
    """Name a run after its settings: equal settings, equal name."""
    if config.run.name:
        return config.run.name
    settings = {
        leaf.path: get_setting(config, leaf.path)
        for leaf in leaves()
        if leaf.path not in FREE and not leaf.path.startswith("run.")
    }
    # Earlier versions hashed these as well; at their defaults they keep the name.
    settings |= {alias.path: alias.neutral for alias in ALIASES if alias.target not in FREE}
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]
    return f"{config.model.backbone}-{config.data.img_size}-{digest}"


def open_run(config: Config) -> Opened:
    """Find the stopped run that these settings continue, or create a new folder.

    Raises:
        CheckpointError: the run to continue has no usable checkpoint or other settings.
        ConfigError: the run folder is in use by a live process.
    """
    wanted = config.train.resume
    if wanted not in ("auto", "never"):
        return _tidied(_continue(Path(wanted), config))
    parent, name = Path(config.run.dir), run_name(config)
    notes = []
    if wanted == "auto":
        for folder in _candidates(parent, name):
            if _status(folder) == "finished":
                notes.append(f"run         {folder} is finished and stays as it is")
                continue
            if not _is_run(folder):
                continue
            lock = try_lock(folder)
            if lock is None:
                notes.append(f"run         {folder} is being trained by another process")
                continue
            checkpoint, problems = CheckpointFolder(folder / "checkpoints").newest()
            if checkpoint is None:
                notes.append(f"run         {folder} had saved nothing yet and starts anew")
                return _tidied(Opened(folder, None, notes, lock))
            changes = compare(checkpoint.config, config)
            return _tidied(Opened(folder, checkpoint, notes + problems + changes, lock))
    while True:
        try:
            path = create_run_dir(parent, name)
        except OSError as error:
            raise ConfigError(
                f"--checkpoint-dir: the run folder {parent / name} cannot be created: {error}."
            ) from error
        if (lock := try_lock(path)) is not None:
            return Opened(path, None, notes, lock)
        # The same command, started at the same moment, found the new folder and took it.


def stopped_run(config: Config) -> dict[str, Any]:
    """Return ``run.json`` of the run that these settings will continue, {} where there is none.

    Looks without touching: ``open_run`` decides.
    """
    wanted = config.train.resume
    if wanted == "never":
        return {}
    if wanted != "auto":
        path = Path(wanted)
        return _run_json(path.parent.parent if path.is_file() else path)
    for folder in _candidates(Path(config.run.dir), run_name(config)):
        found = _run_json(folder)
        if found and found.get("status") != "finished":
            return found
    return {}


def compare(old: Config, new: Config) -> list[str]:
    """List settings that differ from those of the run being continued.

    Raises:
        CheckpointError: one of them decides what the weights mean or which samples are used.
    """
    changed = [
        (leaf.path, get_setting(old, leaf.path), get_setting(new, leaf.path))
        for leaf in leaves()
        if leaf.path not in FREE and not leaf.path.startswith("run.")
        if get_setting(old, leaf.path) != get_setting(new, leaf.path)
    ]
    lines = [f"{path}: {before} -> {after}" for path, before, after in changed]
    if any(path.startswith(FIXED) for path, _, _ in changed):
        raise CheckpointError(
            "The stopped run cannot be continued with these settings: "
            + "; ".join(lines)
            + ". Use the settings it was started with, or --resume never for a new run."
        )
    return [f"changed     {line}" for line in lines]


def check_batch(
    checkpoint: Checkpoint, batch: MicroBatch, effective: Mapping[str, int]
) -> list[str]:
    """Return what changed about how steps are taken.

    Args:
        checkpoint: of the run.
        batch: as chosen now.
        effective: images per step now, by stage.

    Raises:
        CheckpointError: a step would take another number of images, and the run another number of
            steps.
    """
    before = checkpoint.values.get("batch")
    if before is None:
        return []
    for stage, images in before["effective"].items():
        if effective.get(stage, images) != images:
            raise CheckpointError(
                f"The stopped run took {images} images per optimizer step and this one would take "
                f"{effective[stage]} ({stage}). Keep the product of --batch-size (or "
                f"--stage2-batch-size), --accumulation-steps and processes, or start a new run "
                f"with --resume never."
            )
    if before["processes"] != batch.processes:
        return [
            f"changed     processes: {before['processes']} -> {batch.processes}; {batch.size} "
            f"images x {batch.steps} on each, {batch.effective} per step as before"
        ]
    return []


def write_samples(run_dir: Path, data: Data) -> None:
    """Write ``samples.csv``: which images a run trains on, which choose its best checkpoint, and
    the sizes of their files."""
    rows = [
        {
            "split": split,
            "dataset": dataset,
            "name": name,
            "image_bytes": sizes[0],
            "mask_bytes": sizes[1],
        }
        for split, manifest in (("training", data.train), ("validation", data.validation))
        for (dataset, name), sizes in manifest.files().items()
    ]
    write_rows(run_dir / SAMPLES, rows, ("split", "dataset", "name", "image_bytes", "mask_bytes"))


def data_changes(run_dir: Path, data: Data) -> str:
    """Return how the data differs from what ``write_samples`` noted, in words; "" where nothing was
    noted."""
    try:
        with (run_dir / SAMPLES).open(encoding="utf-8", errors="surrogateescape") as file:
            before = {
                (row["dataset"], row["name"]): (int(row["image_bytes"]), int(row["mask_bytes"]))
                for row in csv.DictReader(file)
            }
    except (OSError, ValueError, KeyError):
        return ""
    now = data.train.files() | data.validation.files()
    kinds = {
        "missing": sorted(before.keys() - now.keys()),
        "new": sorted(now.keys() - before.keys()),
        "of another size": sorted(k for k in before.keys() & now.keys() if before[k] != now[k]),
    }
    return "; ".join(
        f"{len(keys)} {kind}: {', '.join(name for _, name in keys[:3])}"
        + (", ..." if len(keys) > 3 else "")
        for kind, keys in kinds.items()
        if keys
    )


def check_data(
    checkpoint: Checkpoint, run_dir: Path, data: Data, *, allow_change: bool = False
) -> list[str]:
    """Return what to tell about changed data; where that is allowed, the epoch in progress starts
    anew, because the order of its samples is another one.

    Raises:
        CheckpointError: the data changed since the checkpoint was written.
    """
    if checkpoint.values.get("data_hash") == data.data_hash:
        return []
    changes = data_changes(run_dir, data)
    if not allow_change:
        raise CheckpointError(
            f"The training data changed since {checkpoint.path} was written"
            f"{f' ({changes})' if changes else ''}: the order of samples and the validation split "
            f"would no longer be the same. Restore the data, go on with --allow-data-change, or "
            f"start a new run with --resume never."
        )
    state = checkpoint.values["state"]
    if state["position"]:
        state["position"] = 0
        for name in ("chosen", "mass"):
            checkpoint.values["routing"][name] = None
        checkpoint.values["routing"]["images"] = 0
    return [
        f"changed     the training data{f' ({changes})' if changes else ''}; epoch "
        f"{state['epoch'] + 1} starts anew, as allowed"
    ]


def _continue(path: Path, config: Config) -> Opened:
    if not path.exists():
        raise CheckpointError(f"--resume: there is no checkpoint or run folder {path}.")
    folder = path.parent.parent if path.is_file() else path
    if not (folder / "run.json").is_file():
        raise CheckpointError(
            f"--resume: {path} lies in no run folder, and a continued run writes into its own. "
            f"Give RUN or RUN/checkpoints/step_*.pt."
        )
    # Before the folder is looked into: a live run's half-written file is not a leftover.
    lock = try_lock(folder)
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
    return Opened(folder, checkpoint, problems + compare(checkpoint.config, config), lock)


def _tidied(opened: Opened) -> Opened:
    """Remove what writes that were killed left in a run's folder."""
    for leftover in opened.path.glob(".*.tmp"):
        leftover.unlink(missing_ok=True)
    return opened


def _candidates(parent: Path, name: str) -> list[Path]:
    """Return name, name-2, name-3 ... as far as they exist, newest first."""
    found = []
    folder, number = parent / name, 1
    while folder.is_dir():
        found.append(folder)
        number += 1
        folder = parent / f"{name}-{number}"
    return found[::-1]


def _is_run(folder: Path) -> bool:
    """Whether a run made this folder, and not somebody who keeps other things in it."""
    begun = {".lock", "config.yaml"}
    return (folder / "run.json").is_file() or {p.name for p in folder.iterdir()} <= begun


def _status(folder: Path) -> str:
    return str(_run_json(folder).get("status", "unknown"))


def _run_json(folder: Path) -> dict[str, Any]:
    try:
        info = json.loads((folder / "run.json").read_text())
    except (OSError, ValueError):
        return {}
    return info if isinstance(info, dict) else {}
