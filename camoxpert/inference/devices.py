"""The engine on several devices of this machine: a process for each, chunks handed out on demand.

Each process loads the model once and gets its next chunk when it hands back rows: a slow device
does less. The parent alone writes the ledger. What becomes of the chunks of a process that dies is
decided in ``schedule``.
"""

from __future__ import annotations

import multiprocessing
import os
import queue
import signal
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, TypedDict

import torch

from camoxpert import console, stop
from camoxpert.errors import CamoXpertError, ConfigError, PeerError, Stopped
from camoxpert.inference.engine import Chunk, ChunkResult, Spec
from camoxpert.inference.local import device_facts, find_batch_size, run_chunks
from camoxpert.inference.schedule import AT_ONCE, Schedule
from camoxpert.inference.timing import Timing
from camoxpert.runs.jobs import JobSummary, WorkerSummary
from camoxpert.runtime.host import usable_cores

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


class _Ready(TypedDict):
    """What a process says when its model is loaded."""

    batch_size: int
    load_seconds: float
    models: int


@dataclass
class _Worker:
    """A process as its parent sees it."""

    name: str
    device: str
    process: BaseProcess
    connection: Connection
    ready: _Ready | None = None
    ended: bool = False


class DeviceEngine:
    """A process per device; see the module.

    Args:
        spec: builds the stages in each process.
        devices: names, one for each process.
        batch_size: inputs of a forward pass; None chooses: the least of all devices' choices.
        threads: of torch in each process; None: the cores, divided by the processes.
    """

    def __init__(
        self,
        spec: Spec,
        devices: Sequence[str],
        *,
        batch_size: int | None,
        threads: int | None = None,
    ) -> None:
        self.spec = spec
        self.batch_size = batch_size
        counts = {name: 0 for name in devices}
        self._places: list[tuple[str, str]] = []
        for name in devices:
            number = counts[name] = counts[name] + 1
            label = name if list(devices).count(name) == 1 else f"{name}#{number}"
            self._places.append((label, name))
        self._threads = threads or max(1, usable_cores() // max(1, len(devices)))
        self._workers: list[_Worker] = []
        self._load_deaths: dict[str, int] = {}
        self._loads: list[float] = []
        self._models = 0
        self._summaries: list[WorkerSummary] = []
        self._schedule: Schedule | None = None
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
            schedule = self._schedule = Schedule(self.spec, items, self._wait_until_ready())
            while not schedule.finished:
                self._hand_out(schedule)
                yield from self._receive()
            self._end()
        finally:
            with stop.current().deferred():
                self._shut_down()
            self._wall = time.monotonic() - started

    def summary(self) -> JobSummary:
        """Return where the time went, as plain values."""
        return {
            "engine": "devices",
            "wall_seconds": self._wall,
            "model_loads": self._models,
            "load_seconds": self._loads,
            "deaths": 0 if self._schedule is None else self._schedule.deaths,
            "workers": self._summaries,
        }

    def _spawn(self, name: str, device: str) -> _Worker:
        context = multiprocessing.get_context("spawn")
        here, there = context.Pipe()
        process = context.Process(
            target=_work,
            args=(there, self.spec, device, name, self.batch_size, self._threads),
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

    def _hand_out(self, schedule: Schedule) -> None:
        """Give every process a chunk, then as much as it may have: few chunks are shared out."""
        for most in (1, AT_ONCE):
            for worker in self._workers:
                while worker.ready is not None:
                    chunk = schedule.next_for(worker.name, workers=len(self._workers), most=most)
                    if chunk is None:
                        break
                    try:
                        worker.connection.send(("chunk", chunk))
                    except OSError:
                        # It just died: its end is noticed next.
                        return

    def _heard(self) -> list[_Worker]:
        """Return the processes that sent something or died; wait a moment for the first."""
        waiting = [worker for worker in self._workers if not worker.ended]
        ready = wait([worker.connection for worker in waiting], POLL_SECONDS)
        return [worker for worker in waiting if worker.connection in ready]

    def _receive(self) -> Iterator[ChunkResult]:
        """Wait for messages and deaths; yield the chunks that they complete."""
        stop.check()
        for worker in self._heard():
            try:
                kind, content = worker.connection.recv()
            except (EOFError, OSError):
                yield from self._bury(worker)
                continue
            if kind == "ready":
                worker.ready = content
                self._loads.append(content["load_seconds"])
                self._models += content["models"]
                self._load_deaths[worker.name] = 0
            elif kind == "rows":
                assert self._schedule is not None
                yield from self._schedule.done(worker.name, content)
            elif kind == "end":
                worker.ended = True
                self._summaries.append(content)
            elif kind == "warning":
                console.warn(f"{worker.name}: {content}")
            elif kind == "error":
                raise content
            else:
                console.warn(f"{worker.name} failed: {content}")

    def _bury(self, worker: _Worker) -> Iterator[ChunkResult]:
        """Note the death of a process: its tasks go back, and another takes its place."""
        worker.process.join(GRACE_SECONDS)
        worker.connection.close()
        self._workers.remove(worker)
        if worker.ended:
            return
        cause = describe_exit(worker.process.exitcode)
        if worker.ready is None:
            self._count_load_death(worker, cause)
            if self._load_deaths[worker.name] >= LOAD_DEATHS:
                return
        if self._schedule is not None:
            console.warn(
                f"the worker process on {worker.name} ended: {cause}. Its "
                f"{self._schedule.items_of(worker.name)} images are given to another"
            )
            yield from self._schedule.lost(worker.name, cause)
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
            for worker in self._heard():
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
    threads: int,
) -> None:
    """Be a worker process: load, then do chunks until there are no more."""
    console.set_silent(True)
    torch.set_num_threads(threads)
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
    ready: _Ready = {"batch_size": size, "load_seconds": loaded, "models": stages.models}
    parent.send("ready", ready)
    timing = Timing()
    for result in run_chunks(stages, handed, size, timing, name):
        parent.send("rows", result)
    timing.end()
    facts = device_facts(stages.device, size, reason, load_seconds=loaded)
    summary: WorkerSummary = {"worker": name, **facts, **timing.summary()}
    parent.send("end", summary)
