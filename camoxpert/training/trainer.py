"""The training loop: one function that reads top to bottom."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from camoxpert.console import TrainingBar
from camoxpert.data.loader import device_batches
from camoxpert.data.unreadable import Unreadable
from camoxpert.metrics import is_better
from camoxpert.runs.checkpoint import Checkpoint
from camoxpert.runs.log import RunLog
from camoxpert.runtime.gpu import GpuMonitor
from camoxpert.training.checkpoints import Saver
from camoxpert.training.guards import StopFlag
from camoxpert.training.meters import LateReader, RoutingMeter, Speed
from camoxpert.training.optim import Stage, lr_at, set_lr
from camoxpert.training.prepare import Setup, training_loader
from camoxpert.training.snapshot import require_finite, restore
from camoxpert.training.state import TrainState
from camoxpert.training.step import out_of_memory, peak_memory, train_step, windows
from camoxpert.training.steplog import Step, active_experts, inspect, note_event, write_routing
from camoxpert.training.validate import ValidationStopped, validate

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

    With several processes all of them call this and take the same turns; the first one writes.

    Args:
        setup: everything decided and built.
        run_dir: an existing run folder.
        log: receives records, scalars and pictures.
        stop: looked at after every optimizer step; the state is saved before leaving.
        say: prints one line for the user.
        resume: checkpoint of this run to continue from.

    Raises:
        Stopped: asked to stop; the same command continues.
        NumericError: too many non-finite steps in a row, or weights that are no longer finite.
        DataError, CheckpointError: a file cannot be read or written.
        PeerError: another process is gone.
    """
    config, plan, device, world = setup.config, setup.plan, setup.device, setup.world
    state = TrainState()
    meter = RoutingMeter(setup.model.level_names(), setup.model.moe_levels[0].kinds)
    if resume is not None:
        state = restore(setup, resume, meter)
        log.truncate_after(state.step, epoch_done=state.position == 0)
        say(f"resumed     {resume.path.name}: epoch {state.epoch + 1}, step {state.step}")
    else:
        # The folder may be that of a run that died before its first checkpoint.
        log.truncate_after(-1)
    saver = Saver(setup, run_dir, state, meter, log)
    reader = LateReader()
    unreadable = Unreadable(len(setup.data.train), config.data.max_unreadable)
    best_scores: dict[str, float] | None = None
    loader, loader_stage, warned = None, 0, False
    learning: list[bool] = []

    def report(text: str) -> None:
        note_event(log, state, text, coming=True)
        say(f"warning     {text}")

    def stop_code() -> int:
        # Several processes act on what all of them know, in the same step.
        return stop.code() if world.size == 1 else stop.agreed

    def stopped_early() -> bool:
        # Between epochs alone: a run that is continued may have stopped so already.
        patience = config.train.early_stopping
        return bool(patience) and not state.position and state.stale >= patience

    with GpuMonitor(str(device)) as gpu:
        while state.epoch < plan.epochs and not stopped_early():
            # --- one epoch: which parameters learn, in which order the samples come
            epoch, stage = state.epoch, plan.stage_of_epoch(state.epoch)
            freed = set_trainable(setup, stage, epoch)
            if learning != (now := [p.requires_grad for p in setup.model.parameters()]):
                setup.forward = setup.model
                setup.forward, learning = world.wrap(setup.model), now
            # Images of the window, of the epoch so far: over all processes.
            slots = stage.batch_size * world.size
            done = -(-state.position // slots)
            if loader is None or loader_stage != stage.number:
                if loader is not None:
                    loader.close()
                teller = report if world.first else None
                loader = training_loader(setup, stage.batch_size, report=teller)
                loader_stage = stage.number
                if epoch == stage.first_epoch and done == 0:
                    text = f"stage {stage.number}: {freed}"
                    note_event(log, state, text, coming=True)
            setup.model.set_active_experts(active_experts(config, epoch))
            loader.set_epoch(epoch, start_batch=done)
            if done == 0:
                meter.reset()
            speed = Speed()
            bar = TrainingBar(
                total=stage.batches,
                epoch=epoch + 1,
                epochs=plan.epochs,
                stage=f"stage {stage.number}" if len(plan.stages) > 1 else "",
                initial=done,
            )
            with bar, log.phase("training"):
                batches = device_batches(loader, device)
                for window in windows(batches, setup.micro_batch.steps):
                    # --- one optimizer step
                    lr = lr_at(plan, config.optim, plan.step_of(epoch, done // setup.steps))
                    set_lr(setup.optimizer, lr)
                    split = setup.split
                    taken = [batch for batch, _ in window]
                    for batch in taken:
                        for line in unreadable.note(batch.replaced):
                            report(line)
                    wish = stop.code() if world.size > 1 else 0
                    try:
                        values = train_step(setup, taken, meter, stop_code=wish)
                    except torch.OutOfMemoryError as error:
                        raise out_of_memory(setup, stage.batch_size) from error
                    if setup.split != split:
                        text = (
                            f"out of memory: micro-batches of {stage.batch_size} are taken in "
                            f"{setup.split} parts from step {state.step + 1} on; the effective "
                            f"batch stays the same"
                        )
                        note_event(log, state, text, coming=True)
                        say(f"memory      {text}")
                    state.step += 1
                    done += len(window)
                    state.position = done * slots
                    images = world.size * sum(len(batch.names) for batch in taken)
                    state.images += images
                    speed.add(images, sum(wait for _, wait in window))
                    step = Step(state.step, stage.number, epoch + 1, lr, taken)
                    late = reader.push(values, step)

                    # --- what the step before this one says
                    inspect(late, setup, state, log, gpu, speed, stop)
                    bar.update(
                        len(window),
                        loss=late[0]["loss"] if late is not None else None,
                        gpu=gpu.text(),
                        memory=peak_memory(device) if late is not None else None,
                        data_wait=speed.data_wait() if late is not None else None,
                    )

                    # --- due work
                    if stop_code():
                        inspect(reader.flush(), setup, state, log, gpu, speed, stop)
                        raise stop.stopped(saver.leave())
                    every = config.run.save_every
                    if saver.owed or (every and state.step % every == 0):
                        inspect(reader.flush(), setup, state, log, gpu, speed, stop)
                        saver.save()
            inspect(reader.flush(), setup, state, log, gpu, speed, stop)
            if stop_code():
                raise stop.stopped(saver.leave())

            # --- end of the epoch: routing, validation, checkpoints
            for seen in world.gather(unreadable.seen):
                for line in unreadable.note(seen.items()):
                    report(line)
            meter.merge(world.sum, first=world.first)
            alarm = write_routing(meter, log, state, stage, epoch, config)
            if alarm and not warned:
                # Once: the report and metrics.jsonl have every epoch's.
                say(f"warning     {alarm}")
            warned = warned or bool(alarm)
            last = epoch + 1 == plan.epochs
            if len(setup.data.validation) and (
                last or (epoch + 1) % config.train.validate_every == 0
            ):
                require_finite(setup, state)
                try:
                    with log.phase("validation"):
                        teller = report if world.first else None
                        scores, left_out = validate(setup, log, state, stop, teller)
                except torch.OutOfMemoryError as error:
                    raise out_of_memory(setup, stage.batch_size) from error
                except ValidationStopped:
                    # The epoch's end is done again, as a whole.
                    log.truncate_after(state.step, epoch_done=False)
                    raise stop.stopped(saver.leave()) from None
                state.epoch, state.position = epoch + 1, 0
                better = state.best is None or is_better(
                    config.train.select, scores[config.train.select], state.best
                )
                if better:
                    state.best, state.best_epoch = scores[config.train.select], state.epoch
                    state.stale, best_scores = 0, scores
                    saver.save_best(scores)
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
                if left_out:
                    record["unreadable"] = left_out
                log.write(record)
                if left_out and state.epoch == config.train.validate_every:
                    text = (
                        f"{len(left_out)} validation images are left out, for example {left_out[0]}"
                    )
                    note_event(log, state, text)
                    say(f"warning     {text}")
                log.scalars(state.step, {f"validation/{k}": v for k, v in scores.items()})
                say(
                    f"epoch {state.epoch:>3}/{plan.epochs}  S {scores['Smeasure']:.3f}  wF "
                    f"{scores['wFmeasure']:.3f}  E {scores['meanEm']:.3f}  IoU "
                    f"{scores['IoU']:.3f}  MAE "
                    f"{scores['MAE']:.3f}{'  best so far' if better else ''}"
                )
            state.epoch, state.position = epoch + 1, 0
            if not len(setup.data.validation) and last:
                require_finite(setup, state)
                state.best_epoch = state.epoch
                saver.save_best({})
            keep_every = config.run.keep_every
            saver.save(stays=bool(keep_every) and state.epoch % keep_every == 0, epoch_done=True)
            if stopped_early():
                since = f"no better {config.train.select} since epoch {state.best_epoch}"
                text = f"early stopping: {since}"
                note_event(log, state, text)
                say(text)
                break
            wishes = {f"stop {code}": 1.0 for code in world.gather(stop.code()) if code}
            stop.agree(wishes)
            if stop.agreed and not last:
                raise stop.stopped(saver.where())
    return Summary(state, best_scores)


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
