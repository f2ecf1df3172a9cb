"""The engine on a Ray cluster: an actor per device, paths in, rows out.

Pixels never go through Ray's object store: actors read and write the shared file system, and the
driver alone writes the ledger, which stays the truth about what is done. Ray's own retries and its
counting of failed tasks are not used: by default it fails a whole job at one exception, and when
told to tolerate errors it reports success with rows missing. What becomes of the chunks of an actor
that dies is decided in ``schedule``.

Ray waits for resources without a word and without a limit. Here a run without a row for
``SILENCE_SECONDS`` is an error that says what the cluster has and what was asked for.
"""

from __future__ import annotations

import importlib
import os
import re
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from camoxpert import console, stop
from camoxpert.errors import CamoXpertError, ConfigError, DataError, PeerError
from camoxpert.inference.engine import Chunk, ChunkResult, Spec
from camoxpert.inference.local import device_facts, find_batch_size, run_chunks
from camoxpert.inference.schedule import AT_ONCE, Schedule
from camoxpert.inference.timing import Timing
from camoxpert.runs.jobs import DeviceFacts, JobSummary, WorkerSummary

SILENCE_SECONDS = 120.0
POLL_SECONDS = 0.5
CPUS_BESIDE_A_GPU = 3
"""Cores that an actor with a GPU reserves for reading and writing."""
LOAD_DEATHS = 2
COLOUR = re.compile(r"\x1b\[[0-9;]*m")


