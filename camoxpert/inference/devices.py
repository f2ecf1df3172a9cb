"""The engine on several devices of this machine: a process for each, chunks handed out on demand.

Each process loads the model once. It has two chunks at a time, so that it reads the second during
the forward pass of the first, and gets the next one when it hands back rows: a slow device does
less. The parent alone writes the ledger. When a process dies its chunks are done by others; a chunk
that was there at two deaths is cut in halves, each of which is then done alone, until the one image
that kills is known.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import queue
import signal
import threading
import time
import traceback
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

import torch

from camoxpert import console, stop
from camoxpert.errors import CamoXpertError, ConfigError, PeerError, Stopped
from camoxpert.inference.engine import Chunk, ChunkResult, Spec
from camoxpert.inference.local import Chunks, device_facts, find_batch_size, run_chunks
from camoxpert.inference.timing import Timing
from camoxpert.runtime.host import usable_cores

AT_ONCE = 2
"""Chunks that a process has at a time."""
FATAL_DEATHS = 2
"""Deaths of a process with a chunk after which the chunk is cut, or its only item given up."""
MOST_DEATHS = 20
"""Deaths in a row, without a chunk done between them, after which the run gives up."""
LOAD_DEATHS = 2
"""Deaths of the processes of a device before they were ready, after which it is left out."""
GRACE_SECONDS = 10.0
POLL_SECONDS = 0.5


def choose_devices(text: str) -> tuple[str, ...]:
    """Return the devices that ``--devices`` names; empty for ``auto``: this process does the work.

    Args:
        text: auto, all, or a list with commas: numbers of CUDA devices, names of devices. A name
            twice means two processes.

    Raises:
        ConfigError: a device that does not exist.
    """
    if text == "auto":
        return ()
    number = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if text == "all":
        return tuple(f"cuda:{index}" for index in range(number)) or ("cpu",)
    names = []
    for word in text.split(","):
        name = f"cuda:{word.strip()}" if word.strip().isdigit() else word.strip()
        index = name.removeprefix("cuda:")
        if name not in ("cpu", "mps") and not (index.isdigit() and name != index):
            raise ConfigError(
                f"--devices {text}: {word!r} is not a device. Use auto, all, numbers of CUDA "
                "devices (0,1) or cpu; cpu,cpu for two processes."
            )
        if name.startswith("cuda:") and int(index) >= number:
            raise ConfigError(
                f"--devices {text}: there is no CUDA device {index}; "
                + (f"this machine has 0 to {number - 1}." if number else "torch finds none here.")
            )
        names.append(name)
    return tuple(names)


@dataclass
class _Task:
    """A chunk on its way through the processes.

    Attributes:
        chunk: the chunk.
        deaths: processes that died with it.
        parts: rows by position in the original chunk, where it was cut; shared by its parts.
        start: position of its first item in the original chunk.
        total: items of the original chunk.
    """

    chunk: Chunk
    deaths: int = 0
    start: int = 0
    parts: dict[int, dict[str, Any]] = field(default_factory=dict)
    total: int = 0

    @property
    def suspect(self) -> bool:
        """Whether it is done alone, so that a death has one cause."""
        return self.deaths > 0


@dataclass
class _Worker:
    """A process as its parent sees it."""

    name: str
    device: str
    process: BaseProcess
    connection: Connection
    tasks: dict[int, _Task] = field(default_factory=dict)
    ready: dict[str, Any] | None = None
    ended: bool = False


class DeviceEngine:
    """A process per device; see the module.

    Args:
        spec: builds the stages in each process.
        devices: names, one for each process.
        batch_size: inputs of a forward pass; None chooses: the least of all devices' choices.
    """

    def __init__(self, spec: Spec, devices: Sequence[str], *, batch_size: int | None) -> None:
        self.spec = spec
        self.batch_size = batch_size
        counts = {name: 0 for name in devices}
        self._places: list[tuple[str, str]] = []
        for name in devices:
            number = counts[name] = counts[name] + 1
            label = name if list(devices).count(name) == 1 else f"{name}#{number}"
            self._places.append((label, name))
        self._cores = max(1, usable_cores() // max(1, list(devices).count("cpu")))
        self._workers: list[_Worker] = []
        self._waiting: deque[_Task] = deque()
        self._load_deaths: dict[str, int] = {}
        self._loads: list[float] = []
        self._ready: dict[str, dict[str, Any]] = {}
        self._summaries: list[dict[str, Any]] = []
        self._number = 0
        self._deaths = self._deaths_in_a_row = 0
        self._wall = 0.0

    def results(self, items: Sequence[Any]) -> Iterator[ChunkResult]:
        """Yield the rows of all items, a chunk at a time, as chunks get done.

        Raises:
            CamoXpertError: that ended a process, such as outputs that cannot be written.
            PeerError: processes die without getting anything done.
            Stopped: the command was asked to stop.
        """
        started = time.monotonic()
        try:
            self._workers = [self._spawn(*place) for place in self._places]
            size = self._wait_until_ready()
            chunks = Chunks(items, size)
            while True:
                self._hand_out(chunks)
                under_way = any(worker.tasks for worker in self._workers)
                if not under_way and not self._waiting and not chunks.left:
                    break
                yield from self._receive()
            self._end()
        finally:
            with stop.current().deferred():
                self._shut_down()
            self._wall = time.monotonic() - started

    def summary(self) -> dict[str, Any]:
        """Return where the time went, as plain values."""
        return {
            "engine": "devices",
            "wall_seconds": self._wall,
            "model_loads": len(self._loads),
            "load_seconds": self._loads,
            "deaths": self._deaths,
            "workers": self._summaries,
        }

    def _spawn(self, name: str, device: str) -> _Worker:
        context = multiprocessing.get_context("spawn")
        here, there = context.Pipe()
        process = context.Process(
            target=_work,
            args=(there, self.spec, device, name, self.batch_size, self._cores),
            name=f"camoxpert {name}",
            daemon=True,
        )
        process.start()
        # Only the child holds its end now: its death ends the connection.
        there.close()
        return _Worker(name, device, process, here)

    def _wait_until_ready(self) -> int:
        """Return the batch size, once every device has its process or was left out."""
        while any(worker.ready is None for worker in self._workers):
            for _ in self._receive():
                raise AssertionError("Rows before any chunk.")
        sizes = [worker.ready["batch_size"] for worker in self._workers if worker.ready]
        return min(sizes)

    def _hand_out(self, chunks: Chunks) -> None:
        """Give every process as much as it may have."""
        for worker in self._workers:
            while worker.ready is not None and self._may_have_more(worker):
                task = self._next_task(chunks, idle=not worker.tasks)
                if task is None:
                    break
                self._number += 1
                worker.tasks[self._number] = task
                chunk = Chunk(self._number, task.chunk.items)
                try:
                    worker.connection.send(("chunk", chunk))
                except OSError:
                    # It just died: its end is noticed next.
                    return

    def _may_have_more(self, worker: _Worker) -> bool:
        alone = any(task.suspect for task in worker.tasks.values())
        return not alone and len(worker.tasks) < AT_ONCE

    def _next_task(self, chunks: Chunks, *, idle: bool) -> _Task | None:
        """Return the next task: a suspect one only for a process that has nothing else."""
        if self._waiting:
            if not idle and self._waiting[0].suspect:
                return None
            return self._waiting.popleft()
        chunk = chunks.take()
        return None if chunk is None else _Task(chunk, total=len(chunk.items))

    def _receive(self) -> Iterator[ChunkResult]:
        """Wait for messages and deaths; yield the chunks that they complete."""
        connections = {worker.connection: worker for worker in self._workers if not worker.ended}
        stop.check()
        for connection in wait(list(connections), POLL_SECONDS):
            worker = connections[connection]  # type: ignore[index]
            try:
                kind, content = worker.connection.recv()
            except (EOFError, OSError, pickle.UnpicklingError):
                yield from self._bury(worker)
                continue
            if kind == "ready":
                worker.ready = content
                self._loads.append(content["load_seconds"])
                self._load_deaths[worker.name] = 0
            elif kind == "rows":
                self._deaths_in_a_row = 0
                yield from self._done(worker, content)
            elif kind == "end":
                worker.ended = True
                self._summaries.append(content)
            elif kind == "warning":
                console.warn(f"{worker.name}: {content}")
            elif kind == "error":
                raise content
            else:
                console.warn(f"{worker.name} failed: {content}")

    def _done(self, worker: _Worker, result: ChunkResult) -> Iterator[ChunkResult]:
        task = worker.tasks.pop(result.number)
        for position, row in enumerate(result.rows):
            task.parts[task.start + position] = row
        yield from self._completed(task, worker.name)

    def _completed(self, task: _Task, worker: str) -> Iterator[ChunkResult]:
        """Yield the original chunk of a task if all its rows are there."""
        if len(task.parts) == task.total:
            rows = [task.parts[position] for position in range(task.total)]
            yield ChunkResult(task.chunk.number, rows, worker)

    def _bury(self, worker: _Worker) -> Iterator[ChunkResult]:
        """Note the death of a process: its tasks go back, and another takes its place."""
        worker.process.join(GRACE_SECONDS)
        worker.connection.close()
        self._workers.remove(worker)
        if worker.ended:
            return
        cause = describe_exit(worker.process.exitcode)
        self._deaths += 1
        self._deaths_in_a_row += 1
        if worker.ready is None:
            self._count_load_death(worker, cause)
            if self._load_deaths[worker.name] >= LOAD_DEATHS:
                return
        elif self._deaths_in_a_row >= MOST_DEATHS:
            raise PeerError(
                f"{self._deaths_in_a_row} worker processes ended one after the other without "
                f"getting anything done; the last one, on {worker.name}: {cause}. What is done is "
                "written; the same command continues."
            )
        else:
            images = sum(len(task.chunk.items) for task in worker.tasks.values())
            console.warn(
                f"the worker process on {worker.name} ended: {cause}. Its {images} images are "
                "given to another"
            )
        for task in worker.tasks.values():
            task.deaths += 1
            yield from self._put_back(task, cause)
        self._workers.append(self._spawn(worker.name, worker.device))

    def _count_load_death(self, worker: _Worker, cause: str) -> None:
        self._load_deaths[worker.name] = self._load_deaths.get(worker.name, 0) + 1
        if self._load_deaths[worker.name] < LOAD_DEATHS:
            return
        if not self._workers:
            raise PeerError(
                f"The worker process on {worker.name} ended while it loaded the model: {cause}. "
                "What is done is written; the same command continues."
            )
        console.warn(
            f"the worker process on {worker.name} ended twice while it loaded the model ({cause}); "
            "the others go on without it"
        )

    def _put_back(self, task: _Task, cause: str) -> Iterator[ChunkResult]:
        """Queue a task again: whole, in halves, or not at all where its only item kills."""
        items = task.chunk.items
        if task.deaths < FATAL_DEATHS:
            self._waiting.append(task)
        elif len(items) == 1:
            reason = f"the worker process ends whenever it gets it: {cause}"
            row = {"item": items[0].name, **self.spec.failed(items[0], reason), "worker": ""}
            task.parts[task.start] = row
            yield from self._completed(task, "")
        else:
            half = (len(items) + 1) // 2
            for start, part in ((0, items[:half]), (half, items[half:])):
                chunk = Chunk(task.chunk.number, part)
                self._waiting.append(
                    _Task(chunk, FATAL_DEATHS - 1, task.start + start, task.parts, task.total)
                )

    def _end(self) -> None:
        """Tell the processes that there is no more work; collect their figures."""
        for worker in self._workers:
            if worker.ready is None:
                # It took the place of one that died, and is not needed any more.
                worker.process.kill()
                worker.ended = True
                continue
            try:
                worker.connection.send(("end", None))
            except OSError:
                continue
        deadline = time.monotonic() + GRACE_SECONDS
        while any(not worker.ended for worker in self._workers) and time.monotonic() < deadline:
            connections = {w.connection: w for w in self._workers if not w.ended}
            for connection in wait(list(connections), POLL_SECONDS):
                worker = connections[connection]  # type: ignore[index]
                try:
                    kind, content = worker.connection.recv()
                except (EOFError, OSError):
                    worker.ended = True
                    continue
                if kind == "end":
                    worker.ended = True
                    self._summaries.append(content)

    def _shut_down(self) -> None:
        """Ask the processes to stop, and kill those that do not."""
        for worker in self._workers:
            if not worker.ended:
                try:
                    worker.connection.send(("stop", None))
                except OSError:
                    continue
        deadline = time.monotonic() + GRACE_SECONDS
        for worker in self._workers:
            worker.process.join(max(0.0, deadline - time.monotonic()))
            if worker.process.is_alive():
                worker.process.kill()
                worker.process.join()
            worker.connection.close()
        self._workers = []


def describe_exit(code: int | None) -> str:
    """Return how a process ended."""
    if code is None:
        return "it does not answer"
    if code >= 0:
        return f"exit code {code}"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = f"signal {-code}"
    hint = " (often: the machine ran out of memory)" if name == "SIGKILL" else ""
    return f"{name}{hint}"


class _Handed:
    """The chunks that the parent sends, as a source for the pipeline."""

    def __init__(self) -> None:
        self.queue: queue.SimpleQueue[Chunk | None] = queue.SimpleQueue()
        self._ended = False

    def take(self, *, wait: bool) -> Chunk | None:
        if self._ended:
            return None
        while True:
            # Signals reach a thread that waits in slices.
            stop.check()
            try:
                chunk = self.queue.get(timeout=POLL_SECONDS if wait else 0.0)
            except queue.Empty:
                if wait:
                    continue
                return None
            self._ended = chunk is None
            return chunk


class _Parent:
    """The child's end of the connection; threads may send."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self._lock = threading.Lock()

    def send(self, kind: str, content: Any) -> None:
        """Send a message; end the process if the parent is gone."""
        with self._lock:
            try:
                self.connection.send((kind, content))
            except OSError:
                os._exit(1)

    def listen(self, handed: _Handed) -> None:
        """Take the parent's messages, in a thread; end the process when the parent is gone."""
        while True:
            try:
                kind, content = self.connection.recv()
            except (EOFError, OSError):
                os._exit(1)
            if kind == "chunk":
                handed.queue.put(content)
            elif kind == "end":
                handed.queue.put(None)
            else:
                os.kill(os.getpid(), signal.SIGTERM)


