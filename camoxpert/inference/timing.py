"""Where the time of an inference run goes."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from camoxpert.runs.jobs import JobSummary, TimingFacts

WARM_UP = 2
"""Forward passes that count as warm-up: libraries choose algorithms and memory is allocated."""
WAITS = ("read", "forward", "write", "chunks")
KEPT = 100_000
"""Passes whose seconds are kept for the percentiles."""


class Timing:
    """Collects the seconds of one worker.

    The loop that feeds the device is always in one of a few places: waiting for an image to be
    read, at the forward pass, waiting for outputs to be written, waiting for work, or between
    them. Their shares add up to 1. Beside it stand the seconds of the threads: they overlap.
    """

    def __init__(self) -> None:
        self._started = time.monotonic()
        self._ended: float | None = None
        self.images = 0
        self.waits = dict.fromkeys(WAITS, 0.0)
        self.stages: dict[str, float] = {}
        self._passes: list[tuple[float, int]] = []
        self._first_steady: float | None = None
        self._inputs_then = 0
        self._inputs = 0
        self._lock = threading.Lock()

    @contextmanager
    def waiting(self, place: str) -> Iterator[None]:
        """Count the block as time at ``place``, one of WAITS."""
        started = time.monotonic()
        try:
            yield
        finally:
            self.waits[place] += time.monotonic() - started

    def add(self, seconds: Mapping[str, float]) -> None:
        """Add seconds of threads by stage."""
        with self._lock:
            for stage, value in seconds.items():
                self.stages[stage] = self.stages.get(stage, 0.0) + value

    def add_batch(self, seconds: float, inputs: int, *, on_host: bool) -> None:
        """Add a forward pass.

        Args:
            seconds: it took.
            inputs: of the pass.
            on_host: the loop computed it itself, rather than waiting for a device.
        """
        if on_host:
            self.waits["forward"] += seconds
        self.add({"forward": seconds})
        self._inputs += inputs
        if len(self._passes) < KEPT:
            self._passes.append((seconds, inputs))
        if len(self._passes) == WARM_UP:
            self._first_steady = time.monotonic()
            self._inputs_then = self._inputs

    def count(self, images: int) -> None:
        """Count finished images."""
        self.images += images

    def end(self) -> None:
        """Stop the clock."""
        self._ended = time.monotonic()

    def summary(self) -> TimingFacts:
        """Return the figures as plain values; seconds, and shares of the wall clock."""
        ended = self._ended or time.monotonic()
        wall = max(ended - self._started, 1e-9)
        loop = dict(self.waits)
        loop["other"] = max(0.0, wall - sum(loop.values()))
        each = sorted(seconds / inputs for seconds, inputs in self._passes[WARM_UP:])
        summary: TimingFacts = {
            "images": self.images,
            "wall_seconds": wall,
            "images_per_second": self.images / wall,
            "loop_seconds": loop,
            "loop_shares": {place: seconds / wall for place, seconds in loop.items()},
            "thread_seconds": dict(self.stages),
            # On CUDA from events on its stream.
            "device_busy_share": self.stages.get("forward", 0.0) / wall,
            "forward_passes": len(self._passes),
            "warm_up_seconds_per_input": [s / n for s, n in self._passes[:WARM_UP]],
        }
        if each:
            summary["forward_seconds_per_input"] = {
                "p50": each[len(each) // 2],
                "p95": each[min(len(each) - 1, int(0.95 * len(each)))],
            }
        if self._first_steady is not None and self._inputs > self._inputs_then:
            span = max(ended - self._first_steady, 1e-9)
            summary["steady_inputs_per_second"] = (self._inputs - self._inputs_then) / span
        return summary


PLACES = {
    "forward": "the model",
    "read": "waiting for images to be read",
    "write": "waiting for files to be written",
    "chunks": "waiting for work",
    "other": "the rest",
}


def describe(summary: JobSummary, places: Mapping[str, str] = PLACES) -> str:
    """Return a line for each worker: images per second and where its time went.

    Args:
        summary: of an engine.
        places: what the places of the loop are called.
    """
    wall = max(summary["wall_seconds"], 1e-9)
    workers = summary["workers"]
    images = sum(worker.get("images", 0) for worker in workers)
    lines = []
    if len(workers) > 1:
        loads = ", ".join(f"{seconds:.1f} s" for seconds in summary.get("load_seconds", ()))
        line = f"{images / wall:.1f} images/s in {wall:.1f} s"
        if summary["model_loads"]:
            line += f"; the model was loaded {summary['model_loads']} times ({loads})"
        lines.append(line)
    for worker in workers:
        if "loop_shares" not in worker:
            continue
        shares = ", ".join(
            f"{text} {worker['loop_shares'][place]:.0%}"
            for place, text in places.items()
            if worker["loop_shares"][place] >= 0.005
        )
        lines.append(
            f"{worker['worker']}: {worker['images']} images, "
            f"{worker['images_per_second']:.1f}/s with {worker['batch_size']} at a time; {shares}"
        )
    return "\n".join(lines)
