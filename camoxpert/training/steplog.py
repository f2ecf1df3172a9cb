"""Reports of training steps: progress bar, log records, skipped steps with their images.

Numbers are read one step late, so that the host never waits for the device.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from camoxpert import console
from camoxpert.console import TrainingBar
from camoxpert.data.samples.batches import Batch
from camoxpert.data.unreadable import Unreadable
from camoxpert.errors import NumericError
from camoxpert.runs.records import ImageFacts
from camoxpert.runtime.device import HostCopy
from camoxpert.runtime.gpu import GpuMonitor
from camoxpert.training.plan import Stage
from camoxpert.training.routing import active_experts, collapse_alarm
from camoxpert.training.run import Run
from camoxpert.training.step import peak_memory

# Below this fp16 cannot hold the gradients whatever the scale: every step would be skipped.
SMALLEST_SCALE = 1.0
NOT_TERMS = ("loss", "grad_norm", "skipped")


class LateReader:
    """Returns the numbers of a step one step later, so that reading never stalls the device."""

    def __init__(self) -> None:
        self._waiting: tuple[list[str], HostCopy, StepNote] | None = None

    def push(
        self, values: dict[str, Tensor], note: StepNote
    ) -> tuple[dict[str, float], StepNote] | None:
        """Queue this step's scalars; return the previous step's as floats with its note, if any."""
        previous = self.flush()
        stacked = torch.stack([value.detach().float().reshape(()) for value in values.values()])
        self._waiting = (list(values), HostCopy(stacked), note)
        return previous

    def flush(self) -> tuple[dict[str, float], StepNote] | None:
        """Return what is queued, waiting for the device if necessary."""
        if self._waiting is None:
            return None
        names, copy, note = self._waiting
        self._waiting = None
        return dict(zip(names, copy.read().tolist(), strict=True)), note


class Speed:
    """Images per second and the share of time spent waiting for data, since the epoch's start."""

    def __init__(self) -> None:
        self.started = time.monotonic()
        self.images = 0
        self.waited = 0.0

    def add(self, images: int, waited: float) -> None:
        """Count a step."""
        self.images += images
        self.waited += waited

    def images_per_second(self) -> float:
        """Return the mean rate."""
        return self.images / max(time.monotonic() - self.started, 1e-9)

    def data_wait(self) -> float:
        """Return the share of time spent waiting, 0..1."""
        return min(self.waited / max(time.monotonic() - self.started, 1e-9), 1.0)


@dataclass
class StepNote:
    """What the host knows about a step, kept until its numbers arrive.

    Attributes:
        number, epoch: both from 1.
        stage: number of the stage.
        lr: learning rate of the decoder.
        window: its micro-batches, to name their images if the step is skipped.
    """

    number: int
    stage: int
    epoch: int
    lr: float
    window: list[Batch]


class StepLog:
    """Progress bar and log of a run's steps.

    Args:
        run: what is trained.

    Attributes:
        unreadable: images that could not be read so far.
    """

    def __init__(self, run: Run) -> None:
        self.run = run
        self.unreadable = Unreadable(len(run.data.trained), run.config.data.max_unreadable)
        self._reader, self._speed = LateReader(), Speed()
        self._gpu: GpuMonitor | None = None
        self._bar: TrainingBar | None = None

    @contextmanager
    def open(self) -> Iterator[None]:
        """Watch the GPU and write warnings to the run's log inside the block."""
        note = lambda text: self.run.note_event(text, coming=True)  # noqa: E731
        with GpuMonitor(str(self.run.device)) as self._gpu, console.heard_by(note):
            yield

    @contextmanager
    def epoch(self, epoch: int, stage: Stage, done: int) -> Iterator[None]:
        """Show the bar of an epoch and count its time.

        Args:
            epoch: from 0.
            stage: the stage of this epoch.
            done: micro-batches already done.
        """
        plan = self.run.plan
        self._speed = Speed()
        with (
            TrainingBar(
                total=stage.batches,
                epoch=epoch + 1,
                epochs=plan.epochs,
                stage=f"stage {stage.number}" if len(plan.stages) > 1 else "",
                initial=done,
            ) as self._bar,
            self.run.log.phase("training"),
        ):
            yield

    def push(
        self, values: dict[str, Tensor], window: list[Batch], *, lr: float, waited: float
    ) -> None:
        """Queue the numbers of a finished step; log those of the step before.

        Args:
            values: scalars on the device, from ``train_step``.
            window: micro-batches of the step.
            lr: learning rate of the decoder.
            waited: seconds the host waited for the data.

        Raises:
            NumericError: too many non-finite steps in a row.
        """
        state, device = self.run.state, self.run.device
        self._speed.add(self.run.world.size * sum(len(b.names) for b in window), waited)
        stage = self.run.plan.stage_of_epoch(state.epoch)
        note = StepNote(state.step, stage.number, state.epoch + 1, lr, window)
        late = self._reader.push(values, note)
        self._log(late)
        if self._bar is not None:
            self._bar.update(
                len(window),
                loss=late[0]["loss"] if late is not None else None,
                gpu=self._gpu.text() if self._gpu is not None else "",
                memory=peak_memory(device) if late is not None else None,
                data_wait=self._speed.data_wait() if late is not None else None,
            )

    def flush(self) -> None:
        """Log the last step, waiting for the device; raises NumericError as ``push``."""
        self._log(self._reader.flush())

    def note_unreadable(self, window: list[Batch]) -> None:
        """Warn of images in these micro-batches that cannot be read and were replaced."""
        for batch in window:
            for line in self.unreadable.note(batch.replaced):
                console.warn(line)

    def share_unreadable(self) -> None:
        """Count the unreadable images of all ranks; every rank calls this."""
        for seen in self.run.world.gather(self.unreadable.seen):
            for line in self.unreadable.note(seen.items()):
                console.warn(line)

    def _log(self, late: tuple[dict[str, float], StepNote] | None) -> None:
        if late is None:
            return
        values, step = late
        run = self.run
        requests = {name: value for name, value in values.items() if name.startswith("stop ")}
        run.stop.agree(int(name.removeprefix("stop ")) for name, n in requests.items() if n)
        if values["skipped"]:
            note_skipped(run, step, values)
        else:
            run.state.skipped_in_a_row = 0
        if run.overfit is not None:
            run.overfit.add(values["mask"])
        if step.number % run.config.run.log_every and step.number != 1:
            return
        terms = {k: v for k, v in values.items() if k not in NOT_TERMS and k not in requests}
        speed = self._speed
        rates = {"images_per_second": speed.images_per_second(), "data_wait": speed.data_wait()}
        memory = self._gpu.memory() if self._gpu is not None else None
        run.log.write(
            {
                "kind": "train",
                "step": step.number,
                "epoch": step.epoch,
                "stage": step.stage,
                "loss": values["loss"],
                "terms": terms,
                "lr": step.lr,
                "grad_norm": values["grad_norm"],
                "images_per_second": rates["images_per_second"],
                "data_wait": rates["data_wait"],
                "gpu": self._gpu.utilisation() if self._gpu is not None else None,
                "memory": memory[0] if memory else None,
            }
        )
        run.log.scalars(step.number, {"train/loss": values["loss"], "train/lr": step.lr})
        run.log.scalars(step.number, {f"train/{name}": value for name, value in terms.items()})
        run.log.scalars(step.number, {f"speed/{name}": value for name, value in rates.items()})


