"""Which parts of a network stay in float so that its int8 file keeps the limits of the gate."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from camoxpert import console, stop
from camoxpert.export.graph import PROBABILITY
from camoxpert.export.images import Calibration
from camoxpert.inference.runtimes import Runtime
from camoxpert.text import count

RANKING_IMAGES = 8
"""Calibration images on which the parts are compared."""


class Quantizes(Protocol):
    """What the search needs of a ``Quantizer``."""

    parts: tuple[str, ...]
    calibration: Calibration

    def write(self, path: Path, in_float: Sequence[str] = (), images: int | None = None) -> None:
        """Write the graph in int8 with some parts in float."""


@dataclass
class Quantization:
    """How a graph was quantised.

    Attributes:
        parts: how many parts it has.
        in_float: those that stay in float, the worst first.
        errors: part -> mean absolute change of a probability when it alone is in int8; empty if
            nothing had to stay.
    """

    parts: int
    in_float: list[str] = field(default_factory=list)
    errors: dict[str, float] = field(default_factory=dict)

    def fields(self) -> dict[str, Any]:
        """Return everything as JSON holds it."""
        return asdict(self)


def quantise(
    quantizer: Quantizes,
    target: Path,
    *,
    broken: Callable[[Path], list[str]],
    open_file: Callable[[Path], Runtime],
    reference: Runtime,
) -> Quantization:
    """Write an int8 file that keeps the limits, with as few parts in float as the order allows.

    All parts are tried first. If that breaks a limit, the parts are ordered by what each alone does
    to the probabilities, and as many of the worst stay in float as needed.

    Args:
        quantizer: writes the files.
        target: file to write; where no choice keeps the limits, the last one that was tried.
        broken: returns the limits that a file breaks.
        open_file: returns what runs a file.
        reference: runs the graph in fp32.
    """
    found = Quantization(len(quantizer.parts))
    quantizer.write(target)
    reasons = broken(target)
    if not reasons:
        return found
    console.decide("int8", f"{reasons[0]}: looking for the parts that break it")
    found.errors = errors_alone(quantizer, target, open_file, reference)
    order = sorted(found.errors, key=lambda part: -found.errors[part])

    def passes(number: int) -> bool:
        stop.check()
        found.in_float = order[:number]
        quantizer.write(target, found.in_float)
        return not broken(target)

    # Twice as many each time, then the fewest that pass between the last two.
    low, high = 0, 1
    while not passes(high):
        if high == len(order):
            return found
        low, high = high, min(2 * high, len(order))
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if passes(middle) else (middle, high)
    if len(found.in_float) != high:
        passes(high)
    console.decide(
        "int8", f"{count(high, 'part')} of {len(order)} in float: {', '.join(found.in_float)}"
    )
    return found


def errors_alone(
    quantizer: Quantizes, scratch: Path, open_file: Callable[[Path], Runtime], reference: Runtime
) -> dict[str, float]:
    """Return the mean absolute change of a probability when one part alone is in int8.

    Args:
        quantizer, open_file, reference: see ``quantise``.
        scratch: file to write.
    """
    inputs = quantizer.calibration.inputs[:RANKING_IMAGES]
    wanted = [_probability(reference, one) for one in inputs]
    errors = {}
    for part in console.track(quantizer.parts, "parts in int8"):
        stop.check()
        others = [other for other in quantizer.parts if other != part]
        quantizer.write(scratch, others, RANKING_IMAGES)
        runtime = open_file(scratch)
        changes = [
            float(np.abs(_probability(runtime, one) - before).mean())
            for one, before in zip(inputs, wanted, strict=True)
        ]
        errors[part] = float(np.mean(changes))
    return errors


def _probability(runtime: Runtime, inputs: Any) -> NDArray[Any]:
    (found,) = runtime.run(dict(inputs), [PROBABILITY])
    return found.astype(np.float64)