def _work(
    connection: Connection,
    spec: Spec,
    device: str,
    name: str,
    batch_size: int | None,
    cores: int,
) -> None:
    """Be a worker process: load, then do chunks until there are no more."""
    console.set_silent(True)
    torch.set_num_threads(cores)
    parent, handed = _Parent(connection), _Handed()
    threading.Thread(target=parent.listen, args=(handed,), daemon=True).start()
    try:
        with stop.watch(), console.heard_by(lambda text: parent.send("warning", text)):
            _do_chunks(parent, spec, device, name, batch_size, handed)
    except Stopped:
        os._exit(0)
    except CamoXpertError as error:
        parent.send("error", error)
    except BaseException:
        # Not every exception can be pickled; the parent treats this as a death.
        parent.send("crash", traceback.format_exc(limit=-3))
        os._exit(1)


def _do_chunks(
    parent: _Parent,
    spec: Spec,
    device: str,
    name: str,
    batch_size: int | None,
    handed: _Handed,
) -> None:
    started = time.monotonic()
    stages = spec.build(device)
    loaded = time.monotonic() - started
    size, reason = find_batch_size(stages, batch_size)
    parent.send("ready", {"batch_size": size, "load_seconds": loaded})
    timing = Timing()
    for result in run_chunks(stages, handed, size, timing, name):
        parent.send("rows", result)
    timing.end()
    facts = device_facts(stages.device, size, reason)
    parent.send("end", {"worker": name, "load_seconds": loaded} | facts | timing.summary())
