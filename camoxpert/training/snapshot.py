"""What a checkpoint holds: everything a run needs to go on, or what evaluation needs."""

from __future__ import annotations

from typing import Any

import torch

from camoxpert.config import to_dict
from camoxpert.errors import CheckpointError
from camoxpert.training.checkpoint import FORMAT, Checkpoint
from camoxpert.training.meters import RoutingMeter
from camoxpert.training.setup import Setup
from camoxpert.training.state import TrainState


def snapshot(setup: Setup, state: TrainState, meter: RoutingMeter) -> dict[str, Any]:
    """Return everything a run needs to go on; tensors and plain Python only."""
    rng: dict[str, Any] = {"cpu": torch.get_rng_state()}
    if setup.device.type == "cuda":
        rng["cuda"] = torch.cuda.get_rng_state(setup.device)
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
        "rng": rng,
    }


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
        setup.optimizer.load_state_dict(values["optimizer"])
        setup.scaler.load_state_dict(values["scaler"])
        if setup.ema is not None and values["ema"] is not None:
            setup.ema.load_state_dict(values["ema"])
        state = TrainState.from_dict(values["state"])
        if "routing" in values:
            meter.load_state_dict(values["routing"], setup.device)
    except (RuntimeError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{checkpoint.path} does not fit this run: {error}") from error
    torch.set_rng_state(values["rng"]["cpu"])
    if setup.device.type == "cuda" and "cuda" in values["rng"]:
        torch.cuda.set_rng_state(values["rng"]["cuda"], setup.device)
    return state
