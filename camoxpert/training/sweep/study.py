"""The book of a sweep: which trials there are, who works on them, and what they scored.

Optuna keeps it in a journal, a file that several processes append to, on shared disks as well. A
trial belongs to the process that holds its lock; the kernel drops the lock of a process that died,
and the next one to look continues its trial.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from camoxpert.errors import ConfigError
from camoxpert.files import lock, try_lock
from camoxpert.training.sweep.space import Dimension

if TYPE_CHECKING:
    import optuna
    from filelock import FileLock

JOURNAL = "journal.log"
STARTUP = 4
"""Finished trials before any is pruned."""


@dataclass
class Claim:
    """A trial that this process works on.

    Attributes:
        number: of the trial, from 0.
        drawn: what it drew.
        reported: epoch -> score that the book has already.
        adopted: another process began it and died.
        lock: held while it is worked on.
    """

    number: int
    drawn: dict[str, Any]
    reported: dict[int, float]
    adopted: bool
    lock: FileLock


class Book:
    """The trials of a sweep.

    Args:
        folder: of the sweep.
        space: what is searched.
        higher_is_better: direction of the scores.
        epochs: of a whole trial.
        seed: of what is drawn.
        start: what the first trial draws; {}: anything.

    Raises:
        ConfigError: Optuna is not installed.
    """

    def __init__(
        self,
        folder: Path,
        space: tuple[Dimension, ...],
        *,
        higher_is_better: bool,
        epochs: int,
        seed: int,
        start: dict[str, Any],
    ) -> None:
        tool = require_optuna()
        tool.logging.set_verbosity(tool.logging.WARNING)
        self.folder, self.space, self.seed = folder, space, seed
        self._tool = tool
        with self.alone():
            backend = tool.storages.journal.JournalFileBackend(str(folder / JOURNAL))
            self.study: optuna.Study = tool.create_study(
                storage=tool.storages.JournalStorage(backend),
                study_name="sweep",
                direction="maximize" if higher_is_better else "minimize",
                load_if_exists=True,
                pruner=tool.pruners.MedianPruner(
                    n_startup_trials=STARTUP, n_warmup_steps=max(1, epochs // 5)
                ),
            )
            if start and not self.study.trials:
                self.study.enqueue_trial(start)

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Keep other processes of the sweep from taking trials inside the block."""
        with lock(self.folder / ".lock"):
            yield

    def trials(self, *states: str) -> list[optuna.trial.FrozenTrial]:
        """Return the trials in some states (COMPLETE, PRUNED, RUNNING, FAIL), or all."""
        wanted = [self._tool.trial.TrialState[state] for state in states]
        return self.study.get_trials(deepcopy=False, states=wanted or None)

    def claim(self, most: int) -> Claim | None:
        """Return a trial to work on: one whose process died, else a new one, at most ``most`` in
        all; None if there is nothing left."""
        with self.alone():
            for old in self.trials("RUNNING"):
                held = try_lock(self._lock_of(old.number))
                if held is None:
                    continue
                if {dim.path for dim in self.space} <= old.params.keys():
                    reported = dict(old.intermediate_values)
                    return Claim(old.number, dict(old.params), reported, True, held)
                # Its process died while it drew.
                self.fail(old.number)
                held.release()
            if len(self.trials("RUNNING", "COMPLETE", "PRUNED")) >= most:
                return None
            # A sampler that continues depends on the trials alone, whoever drew them.
            number = len(self.study.trials)
            seed = (self.seed * 1_000_003 + number) % 2**32
            self.study.sampler = self._tool.samplers.TPESampler(seed=seed)
            trial = self.study.ask()
            for dim in self.space:
                dim.suggest(trial)
            held = try_lock(self._lock_of(trial.number))
            if held is None:
                raise ConfigError(f"{self._lock_of(trial.number)} is held by another process.")
            return Claim(trial.number, dict(trial.params), {}, False, held)

    def _lock_of(self, number: int) -> Path:
        place = self.folder / "locks"
        place.mkdir(exist_ok=True)
        return place / f"trial-{number:04d}.lock"

    def report(self, claim: Claim, epoch: int, score: float) -> bool:
        """Write the score of an epoch; return whether the trial should be pruned."""
        trial = self._tool.trial.Trial(self.study, self._id(claim.number))
        if epoch not in claim.reported:
            trial.report(score, epoch)
            claim.reported[epoch] = score
        return bool(trial.should_prune())

    def note(self, number: int, name: str, value: Any) -> None:
        """Write a remark about a trial."""
        self.study._storage.set_trial_user_attr(self._id(number), name, value)

    def complete(self, number: int, score: float) -> None:
        """Close a trial with its score."""
        self.study.tell(number, score)

    def prune(self, number: int, reason: str) -> None:
        """Close a trial that has no score, or was not worth finishing."""
        self.note(number, "reason", reason)
        self.study.tell(number, state=self._tool.trial.TrialState.PRUNED)

    def fail(self, number: int, *, repeat: dict[str, Any] | None = None) -> None:
        """Close a trial that cannot be continued; its values are tried again in another one."""
        self.study.tell(number, state=self._tool.trial.TrialState.FAIL)
        if repeat:
            self.study.enqueue_trial(repeat)

    def _id(self, number: int) -> int:
        return next(t._trial_id for t in self.trials() if t.number == number)


@contextmanager
def held(claim: Claim) -> Iterator[Claim]:
    """Release the lock of a trial after the block."""
    try:
        yield claim
    finally:
        with contextlib.suppress(OSError):
            claim.lock.release()


def require_optuna() -> Any:
    """Return Optuna; raise ConfigError with the command that installs it."""
    try:
        import optuna
        import optuna.storages.journal
    except ImportError as error:
        raise ConfigError(
            "A sweep needs Optuna 5 or later, which is not installed: pip install "
            '"camoxpert[sweep]".'
        ) from error
    return optuna
