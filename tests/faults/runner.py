"""Runs the program in forked processes, so that a start costs no imports.

Reads one JSON request per line: ``arguments`` of the program; ``ranks`` (processes that train
together, as torchrun would start them), ``machines`` (on which they seem to run); ``signals``, a
list of [when, signal, rank or null for all], where when is seconds since the last one or a text
that the program prints; ``environment``; ``patches``, names of functions of this file that
change the program before it starts. Answers the exit status of every rank, negative for a signal,
and the seconds from the last signal (or the first rank's end) to the end of the last rank.

What a run imports later (torch._dynamo alone takes over a second) is imported here, and left out
of the children's garbage collections, which would walk through all of it.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import itertools
import json
import os
import pkgutil
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch._dynamo
import torch.utils.flop_counter
from PIL import Image

import camoxpert
import camoxpert.data.samples.augment
import camoxpert.training.trainer
from camoxpert.cli import main
from camoxpert.runs import store
from camoxpert.training import prepare, session

torch.set_num_threads(1)
camoxpert.data.samples.augment.Operators()
for found in pkgutil.walk_packages(camoxpert.__path__, "camoxpert."):
    importlib.import_module(found.name)
Image.init()


def slow_saves() -> None:
    """Slow down every checkpoint write."""
    honest = os.fsync

    def slow(handle: int) -> None:
        time.sleep(0.03)
        honest(handle)

    store.os.fsync = slow


def before_steps(call: Callable[[int], object]) -> None:
    """Call ``call`` with the number of every optimizer step, from 1, before it is taken."""
    trainer = camoxpert.training.trainer
    honest = trainer.train_step
    numbers = itertools.count(1)

    def step(*arguments, **options):
        call(next(numbers))
        return honest(*arguments, **options)

    trainer.train_step = step


def slow_steps() -> None:
    """Make steps take long enough to be interrupted, and print each one."""

    def wait_a_little(number: int) -> None:
        print(f"[step {number}]", flush=True)
        time.sleep(0.05)

    before_steps(wait_a_little)


def three_seconds_a_step() -> None:
    """Make steps take long enough to be interrupted twice."""

    def wait_long(number: int) -> None:
        print(f"[step {number}]", flush=True)
        ends = time.monotonic() + 3 * (number > 1)
        while time.monotonic() < ends:
            time.sleep(0.1)

    before_steps(wait_long)


def clock_of_steps() -> None:
    """Give the deadline a clock that ticks once per step."""
    from camoxpert.stop import Stop

    steps: list[int] = []
    before_steps(steps.append)
    start = Stop.__init__
    Stop.__init__ = lambda stop, hours=None: start(stop, hours, lambda: len(steps))


def a_worker_dies() -> None:
    """Kill a data worker, as the kernel does when memory is short, in the second step."""
    kill_workers({2})


def workers_die_again_and_again() -> None:
    """Kill the data workers before every step but the first."""
    kill_workers(set(range(2, 1000)))


def kill_workers(when: set[int]) -> None:
    """Kill the data workers before each of these steps."""
    import multiprocessing

    from camoxpert.data import supervise

    supervise.POLL_SECONDS = 1.0

    def kill(number: int) -> None:
        if number in when:
            for worker in multiprocessing.active_children():
                os.kill(worker.pid, signal.SIGKILL)

    before_steps(kill)


def small_disk() -> None:
    """Limit files to 300 KB: less than a checkpoint, more than anything else."""
    import resource

    resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))


def folder_vanishes() -> None:
    """Delete the run's folder in the middle of the run."""
    import shutil

    honest = session.train
    folders: list[Path] = []

    def train(run):
        folders.append(run.path)
        return honest(run)

    session.train = train
    before_steps(lambda number: shutil.rmtree(folders[0]) if number == 4 else None)


def folder_becomes_read_only() -> None:
    """Let renames fail as in a folder without write permission, which root would not notice."""
    honest = Path.replace

    def refused(path, target):
        if str(target).endswith(".pt"):
            raise PermissionError(13, "Permission denied", str(target))
        return honest(path, target)

    Path.replace = refused


