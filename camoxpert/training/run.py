"""The state of a training run: everything decided and built, and its progress."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from camoxpert.config import Config
from camoxpert.data.samples.batches import Batch
from camoxpert.models.camoxpert import CamoXpert
from camoxpert.runs.checkpoint import StateValues
from camoxpert.runs.log import RunLog
from camoxpert.runs.records import EventRecord
from camoxpert.runtime.device import Precision
from camoxpert.runtime.processes import World
from camoxpert.stop import Stop
from camoxpert.training.batching import Batching
from camoxpert.training.ema import ModelEma, Statistics
from camoxpert.training.guide import Guide
from camoxpert.training.overfit import Overfit
from camoxpert.training.plan import Plan
from camoxpert.training.routing import RoutingMeter, StepCounts
from camoxpert.training.rundata import RunData


@dataclass
class TrainState:
    """Progress of a run, saved with every checkpoint; every field is a plain number or None.

    Attributes:
        step: optimizer steps taken (windows finished, skipped ones included).
        epoch: epoch in progress, from 0.
        position: images of the epoch that are done, over all processes, always at the end of an
            optimizer step; 0 between epochs.
        images: training images seen.
        best: best validation score, or None before the first validation.
        best_epoch: epoch of the best score, from 1; 0 before the first validation.
        stale: validations since the best score.
        skipped: optimizer steps skipped for non-finite values, in total.
        skipped_in_a_row: the same since the last good step.
        seconds: wall time spent training, over all sessions.
        ended: why training ends before the plan is done, or "".
    """

    step: int = 0
    epoch: int = 0
    position: int = 0
    images: int = 0
    best: float | None = None
    best_epoch: int = 0
    stale: int = 0
    skipped: int = 0
    skipped_in_a_row: int = 0
    seconds: float = 0.0
    ended: str = ""

    def to_dict(self) -> StateValues:
        """Return all fields as a dictionary; without ``ended`` where there is nothing to say."""
        ended: StateValues = {"ended": self.ended} if self.ended else {}
        return {
            "step": self.step,
            "epoch": self.epoch,
            "position": self.position,
            "images": self.images,
            "best": self.best,
            "best_epoch": self.best_epoch,
            "stale": self.stale,
            "skipped": self.skipped,
            "skipped_in_a_row": self.skipped_in_a_row,
            "seconds": self.seconds,
            **ended,
        }

    @classmethod
    def from_dict(cls, values: StateValues) -> TrainState:
        """Rebuild from ``to_dict``; raises TypeError for unknown fields."""
        return cls(**values)


@dataclass
class Run:
    """A run: ``prepare`` builds it, ``session`` gives it a folder and a log, ``train`` trains it.

    Attributes:
        asked: the user's checked settings, which are saved and compared when a run continues.
        config: the same with nothing left open: what is trained.
        data: training, validation and test sets, and how they are read.
        device, precision: where and in which number format the step runs.
        model: the network, without wrappers; its names are those of checkpoints.
        ema: the moving average that is evaluated, or None.
        optimizer, scaler: AdamW, and the loss scaling of fp16.
        plan, batching: stages and steps; micro-batches of a step.
        world, stop: the processes that train together; the request to stop.
        meter, step_counts: experts used, per epoch and per step.
        gmacs: billions of multiply-adds of one image's forward pass.
        forward: module to call for a forward pass: the model, wrapped for several processes.
        loss: loss function, ``(output, masks, config, counts_LE=) -> (loss, terms)``.
        state: progress.
        path, log: its folder and its records; without a folder nothing is written.
        files: sha256 of the files that settings name, by dotted path.
        split: parts into which each micro-batch is split after the device ran out of memory.
        guide: the references that images are shown with, or None.
        overfit: the losses of a run that learns batches by heart, or None.
        statistics: the model's buffers, which a skipped step leaves as they were; listed by the
            first step.
    """

    asked: Config
    config: Config
    data: RunData
    device: torch.device
    precision: Precision
    model: CamoXpert
    ema: ModelEma | None
    optimizer: torch.optim.AdamW
    scaler: torch.amp.GradScaler
    plan: Plan
    batching: Batching
    world: World
    stop: Stop
    meter: RoutingMeter
    step_counts: StepCounts
    gmacs: float
    forward: nn.Module
    loss: Callable[..., tuple[Tensor, dict[str, Tensor]]]
    state: TrainState = field(default_factory=TrainState)
    path: Path | None = None
    log: RunLog = field(default_factory=RunLog)
    split: int = 1
    files: dict[str, str] = field(default_factory=dict)
    guide: Guide | None = None
    overfit: Overfit | None = None
    statistics: Statistics | None = None

    @property
    def evaluated_model(self) -> CamoXpert:
        """The model that validation scores: the EMA where there is one."""
        if self.ema is None:
            return self.model
        assert isinstance(self.ema.module, CamoXpert)
        return self.ema.module

    @property
    def parameters(self) -> int:
        """Number of parameters of the model."""
        return sum(p.numel() for p in self.model.parameters())

    @property
    def folder(self) -> Path:
        """The run's folder; only available once it was opened."""
        assert self.path is not None
        return self.path

    def stop_code(self) -> int:
        """Return the exit code to stop with after this step, or 0.

        Several processes return the code they agreed on, so that all stop at the same step.
        """
        return self.stop.code() if self.world.size == 1 else self.stop.agreed

    def count_window(self, window: list[Batch]) -> None:
        """Count a finished optimizer step: its position in the epoch and the images of all ranks.

        The position counts whole micro-batches, even if the last one is short.
        """
        batch_size = self.plan.stage_of_epoch(self.state.epoch).batch_size
        slots = batch_size * self.world.size
        done = -(-self.state.position // slots)
        self.state.position = (done + len(window)) * slots
        self.state.images += self.world.size * sum(len(batch.names) for batch in window)
        self.state.step += 1

    def note_event(self, text: str, *, coming: bool = False, epoch_end: bool = False) -> None:
        """Log an event for the report.

        Args:
            text: one sentence.
            coming: the event belongs to the next step; a run that resumes before it logs it again.
            epoch_end: the event belongs to the end of the epoch, which is repeated as a whole.
        """
        # Counted from 1: the epoch in progress, or between epochs the last finished one.
        epoch = self.state.epoch + bool(self.state.position or coming)
        record: EventRecord = {
            "kind": "event",
            "step": self.state.step + coming,
            "epoch": epoch,
            "text": text,
        }
        if epoch_end:
            record["epoch_end"] = True
        self.log.write(record)
