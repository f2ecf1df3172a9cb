"""Starts runs in forked processes, so that a start costs no new import of torch.

Reads a JSON list of requests: ``arguments`` of the program, ``ranks`` that train together, ``log``
for what is printed, ``stop_after``: a metrics.jsonl; once it tells of a training step, SIGTERM goes
to all ranks. Answers the list of exit statuses of each request.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import pkgutil
import signal
import socket
import sys
import time
from pathlib import Path

import albumentations  # noqa: F401
import torch
import torch._dynamo
import torch.utils.flop_counter

import camoxpert
from camoxpert.cli import main

torch.set_num_threads(1)
# Once here, not in every process: all of the package, whatever its modules are called.
for found in pkgutil.walk_packages(camoxpert.__path__, "camoxpert."):
    importlib.import_module(found.name)


def slow_disk() -> None:
    """Draw writing to the disk out, so that a stop in the middle cannot come too late.

    The one change to the program that any of this makes, and it is to the standard library.
    """
    honest = os.fsync

    def slow(handle: int) -> None:
        time.sleep(0.1)
        honest(handle)

    os.fsync = slow


def child(request: dict, environment: dict[str, str]) -> None:
    """Run the program in this process; never return."""
    log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ.update(environment)
    if request["stop_after"]:
        slow_disk()
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


def ranks_of(count: int) -> list[dict[str, str]]:
    """Return what torchrun tells every process it starts."""
    if count == 1:
        return [{}]
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    shared = {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
    shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [{**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)]


def wait_for_a_step(metrics: Path) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        with contextlib.suppress(FileNotFoundError):
            if '"train"' in metrics.read_text():
                return
        time.sleep(0.002)


def run(request: dict) -> list[int]:
    pids = []
    for environment in ranks_of(request["ranks"]):
        pid = os.fork()
        if pid == 0:
            child(request, environment)
        pids.append(pid)
    if request["stop_after"]:
        wait_for_a_step(Path(request["stop_after"]))
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]


# The children's garbage collections need not walk through all that was imported.
gc.collect()
gc.freeze()
print(json.dumps([run(request) for request in json.load(sys.stdin)]))
