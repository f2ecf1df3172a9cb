"""Numbers that stay on the device until nobody has to wait for them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from camoxpert.models.router import Routing


class LateReader:
    """Hands out the numbers of a step one step later, so that reading never stalls the device."""

    def __init__(self) -> None:
        self._waiting: tuple[list[str], Tensor, Any] | None = None

    def push(
        self, values: dict[str, Tensor], note: Any = None
    ) -> tuple[dict[str, float], Any] | None:
        """Queue this step's scalars; return the previous step's as floats with its note, if any."""
        previous = self.flush()
        stacked = torch.stack([value.detach().float().reshape(()) for value in values.values()])
        self._waiting = (list(values), stacked, note)
        return previous

    def flush(self) -> tuple[dict[str, float], Any] | None:
        """Return what is queued, waiting for the device if it must."""
        if self._waiting is None:
            return None
        names, stacked, note = self._waiting
        self._waiting = None
        return dict(zip(names, stacked.tolist(), strict=True)), note


class RoutingMeter:
    """Counts, per decoder level, which experts were chosen and how much gate mass they got.

    Args:
        levels: names of the levels, in the order of the model's routing records.
        experts: kind of every expert; repeated kinds get a number.
    """

    def __init__(self, levels: Sequence[str], experts: Sequence[str]) -> None:
        self.levels = tuple(levels)
        self.experts = [
            f"{kind} {1 + list(experts[:i]).count(kind)}" if list(experts).count(kind) > 1 else kind
            for i, kind in enumerate(experts)
        ]
        self.reset()

    def reset(self) -> None:
        """Forget everything counted."""
        self.chosen: list[Tensor] = []
        self.mass: list[Tensor] = []

    @torch.no_grad()
    def update(self, routing: Sequence[Routing]) -> None:
        """Add a batch's records; nothing is read back to the host."""
        for level, record in enumerate(routing):
            flat = record.experts_BK.reshape(-1)
            chosen = torch.zeros(len(self.experts), device=flat.device)
            chosen.scatter_add_(0, flat, torch.ones_like(flat, dtype=torch.float32))
            mass = record.probs_BE.detach().sum(0)
            if level == len(self.chosen):
                self.chosen.append(chosen)
                self.mass.append(mass)
            else:
                self.chosen[level] += chosen
                self.mass[level] += mass

    def summary(self) -> dict[str, dict[str, Any]]:
        """Return level -> usage (share of choices), gate (share of probability), normalised
        entropy.

        Entropy is that of the usage over log(experts): 1 is uniform, 0 a single expert.
        """
        result = {}
        for name, chosen, mass in zip(self.levels, self.chosen, self.mass, strict=False):
            usage = (chosen / chosen.sum().clamp_min(1)).tolist()
            gate = (mass / mass.sum().clamp_min(1e-12)).tolist()
            entropy = -sum(p * math.log(p) for p in usage if p > 0)
            scale = math.log(len(usage)) if len(usage) > 1 else 1.0
            result[name] = {"usage": usage, "gate": gate, "entropy": entropy / scale}
        return result
