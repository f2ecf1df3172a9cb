"""The engine in this process, on one device."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator, Sequence
from typing import Any

import torch

from camoxpert.inference.batching import BatchSize, choose_batch_size
from camoxpert.inference.engine import Chunk, ChunkResult, ChunkSource, Pipeline, Stages
from camoxpert.inference.timing import Timing
from camoxpert.runs.jobs import CudaFacts, DeviceFacts, JobSummary, LoadFacts, WorkerSummary


class Chunks:
    """Cuts items into chunks as they are asked for.

    Args:
        items: all.
        size: items of a chunk.
    """

    def __init__(self, items: Sequence[Any], size: int) -> None:
        self._items, self._size = items, size
        self._next = self._number = 0

    @property
    def left(self) -> int:
        """Items that were not taken."""
        return max(0, len(self._items) - self._next)

    def take(self, *, wait: bool = True) -> Chunk | None:
        """Return the next chunk, or None after the last."""
        items = tuple(self._items[self._next : self._next + self._size])
        if not items:
            return None
        chunk = Chunk(self._number, items)
        self._next += len(items)
        self._number += 1
        return chunk


class LocalEngine:
    """Works in this process.

    Args:
        stages: what is done.
        batch_size: inputs of a forward pass; None chooses.
        load_seconds: the stages took to build.
    """

    def __init__(
        self, stages: Stages, *, batch_size: int | None, load_seconds: float = 0.0
    ) -> None:
        self.stages = stages
        self.batch_size = batch_size
        self.load_seconds = load_seconds
        self._workers: list[WorkerSummary] = []
        self._wall = 0.0

    def results(self, items: Sequence[Any]) -> Iterator[ChunkResult]:
        """Yield the rows of all items, a chunk at a time; see ``Pipeline``.

        Raises:
            DataError: outputs cannot be written.
            Stopped: the command was asked to stop.
        """
        started = time.monotonic()
        size, reason = find_batch_size(self.stages, self.batch_size)
        timing = Timing()
        name = str(self.stages.device)
        work = run_chunks(self.stages, Chunks(items, size), size, timing, name)
        try:
            yield from work
        finally:
            timing.end()
            self._wall = time.monotonic() - started
            facts = device_facts(self.stages.device, size, reason, load_seconds=self.load_seconds)
            self._workers = [{"worker": name, **facts, **timing.summary()}]

    def summary(self) -> JobSummary:
        """Return where the time went, as plain values."""
        return {
            "engine": "local",
            "wall_seconds": self._wall,
            "model_loads": self.stages.models,
            "workers": self._workers,
        }


def find_batch_size(stages: Stages, asked: int | None) -> tuple[int, str]:
    """Return the inputs of a forward pass and the reason."""
    if asked is not None:
        return asked, "as asked"
    return choose_batch_size(stages.forward, stages.example(), stages.device)


def run_chunks(
    stages: Stages, source: ChunkSource, size: int, timing: Timing, worker: str
) -> Generator[ChunkResult, None, None]:
    """Yield the results of all chunks of a source, from a pipeline of its own."""
    with Pipeline(
        stages, source, batch_size=BatchSize(size), timing=timing, worker=worker
    ) as pipeline:
        yield from pipeline.results()


def device_facts(
    device: torch.device, batch_size: int, reason: str, *, load_seconds: float | None = None
) -> DeviceFacts:
    """Return what a summary says of a worker's device."""
    loading: LoadFacts = {} if load_seconds is None else {"load_seconds": load_seconds}
    cuda: CudaFacts = {}
    if device.type == "cuda":
        cuda["device_name"] = torch.cuda.get_device_name(device)
        cuda["peak_memory_bytes"] = torch.cuda.max_memory_allocated(device)
    return {
        **loading,
        "device": str(device),
        "batch_size": batch_size,
        "batch_size_reason": reason,
        **cuda,
    }
