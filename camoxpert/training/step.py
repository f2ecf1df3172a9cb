"""One optimizer step: micro-batches forward and back, gradients shared, weights and EMA moved."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import nullcontext

import torch

from camoxpert.data.samples.batches import Batch
from camoxpert.errors import ConfigError
from camoxpert.losses import total_loss
from camoxpert.models.router import Routing
from camoxpert.runtime.processes import World, no_sync
from camoxpert.runtime.regions import region
from camoxpert.training.guards import STOP_CODES
from camoxpert.training.meters import RoutingMeter
from camoxpert.training.prepare import Setup, autocast, mask_target


def train_step(
    setup: Setup, window: list[Batch], meter: RoutingMeter, *, stop_code: int = 0
) -> dict[str, torch.Tensor]:
    """Take one optimizer step over the micro-batches of a window.

    Each image weighs the same, in a short last window too. A non-finite loss or gradient of any
    process leaves weights, optimizer and EMA of all exactly as they were; the device decides it,
    the host does not wait.

    Args:
        setup: what is trained.
        window: this process's micro-batches of the step.
        meter: receives the routing.
        stop_code: exit code with which this process wants to stop, or 0; the others learn it from
            the returned scalars.

    Returns:
        Scalars on the device: ``loss`` and its parts (means over all processes), ``grad_norm``,
        ``skipped`` (0 or 1), and with several processes ``stop 75`` and its like: how many of them
        want to stop with which code.
    """
    model, optimizer, scaler, config = setup.model, setup.optimizer, setup.scaler, setup.config
    model.train()
    if not any(p.requires_grad for p in model.backbone.parameters()):
        # Frozen means frozen: batch norm statistics and dropout, too.
        model.backbone.eval()
    values, records = accumulate_within_memory(setup, window)
    for routing in records:
        meter.update(routing)
    values = shared(setup.world, values, stop_code)
    if scaler.is_enabled():
        # The scaler looks at gradients alone, and those of an infinite loss may be finite.
        grad = next(p.grad for p in model.parameters() if p.grad is not None)
        grad.add_(torch.where(torch.isfinite(values["loss"]), 0.0, float("inf")))
    scaler.unscale_(optimizer)
    limit = config.optim.clip_grad_norm or float("inf")
    with region("clip"):
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), limit)
    finite = (torch.isfinite(norm) & torch.isfinite(values["loss"])).float()
    with region("optimizer"):
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
        with region("EMA"):
            setup.ema.update(model, finite)
    return {**values, "grad_norm": norm, "skipped": 1 - finite}


def accumulate_within_memory(
    setup: Setup, window: list[Batch]
) -> tuple[dict[str, torch.Tensor], list[tuple[Routing, ...]]]:
    """Add up the gradients of a window; where micro-batches do not fit, halve them and start anew.

    The images of the optimizer step stay the same, and so does each one's weight. Smaller parts
    stay for the rest of the run.

    Raises:
        torch.OutOfMemoryError: single images do not fit, or other processes take part.
    """
    while True:
        parts = [part for batch in window for part in batch.split(setup.split)]
        try:
            return accumulate(setup, parts)
        except torch.OutOfMemoryError:
            # With several processes the others wait for this one's gradients already.
            if setup.world.size > 1 or max(len(part.names) for part in parts) == 1:
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
        # Gradients are shared once per step, with the last part.
        with nullcontext() if batch is parts[-1] else no_sync(setup.forward):
            with autocast(setup):
                output = setup.forward(batch.images)
            counts_LE = counts.add(output.routing)
            target = mask_target(batch)
            with region("loss"):
                loss, terms = total_loss(output, target, setup.config.loss, counts_LE=counts_LE)
            with region("backward"):
                setup.scaler.scale(loss * share).backward()
        records.append(tuple(Routing(*(part.detach() for part in r)) for r in output.routing))
        for name, value in {"loss": loss.detach(), **terms}.items():
            values[name] = values.get(name, 0) + value * share
    return values, records


def shared(
    world: World, values: dict[str, torch.Tensor], stop_code: int
) -> dict[str, torch.Tensor]:
    """Return the means of scalars over all processes, and who wants to stop, in one exchange."""
    if world.size == 1:
        return values
    vector = torch.stack([v.detach().float().reshape(()) for v in values.values()])
    wishes = vector.new_tensor([float(code == stop_code) for code in STOP_CODES])
    total = world.sum(torch.cat([vector / world.size, wishes]))
    names = [*values, *(f"stop {code}" for code in STOP_CODES)]
    return dict(zip(names, total.unbind(), strict=True))


def out_of_memory(setup: Setup, batch_size: int) -> ConfigError:
    """Say what did not fit and which flags keep the same effective batch in less memory."""
    half, double = max(1, batch_size // 2), 2 * setup.micro_batch.steps
    return ConfigError(
        f"Out of memory on {setup.device}: {batch_size} images of "
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


def peak_memory(device: torch.device) -> int | None:
    """Return the most memory the device held, in bytes; None on a CPU."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
