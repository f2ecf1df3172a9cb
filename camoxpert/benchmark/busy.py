"""``benchmark train --busy``: the training step beside another busy process.

OpenMP threads that wait for each other in a loop keep the cores from the thread they wait for, so
one more busy process slows a step many times. How threads wait is decided when torch is loaded, so
every policy is measured in a process of its own; the processes take turns.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from camoxpert import console
from camoxpert.benchmark.common import (
    Ratio,
    Report,
    heading,
    interleaved,
    milliseconds,
    paired_ratio,
    quartiles,
    show_table,
)
from camoxpert.benchmark.train import Step, Subject
from camoxpert.config import config_from_dict, to_dict
from camoxpert.errors import ConfigError
from camoxpert.runtime.device import Precision
from camoxpert.runtime.host import PASSIVE, WAIT_POLICIES

POLICIES: dict[str, dict[str, str]] = {"passive": dict(PASSIVE), "active": {}}
"""Environment of the processes: threads that wait sleep (what the command line sets), or spin a
while first (the default of OpenMP)."""
SPIN = "while True: pass"


def run(subject: Subject, *, rounds: int = 7) -> Report:
    """Measure, print, and return the content of the JSON file.

    Args:
        subject: the step; on a CPU.
        rounds: timed rounds of every variant, interleaved.

    Raises:
        ConfigError: the device is not a CPU.
    """
    if subject.device.type != "cpu":
        raise ConfigError("--busy measures how CPU threads wait for each other: add --device cpu.")
    with ExitStack() as stack:
        steps = {
            name: stack.enter_context(_process(subject, variables))
            for name, variables in POLICIES.items()
        }
        seconds = {f"quiet, {k}": v for k, v in interleaved(steps, rounds=rounds).items()}
        with _busy_process():
            seconds |= {f"busy, {k}": v for k, v in interleaved(steps, rounds=rounds).items()}
    times = {name: milliseconds(values) for name, values in seconds.items()}
    ratios: dict[str, Ratio] = {
        f"{slow} over {fast}": paired_ratio(seconds[slow], seconds[fast])
        for slow, fast in (
            ("busy, active", "busy, passive"),
            ("quiet, active", "quiet, passive"),
            ("busy, passive", "quiet, passive"),
        )
    }
    config = subject.config
    report = heading(
        "train --busy",
        {
            "backbone": config.model.backbone,
            "img_size": config.data.img_size,
            "batch_size": subject.batch_size,
            "num_experts": config.model.num_experts,
            "rounds": rounds,
            "threads": _threads(),
        },
    )
    console.say("A training step alone, and beside a process that keeps one core busy:")
    show_table([[name, f"{value:.0f} ms"] for name, value in times.items()])
    for name, ratio in ratios.items():
        console.say(f"  {name}: {quartiles(ratio)}")
    return report | {"milliseconds": times, "ratios": ratios}


def _threads() -> int:
    import torch

    return torch.get_num_threads()


@contextmanager
def _process(subject: Subject, variables: dict[str, str]) -> Iterator[Callable[[], object]]:
    """Start a process with these environment variables; yield a call that takes one step in it."""
    kept = {k: v for k, v in os.environ.items() if k not in WAIT_POLICIES}
    path = os.pathsep.join([str(Path(__file__).parents[2]), kept.get("PYTHONPATH", "")])
    process = subprocess.Popen(
        [sys.executable, "-c", "from camoxpert.benchmark import busy; busy.serve()"],
        env={**kept, **variables, "PYTHONPATH": path.rstrip(os.pathsep)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert process.stdin is not None and process.stdout is not None
    to, back = process.stdin, process.stdout

    def step() -> None:
        to.write(b"step\n")
        to.flush()
        answer = back.readline()
        if not answer:
            raise RuntimeError("the measured process ended; its error is above")

    try:
        settings = {"config": to_dict(subject.config), "batch_size": subject.batch_size}
        to.write(json.dumps({**settings, "dtype": str(subject.precision.dtype)}).encode() + b"\n")
        to.flush()
        yield step
    finally:
        process.kill()
        process.wait()
        to.close()
        back.close()


def serve() -> None:
    """Take a step for every line of standard input; the first one describes the subject."""
    import torch

    told = json.loads(sys.stdin.buffer.readline())
    name = told["dtype"].removeprefix("torch.")
    precision = Precision(None if name == "None" else getattr(torch, name), False, name)
    config = config_from_dict(told["config"])
    step = Step(Subject(config, torch.device("cpu"), precision, told["batch_size"]))
    for _ in sys.stdin.buffer:
        step.full()
        print("done", flush=True)


@contextmanager
def _busy_process() -> Iterator[None]:
    """Keep one core busy inside the block."""
    process = subprocess.Popen([sys.executable, "-c", SPIN])
    try:
        yield
    finally:
        process.kill()
        process.wait()
