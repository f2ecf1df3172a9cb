"""``sweep``: search settings by validation scores; every trial is an ordinary run.

Test sets are neither scored by a trial nor choose anything: what the best settings are worth there
is for the run to say that is trained with them.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from camoxpert import console
from camoxpert.config import (
    Config,
    build_config,
    changed_settings,
    check_conflicts,
    load_config,
    to_yaml,
)
from camoxpert.errors import CheckpointError, ConfigError, NumericError, Stopped
from camoxpert.files import read_json, write_bytes, write_json
from camoxpert.metrics import HIGHER_IS_BETTER
from camoxpert.runs.folder import run_name
from camoxpert.runs.identity import setting_differences
from camoxpert.runs.records import deciding_score, read_info, read_records
from camoxpert.text import shorten
from camoxpert.training import session
from camoxpert.training.sweep.space import Dimension, start_of, values_of
from camoxpert.training.sweep.study import Book, Claim, held
from camoxpert.training.validate import heard_by

BASE, ABOUT = "base.yaml", "sweep.json"
PRUNED = "pruned by the sweep"
HOPELESS = 3
"""Trials that fail before any succeeds: the settings of all of them must be wrong."""


@dataclass(frozen=True)
class Sweep:
    """A search of settings.

    Attributes:
        folder: receives everything.
        base: settings of all trials but for those searched.
        space: what is searched.
        trials: how many, over all processes and calls.
        book: of the trials.
    """

    folder: Path
    base: Config
    space: tuple[Dimension, ...]
    trials: int
    book: Book

    def config_of(self, number: int, drawn: Mapping[str, Any]) -> Config:
        """Return the settings of a trial.

        Raises:
            ConfigError: the values drawn contradict each other or the other settings.
        """
        values = {**changed_settings(self.base), **values_of(self.space, drawn)}
        config = build_config(values)
        check_conflicts(config)
        run = replace(
            config.run, dir=str(self.folder / "trials"), name=f"trial-{number:04d}", test=False
        )
        train = replace(config.train, resume="auto", max_hours=None)
        return replace(config, run=run, train=train)

    def path_of(self, number: int) -> Path:
        """Return the run folder of a trial."""
        named = replace(self.base, run=replace(self.base.run, name=f"trial-{number:04d}"))
        return self.folder / "trials" / run_name(named)


def open_sweep(config: Config, space: tuple[Dimension, ...], folder: Path, trials: int) -> Sweep:
    """Begin a sweep in a folder, or continue the one in it.

    Raises:
        ConfigError: settings that no sweep can have, or Optuna is missing.
        CheckpointError: the folder holds a sweep with other settings or another space.
    """
    check_sweepable(config)
    folder.mkdir(parents=True, exist_ok=True)
    book = Book(
        folder,
        space,
        higher_is_better=HIGHER_IS_BETTER[config.train.select],
        epochs=config.train.epochs,
        seed=config.train.seed,
        start=start_of(space, config),
    )
    searched = {dim.path: dim.to_dict() for dim in space}
    with book.alone():
        if (folder / BASE).is_file():
            _require_same(folder, config, searched)
        else:
            write_json(folder / ABOUT, {"space": searched, "measure": config.train.select})
            write_bytes(folder / BASE, to_yaml(config).encode())
    return Sweep(folder, config, space, trials, book)


def check_sweepable(config: Config) -> None:
    """Raise ConfigError for settings with which trials cannot be compared."""
    if config.data.val_fraction == 0:
        raise ConfigError(
            "A sweep compares trials on validation images, and --val-fraction 0 leaves none. Test "
            "sets must not choose."
        )
    if config.train.quick.overfit_batches is not None:
        raise ConfigError(
            "--overfit-batches validates on what it trained on: its scores choose nothing. Use "
            "--data-fraction or --limit-batches for quick trials."
        )
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError(
            "A sweep is not started by torchrun: start the same command once per device, with "
            "--device cuda:0, cuda:1 ...; the processes share the trials."
        )


def _require_same(folder: Path, config: Config, searched: Mapping[str, Any]) -> None:
    changes = list(
        setting_differences(load_config(file=folder / BASE), config, before={}, now={}).values()
    )
    before = read_json(folder / ABOUT).get("space", {})
    for path in dict.fromkeys([*before, *searched]):
        # Through JSON, where tuples are lists.
        now = None if path not in searched else _plain(searched[path])
        if before.get(path) != now:
            changes.append(f"the space of {path}")
    if changes:
        raise CheckpointError(
            f"The sweep in {folder} has other settings ({shorten(changes)}): its trials could not "
            f"be compared with new ones. Give another folder with -o, or the settings it had."
        )


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (tuple, list)) else value


def search(sweep: Sweep, *, max_hours: float | None = None) -> int:
    """Work on trials until none is left; return how many this process finished.

    Args:
        sweep: an open one; other processes may work on it.
        max_hours: after this time the trial in progress is saved and the sweep stops.

    Raises:
        Stopped: the same call continues.
        ConfigError: nothing that was drawn can be trained.
    """
    deadline = None if max_hours is None else time.monotonic() + 3600 * max_hours
    finished, failures = 0, 0
    while True:
        claim = sweep.book.claim(sweep.trials)
        if claim is None:
            return finished
        with held(claim):
            try:
                _work(sweep, claim, deadline)
            except (ConfigError, NumericError) as error:
                failures += 1
                sweep.book.prune(claim.number, str(error))
                _say(sweep, claim, f"failed: {error}")
                if failures >= HOPELESS and not sweep.book.trials("COMPLETE"):
                    raise
        finished += 1


def _work(sweep: Sweep, claim: Claim, deadline: float | None) -> None:
    """Train a trial, or what is left of it, and write its score into the book."""
    config, path = sweep.config_of(claim.number, claim.drawn), sweep.path_of(claim.number)
    started = time.monotonic()
    if read_info(path).get("status") != "finished":
        verb = "continues" if claim.adopted else "training"
        console.note(f"{_place(sweep, claim)}: {verb}: {_values(sweep, claim)}")
        if deadline is not None:
            # A run that begins at the deadline stops in its first step.
            left = max((deadline - started) / 3600, 1e-6)
            config = replace(config, train=replace(config.train, max_hours=left))
        try:
            _train(sweep, claim, config)
        except Stopped as stopped:
            stopped.args = (f"Stopped in trial {claim.number}; the same command continues there.",)
            raise
        except CheckpointError as error:
            if not claim.adopted:
                raise
            sweep.book.fail(claim.number, repeat=claim.drawn)
            _say(sweep, claim, f"cannot be continued and is repeated as another trial: {error}")
            return
    _finish(sweep, claim, path, time.monotonic() - started)


def _train(sweep: Sweep, claim: Claim, config: Config) -> None:
    last = config.train.epochs

    def judge(epoch: int, score: float) -> str:
        prune = sweep.book.report(claim, epoch, score)
        if not prune or epoch >= last:
            return ""
        return f"{PRUNED}: {score:.3f} after epoch {epoch} is below the median of the other trials"

    with console.muted(), heard_by(judge):
        session.run(config)


def _finish(sweep: Sweep, claim: Claim, path: Path, seconds: float) -> None:
    """Write the outcome of a finished run into the book, and drop what only a stopped run needs."""
    records = read_records(path / "metrics.jsonl")
    measure = sweep.base.train.select
    best = records.best
    if best is None:
        raise ConfigError(f"{path} has no validation: there is nothing to compare.")
    score = deciding_score(best, measure)
    reason = next((e["text"] for e in records.events if e["text"].startswith(PRUNED)), "")
    for name in ("score", "epoch", "seconds"):
        value = {"score": score, "epoch": best["epoch"], "seconds": round(seconds, 1)}[name]
        sweep.book.note(claim.number, name, value)
    if reason:
        sweep.book.prune(claim.number, reason)
    else:
        sweep.book.complete(claim.number, score)
    for file in (path / "checkpoints").glob("step_*.pt"):
        with contextlib.suppress(OSError):
            file.unlink()
    _say(
        sweep, claim, reason or f"{measure} {score:.4f} at epoch {best['epoch']} ({seconds:.0f} s)"
    )


def _say(sweep: Sweep, claim: Claim, what: str) -> None:
    console.say(f"{_place(sweep, claim)}: {_values(sweep, claim)}: {what}")


def _place(sweep: Sweep, claim: Claim) -> str:
    return f"trial {claim.number} [{len(sweep.book.trials('COMPLETE', 'PRUNED'))}/{sweep.trials}]"


def _values(sweep: Sweep, claim: Claim) -> str:
    return words_of(values_of(sweep.space, claim.drawn))


def words_of(values: Mapping[str, Any]) -> str:
    """Return settings and their values on one line."""
    return ", ".join(
        f"{path} {value:.4g}" if isinstance(value, float) else f"{path} {value}"
        for path, value in values.items()
    )
