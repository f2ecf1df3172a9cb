"""What bounds a step, found by changing one thing at a time, and which change would help most."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypedDict

DATA_SHARE, FLAT_GROWTH, MANY_SYNCS, GOOD_USE = 0.15, 1.35, 3, 0.35


@dataclass(frozen=True)
class Workload:
    """A training step and the changes that can be made to it.

    Attributes:
        fetch: returns the next batch, waiting for it as training does.
        step: takes a whole training step on a batch.
        double: returns a batch with twice the images.
        wait: waits for the device.
    """

    fetch: Callable[[], Any]
    step: Callable[[Any], object]
    double: Callable[[Any], Any]
    wait: Callable[[], object] = lambda: None


@dataclass(frozen=True)
class Diagnosis:
    """What bounds a step, and the times behind the verdict.

    Attributes:
        verdict: data, launch, sync, compute or memory.
        seconds: median time of the unchanged step.
        without_data: the same with a preloaded batch.
        doubled: the same with twice the images.
        evidence: one sentence with the numbers.
    """

    verdict: str
    seconds: float
    without_data: float
    doubled: float
    evidence: str


class Advice(TypedDict):
    """A change, and the factor in throughput that it can bring at most."""

    gain: float
    text: str


def diagnose(
    workload: Workload,
    *,
    rounds: int = 5,
    syncs: int = 0,
    utilisation: float | None = None,
) -> Diagnosis:
    """Find out what bounds a step by changing one thing at a time; the variants take turns.

    A preloaded batch removes the data path; twice the images double the work of the device and
    leave the number of launches as it is.

    Args:
        workload: the step.
        rounds: timed steps of each variant.
        syncs: host syncs of a step.
        utilisation: share of the device's arithmetic peak that the step reaches; None if unknown.
    """
    kept = workload.fetch()
    twice = workload.double(kept)
    times: dict[str, list[float]] = {"as it is": [], "no data": [], "doubled": []}

    def timed(name: str, call: Callable[[], object]) -> None:
        started = time.perf_counter()
        call()
        workload.wait()
        times[name].append(time.perf_counter() - started)

    workload.step(kept)
    workload.step(twice)
    workload.wait()
    for _ in range(rounds):
        timed("as it is", lambda: workload.step(workload.fetch()))
        timed("no data", lambda: workload.step(kept))
        timed("doubled", lambda: workload.step(twice))
    seconds, without, doubled = (statistics.median(times[name]) for name in times)
    share, growth = 1 - without / seconds, doubled / without
    if share > DATA_SHARE:
        verdict = "data"
        evidence = f"with preloaded data the step takes {without / seconds:.0%} as long"
    elif growth < FLAT_GROWTH:
        verdict = "sync" if syncs >= MANY_SYNCS else "launch"
        evidence = f"twice the images take {growth:.2f} times as long"
        evidence += f", with {syncs} host syncs in a step" if verdict == "sync" else ""
    else:
        verdict = "memory" if utilisation is not None and utilisation < GOOD_USE else "compute"
        evidence = f"twice the images take {growth:.2f} times as long"
        if utilisation is not None:
            evidence += f", at {utilisation:.0%} of the arithmetic peak"
    return Diagnosis(verdict, seconds, without, doubled, evidence)


def advice(
    diagnosis: Diagnosis,
    seconds: Mapping[str, float],
    *,
    batch_size: int,
    num_workers: int,
    accelerator: bool,
) -> list[Advice]:
    """Return what to change, the largest gain first.

    Gains come from the interventions and from the components' shares; they are upper bounds.

    Args:
        diagnosis: of the step.
        seconds: per component.
        batch_size, num_workers: in use.
        accelerator: whether the work happens on a device other than the CPU.
    """
    total = sum(seconds.values()) or 1.0
    found: list[tuple[float, str]] = []
    data = diagnosis.seconds / diagnosis.without_data
    if data > 1.03:
        workers = max(1, 2 * num_workers)
        found.append((data, f"--num-workers {workers}: the step waits for its data"))
    doubled = 2 * diagnosis.without_data / diagnosis.doubled
    if doubled > 1.03:
        text = f"--batch-size {2 * batch_size}, fewer --accumulation-steps: fewer launches an image"
        found.append((doubled, text))
    for name, threshold, text in (
        ("EMA", 0.03, "--no-use-ema: no moving average of the weights"),
        ("backward: recomputed", 0.05, "--gradient-checkpointing off: nothing is computed twice"),
        ("copy", 0.03, "data.pin_memory=true: copies overlap with the computation"),
    ):
        share = seconds.get(name, 0.0) / total
        if share > threshold and (accelerator or name != "copy"):
            found.append((1 / (1 - share), text))
    return [{"gain": gain, "text": text} for gain, text in sorted(found, reverse=True)]
