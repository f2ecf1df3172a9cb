"""The training loop: one function that reads top to bottom, and the step it repeats."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from camoxpert.config import Config
from camoxpert.data.batches import Batch
from camoxpert.data.loader import build_eval_loader, device_batches
from camoxpert.errors import ConfigError, NumericError
from camoxpert.losses import total_loss
from camoxpert.metrics import Evaluator, is_better
from camoxpert.models.router import Routing
from camoxpert.observe.gpu import GpuMonitor
from camoxpert.observe.plots import panel
from camoxpert.observe.progress import TrainingBar
from camoxpert.observe.runlog import RunLog
from camoxpert.training.checkpoint import Checkpoint, CheckpointFolder
from camoxpert.training.guards import StopFlag
from camoxpert.training.meters import LateReader, RoutingMeter, Speed, collapse_alarm
from camoxpert.training.optim import Stage, lr_at, set_lr
from camoxpert.training.setup import Setup, autocast, mask_target, training_loader
from camoxpert.training.snapshot import restore, shipped, snapshot
from camoxpert.training.state import TrainState
from camoxpert.training.validation import Item, score

Say = Callable[[str], None]


@dataclass
class Summary:
    """How a run ended: the final state, and the scores of the best validation (None without
    one)."""

    state: TrainState
    best_scores: dict[str, float] | None


def train(
    setup: Setup,
    run_dir: Path,
    log: RunLog,
    *,
    stop: StopFlag,
    say: Say,
    resume: Checkpoint | None = None,
) -> Summary:
    """Train until the plan is done, early stopping strikes or ``stop`` is raised.

    Args:
        setup: everything decided and built.
        run_dir: an existing run folder.
        log: receives records, scalars and pictures.
        stop: looked at after every optimizer step; the state is saved before leaving.
        say: prints one line for the user.
        resume: checkpoint of this run to continue from.

    Raises:
        Stopped: asked to stop; the same command continues.
        NumericError: too many non-finite steps in a row.
        DataError, CheckpointError: a file cannot be read or written.
    """
    config, plan, device = setup.config, setup.plan, setup.device
    checkpoints = CheckpointFolder(run_dir / "checkpoints")
    state = TrainState()
    meter = RoutingMeter(setup.model.level_names(), setup.model.moe_levels[0].kinds)
    if resume is not None:
        state = restore(setup, resume, meter)
        log.truncate_after(state.step, epoch_done=state.batch == 0)
        say(f"resumed     {resume.path.name}: epoch {state.epoch + 1}, step {state.step}")
    else:
        # The folder may be that of a run that died before its first checkpoint.
        log.truncate_after(-1)
    reader = LateReader()
    best_scores: dict[str, float] | None = None
    loader, loader_stage, warned = None, 0, False
    started, seconds_before = time.monotonic(), state.seconds

    def save() -> None:
        state.seconds = seconds_before + time.monotonic() - started
        with log.phase("checkpoints"):
            checkpoints.save(snapshot(setup, state, meter), step=state.step)

    with GpuMonitor(str(device)) as gpu:
        while state.epoch < plan.epochs:
            # --- one epoch: which parameters learn, in which order the samples come
            epoch, stage = state.epoch, plan.stage_of_epoch(state.epoch)
            freed = set_trainable(setup, stage, epoch)
            if loader is None or loader_stage != stage.number:
                if loader is not None:
                    loader.close()
                loader, loader_stage = training_loader(setup, stage.batch_size), stage.number
                if epoch == stage.first_epoch and state.batch == 0:
                    text = f"stage {stage.number}: {freed}"
                    log.write(
                        {"kind": "event", "step": state.step, "epoch": epoch + 1, "text": text}
                    )
            setup.model.set_active_experts(active_experts(config, epoch))
            loader.set_epoch(epoch, start_batch=state.batch)
            if state.batch == 0:
                meter.reset()
            speed = Speed()
            bar = TrainingBar(
                total=stage.batches,
                epoch=epoch + 1,
                epochs=plan.epochs,
                stage=f"stage {stage.number}" if len(plan.stages) > 1 else "",
                initial=state.batch,
            )
            with bar, log.phase("training"):
                batches = device_batches(loader, device)
                for window in windows(batches, setup.micro_batch.steps):
                    # --- one optimizer step
                    lr = lr_at(plan, config.optim, state.step)
                    set_lr(setup.optimizer, lr)
                    split = setup.split
                    try:
                        values = train_step(setup, [batch for batch, _ in window], meter)
                    except torch.OutOfMemoryError as error:
                        raise out_of_memory(setup, stage) from error
                    if setup.split != split:
                        text = (
                            f"out of memory: micro-batches of {stage.batch_size} are taken in "
                            f"{setup.split} parts from step {state.step + 1} on; the effective "
                            f"batch stays the same"
                        )
                        note_event(log, state, text)
                        say(f"memory      {text}")
                    state.step += 1
                    state.batch += len(window)
                    names = [name for batch, _ in window for name in batch.names]
                    state.images += len(names)
                    speed.add(len(names), sum(wait for _, wait in window))
                    late = reader.push(values, (state.step, stage.number, epoch + 1, lr, names))

                    # --- what the step before this one says
                    if late is not None:
                        inspect(late, config, state, log, gpu, speed)
                        bar.update(
                            len(window),
                            loss=late[0]["loss"],
                            gpu=gpu.text(),
                            memory=peak_memory(device),
                            data_wait=speed.data_wait(),
                        )
                    else:
                        bar.update(
                            len(window), loss=None, gpu=gpu.text(), memory=None, data_wait=None
                        )

                    # --- due work
                    if stop.code():
                        inspect(reader.flush(), config, state, log, gpu, speed)
                        save()
                        raise stop.stopped(
                            f"Saved at epoch {epoch + 1}, step {state.step} of {plan.steps} in "
                            f"{run_dir}. Run the same command again to continue."
                        )
                    if config.run.save_every and state.step % config.run.save_every == 0:
                        inspect(reader.flush(), config, state, log, gpu, speed)
                        save()
            inspect(reader.flush(), config, state, log, gpu, speed)

            # --- end of the epoch: routing, validation, checkpoints
            alarm = write_routing(meter, log, state, stage, epoch, config)
            if alarm and not warned:
                # Once: the report and metrics.jsonl have every epoch's.
                say(f"warning     {alarm}")
            warned = warned or bool(alarm)
            state.epoch, state.batch = epoch + 1, 0
            last = state.epoch == plan.epochs
            if len(setup.data.validation) and (
                last or state.epoch % config.train.validate_every == 0
            ):
                with log.phase("validation"):
                    scores = validate(setup, log, state, stop)
                better = state.best is None or is_better(
                    config.train.select, scores[config.train.select], state.best
                )
                if better:
                    state.best, state.best_epoch = scores[config.train.select], state.epoch
                    state.stale, best_scores = 0, scores
                    checkpoints.save_best(shipped(setup, state, scores), step=state.step)
                else:
                    state.stale += 1
                record = {"kind": "validation", "step": state.step, "epoch": state.epoch}
                weights = "ema" if setup.ema else "model"
                record |= {
                    "stage": stage.number,
                    "scores": scores,
                    "best": better,
                    "weights": weights,
                }
                log.write(record)
                log.scalars(state.step, {f"validation/{k}": v for k, v in scores.items()})
                say(
                    f"epoch {state.epoch:>3}/{plan.epochs}  S {scores['Smeasure']:.3f}  wF "
                    f"{scores['wFmeasure']:.3f}  E {scores['meanEm']:.3f}  IoU "
                    f"{scores['IoU']:.3f}  MAE "
                    f"{scores['MAE']:.3f}{'  best so far' if better else ''}"
                )
            elif not len(setup.data.validation) and last:
                state.best_epoch = state.epoch
                checkpoints.save_best(shipped(setup, state, {}), step=state.step)
            save()
            if config.train.early_stopping and state.stale >= config.train.early_stopping:
                since = f"no better {config.train.select} since epoch {state.best_epoch}"
                text = f"early stopping: {since}"
                note_event(log, state, text)
                say(text)
                break
            if stop.code() and not last:
                raise stop.stopped(
                    f"Saved after epoch {state.epoch} in {run_dir}. Run the same command again to "
                    f"continue."
                )
    return Summary(state, best_scores)


def train_step(setup: Setup, window: list[Batch], meter: RoutingMeter) -> dict[str, torch.Tensor]:
    """Take one optimizer step over the micro-batches of a window.

    Each image weighs the same, in a short last window too. A non-finite loss or gradient leaves
    weights, optimizer and EMA exactly as they were; the device decides it, the host does not wait.

    Returns:
        Scalars on the device: ``loss``, its parts, ``grad_norm`` and ``skipped`` (0 or 1).
    """
    model, optimizer, scaler, config = setup.model, setup.optimizer, setup.scaler, setup.config
    model.train()
    if not any(p.requires_grad for p in model.backbone.parameters()):
        # Frozen means frozen: batch norm statistics and dropout, too.
        model.backbone.eval()
    values, records = accumulate_within_memory(setup, window)
    for routing in records:
        meter.update(routing)
    scaler.unscale_(optimizer)
    limit = config.optim.clip_grad_norm or float("inf")
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), limit)
    finite = (torch.isfinite(norm) & torch.isfinite(values["loss"])).float()
    if scaler.is_enabled():
        scaler.step(optimizer)
        scaler.update()
    else:
        # The fused kernels skip the update where this is 1, the way loss scaling makes them.
        optimizer.grad_scale = None  # type: ignore[attr-defined]
        optimizer.found_inf = 1 - finite  # type: ignore[attr-defined]
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    counts_LE = setup.step_counts.counts_LE
    if config.optim.router_bias_rate and counts_LE is not None:
        for level, counts_E in zip(reversed(model.moe_levels), counts_LE, strict=True):
            level.router.move_bias(counts_E, config.optim.router_bias_rate * finite)
    if setup.ema is not None:
        setup.ema.update(model, finite)
    return {**values, "grad_norm": norm, "skipped": 1 - finite}


def accumulate_within_memory(
    setup: Setup, window: list[Batch]
) -> tuple[dict[str, torch.Tensor], list[tuple[Routing, ...]]]:
    """Add up the gradients of a window; where micro-batches do not fit, halve them and start anew.

    The images of the optimizer step stay the same, and so does each one's weight. Smaller parts
    stay for the rest of the run.

    Raises:
        torch.OutOfMemoryError: single images do not fit.
    """
    while True:
        parts = [part for batch in window for part in batch.split(setup.split)]
        try:
            return accumulate(setup, parts)
        except torch.OutOfMemoryError:
            if max(len(part.names) for part in parts) == 1:
                raise
        # Not in the handler: until it is left, the traceback holds the tensors that did not fit.
        setup.optimizer.zero_grad(set_to_none=True)
        if setup.device.type == "cuda":
            torch.cuda.empty_cache()
        setup.split *= 2


def accumulate(
    setup: Setup, parts: list[Batch]
) -> tuple[dict[str, torch.Tensor], list[tuple[Routing, ...]]]:
    """Run forward and backward passes; return the loss with its terms, and the routing records."""
    images = sum(len(batch.names) for batch in parts)
    values: dict[str, torch.Tensor] = {}
    records = []
    counts = setup.step_counts
    counts.start()
    for batch in parts:
        share = len(batch.names) / images
        with autocast(setup):
            output = setup.model(batch.images)
        counts_LE = counts.add(output.routing)
        loss, terms = total_loss(output, mask_target(batch), setup.config.loss, counts_LE=counts_LE)
        setup.scaler.scale(loss * share).backward()
        records.append(tuple(Routing(*(part.detach() for part in r)) for r in output.routing))
        for name, value in {"loss": loss.detach(), **terms}.items():
            values[name] = values.get(name, 0) + value * share
    return values, records


def out_of_memory(setup: Setup, stage: Stage) -> ConfigError:
    """Say what did not fit and which flags keep the same effective batch in less memory."""
    half, double = max(1, stage.batch_size // 2), 2 * setup.micro_batch.steps
    return ConfigError(
        f"Out of memory on {setup.device}: {stage.batch_size} images of "
        f"{setup.config.data.img_size} px do not fit (peak "
        f"{(peak_memory(setup.device) or 0) / 1e9:.1f} GB). The same effective batch in half the "
        f"memory: --batch-size {half} --accumulation-steps {double}; or --gradient-checkpointing. "
        f"The checkpoints already written are intact."
    )


def windows(
    batches: Iterable[tuple[Batch, float]], size: int
) -> Iterator[list[tuple[Batch, float]]]:
    """Group micro-batches into accumulation windows; the last one may be short, never dropped."""
    window: list[tuple[Batch, float]] = []
    for item in batches:
        window.append(item)
        if len(window) == size:
            yield window
            window = []
    if window:
        yield window


def set_trainable(setup: Setup, stage: Stage, epoch: int) -> str:
    """Freeze or free the backbone for an epoch; returns what learns, in words.

    With ``--progressive-unfreeze`` stage 2 frees one level more, deepest first, at equal intervals
    over its first half.
    """
    levels = setup.model.backbone.parameter_levels()
    if stage.number == 1:
        free = 0
    elif setup.config.train.progressive_unfreeze:
        interval = max(stage.epochs / 2 / len(levels), 1e-9)
        free = min(len(levels), 1 + int((epoch - stage.first_epoch) / interval))
    else:
        free = len(levels)
    for index, parameters in enumerate(levels):
        for parameter in parameters:
            parameter.requires_grad_(index >= len(levels) - free)
    if free == 0:
        return "decoder only, backbone frozen"
    return "everything" if free == len(levels) else f"decoder and {free} backbone levels"


def active_experts(config: Config, epoch: int) -> int:
    """Return how many experts an image uses in an epoch: all of them during router warm-up.

    The evaluated weights (the EMA's copy of the model) are always routed as they will ship.
    """
    warm = epoch < config.train.router_warmup
    return config.model.num_experts if warm else config.model.top_k


def inspect(
    late: tuple[dict[str, float], Any] | None,
    config: Config,
    state: TrainState,
    log: RunLog,
    gpu: GpuMonitor,
    speed: Speed,
) -> None:
    """Log a finished step where it is due, and stop at too many non-finite ones in a row."""
    if late is None:
        return
    values, (step, stage, epoch, lr, names) = late
    if values["skipped"]:
        state.skipped += 1
        state.skipped_in_a_row += 1
        shown = ", ".join(names[:8]) + ("..." if len(names) > 8 else "")
        text = f"step {step} skipped: non-finite loss or gradient; images {shown}"
        log.write({"kind": "event", "step": step, "epoch": epoch, "text": text})
        if state.skipped_in_a_row > config.train.max_skipped_steps:
            raise NumericError(
                f"{state.skipped_in_a_row} optimizer steps in a row had a non-finite loss or "
                f"gradient (last: step {step}, epoch {epoch}). The weights are those before them "
                f"and the last checkpoint is intact. Lower --lr, or try --precision fp32; "
                f"metrics.jsonl names the images."
            )
    else:
        state.skipped_in_a_row = 0
    if step % config.run.log_every and step != 1:
        return
    parts = {k: v for k, v in values.items() if k not in ("loss", "grad_norm", "skipped")}
    rates = {"images_per_second": speed.images_per_second(), "data_wait": speed.data_wait()}
    record = {"kind": "train", "step": step, "epoch": epoch, "stage": stage, "loss": values["loss"]}
    record |= {"terms": parts, "lr": lr, "grad_norm": values["grad_norm"], **rates}
    memory = gpu.memory()
    record |= {"gpu": gpu.utilisation(), "memory": memory[0] if memory else None}
    log.write(record)
    log.scalars(step, {"train/loss": values["loss"], "train/lr": lr})
    log.scalars(step, {f"train/{name}": value for name, value in parts.items()})
    log.scalars(step, {f"speed/{name}": value for name, value in rates.items()})


def validate(setup: Setup, log: RunLog, state: TrainState, stop: StopFlag) -> dict[str, float]:
    """Score the evaluated weights on the validation split at original size."""
    data, count = setup.config.data, setup.config.run.num_images
    evaluator = Evaluator()
    loader = build_eval_loader(
        setup.data.validation,
        img_size=data.img_size,
        batch_size=setup.plan.stages[0].batch_size,
        num_workers=setup.data.num_workers,
        max_pixels=data.max_pixels,
        keep_images=count > 0 and setup.config.run.tensorboard,
    )

    shown = itertools.count()

    def show(item: Item, prediction: Callable[[], np.ndarray], row: dict[str, Any]) -> None:
        if item.original is not None and next(shown) < count:
            picture = panel(item.original, item.mask, prediction() / np.float32(255))
            log.image(f"validation/{row['name']}", picture, state.step)

    setup.evaluated_model.set_active_experts(setup.config.model.top_k)
    score(
        setup.evaluated_model,
        loader,
        device=setup.device,
        evaluator=evaluator,
        context=lambda: autocast(setup),
        seen=show,
    )
    return evaluator.results()


def note_event(log: RunLog, state: TrainState, text: str) -> None:
    """Log something worth a line in the report."""
    log.write({"kind": "event", "step": state.step, "epoch": state.epoch, "text": text})


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


def peak_memory(device: torch.device) -> int | None:
    """Return the most memory the device held, in bytes; None on a CPU."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
