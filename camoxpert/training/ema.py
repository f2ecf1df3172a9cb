"""Exponential moving average of the weights, the weights that are evaluated and shipped."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from camoxpert.errors import CheckpointError
from camoxpert.runs.checkpoint import EmaValues


def warmed_decay(decay: float, updates: Tensor) -> Tensor:
    """Return min(decay, (1 + n) / (10 + n)) for the n-th update, from 0; a scalar tensor.

    A constant 0.9999 keeps most of the random initialisation for thousands of steps; warmed up, the
    average spans about the last tenth of the updates until ``decay`` is reached.
    """
    return ((1 + updates) / (10 + updates)).clamp(max=decay)


class Statistics:
    """The buffers that training moves, such as those of batch norms, of one model.

    A forward pass moves them before anyone knows whether its loss is finite, and an average that
    has met an infinity never recovers: a skipped step must not leave its own behind.

    They are read and written as one tensor: fifty batch norms have a hundred, each a launch of its
    own. They are looked up by name, as they may be replaced; those that are no part of the state
    are constants.

    Args:
        model: their owner.
    """

    def __init__(self, model: nn.Module) -> None:
        self._places = [
            (module, name)
            for module in model.modules()
            for name, buffer in module._buffers.items()
            if buffer is not None and name not in module._non_persistent_buffers_set
        ]

    def _buffers(self, *, floating: bool) -> list[Tensor]:
        buffers: list[Tensor] = [getattr(module, name) for module, name in self._places]
        return [buffer for buffer in buffers if buffer.is_floating_point() == floating]

    @torch.no_grad()
    def read(self) -> Tensor | None:
        """Return a copy of all floating ones in a row; None without any."""
        buffers = self._buffers(floating=True)
        return torch.cat([buffer.reshape(-1) for buffer in buffers]) if buffers else None

    @torch.no_grad()
    def write(self, new: Tensor | None, old: Tensor | None, keep: Tensor) -> None:
        """Set the floating ones to ``new``, or to ``old`` where the scalar ``keep`` is 0."""
        if new is None or old is None:
            return
        buffers = self._buffers(floating=True)
        parts = torch.where(keep > 0, new, old).split([buffer.numel() for buffer in buffers])
        torch._foreach_copy_(
            buffers, [part.view_as(buffer) for part, buffer in zip(parts, buffers, strict=True)]
        )

    @torch.no_grad()
    def copy_counts(self, other: Statistics) -> None:
        """Copy those that are not floating from a model of the same kind."""
        counts = self._buffers(floating=False)
        if counts:
            torch._foreach_copy_(counts, other._buffers(floating=False))


class ModelEma:
    """A second model whose parameters follow the first; buffers are copied.

    Args:
        model: the trained model, before it is compiled or wrapped.
        decay: largest decay.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.module = copy.deepcopy(model).eval().requires_grad_(False)
        self.decay = decay
        device = next(model.parameters()).device
        # Counted on the device: the host need not know which steps were skipped.
        kind = torch.float32 if device.type == "mps" else torch.float64
        self.updates = torch.zeros((), dtype=kind, device=device)
        self._statistics = Statistics(self.module)
        self._follows: nn.Module | None = None

    @torch.no_grad()
    def update(self, model: nn.Module, keep: Tensor) -> None:
        """Move towards ``model``; a scalar tensor ``keep`` of 0 leaves the average as it is.

        ``keep`` is 0 for a skipped optimizer step. It is a tensor so that the host need not wait
        for the device to learn which.
        """
        weight = keep * (1 - warmed_decay(self.decay, self.updates)).to(keep.dtype)
        self.updates += keep
        if self._follows is not model or next(model.parameters()) is not self._trained[0]:
            self._walk(model)
        steps = list(torch._foreach_sub(self._trained, self._averaged))
        torch._foreach_mul_(steps, weight)
        torch._foreach_add_(self._averaged, steps)
        own, new = self._statistics, self._followed
        own.write(new.read(), own.read(), keep)
        own.copy_counts(new)

    def _walk(self, model: nn.Module) -> None:
        """List the weights of both models once: walking 700 modules takes the host 8 ms a step.

        Weights are replaced all at once or not at all.
        """
        self._averaged: list[Tensor] = list(self.module.parameters())
        self._trained: list[Tensor] = list(model.parameters())
        self._followed = Statistics(model)
        self._follows = model

    def state_dict(self) -> EmaValues:
        """Return weights (the model's own keys) and the update count."""
        return {"weights": self.module.state_dict(), "updates": int(self.updates)}

    def load_state_dict(self, state: EmaValues) -> None:
        """Restore what ``state_dict`` returned; raises CheckpointError if it does not fit."""
        try:
            self.module.load_state_dict(state["weights"])
            self.updates.fill_(int(state["updates"]))
        except (KeyError, RuntimeError) as error:
            raise CheckpointError(f"The EMA weights do not fit this model: {error}") from error
