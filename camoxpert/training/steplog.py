"""What a run tells its log: steps, skipped steps with their images, routing, events."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from camoxpert.config import Config
from camoxpert.data.samples.batches import Batch
from camoxpert.errors import NumericError
from camoxpert.runs.log import RunLog
from camoxpert.runtime.gpu import GpuMonitor
from camoxpert.training.guards import StopFlag
from camoxpert.training.meters import RoutingMeter, Speed, collapse_alarm
from camoxpert.training.optim import Stage
from camoxpert.training.prepare import Setup
from camoxpert.training.state import TrainState

# Below this fp16 cannot hold the gradients whatever the scale: every step would be skipped.
SMALLEST_SCALE = 1.0
NOT_TERMS = ("loss", "grad_norm", "skipped")


@dataclass
class Step:
    """What is known of a step on the host, kept until its numbers arrive.

    Attributes:
        number: from 1; ``epoch`` from 1, too.
        window: its micro-batches, for a word about their images where the step is skipped.
    """

    number: int
    stage: int
    epoch: int
    lr: float
    window: list[Batch]


def inspect(
    late: tuple[dict[str, float], Step] | None,
    setup: Setup,
    state: TrainState,
    log: RunLog,
    gpu: GpuMonitor,
    speed: Speed,
    stop: StopFlag,
) -> None:
    """Log a finished step where it is due; note who wants to stop.

    Raises:
        NumericError: too many non-finite steps in a row.
    """
    if late is None:
        return
    values, step = late
    stop.agree(values)
    values = {name: value for name, value in values.items() if not name.startswith("stop ")}
    config = setup.config
    if values["skipped"]:
        note_skipped(setup, state, log, step, values)
    else:
        state.skipped_in_a_row = 0
    if step.number % config.run.log_every and step.number != 1:
        return
    parts = {k: v for k, v in values.items() if k not in NOT_TERMS}
    rates = {"images_per_second": speed.images_per_second(), "data_wait": speed.data_wait()}
    record = {"kind": "train", "step": step.number, "epoch": step.epoch, "stage": step.stage}
    record |= {"loss": values["loss"], "terms": parts, "lr": step.lr}
    record |= {"grad_norm": values["grad_norm"], **rates}
    memory = gpu.memory()
    record |= {"gpu": gpu.utilisation(), "memory": memory[0] if memory else None}
    log.write(record)
    log.scalars(step.number, {"train/loss": values["loss"], "train/lr": step.lr})
    log.scalars(step.number, {f"train/{name}": value for name, value in parts.items()})
    log.scalars(step.number, {f"speed/{name}": value for name, value in rates.items()})


def note_skipped(
    setup: Setup, state: TrainState, log: RunLog, step: Step, values: dict[str, float]
) -> None:
    """Count and log a skipped step with its images; every process takes part.

    Raises:
        NumericError: too many in a row, or gradients that fp16 cannot hold.
    """
    state.skipped += 1
    state.skipped_in_a_row += 1
    images = [about for part in setup.world.gather(about_images(step.window)) for about in part]
    shown = ", ".join(about["name"] for about in images[:8]) + ("..." if len(images) > 8 else "")
    scale = setup.scaler.get_scale() if setup.scaler.is_enabled() else None
    text = f"step {step.number} skipped: non-finite loss or gradient; images {shown}"
    log.write(
        {"kind": "event", "step": step.number, "epoch": step.epoch, "text": text}
        | {"loss": values["loss"], "grad_norm": values["grad_norm"], "lr": step.lr}
        | {"scale": scale, "images": images}
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
    if state.skipped_in_a_row > setup.config.train.max_skipped_steps:
        raise NumericError(
            f"{state.skipped_in_a_row} optimizer steps in a row had a non-finite loss or gradient "
            f"(last: step {step.number}, epoch {step.epoch}). {advice}"
        )


def about_images(window: list[Batch]) -> list[dict[str, Any]]:
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


def note_event(log: RunLog, state: TrainState, text: str, *, coming: bool = False) -> None:
    """Log something worth a line in the report.

    Args:
        log, state: of the run.
        text: one sentence.
        coming: it belongs to the step that comes next, and is told again by a run that resumes
            before it.
    """
    # From 1: the epoch in progress, or between epochs the one that is done.
    epoch = state.epoch + bool(state.position or coming)
    log.write({"kind": "event", "step": state.step + coming, "epoch": epoch, "text": text})


def write_routing(
    meter: RoutingMeter, log: RunLog, state: TrainState, stage: Stage, epoch: int, config: Config
) -> str:
    """Log which experts the epoch's images used; nothing where a resume had no step left to do.

    Returns:
        What is wrong with the router, or "".
    """
    levels = meter.summary()
    if not levels:
        return ""
    record = {"kind": "routing", "step": state.step, "epoch": epoch + 1, "stage": stage.number}
    log.write({**record, "experts": meter.experts, "levels": levels})
    for name, level in levels.items():
        log.scalars(state.step, {f"routing/entropy {name}": level["entropy"]})
        log.scalars(state.step, {f"routing/max violation {name}": level["max_violation"]})
        usage = zip(meter.experts, level["usage"], strict=True)
        log.scalars(state.step, {f"routing {name}/{expert}": share for expert, share in usage})
    alarm = collapse_alarm(
        levels, meter.experts, images=meter.images, top_k=active_experts(config, epoch)
    )
    if alarm:
        log.write({"kind": "event", "step": state.step, "epoch": epoch + 1, "text": alarm})
    return alarm


def active_experts(config: Config, epoch: int) -> int:
    """Return how many experts an image uses in an epoch: all of them during router warm-up.

    The evaluated weights (the EMA's copy of the model) are always routed as they will ship.
    """
    warm = epoch < config.train.router_warmup
    return config.model.num_experts if warm else config.model.top_k