def note_skipped(run: Run, step: StepNote, values: dict[str, float]) -> None:
    """Count and log a skipped step with its images; every rank calls this.

    Raises:
        NumericError: too many in a row, or gradients that fp16 cannot hold.
    """
    state = run.state
    state.skipped += 1
    state.skipped_in_a_row += 1
    images = [about for part in run.world.gather(describe_images(step.window)) for about in part]
    shown = ", ".join(about["name"] for about in images[:8]) + ("..." if len(images) > 8 else "")
    scale = run.scaler.get_scale() if run.scaler.is_enabled() else None
    text = f"step {step.number} skipped: non-finite loss or gradient; images {shown}"
    run.log.write(
        {
            "kind": "event",
            "step": step.number,
            "epoch": step.epoch,
            "text": text,
            "loss": values["loss"],
            "grad_norm": values["grad_norm"],
            "lr": step.lr,
            "scale": scale,
            "images": images,
        }
    )
    advice = (
        "The weights are those before them and the last checkpoint is intact. Lower --lr, or try "
        "--precision fp32; metrics.jsonl names the images."
    )
    if scale is not None and scale < SMALLEST_SCALE:
        raise NumericError(
            f"fp16 cannot hold the gradients: the loss scale fell to {scale:g} after "
            f"{state.skipped_in_a_row} skipped steps (last: step {step.number}, epoch "
            f"{step.epoch}). {advice}"
        )
    if state.skipped_in_a_row > run.config.train.max_skipped_steps:
        raise NumericError(
            f"{state.skipped_in_a_row} optimizer steps in a row had a non-finite loss or gradient "
            f"(last: step {step.number}, epoch {step.epoch}). {advice}"
        )


def describe_images(window: list[Batch]) -> list[ImageFacts]:
    """Return name, mean grey value (0..255) and share of object pixels of every image."""
    return [
        {
            "name": name,
            "mean": round(float(batch.images[i].float().mean()), 1),
            "object": round(float((batch.masks[i] > 127).float().mean()), 4),
        }
        for batch in window
        for i, name in enumerate(batch.names)
    ]


def log_routing(run: Run, stage: Stage, epoch: int) -> None:
    """Log which experts the epoch's images, or their regions, used on all ranks; warn of a collapse
    once.

    Logs nothing if no images were counted. Every rank calls this.
    """
    meter, log, step = run.meter, run.log, run.state.step
    meter.merge(run.world.sum, first=run.world.first)
    levels = meter.summary()
    if not levels:
        return
    log.write(
        {
            "kind": "routing",
            "step": step,
            "epoch": epoch + 1,
            "stage": stage.number,
            "experts": list(meter.experts),
            "levels": levels,
        }
    )
    for name, level in levels.items():
        log.scalars(step, {f"routing/entropy {name}": level["entropy"]})
        log.scalars(step, {f"routing/max violation {name}": level["max_violation"]})
        usage = zip(meter.experts, level["usage"], strict=True)
        log.scalars(step, {f"routing {name}/{expert}": share for expert, share in usage})
    top_k = active_experts(run.config, epoch)
    alarm = collapse_alarm(levels, meter.experts, top_k=top_k)
    again, meter.ill = meter.ill, bool(alarm)
    if alarm:
        run.note_event(alarm, epoch_end=True)
        if again and not meter.alarmed:
            # Printed once, and only if it lasts: most routers start out uneven. The report and
            # metrics.jsonl have the alarms of all epochs.
            console.note(f"warning     {alarm}")
        meter.alarmed = meter.alarmed or again
