"""What a checkpoint holds: everything a run needs to go on, or what evaluation needs."""

from __future__ import annotations

from typing import Any

import torch

from camoxpert.config import to_dict
from camoxpert.errors import CheckpointError, NumericError
from camoxpert.runs.checkpoint import FORMAT, Checkpoint
from camoxpert.training.meters import RoutingMeter
from camoxpert.training.prepare import Setup
from camoxpert.training.state import TrainState


def snapshot(setup: Setup, state: TrainState, meter: RoutingMeter) -> dict[str, Any]:
    """Return everything a run needs to go on; tensors and plain Python only.

    Every process calls this; what the first one returns is to be kept.
    """
    rng: dict[str, Any] = {"cpu": torch.get_rng_state()}
    if setup.device.type == "cuda":
        rng["cuda"] = torch.cuda.get_rng_state(setup.device)
    rngs = setup.world.gather(rng)
    meter.merge(setup.world.sum, first=setup.world.first)
    batch = setup.micro_batch
    return {
        "format": FORMAT,
        "config": to_dict(setup.config),
        "data_hash": setup.data.data_hash,
        "model": setup.model.state_dict(),
        "ema": setup.ema.state_dict() if setup.ema else None,
        "optimizer": setup.optimizer.state_dict(),
        "scaler": setup.scaler.state_dict(),
        "state": state.to_dict(),
        "routing": meter.state_dict(),
        "rng": rngs[0],
        "other_rngs": rngs[1:],
        "batch": {
            "size": batch.size,
            "steps": batch.steps,
            "processes": batch.processes,
            "effective": images_per_step(setup),
        },
    }


def images_per_step(setup: Setup) -> dict[str, int]:
    """Return the images of an optimizer step over all processes, by the name of the stage."""
    batch = setup.micro_batch
    return {
        f"stage {stage.number}": stage.batch_size * batch.steps * batch.processes
        for stage in setup.plan.stages
    }


def require_finite(setup: Setup, state: TrainState) -> None:
    """Raise NumericError where weights have become useless: not finite, or too large to add up.

    One look at the device; for use before weights are kept.
    """
    weights = [p.detach() for p in setup.model.parameters()]
    if setup.ema is not None:
        weights += [p for p in setup.ema.module.parameters()]
    if not torch.stack(torch._foreach_norm(weights)).isfinite().all():
        raise NumericError(
            f"The weights are no longer finite after step {state.step} (epoch {state.epoch + 1}): "
            f"training diverged. They are not saved; the last checkpoint is intact. Lower --lr, or "
            f"keep --clip-grad-norm on."
        )


def state_bytes(setup: Setup) -> int:
    """Return the size of a checkpoint: weights, their average, and AdamW's two moments."""
    weights = sum(t.numel() * t.element_size() for t in setup.model.state_dict().values())
    return weights * (4 if setup.ema else 3)


def shipped(setup: Setup, state: TrainState, scores: dict[str, float]) -> dict[str, Any]:
    """Return what evaluation and prediction need: the evaluated weights and the settings."""
    return {
        "format": FORMAT,
        "config": to_dict(setup.config),
        "data_hash": setup.data.data_hash,
        "model": setup.evaluated_model.state_dict(),
        "ema": None,
        "state": state.to_dict(),
        "scores": scores,
    }


def restore(setup: Setup, checkpoint: Checkpoint, meter: RoutingMeter) -> TrainState:
    """Put a snapshot back: weights, optimizer, scaler, EMA, state, and the random state last."""
    values = checkpoint.values
    if "optimizer" not in values:
        raise CheckpointError(
            f"{checkpoint.path} holds weights only and cannot be continued. Use a step_*.pt file "
            f"or the run folder; to start a new run from these weights give them with --weights."
        )
    try:
        setup.model.load_state_dict(values["model"])
        # The moments are the checkpoint's; weight decay, betas and scales are those of now, or a
        # change of them would be told and not made.
        groups = setup.optimizer.param_groups
        now = [{k: g[k] for k in ("weight_decay", "betas", "scale")} for g in groups]
        setup.optimizer.load_state_dict(values["optimizer"])
        for group, settings in zip(setup.optimizer.param_groups, now, strict=True):
            group.update(settings)
        setup.scaler.load_state_dict(values["scaler"])
        if setup.ema is not None:
            # An average that begins now begins at the weights of now.
            fresh = {"weights": values["model"], "updates": 0}
            setup.ema.load_state_dict(values["ema"] or fresh)
        state = TrainState.from_dict(values["state"])
        # Counts of an epoch that was stopped on its way: the first process keeps them for all.
        if "routing" in values:
            meter.load_state_dict(values["routing"], setup.device)
            meter.merge(lambda counts: counts, first=setup.world.first)
    except (RuntimeError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{checkpoint.path} does not fit this run: {error}") from error
    rngs = [values["rng"], *values.get("other_rngs", [])]
    if setup.world.rank < len(rngs):
        # Of another number of processes, those that were not there begin with their seeds.
        rng = rngs[setup.world.rank]
        torch.set_rng_state(rng["cpu"])
        if setup.device.type == "cuda" and "cuda" in rng:
            torch.cuda.set_rng_state(rng["cuda"], setup.device)
    return state
