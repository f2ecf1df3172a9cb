"""One optimizer step: forward and backward passes, gradient exchange, weight and EMA update."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from camoxpert import console
from camoxpert.data.samples.batches import Batch
from camoxpert.errors import ConfigError
from camoxpert.losses import size_weights
from camoxpert.models.camoxpert import CamoXpert
from camoxpert.models.router import Routing
from camoxpert.runtime.device import upload
from camoxpert.runtime.processes import no_sync
from camoxpert.runtime.regions import region
from camoxpert.stop import STOP_CODES
from camoxpert.training.compiling import run_eagerly
from camoxpert.training.ema import Statistics
from camoxpert.training.modalities import seen_in_training
from camoxpert.training.run import Run

T = TypeVar("T")


def train_step(run: Run, window: list[Batch]) -> dict[str, Tensor]:
    """Take one optimizer step over the micro-batches of a window.

    Every image has the same weight, also in a short last window. On a non-finite loss or gradient
    in any process, weights, buffers, optimizer and EMA of all stay exactly as they were. The device
    decides this; the host does not wait.

    Args:
        run: what is trained; its meter receives the routing.
        window: this process's micro-batches of the step.

    Returns:
        Scalars on the device: ``loss`` and its terms (means over all processes), ``grad_norm``,
        ``skipped`` (0 or 1), and with several processes ``stop 75`` and so on: how many of them
        were asked to stop with this exit code.

    Raises:
        torch.OutOfMemoryError: see ``accumulate_within_memory``.
    """
    model, optimizer, scaler, config = run.model, run.optimizer, run.scaler, run.config
    if config.train.keep_rgb:
        assert model.modalities is not None
        if model.training or not model.modalities.training:
            # The photograph model is kept as it is: nothing in it may follow what is shown here.
            model.eval()
            model.modalities.train()
    elif not (model.training and model.backbone.training):
        # It walks through all modules, milliseconds in which a GPU may wait.
        model.train()
    if not any(p.requires_grad for p in model.backbone.parameters()):
        # Frozen means frozen: batch norm statistics and dropout included.
        model.backbone.eval()
    if run.statistics is None:
        run.statistics = Statistics(model)
    before = run.statistics.read()
    values, records = accumulate_within_memory(run, window)
    for routing in records:
        run.meter.update(routing)
    values = share_values(run, values)
    if scaler.is_enabled():
        # The scaler checks the gradients only, and those of an infinite loss may be finite.
        grad = next(p.grad for p in model.parameters() if p.grad is not None)
        grad.add_(torch.where(torch.isfinite(values["loss"]), 0.0, float("inf")))
    scaler.unscale_(optimizer)
    with region("clip"):
        norm, is_finite = clip(model, config.optim.clip_grad_norm or float("inf"))
    finite = (is_finite & torch.isfinite(values["loss"])).float()
    with region("optimizer"):
        if scaler.is_enabled():
            scaler.step(optimizer)
            scaler.update()
        else:
            # The fused kernels skip the update where found_inf is 1, as under loss scaling.
            optimizer.grad_scale = None  # type: ignore[attr-defined]  # read by the fused step
            optimizer.found_inf = 1 - finite  # type: ignore[attr-defined]  # the same
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    run.statistics.write(run.statistics.read(), before, finite)
    counts_LE = run.step_counts.counts_LE
    if config.optim.router_bias_rate and counts_LE is not None:
        for level, counts_E in zip(reversed(model.moe_levels), counts_LE, strict=True):
            level.router.move_bias(counts_E, config.optim.router_bias_rate * finite)
    if run.ema is not None:
        with region("EMA"):
            run.ema.update(model, finite)
    return {**values, "grad_norm": norm, "skipped": 1 - finite}


def clip(model: CamoXpert, limit: float) -> tuple[Tensor, Tensor]:
    """Clip the gradients; return the norm of the network's, and whether all of them are finite.

    Those of the presence head are clipped by themselves, or they would shorten the steps of the
    masks that nothing of the head flows into.
    """
    if model.presence is None:
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), limit)
        return norm, torch.isfinite(norm)
    own = list(model.presence.parameters())
    named = {id(p) for p in own}
    others = [p for p in model.parameters() if id(p) not in named]
    norm, of_head = (torch.nn.utils.clip_grad_norm_(part, limit) for part in (others, own))
    return norm, torch.isfinite(norm) & torch.isfinite(of_head)


def accumulate_within_memory(
    run: Run, window: list[Batch]
) -> tuple[dict[str, Tensor], list[tuple[Routing, ...]]]:
    """Add up the gradients of a window; if micro-batches do not fit in memory, halve and retry.

    The optimizer step keeps its images and their weights. The smaller parts are kept until this
    process ends.

    Raises:
        torch.OutOfMemoryError: single images do not fit, or there are several processes.
    """
    split = run.split
    while True:
        parts = [part for batch in window for part in batch.split(run.split)]
        try:
            sums = accumulate(run, parts)
            break
        except torch.OutOfMemoryError:
            # The other ranks already wait for the gradients of this one.
            if run.world.size > 1 or max(len(part.names) for part in parts) == 1:
                raise
        except Exception as error:
            # The backward pass is compiled when it first runs.
            if not run_eagerly(run.model, error):
                raise
            run.optimizer.zero_grad(set_to_none=True)
            continue
        # Outside the handler: inside it, the traceback keeps the tensors that did not fit.
        run.optimizer.zero_grad(set_to_none=True)
        if run.device.type == "cuda":
            torch.cuda.empty_cache()
        run.split *= 2
    if run.split != split:
        size = run.plan.stage_of_epoch(run.state.epoch).batch_size
        text = (
            f"out of memory: micro-batches of {size} are taken in {run.split} parts from step "
            f"{run.state.step + 1} on; the effective batch stays the same"
        )
        run.note_event(text, coming=True)
        console.say(f"memory      {text}")
    return sums


def accumulate(run: Run, parts: list[Batch]) -> tuple[dict[str, Tensor], list[tuple[Routing, ...]]]:
    """Run forward and backward passes; return the loss with its terms, and the routing records."""
    images = sum(len(batch.names) for batch in parts)
    values: dict[str, Tensor] = {}
    records = []
    counts = run.step_counts
    counts.start()
    options = loss_options(run, parts)
    for batch in parts:
        share = len(batch.names) / images
        # Gradients are exchanged once per step, with the last part.
        with nullcontext() if batch is parts[-1] else no_sync(run.forward):
            # Also where no image of the batch has one: with several processes every parameter
            # takes part in every pass.
            with region("references") if run.guide is not None else nullcontext():
                shown = shown_beside(run, batch)
            with run.precision.autocast(run.device):
                output = run.forward(batch.images, *shown)
            moved = None
            if run.batching.checkpointing and run.statistics is not None:
                moved = run.statistics.read()
            counts_LE = counts.add(output.routing)
            target = batch.target()
            taught: dict[str, Tensor | None] = {}
            if batch.soft is not None:
                taught = {"teacher_B1HW": batch.teacher(), "unlabeled_B": batch.unlabeled}
            with region("loss"):
                loss, terms = run.loss(
                    output,
                    target,
                    run.config.loss,
                    counts_LE=counts_LE,
                    known_B1HW=batch.known(),
                    **taught,
                    **options,
                )
            with region("backward"):
                run.scaler.scale(loss * share).backward()
            if moved is not None and run.statistics is not None:
                # What is computed again in the backward pass moves batch norms' averages again.
                run.statistics.write(moved, moved, moved.new_ones(()))
        records.append(tuple(Routing(*(part.detach() for part in r)) for r in output.routing))
        for name, value in {"loss": loss.detach(), **terms}.items():
            values[name] = values.get(name, 0) + value * share
    return values, records


def shown_beside(run: Run, batch: Batch) -> tuple[Any, ...]:
    """Return what the model gets beside the images of a batch: references, modalities."""
    if batch.modalities:
        return None, seen_in_training(batch, run.config, run.state.epoch)
    return () if run.guide is None else (run.guide.reference(batch, run.state.epoch),)


def loss_options(run: Run, parts: list[Batch]) -> dict[str, Any]:
    """Return what the loss must know of the whole step and of the run, as far as settings ask.

    Images are weighted by size against all images of the step, however it is divided into
    micro-batches and over processes: one all-reduce of two numbers.
    """
    config = run.config.loss
    options: dict[str, Any] = {}
    if len(run.data.negatives):
        options["empty_alone"] = True
    if config.uncertainty:
        options["progress"] = run.plan.progress(run.state.step)
    if config.size_balance:
        weights = torch.cat(
            [size_weights(part.target(), config.size_balance, part.known()) for part in parts]
        )
        number = weights.new_full((), float(len(weights)))
        total = run.world.sum(torch.stack([weights.sum(), number]))
        options["size_mean"] = total[0] / total[1]
    return options


def share_values(run: Run, values: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the means of scalars over all processes, and the stop requests, in one all-reduce."""
    world = run.world
    if world.size == 1:
        return values
    request = run.stop.code()
    vector = torch.stack([v.detach().float().reshape(()) for v in values.values()])
    requests = upload(np.array([code == request for code in STOP_CODES]), vector)
    total = world.sum(torch.cat([vector / world.size, requests]))
    names = [*values, *(f"stop {code}" for code in STOP_CODES)]
    return dict(zip(names, total.unbind(), strict=True))


@contextmanager
def memory_explained(run: Run) -> Iterator[None]:
    """Turn OutOfMemoryError into a ConfigError that names flags with the same effective batch."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        size = run.plan.stage_of_epoch(run.state.epoch).batch_size
        half, double = max(1, size // 2), 2 * run.batching.steps
        raise ConfigError(
            f"Out of memory on {run.device}: {size} images of {run.config.data.img_size} px do not "
            f"fit (peak {(peak_memory(run.device) or 0) / 1e9:.1f} GB). The same effective batch "
            f"in half the memory: --batch-size {half} --accumulation-steps {double}; or "
            f"--gradient-checkpointing. The checkpoints already written are intact."
        ) from error


def windows(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """Group micro-batches into accumulation windows; the last one may be short, never dropped."""
    window: list[T] = []
    for item in items:
        window.append(item)
        if len(window) == size:
            yield window
            window = []
    if window:
        yield window


def peak_memory(device: torch.device) -> int | None:
    """Return the most memory the device held, in bytes; None on a CPU."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
