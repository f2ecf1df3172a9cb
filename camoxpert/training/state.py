"""Where a run stands: plain numbers, saved with every checkpoint."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any


@dataclass
class TrainState:
    """Position and bookkeeping of a run; every field is a plain number, text or None.

    Attributes:
        step: optimizer steps taken (windows finished, skipped ones included).
        epoch: epoch in progress, from 0.
        position: images of the epoch's order that are done, over all processes, always at the end
            of an optimizer step; 0 between epochs.
        images: training images seen.
        best: best validation score, or None before the first validation.
        best_epoch: epoch of the best score, from 1; 0 before the first validation.
        stale: validations since the best score.
        skipped: optimizer steps skipped for non-finite values, all together.
        skipped_in_a_row: the same since the last good step.
        seconds: wall time spent training, over all sessions.
    """

    step: int = 0
    epoch: int = 0
    position: int = 0
    images: int = 0
    best: float | None = None
    best_epoch: int = 0
    stale: int = 0
    skipped: int = 0
    skipped_in_a_row: int = 0
    seconds: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """Return all fields as a dictionary."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TrainState:
        """Rebuild from ``to_dict``; raises TypeError for unknown fields."""
        return cls(**values)