class RayEngine:
    """An actor for each GPU of the cluster, or where there is none for each group of cores.

    Args:
        spec: builds the stages in each actor.
        address: of the cluster; ``local`` starts one on this machine.
        batch_size: inputs of a forward pass; None chooses.
        output: folder of the results, which every node must see.
        actors: how many; None: one per GPU, or one per two cores.
    """

    def __init__(
        self,
        spec: Spec,
        address: str,
        *,
        batch_size: int | None,
        output: Path,
        actors: int | None = None,
    ) -> None:
        self.spec, self.address = spec, address
        self.batch_size, self.output, self.actors = batch_size, output, actors
        self._ray = import_ray()
        self._schedule: Schedule | None = None
        self._loads: list[float] = []
        self._summaries: list[WorkerSummary] = []
        self._names: dict[Any, str] = {}
        self._load_deaths: dict[str, int] = {}
        self._needs: dict[str, float] = {}
        self._number = 0
        self._wall = 0.0

    def results(self, items: Sequence[Any]) -> Iterator[ChunkResult]:
        """Yield the rows of all items, a chunk at a time, as chunks get done.

        Raises:
            ConfigError: the cluster cannot be reached, or an actor never fits on it.
            CamoXpertError: that ended an actor, such as outputs that cannot be written.
            PeerError: actors die without getting anything done, or nothing happens.
            Stopped: the command was asked to stop.
        """
        started = time.monotonic()
        self._connect()
        token = self.output / f".shared-{uuid.uuid4().hex}"
        try:
            token.touch()
            yield from self._run(items, token)
        finally:
            token.unlink(missing_ok=True)
            with stop.current().deferred():
                self._ray.shutdown()
            self._wall = time.monotonic() - started

    def summary(self) -> JobSummary:
        """Return where the time went, as plain values."""
        return {
            "engine": "ray",
            "wall_seconds": self._wall,
            "model_loads": len(self._loads),
            "load_seconds": self._loads,
            "deaths": 0 if self._schedule is None else self._schedule.deaths,
            "workers": self._summaries,
        }

    def _connect(self) -> None:
        local = self.address == "local"
        try:
            self._ray.init(
                address="local" if local else self.address,
                include_dashboard=False if local else None,
                log_to_driver=False,
                configure_logging=False,
                ignore_reinit_error=True,
            )
        except Exception as error:
            raise ConfigError(
                f"--ray-address {self.address}: no Ray cluster answers there "
                f"({type(error).__name__}: {error}). `ray status` on its head node shows its "
                "address; local starts one on this machine."
            ) from error

    def _run(self, items: Sequence[Any], token: Path) -> Iterator[ChunkResult]:
        waiting: dict[Any, tuple[str, Any]] = {}
        for name in self._place():
            self._start(name, token, waiting)
        sizes: dict[Any, int] = {}
        total, heard = len(waiting), time.monotonic()
        while self._schedule is None or not self._schedule.finished:
            stop.check()
            if self._schedule is not None:
                for actor in sizes:
                    self._hand_out(actor, waiting)
            ready, _ = self._ray.wait(list(waiting), num_returns=1, timeout=POLL_SECONDS)
            if not ready and time.monotonic() - heard > SILENCE_SECONDS:
                raise PeerError(self._why_silent(len(sizes), total))
            for reference in ready:
                heard = time.monotonic()
                kind, actor = waiting.pop(reference)
                try:
                    answer = self._ray.get(reference)
                except self._ray.exceptions.RayError as error:
                    sizes.pop(actor, None)
                    yield from self._lost(actor, error, token, waiting)
                    continue
                if isinstance(answer, CamoXpertError):
                    raise answer
                if kind == "ready":
                    sizes[actor] = answer["batch_size"]
                    self._loads.append(answer["load_seconds"])
                    total = len(self._names)
                    if self._schedule is None:
                        # The first decides: waiting for all would wait for the slowest node.
                        self._schedule = Schedule(self.spec, items, answer["batch_size"])
                else:
                    assert self._schedule is not None
                    yield from self._schedule.done(self._names[actor], answer)
        self._collect(list(sizes))

    def _place(self) -> list[str]:
        """Return the names of the actors, after a look at what the cluster has.

        Raises:
            ConfigError: it has too little for a single one.
        """
        have = self._ray.cluster_resources()
        gpus, cpus = int(have.get("GPU", 0)), int(have.get("CPU", 0))
        if gpus:
            number = self.actors or gpus
            # Ray hangs without a word where an actor's cores are not there.
            self._needs = {"num_gpus": 1, "num_cpus": min(CPUS_BESIDE_A_GPU, max(1, cpus // gpus))}
        else:
            number = self.actors or max(1, cpus // 2)
            self._needs = {"num_gpus": 0, "num_cpus": max(1, cpus // number)}
        if number * self._needs["num_cpus"] > cpus or number * self._needs["num_gpus"] > gpus:
            raise ConfigError(
                f"The Ray cluster has {cpus} CPUs and {gpus} GPUs; {number} actors need "
                f"{number * self._needs['num_cpus']:g} CPUs and "
                f"{number * self._needs['num_gpus']:g} GPUs. Lower --ray-actors, or add nodes."
            )
        console.decide(
            "ray",
            f"{number} actors on {len([n for n in self._ray.nodes() if n['Alive']])} nodes, each "
            f"with {self._needs['num_cpus']} CPUs and {self._needs['num_gpus']} GPUs",
        )
        return [f"ray#{index + 1}" for index in range(number)]

    def _start(self, name: str, token: Path, waiting: dict[Any, tuple[str, Any]]) -> None:
        remote = self._ray.remote(
            max_restarts=0, max_task_retries=0, max_concurrency=AT_ONCE + 1, **self._needs
        )(_Actor)
        actor = remote.remote(
            self.spec, name, self.batch_size, str(token), bool(self._needs["num_gpus"])
        )
        self._names[actor] = name
        waiting[actor.ready.remote()] = ("ready", actor)

    def _hand_out(self, actor: Any, waiting: dict[Any, tuple[str, Any]]) -> None:
        assert self._schedule is not None
        name, number = self._names[actor], len(self._names)
        while (chunk := self._schedule.next_for(name, workers=number)) is not None:
            waiting[actor.do.remote(chunk)] = ("rows", actor)

    def _lost(
        self, actor: Any, error: Exception, token: Path, waiting: dict[Any, tuple[str, Any]]
    ) -> Iterator[ChunkResult]:
        """Note the death of an actor; another takes its place."""
        name = self._names.pop(actor, None)
        if name is None:
            # The second chunk of an actor whose death is known.
            return
        cause = last_line(str(error))
        if self._schedule is None or not self._schedule.items_of(name):
            self._load_deaths[name] = self._load_deaths.get(name, 0) + 1
            if self._load_deaths[name] >= LOAD_DEATHS:
                raise PeerError(f"The Ray actor {name} ended while it loaded the model: {cause}")
        if self._schedule is not None:
            console.warn(
                f"the Ray actor {name} ended ({cause}). Its {self._schedule.items_of(name)} images "
                "are given to another"
            )
            yield from self._schedule.lost(name, cause)
        self._start(name, token, waiting)

    def _collect(self, actors: Sequence[Any]) -> None:
        for actor in actors:
            try:
                self._summaries.append(self._ray.get(actor.summary.remote(), timeout=30))
            except self._ray.exceptions.RayError:
                continue

    def _why_silent(self, ready: int, total: int) -> str:
        free = self._ray.available_resources()
        needs = f"{self._needs['num_cpus']} CPUs and {self._needs['num_gpus']} GPUs"
        return (
            f"No row for {SILENCE_SECONDS:.0f} s: {ready} of {total} Ray actors are ready, each "
            f"needs {needs}; the cluster has {free.get('CPU', 0):g} CPUs and "
            f"{free.get('GPU', 0):g} GPUs free. Lower --ray-actors, or look at `ray status`. What "
            "is done is written; the same command continues."
        )


def last_line(text: str) -> str:
    """Return what a traceback of Ray ends with, without its colours."""
    lines = [line.strip() for line in COLOUR.sub("", text).splitlines() if line.strip()]
    return lines[-1][:300] if lines else "no reason given"


def import_ray() -> Any:
    """Return the module ``ray``.

    Raises:
        ConfigError: it is not installed.
    """
    # It would send usage statistics home otherwise.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        return importlib.import_module("ray")
    except ImportError as error:
        raise ConfigError(
            '--engine ray needs Ray, which is not installed: pip install "camoxpert[ray]".'
        ) from error


class _Actor:
    """A worker in a Ray process; its methods run in threads, two chunks at a time."""

    def __init__(
        self, spec: Spec, name: str, batch_size: int | None, token: str, gpu: bool
    ) -> None:
        self._arguments = spec, name, batch_size, token, gpu
        self._results: dict[int, ChunkResult] = {}
        self._error: Exception | None = None
        self._changed = threading.Condition()
        self._queue: list[Chunk] = []
        self._ready: dict[str, float] | None = None
        self._timing = Timing()
        self._facts: DeviceFacts | None = None
        threading.Thread(target=self._work, daemon=True).start()

    def ready(self) -> Any:
        """Wait until the model is loaded; return its batch size, or the error."""
        with self._changed:
            while self._ready is None and self._error is None:
                self._changed.wait()
        return self._answer(self._ready)

    def do(self, chunk: Chunk) -> Any:
        """Return the rows of a chunk, or the error that ended the work."""
        with self._changed:
            self._queue.append(chunk)
            self._changed.notify_all()
            while chunk.number not in self._results and self._error is None:
                self._changed.wait()
            return self._answer(self._results.pop(chunk.number, None))

    def summary(self) -> WorkerSummary:
        """Return where the time went."""
        self._timing.end()
        assert self._facts is not None
        return {"worker": self._arguments[1], **self._facts, **self._timing.summary()}

    def _answer(self, value: Any) -> Any:
        if value is not None:
            return value
        if isinstance(self._error, CamoXpertError):
            return self._error
        assert self._error is not None
        raise self._error

    def take(self, *, wait: bool) -> Chunk | None:
        """Hand the next chunk to the pipeline."""
        with self._changed:
            while wait and not self._queue:
                self._changed.wait()
            return self._queue.pop(0) if self._queue else None

    def _work(self) -> None:
        try:
            self._load_and_run()
        except Exception as error:
            with self._changed:
                self._error = error
                self._changed.notify_all()

    def _load_and_run(self) -> None:
        spec, name, batch_size, token, gpu = self._arguments
        if not Path(token).exists():
            raise DataError(
                f"{Path(token).parent} is not there on the node of {name}: with --engine ray the "
                "photos, the model and -o must be in folders that all nodes share."
            )
        started = time.monotonic()
        stages = spec.build("cuda" if gpu else "cpu")
        loaded = time.monotonic() - started
        size, reason = find_batch_size(stages, batch_size)
        self._facts = device_facts(stages.device, size, reason, load_seconds=loaded)
        self._timing = Timing()
        with self._changed:
            self._ready = {"batch_size": size, "load_seconds": loaded}
            self._changed.notify_all()
        for result in run_chunks(stages, self, size, self._timing, name):
            with self._changed:
                self._results[result.number] = result
                self._changed.notify_all()
