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
        drain: takes the batches that workers prepared ahead. Without it the data path looks as fast
            as its queue is full.
        burst: batches that arrive together, one from every worker.
    """

    fetch: Callable[[], Any]
    step: Callable[[Any], object]
    double: Callable[[Any], Any]
    wait: Callable[[], object] = lambda: None
    drain: Callable[[], object] = lambda: None
    burst: int = 1


@dataclass(frozen=True)
class Diagnosis:
    """What bounds a step, and the times behind the verdict.

    Attributes:
        verdict: data, launch, sync, compute or memory.
        seconds: mean time of the unchanged step, its wait for the data included.
        waiting: share of that time spent waiting for the data, 0..1.
        without_data: median time of a step on a preloaded batch.
        doubled: the same with twice the images.
        evidence: one sentence with the numbers.
        data_gain: factor in throughput if the data cost nothing.
    """

    verdict: str
    seconds: float
    waiting: float
    without_data: float
    doubled: float
    evidence: str
    data_gain: float = 1.0


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

    Unchanged steps are measured in pairs of fetch and step, one after another as in training, after
    the batches prepared ahead were taken. A preloaded batch removes the data path; twice the images
    double the work of the device and leave the number of launches as it is.

    Args:
        workload: the step.
        rounds: rounds of each variant.
        syncs: host syncs of a step.
        utilisation: share of the device's arithmetic peak that the step reaches; None if unknown.
    """
    kept = workload.fetch()
    twice = workload.double(kept)
    fetched: list[float] = []
    times: dict[str, list[float]] = {"as it is": [], "no data": [], "doubled": []}

    def timed(name: str, call: Callable[[], object]) -> None:
        started = time.perf_counter()
        call()
        workload.wait()
        times[name].append(time.perf_counter() - started)

    def pair() -> None:
        started = time.perf_counter()
        batch = workload.fetch()
        fetched.append(time.perf_counter() - started)
        workload.step(batch)

    workload.step(kept)
    workload.step(twice)
    workload.wait()
    for _ in range(rounds):
        workload.drain()
        # The queue refills during a step that is slower than the data.
        workload.step(workload.fetch())
        workload.wait()
        for _ in range(max(2, workload.burst)):
            timed("as it is", pair)
        timed("no data", lambda: workload.step(kept))
        timed("doubled", lambda: workload.step(twice))
    # Batches arrive in bursts, so that a median would miss the long waits between them.
    seconds = statistics.fmean(times["as it is"])
    waiting = statistics.fmean(fetched) / seconds
    stepping = statistics.median(
        whole - fetch for whole, fetch in zip(times["as it is"], fetched, strict=True)
    )
    without, doubled = statistics.median(times["no data"]), statistics.median(times["doubled"])
    growth = doubled / without
    if waiting > DATA_SHARE:
        verdict = "data"
        evidence = f"{waiting:.0%} of the time is spent waiting for a batch"
    elif 1 - without / stepping > DATA_SHARE:
        # On a CPU the workers take the cores from the step.
        verdict = "data"
        evidence = f"with preloaded data the step takes {without / stepping:.0%} as long"
    elif growth < FLAT_GROWTH:
        verdict = "sync" if syncs >= MANY_SYNCS else "launch"
        evidence = f"twice the images take {growth:.2f} times as long"
        evidence += f", with {syncs} host syncs in a step" if verdict == "sync" else ""
    else:
        verdict = "memory" if utilisation is not None and utilisation < GOOD_USE else "compute"
        evidence = f"twice the images take {growth:.2f} times as long"
        if utilisation is not None:
            evidence += f", at {utilisation:.0%} of the arithmetic peak"
    gain = (1 / (1 - min(waiting, 0.999))) * max(1.0, stepping / without)
    return Diagnosis(verdict, seconds, waiting, without, doubled, evidence, gain)


@dataclass(frozen=True)
class Conditions:
    """What the advice depends on.

    Attributes:
        batch_size, steps: images of a micro-batch, and micro-batches of an optimizer step.
        num_workers: data workers in use.
        cores: that the process may use.
        cached: whether decoded pairs are read from a cache.
        accelerator: whether the work happens on a device other than the CPU.
    """

    batch_size: int
    steps: int
    num_workers: int
    cores: int
    cached: bool
    accelerator: bool


def advice(
    diagnosis: Diagnosis, seconds: Mapping[str, float], conditions: Conditions
) -> list[Advice]:
    """Return what to change, the largest gain first.

    Gains come from the interventions and from the components' shares; they are upper bounds.

    Args:
        diagnosis: of the step.
        seconds: per component.
        conditions: how the step is taken.
    """
    total = sum(seconds.values()) or 1.0
    found: list[tuple[float, str]] = []
    data = diagnosis.data_gain
    if data > 1.03 and not conditions.cached:
        found.append((data, "--cache disk: files are decoded once, not in every epoch"))
    workers = min(max(1, 2 * conditions.num_workers), conditions.cores)
    if data > 1.03 and workers > conditions.num_workers:
        found.append((data, f"--num-workers {workers}: the step waits for its data"))
    doubled = 2 * diagnosis.without_data / diagnosis.doubled
    if doubled > 1.03:
        text = f"--batch-size {2 * conditions.batch_size}"
        if conditions.steps > 1:
            text += f" --accumulation-steps {-(-conditions.steps // 2)}: fewer launches a step"
        else:
            text += ": fewer launches an image, and a step of more images (adapt --lr)"
        found.append((doubled, text))
    for name, threshold, text in (
        ("EMA", 0.03, "--no-use-ema: no moving average of the weights"),
        ("backward: recomputed", 0.05, "--gradient-checkpointing off: nothing is computed twice"),
        ("copy", 0.03, "data.pin_memory=true: copies overlap with the computation"),
    ):
        share = seconds.get(name, 0.0) / total
        if share > threshold and (conditions.accelerator or name != "copy"):
            found.append((1 / (1 - share), text))
    found.sort(key=lambda item: -item[0])
    return [{"gain": gain, "text": text} for gain, text in found]
