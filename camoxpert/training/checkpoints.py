"""When a run's checkpoints are written, and when they are not."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch

from camoxpert.runs.checkpoint import CheckpointFolder
from camoxpert.runs.log import RunLog
from camoxpert.training.meters import RoutingMeter
from camoxpert.training.prepare import Setup
from camoxpert.training.snapshot import require_finite, shipped, snapshot, state_bytes
from camoxpert.training.state import TrainState
from camoxpert.training.steplog import note_event


class Saver:
    """Writes the checkpoints of a run: on the first process, with what all of them know.

    A state whose last step was skipped is not written: where a run diverges, the newest checkpoint
    is of before. It is owed until the next step that works. At the end of an epoch one or two
    overflows of fp16 are no such sign. Weights that are no longer finite are never written.

    Attributes:
        owed: a save is due as soon as a step works.
    """

    ROUTINE_OVERFLOWS = 2

    def __init__(
        self, setup: Setup, run_dir: Path, state: TrainState, meter: RoutingMeter, log: RunLog
    ) -> None:
        self.setup, self.run_dir, self.state, self.meter, self.log = (
            setup,
            run_dir,
            state,
            meter,
            log,
        )
        self.saved_step = state.step if state.step else None
        self.owed = self._owed_stays = False
        self.started, self.seconds_before = time.monotonic(), state.seconds
        self.folder: CheckpointFolder | None = None
        setup.world.from_first(self._open)

    def _open(self) -> None:
        self.folder = CheckpointFolder(self.run_dir / "checkpoints")
        keep_every = self.setup.config.run.keep_every
        others = self.setup.plan.epochs // keep_every if keep_every else 0
        self.folder.require_space(state_bytes(self.setup), others=others)

    def save(self, *, stays: bool = False, epoch_done: bool = False) -> bool:
        """Write where the run stands; returns whether it was written."""
        state = self.state
        routine = epoch_done and self.setup.scaler.is_enabled()
        if state.skipped_in_a_row > (self.ROUTINE_OVERFLOWS if routine else 0):
            if not self.owed:
                text = f"not saved at step {state.step}: its last step was skipped"
                note_event(self.log, state, text)
            self.owed, self._owed_stays = True, self._owed_stays or stays
            return False
        stays = stays or self._owed_stays
        self.owed = self._owed_stays = False
        require_finite(self.setup, state)
        state.seconds = self.seconds_before + time.monotonic() - self.started
        with self.log.phase("checkpoints"):
            values = snapshot(self.setup, state, self.meter)
            if self.folder is not None:
                self.folder.save(values, step=state.step, stays=stays, about=self._about())
        self.saved_step = state.step
        return True

    def save_best(self, scores: dict[str, float]) -> None:
        """Write the evaluated weights."""
        if self.folder is not None:
            values = shipped(self.setup, self.state, scores)
            self.folder.save_best(values, step=self.state.step, about=self._about())

    def leave(self) -> str:
        """Save if the state is good; returns what to tell the user."""
        self.save()
        return self.where()

    def where(self) -> str:
        """Return where the run can be continued from, in words."""
        if self.saved_step is None:
            return f"Nothing was worth saving yet in {self.run_dir}. The same command starts anew."
        return (
            f"Saved at step {self.saved_step} of {self.setup.plan.steps} in {self.run_dir}. Run "
            f"the same command again to continue."
        )

    def _about(self) -> dict[str, Any]:
        return {
            "epoch": self.state.epoch,
            "best": self.state.best,
            "data_hash": self.setup.data.data_hash,
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
            "processes": self.setup.world.size,
        }
