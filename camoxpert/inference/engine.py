"""The inference engine: read, batch, compute on the device, finish, and hand back rows.

Items come in chunks, and a chunk is done when all of its items are: its rows are handed back at
once, so that a ledger holds whole chunks only and a stopped run repeats whole chunks, with the same
batches and the same bits. Items are read ahead in threads, results are finished (resized, encoded,
written) in other threads, and on CUDA the next batch is launched before the last one is fetched:
the device waits for neither. What happens to an item is in ``Stages``; who gets which chunk (this
process, a process per device, a cluster) is decided elsewhere.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Protocol

import torch
from torch import Tensor

from camoxpert import stop
from camoxpert.errors import DataError
from camoxpert.inference.batching import BatchSize
from camoxpert.inference.outputs import NOT_FINITE, Outputs, is_finite, on_host
from camoxpert.inference.timing import Timing

Row = dict[str, Any]
"""A row of the ledger: see ``ledger``."""

READERS = 2
"""Threads that read and decode beside the device."""
FINISHERS = 2
"""Threads that resize, encode and write beside the device."""
HELD_BYTES = 1_500_000_000
"""Bytes of samples that may wait in memory, of those being read and those being written each."""
FEWEST_AHEAD = 2
MOST_CHUNKS = 4
"""Chunks that may wait for their files while the next ones are computed."""


class Item(Protocol):
    """What the engine works on; pickled to worker processes."""

    @property
    def name(self) -> str:
        """Unique name of the item and of its outputs."""


class Sample(Protocol):
    """An item that was read."""

    @property
    def inputs(self) -> Sequence[Tensor]:
        """Tensors for the device, of one shape or several: the image, or its tiles."""

    @property
    def held_bytes(self) -> int:
        """Memory that the sample takes until it is finished."""

    @property
    def seconds(self) -> dict[str, float]:
        """Stage -> seconds of reading."""


class Stages(Protocol):
    """What is done with an item. ``read`` and ``finish`` are called from several threads.

    Attributes:
        device: of the forward pass.
        models: how many models were loaded to build it.
    """

    device: torch.device
    models: int

    def read(self, item: Any) -> Any:
        """Return the sample of an item.

        Raises:
            DataError: it cannot be read: a row says so, and the others go on.
        """

    def forward(self, inputs: Tensor, samples: Sequence[Any] = ()) -> Outputs:
        """Return the outputs for stacked inputs (B, ...), on the device, without sync.

        Args:
            inputs: of one shape.
            samples: the sample that each of them belongs to; empty: a batch to measure with.
        """

    def finish(self, item: Any, sample: Any, outputs: list[Any]) -> Row:
        """Write the outputs of an item and return the fields of its row.

        Args:
            item, sample: the item.
            outputs: of every input of the sample, in order, on the host: a tensor, a tuple of
                tensors, or a value of the list.

        Raises:
            DataError: they cannot be written: the run ends.
        """

    def failed(self, item: Any, reason: str) -> Row:
        """Return the fields of the row of an item that could not be read or computed."""

    def example(self) -> Tensor:
        """Return an input (1, ...) of the usual shape on the device, to measure with."""


class Spec(Protocol):
    """Builds the stages in whichever process works; pickled."""

    def build(self, device: str) -> Stages:
        """Load what is needed on a device.

        Args:
            device: as in ``--device``.
        """

    def failed(self, item: Any, reason: str) -> Row:
        """Return the fields of the row of an item that no process could do."""


@dataclass(frozen=True)
class Chunk:
    """Items that are done together.

    Attributes:
        number: of the chunk in this run.
        items: in order.
    """

    number: int
    items: tuple[Any, ...]


@dataclass(frozen=True)
class ChunkResult:
    """The rows of a chunk, in the order of its items."""

    number: int
    rows: list[Row]
    worker: str


class ChunkSource(Protocol):
    """Hands out chunks, when asked."""

    def take(self, *, wait: bool) -> Chunk | None:
        """Return the next chunk; None if there is none (``wait``: ever again; else: now)."""


@dataclass
class _Work:
    """A chunk on its way.

    Attributes:
        chunk: the chunk.
        rows: fields of its rows by position, as far as known.
        finishing: position -> the thread that finishes that item.
        unread: items that were not fetched yet.
        computing: items whose outputs are not complete.
    """

    chunk: Chunk
    rows: dict[int, Row] = field(default_factory=dict)
    finishing: dict[int, Future[Row]] = field(default_factory=dict)
    unread: int = 0
    computing: int = 0


@dataclass
class _Reading:
    work: _Work
    position: int
    item: Any
    future: Future[Any]


@dataclass
class _Computing:
    """A sample whose inputs are on their way through the device."""

    work: _Work
    position: int
    item: Any
    sample: Any
    outputs: list[Any]
    seconds: float = 0.0


@dataclass
class _Launched:
    """A batch on the device.

    Attributes:
        places: for each output the sample and the number of its input.
        outputs: on the host, once ``done`` has happened.
        started: host clock.
        begin, done: CUDA events, or None on other devices.
    """

    places: list[tuple[_Computing, int]]
    outputs: Outputs
    started: float
    begin: torch.cuda.Event | None = None
    done: torch.cuda.Event | None = None


class Pipeline:
    """Runs the chunks of a source through the stages, in this process.

    Iterate over ``results``; leaving the ``with`` block waits for the writing threads.

    Args:
        stages: what is done.
        source: hands out chunks.
        batch_size: inputs of a forward pass.
        timing: receives where the time goes.
        worker: name of this worker, for rows.
        most_chunks: that may wait for their files while the next ones are computed.
    """

    def __init__(
        self,
        stages: Stages,
        source: ChunkSource,
        *,
        batch_size: BatchSize,
        timing: Timing,
        worker: str,
        most_chunks: int = MOST_CHUNKS,
    ) -> None:
        self.stages = stages
        self.batch_size = batch_size
        self.timing = timing
        self.worker = worker
        self.most_chunks = most_chunks
        # A CPU that computes does not wait; a GPU is fed from two batches.
        self._batches_ahead = 2 if stages.device.type == "cuda" else 1
        self._source = source
        self._ended = False
        self._queue: deque[tuple[_Work, int, Any]] = deque()
        self._reading: deque[_Reading] = deque()
        self._works: deque[_Work] = deque()
        self._batches: dict[torch.Size, list[tuple[_Computing, int, Tensor]]] = {}
        self._launched: _Launched | None = None
        self._written: deque[tuple[Future[Row], int]] = deque()
        self._mean_bytes = 0.0
        self._readers = ThreadPoolExecutor(READERS, "read")
        self._finishers = ThreadPoolExecutor(FINISHERS, "finish")

    def __enter__(self) -> Pipeline:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        # A file that is being written is finished: its writer would otherwise outlive the lock.
        with stop.current().deferred():
            self._readers.shutdown(cancel_futures=True)
            self._finishers.shutdown(cancel_futures=True)

    @torch.inference_mode()
    def results(self) -> Iterator[ChunkResult]:
        """Yield the rows of every chunk, in the order of the source.

        Raises:
            DataError: outputs cannot be written.
            Stopped: the command was asked to stop.
        """
        while True:
            stop.check()
            self._read_ahead()
            if self._reading:
                self._take_sample(self._reading.popleft())
            elif self._launched is not None:
                self._fetch()
            elif not self._works:
                if self._ended:
                    return
                continue
            yield from self._finished(wait=not self._reading and not self._in_flight)

    @property
    def _in_flight(self) -> bool:
        return bool(self._batches) or self._launched is not None

    def _read_ahead(self) -> None:
        """Keep enough items being read; ask for more chunks where they run out."""
        window = self._batches_ahead * self.batch_size.value
        # How large the samples are is known with the first.
        fitting = int(HELD_BYTES / self._mean_bytes) if self._mean_bytes else 0
        window = min(window, max(FEWEST_AHEAD, fitting))
        while len(self._reading) < window:
            if not self._queue and not self._take_chunk():
                return
            work, position, item = self._queue.popleft()
            future = self._readers.submit(self.stages.read, item)
            self._reading.append(_Reading(work, position, item, future))

    def _take_chunk(self) -> bool:
        """Take the next chunk; wait for one only where nothing else is left to do."""
        if self._ended:
            return False
        idle = not self._reading and not self._works
        with self.timing.waiting("chunks"):
            chunk = self._source.take(wait=idle)
        if chunk is None:
            self._ended = idle
            return False
        work = _Work(chunk, unread=len(chunk.items))
        self._works.append(work)
        self._queue += [(work, position, item) for position, item in enumerate(chunk.items)]
        return True

    def _take_sample(self, reading: _Reading) -> None:
        """Wait for an item to be read and put its inputs into the batch."""
        work = reading.work
        with self.timing.waiting("read"):
            sample, reason = _result_of(reading.future)
        if sample is None:
            work.rows[reading.position] = self.stages.failed(reading.item, reason)
        work.unread -= 1
        if sample is not None:
            mean = self._mean_bytes or sample.held_bytes
            self._mean_bytes = mean + (sample.held_bytes - mean) / 8
            self.timing.add(sample.seconds)
            work.computing += 1
            computing = _Computing(
                work, reading.position, reading.item, sample, [None] * len(sample.inputs)
            )
            for number, tensor in enumerate(sample.inputs):
                batch = self._batches.setdefault(tensor.shape, [])
                batch.append((computing, number, tensor))
                if len(batch) >= self.batch_size.value:
                    self._launch(tensor.shape)
        # Batches do not cross chunks: a chunk that is repeated has the same batches.
        if not work.unread:
            for shape in list(self._batches):
                self._launch(shape)

    def _launch(self, shape: torch.Size) -> None:
        """Start the forward pass of a batch; on CUDA fetch the one before meanwhile."""
        launched = self._forward(self._batches.pop(shape))
        if launched is None:
            return
        if self._launched is not None:
            self._fetch()
        self._launched = launched
        if launched.done is None:
            self._fetch()

    def _forward(self, batch: list[tuple[_Computing, int, Tensor]]) -> _Launched | None:
        """Start a forward pass; after running out of memory repeat it in halves."""
        places = [(computing, number) for computing, number, _ in batch]
        try:
            return self._start([tensor for _, _, tensor in batch], places)
        except torch.OutOfMemoryError:
            pass
        # Outside the except block: the error's traceback would keep the memory.
        if self._launched is not None:
            self._fetch()
        torch.cuda.empty_cache()
        if len(batch) == 1:
            self._give_up(batch[0][0])
            return None
        self.batch_size.halve(len(batch))
        half = (len(batch) + 1) // 2
        for part in (batch[:half], batch[half:]):
            launched = self._forward(part)
            if launched is not None:
                self._launched = launched
                self._fetch()
        return None

    def _give_up(self, computing: _Computing) -> None:
        """Fail an item whose single input does not fit into the device's memory."""
        work = computing.work
        if computing.position not in work.rows:
            work.computing -= 1
            work.rows[computing.position] = self.stages.failed(
                computing.item, "it does not fit into the memory of the device by itself"
            )

    def _start(self, inputs: list[Tensor], places: list[tuple[_Computing, int]]) -> _Launched:
        device = self.stages.device
        stacked = torch.stack(inputs)
        samples = [computing.sample for computing, _ in places]
        started = time.monotonic()
        if device.type != "cuda":
            outputs = on_host(self.stages.forward(stacked.to(device), samples))
            self.batch_size.note_clean()
            return _Launched(places, outputs, started)
        begin, done = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        on_device = stacked.pin_memory().to(device, non_blocking=True)
        # Without a stream, that of the process's first device would be marked, which has no work.
        stream = torch.cuda.current_stream(device)
        begin.record(stream)
        outputs = on_host(self.stages.forward(on_device, samples))
        done.record(stream)
        self.batch_size.note_clean()
        return _Launched(places, outputs, started, begin, done)

    def _fetch(self) -> None:
        """Wait for the batch on the device and give its outputs to the finishing threads."""
        launched, self._launched = self._launched, None
        assert launched is not None
        with self.timing.waiting("forward"):
            if launched.done is not None and launched.begin is not None:
                launched.done.synchronize()
                seconds = launched.begin.elapsed_time(launched.done) / 1000
            else:
                seconds = time.monotonic() - launched.started
        each = seconds / len(launched.places)
        self.timing.add_batch(seconds, len(launched.places), on_host=launched.done is None)
        outputs = launched.outputs
        each_output = zip(*outputs, strict=True) if isinstance(outputs, tuple) else outputs
        for (computing, number), output in zip(launched.places, each_output, strict=True):
            computing.outputs[number] = output
            computing.seconds += each
            if all(found is not None for found in computing.outputs):
                self._submit(computing)

    def _submit(self, computing: _Computing) -> None:
        """Finish an item in a thread; wait where too much waits to be written already."""
        work = computing.work
        work.computing -= 1
        held = computing.sample.held_bytes
        with self.timing.waiting("write"):
            while self._written and self._written[0][0].done():
                self._written.popleft()
            while self._written and sum(n for _, n in self._written) + held > HELD_BYTES:
                self._written.popleft()[0].result()
        future = self._finishers.submit(self._finish, computing)
        work.finishing[computing.position] = future
        self._written.append((future, held))

    def _finish(self, computing: _Computing) -> Row:
        outputs = [found for found in computing.outputs if found is not None]
        if not all(is_finite(found) for found in outputs):
            return self.stages.failed(computing.item, NOT_FINITE)
        row = self.stages.finish(computing.item, computing.sample, outputs)
        self.timing.add(row["seconds"])
        row["seconds"] = computing.sample.seconds | {"forward": computing.seconds} | row["seconds"]
        return row

    def _finished(self, *, wait: bool) -> Iterator[ChunkResult]:
        """Yield the complete chunks at the front; ``wait`` for one if nothing else runs."""
        while self._works:
            work = self._works[0]
            if work.unread or work.computing:
                return
            done = all(future.done() for future in work.finishing.values())
            # With more chunks waiting for their files the device is the faster part.
            if not done and not wait and len(self._works) <= self.most_chunks:
                return
            with self.timing.waiting("write"):
                for position, future in work.finishing.items():
                    work.rows[position] = future.result()
            self._works.popleft()
            rows = []
            for position, item in enumerate(work.chunk.items):
                row = work.rows[position]
                rows.append({"item": item.name, **row, "worker": self.worker})
            self.timing.count(len(rows))
            yield ChunkResult(work.chunk.number, rows, self.worker)


def _result_of(reading: Future[Any]) -> tuple[Any, str]:
    """Return a sample, or None and the reason why there is none."""
    try:
        return reading.result(), ""
    except DataError as error:
        return None, str(error)
    except Exception as error:
        # One strange file in a million must not end the run, whatever its decoder raises.
        return None, f"it cannot be read: {type(error).__name__}: {error}"
