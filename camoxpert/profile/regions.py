"""Where a step's time goes, by component, and what bounds it, found out by intervention.

The timer knows nothing of the trainer: it is told which modules and functions are which component.
Times
are exclusive: what a part of a component is charged with is taken off the component, so that the
rows of a table add up to the wall time of the step.
"""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

OTHER = "other"


@dataclass
class _Region:
    name: str
    started: float
    first: Any = None
    last: Any = None
    inner_seconds: float = 0.0
    inner: list[_Region] = field(default_factory=list)


class ComponentTimer:
    """Charges time to components, on the host and, on a CUDA device, on its own clock.

    Args:
        device: where the work happens. On the host a component takes as long as it needs to be
            queued; on a CUDA device events on the stream say how long it really took.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.host: dict[str, list[float]] = defaultdict(list)
        self.on_device: dict[str, list[float]] = defaultdict(list)
        self._stack: list[_Region] = []
        self._step: dict[str, float] = {}
        self._handles: list[Any] = []
        self.regions = 0

    @property
    def active(self) -> bool:
        """Whether a step is being timed."""
        return bool(self._stack)

    def enter(self, name: str) -> None:
        """Begin a component."""
        if not self._stack and name != OTHER:
            return
        self.regions += 1
        region = _Region(name, time.perf_counter())
        if self.device.type == "cuda":
            region.first = torch.cuda.Event(enable_timing=True)
            region.first.record()
        self._stack.append(region)

    def leave(self) -> None:
        """End the component begun last."""
        if not self._stack:
            return
        region = self._stack.pop()
        if region.first is not None:
            region.last = torch.cuda.Event(enable_timing=True)
            region.last.record()
        seconds = time.perf_counter() - region.started
        self._step[region.name] = self._step.get(region.name, 0.0) + seconds - region.inner_seconds
        if self._stack:
            self._stack[-1].inner_seconds += seconds
            self._stack[-1].inner.append(region)
        elif region.first is not None:
            self._read_device(region)

    @contextmanager
    def region(self, name: str) -> Iterator[None]:
        """Charge the block to a component."""
        self.enter(name)
        try:
            yield
        finally:
            self.leave()

    @contextmanager
    def step(self) -> Iterator[None]:
        """Time one whole step; what no component claims is charged to ``other``."""
        self._step = {}
        with self.region(OTHER):
            yield
        for name, seconds in self._step.items():
            self.host[name].append(seconds)

    def wrap(self, function: Callable[..., Any], name: str) -> Callable[..., Any]:
        """Return the function, charged to a component."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.region(name):
                return function(*args, **kwargs)

        return timed

    def watch(self, module: nn.Module, name: str) -> None:
        """Charge a module's forward pass to a component, until ``close``."""

        def before(module: nn.Module, inputs: Any) -> None:
            self.enter(name)

        def after(module: nn.Module, inputs: Any, outputs: Any) -> None:
            self.leave()

        self._handles.append(module.register_forward_pre_hook(before))
        self._handles.append(module.register_forward_hook(after, always_call=True))

    def close(self) -> None:
        """Remove all hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def table(self, *, device: bool = False) -> dict[str, float]:
        """Return component -> mean seconds per step; the values add up to the mean step."""
        source = self.on_device if device else self.host
        steps = max((len(values) for values in source.values()), default=0)
        return {name: sum(values) / steps for name, values in source.items()}

    def _read_device(self, root: _Region) -> None:
        torch.cuda.synchronize(self.device)
        totals: dict[str, float] = defaultdict(float)

        def walk(region: _Region) -> float:
            seconds: float = region.first.elapsed_time(region.last) / 1e3
            totals[region.name] += seconds - sum(walk(inner) for inner in region.inner)
            return seconds

        walk(root)
        for name, seconds in totals.items():
            self.on_device[name].append(seconds)


@dataclass(frozen=True)
class Workload:
    """A training step that can be intervened in.

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
    """What bounds a step, and the times that say so.

    Attributes:
        verdict: data, launch, sync, compute or memory.
        seconds: median of the step as it is.
        without_data: the same with a batch that is already there.
        doubled: the same with twice the images.
        evidence: one sentence with the numbers.
    """

    verdict: str
    seconds: float
    without_data: float
    doubled: float
    evidence: str


DATA_SHARE, FLAT_GROWTH, MANY_SYNCS, GOOD_USE = 0.15, 1.35, 3, 0.35


def diagnose(
    workload: Workload,
    *,
    rounds: int = 5,
    syncs: int = 0,
    utilisation: float | None = None,
) -> Diagnosis:
    """Find out what bounds a step by changing one thing at a time; the variants take turns.

    A batch that is already there takes the data path away; twice the images double the work of the
    device and leave the number of launches as it is.

    Args:
        workload: the step.
        rounds: of the three variants.
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
        evidence = f"with its batch at hand the step takes {without / seconds:.0%} of its time"
    elif growth < FLAT_GROWTH:
        verdict = "sync" if syncs >= MANY_SYNCS else "launch"
        evidence = f"twice the images take {growth:.2f} times as long"
        evidence += f", with {syncs} host syncs in a step" if verdict == "sync" else ""
    else:
        verdict = "memory" if utilisation is not None and utilisation < GOOD_USE else "compute"
        evidence = f"twice the images take {growth:.2f} times as long"
        if utilisation is not None:
            evidence += f" and the arithmetic peak is used to {utilisation:.0%}"
    return Diagnosis(verdict, seconds, without, doubled, evidence)


def advice(
    diagnosis: Diagnosis,
    table: dict[str, float],
    *,
    batch_size: int,
    num_workers: int,
    accelerator: bool,
) -> list[tuple[float, str]]:
    """Return (expected gain in throughput, what to do), the largest gain first.

    Gains come from the interventions and from the table's shares; they are what the change can
    bring at most.

    Args:
        diagnosis: of the step.
        table: seconds per component.
        batch_size, num_workers: in use.
        accelerator: the work happens on a device of its own.
    """
    total = sum(table.values()) or 1.0
    found = []
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
        ("copy", 0.03, "data.pin_memory=true: copies run beside the computation"),
    ):
        share = table.get(name, 0.0) / total
        if share > threshold and (accelerator or name != "copy"):
            found.append((1 / (1 - share), text))
    return sorted(found, reverse=True)


def text_rows(table: dict[str, float], order: Sequence[str]) -> list[str]:
    """Lay a table out: component, milliseconds, share; in the given order, the unknown last."""
    total = sum(table.values()) or 1.0
    names = [name for name in order if name in table] + [n for n in table if n not in order]
    width = max((len(name) for name in names), default=0)
    lines = [
        f"{name:<{width}}  {1e3 * table[name]:9.2f} ms  {table[name] / total:6.1%}"
        for name in names
    ]
    return [*lines, f"{'step':<{width}}  {1e3 * total:9.2f} ms"]
