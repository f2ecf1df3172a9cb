"""What a forward pass of the engine returns, on its way to the host."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from camoxpert.inference.score import WHERE_FROM

Outputs = Tensor | tuple[Tensor, ...] | list[Any]
"""Of a batch: a tensor (B, ...), several of them, or a list of B values that are on the host."""
NOT_FINITE = f"the network's output is not finite. {WHERE_FROM}"
"""Reason for which an item failed."""


def is_finite(found: Any) -> bool:
    """Return whether an output on the host has no NaN and no infinity."""
    parts = found if isinstance(found, tuple) else (found,)
    return all(
        bool(part.isfinite().all())
        for part in parts
        if isinstance(part, Tensor) and part.is_floating_point()
    )


def on_host(found: Outputs) -> Outputs:
    """Return outputs on the host; from CUDA they arrive when the stream is done."""
    if isinstance(found, list):
        return found
    if isinstance(found, tuple):
        return tuple(_copied(part) for part in found)
    return _copied(found)


def _copied(found: Tensor) -> Tensor:
    if found.device.type != "cuda":
        return found.cpu()
    copy = torch.empty(found.shape, dtype=found.dtype, pin_memory=True)
    return copy.copy_(found, non_blocking=True)