def rank_1_fails() -> None:
    """Raise an error on rank 1 alone, in its second step."""

    def fail(number: int) -> None:
        if os.environ.get("RANK") == "1" and number == 2:
            raise RuntimeError("a fault of rank 1 alone")

    before_steps(fail)


def rank_1_hangs() -> None:
    """Let rank 1 stop answering in its second step."""

    def hang(number: int) -> None:
        if os.environ.get("RANK") == "1" and number == 2:
            time.sleep(60)

    before_steps(hang)


def rank_1_sees_nan() -> None:
    """Give rank 1 a NaN loss in its second step."""
    honest = prepare.total_loss
    calls = []

    def broken(*arguments, **options):
        loss, parts = honest(*arguments, **options)
        calls.append(1)
        if os.environ.get("RANK") == "1" and len(calls) == 2:
            loss = loss * float("nan")
        return loss, parts

    prepare.total_loss = broken


def slow_validation() -> None:
    """Make scoring an image take long enough to be interrupted."""
    from camoxpert.inference import score as validation

    honest = validation.probability_maps

    def slow(*arguments, **options):
        print("[scoring]", flush=True)
        time.sleep(0.2)
        return honest(*arguments, **options)

    validation.probability_maps = slow


def slow_start() -> None:
    """Make building the model take long enough to be interrupted."""
    honest = prepare.build_model

    def slow(*arguments, **options):
        time.sleep(0.5)
        return honest(*arguments, **options)

    prepare.build_model = slow


def slow_decoding() -> None:
    """Make building a cache take long enough to be interrupted."""
    from camoxpert.data.cache import build as cache

    honest = cache.decode_pair

    def slow(*arguments, **options):
        print("[decoding]", flush=True)
        time.sleep(0.15)
        return honest(*arguments, **options)

    cache.decode_pair = slow
    cache.usable_cores = lambda: 1


def child(request: dict, environment: dict[str, str]) -> None:
    """Run the program in this process; never return."""
    log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.setsid()
    os.environ.update(environment)
    for name in request.get("patches", ()):
        globals()[name]()
    code = 1
    try:
        code = main(request["arguments"])
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def wait(when: float | str, log: str) -> None:
    """Wait for some seconds, or until the program has printed a text."""
    if not isinstance(when, str):
        time.sleep(when)
        return
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        with contextlib.suppress(FileNotFoundError):
            if when in Path(log).read_text(errors="replace"):
                return
        time.sleep(0.01)


def free_port() -> int:
    """Return an unused port."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def ranks_of(count: int, machines: int) -> list[dict[str, str]]:
    """Return the variables torchrun sets for every process, on one or more machines."""
    if count == 1:
        return [{}]
    local = count // machines
    shared = {
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(local),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
    }
    return [{**shared, "RANK": str(rank), "LOCAL_RANK": str(rank % local)} for rank in range(count)]


gc.collect()
gc.freeze()
for line in sys.stdin:
    wanted = json.loads(line)
    pids = []
    for environment in ranks_of(wanted.get("ranks", 1), wanted.get("machines", 1)):
        pid = os.fork()
        if pid == 0:
            child(wanted, environment | wanted.get("environment", {}))
        pids.append(pid)
    for when, number, rank in wanted.get("signals", ()):
        wait(when, wanted["log"])
        for index, pid in enumerate(pids):
            if rank in (None, index):
                with contextlib.suppress(ProcessLookupError):
                    # A kill goes to the whole process group, data workers included.
                    group = number == signal.SIGKILL or wanted.get("whole_group")
                    (os.killpg if group else os.kill)(pid, number)
    started = time.monotonic() if wanted.get("signals") else None
    statuses = {}
    for _ in pids:
        pid, status = os.wait()
        statuses[pid] = os.waitstatus_to_exitcode(status)
        started = started or time.monotonic()
    answer = {"codes": [statuses[pid] for pid in pids], "seconds": time.monotonic() - started}
    print(json.dumps(answer), flush=True)
