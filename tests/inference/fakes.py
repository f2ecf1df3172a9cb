"""Stages without a model, importable by worker processes."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from camoxpert.errors import DataError
from camoxpert.files import write_bytes


@dataclass(frozen=True)
class Thing:
    """An item: its inputs are ``value``, ``value + 0.5`` ... of the given sides."""

    name: str
    value: float = 0.0
    sides: tuple[int, ...] = (2,)
    fault: str = ""


@dataclass(frozen=True)
class Read:
    inputs: tuple[Tensor, ...]
    seconds: dict[str, float] = field(default_factory=lambda: {"read": 0.0})
    held_bytes: int = 100


class FakeStages:
    """Doubles the mean of every input; notes the sizes of the forward passes."""

    def __init__(self, folder: Path | None = None, most: int = 10**9) -> None:
        self.device = torch.device("cpu")
        self.models = 1
        self.folder, self.most = folder, most
        self.passes: list[list[float]] = []
        self.read_names: list[str] = []

    def read(self, item: Thing) -> Read:
        self.read_names.append(item.name)
        if item.fault == "unreadable":
            raise DataError(f"{item.name} is damaged")
        if item.fault == "strange":
            raise ZeroDivisionError("in a decoder")
        if item.fault == "kills" or (item.fault == "kills once" and self._first(item)):
            os.kill(os.getpid(), signal.SIGKILL)
        inputs = tuple(
            torch.full((1, side, side), item.value + index / 2)
            for index, side in enumerate(item.sides)
        )
        return Read(inputs)

    def _first(self, item: Thing) -> bool:
        assert self.folder is not None
        mark = self.folder / f"{item.name}.killed"
        there = mark.exists()
        mark.touch()
        return not there

    def forward(self, inputs: Tensor, samples: Sequence[Read] = ()) -> Tensor:
        if len(inputs) > self.most:
            raise torch.OutOfMemoryError("no room")
        self.passes.append(inputs.mean((1, 2, 3)).tolist())
        return 2 * inputs.mean((1, 2, 3))

    def finish(self, item: Thing, sample: Read, outputs: list[Tensor]) -> dict[str, Any]:
        if item.fault == "slow":
            time.sleep(0.2)
        if item.fault == "disk full":
            raise DataError("No space left on device.")
        if self.folder is not None:
            write_bytes(self.folder / item.name, str([float(o) for o in outputs]).encode())
        found = [float(output) for output in outputs]
        return {"status": "ok", "found": found, "seconds": {"write": 0.0}}

    def failed(self, item: Thing, reason: str) -> dict[str, Any]:
        return {"status": "failed", "reason": reason}

    def example(self) -> Tensor:
        return torch.zeros(1, 1, 2, 2)


@dataclass(frozen=True)
class FakeSpec:
    folder: Path
    dies: str = ""

    def build(self, device: str) -> FakeStages:
        if self.dies == "loading":
            os._exit(7)
        if self.dies == "refuses":
            raise DataError("the model is gone")
        return FakeStages(self.folder)

    def failed(self, item: Thing, reason: str) -> dict[str, Any]:
        return {"status": "failed", "reason": reason}


def things(number: int, **faults: str) -> list[Thing]:
    """Return items t0, t1 ... with values 0, 1 ...; ``t3="kills"`` gives one a fault."""
    return [Thing(f"t{n}", float(n), fault=faults.get(f"t{n}", "")) for n in range(number)]


def names(rows: Sequence[dict[str, Any]]) -> list[str]:
    return [row["item"] for row in rows]
