"""Shared by all benchmarks: interleaved timing, medians, ratios, and the machine they ran on."""

from __future__ import annotations

import os
import platform
import statistics
import textwrap
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import TypedDict

import torch

from camoxpert import console, text
from camoxpert.runs.info import git_commit, versions
from camoxpert.runtime.host import usable_cores

Report = dict[str, object]
"""The content of a benchmark's JSON file."""


class Ratio(TypedDict):
    """Median and quartiles of a ratio over the rounds."""

    ratio: float
    low: float
    high: float


def interleaved(
    variants: Mapping[str, Callable[[], object]],
    *,
    rounds: int,
    warmup: int = 1,
    description: str = "rounds",
) -> dict[str, list[float]]:
    """Time variants in turns, so that a slow minute of the machine slows all of them.

    Args:
        variants: name -> what to time.
        rounds: timed calls of each variant; the order is reversed every other round.
        warmup: untimed calls of each.
        description: shown before the progress bar.

    Returns:
        Name -> seconds of each round.
    """
    for _ in range(warmup):
        for call in variants.values():
            call()
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for number in console.track(range(rounds), description):
        names = list(variants)
        for name in names if number % 2 == 0 else reversed(names):
            started = time.perf_counter()
            variants[name]()
            seconds[name].append(time.perf_counter() - started)
    return seconds


def paired_ratio(slow: Sequence[float], fast: Sequence[float]) -> Ratio:
    """Return the median of the per-round ratios slow / fast, with their quartiles."""
    ratios = [a / b for a, b in zip(slow, fast, strict=True)]
    low, middle, high = (
        statistics.quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else ratios * 3
    )
    return {"ratio": middle, "low": low, "high": high}


def milliseconds(seconds: Sequence[float]) -> float:
    """Return the median in milliseconds."""
    return 1e3 * statistics.median(seconds)


def multiply_adds(call: Callable[..., object], *inputs: object) -> float:
    """Return the multiply-adds of ``call(*inputs)``: convolutions and matrix products."""
    from torch.utils.flop_counter import FlopCounterMode

    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        call(*inputs)
    return int(counter.get_total_flops()) / 2


def show_table(rows: Sequence[Sequence[str]]) -> None:
    """Print rows, indented under the line above them."""
    console.say(textwrap.indent(text.table(rows), "  "))


def quartiles(ratio: Ratio, digits: int = 2) -> str:
    """Return ``ratio (low to high)``."""
    return f"{ratio['ratio']:.{digits}f} ({ratio['low']:.{digits}f} to {ratio['high']:.{digits}f})"


def heading(name: str, settings: Mapping[str, object]) -> Report:
    """Return the first fields of a benchmark's JSON: settings, machine and versions.

    No host or user name: these files are published.
    """
    return {
        "benchmark": name,
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": {
            "processor": _processor(),
            "usable_cores": usable_cores(),
            "load": [round(value, 2) for value in os.getloadavg()],
            "platform": f"{platform.system()} {platform.machine()}, "
            f"Python {platform.python_version()}",
        },
        "versions": versions(),
        "commit": git_commit(Path(__file__).parents[2]),
        "settings": dict(settings),
    }


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
