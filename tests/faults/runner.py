"""Runs the program again and again in forked processes, so that a kill costs no new imports.

Reads one JSON request a line: ``arguments`` of the program, ``seconds`` until SIGKILL (null: let it
finish), ``slow_saves`` (seconds that every checkpoint write is drawn out). Answers the exit status,
negative for a signal.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time

import torch

import camoxpert.data.augment
import camoxpert.training.trainer
from camoxpert.cli import main
from camoxpert.training import checkpoint

torch.set_num_threads(1)
camoxpert.data.augment.Operators()


def child(request: dict) -> None:
    """Run the program in this process; never return."""
    devnull = os.open(os.devnull, os.O_WRONLY)
    log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(devnull)
    os.setsid()
    if request.get("slow_saves"):
        honest = os.fsync

        def slow(handle: int) -> None:
            time.sleep(request["slow_saves"])
            honest(handle)

        checkpoint.os.fsync = slow
    code = 1
    try:
        code = main(request["arguments"])
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


for line in sys.stdin:
    wanted = json.loads(line)
    pid = os.fork()
    if pid == 0:
        child(wanted)
    if wanted["seconds"] is not None:
        time.sleep(wanted["seconds"])
        try:
            # The whole group: data workers, too.
            os.killpg(pid, signal.SIGKILL)
        except ProcessLookupError:
            os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    print(json.dumps(os.waitstatus_to_exitcode(status)), flush=True)
