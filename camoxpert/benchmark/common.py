"""What every benchmark shares: interleaved timing, medians, ratios, and where it ran."""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from camoxpert.runs.info import git_commit, versions
from camoxpert.runtime.host import usable_cores


def interleaved(
    variants: Mapping[str, Callable[[], object]],
    *,
    rounds: int,
    warmup: int = 1,
    done: Callable[[int], object] = lambda count: None,
) -> dict[str, list[float]]:
    """Time variants in turns, so that a slow minute of the machine slows all of them.

    Args:
        variants: name -> what to time.
        rounds: timed calls of each variant; the order is reversed every other round.
        warmup: untimed calls of each.
        done: called with 1 after every round.

    Returns:
        Name -> seconds of each round.
    """
    for _ in range(warmup):
        for call in variants.values():
            call()
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for number in range(rounds):
        names = list(variants)
        for name in names if number % 2 == 0 else reversed(names):
            started = time.perf_counter()
            variants[name]()
            seconds[name].append(time.perf_counter() - started)
        done(1)
    return seconds


def paired_ratio(slow: Sequence[float], fast: Sequence[float]) -> dict[str, float]:
    """Return the median of the per-round ratios slow / fast, with their quartiles."""
    ratios = [a / b for a, b in zip(slow, fast, strict=True)]
    low, middle, high = (
        statistics.quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else ratios * 3
    )
    return {"ratio": middle, "low": low, "high": high}


def milliseconds(seconds: Sequence[float]) -> float:
    """Return the median in milliseconds."""
    return 1e3 * statistics.median(seconds)


def machine() -> dict[str, Any]:
    """Return what a reader must know of the machine; no host or user name."""
    return {
        "processor": _processor(),
        "usable_cores": usable_cores(),
        "load": [round(value, 2) for value in os.getloadavg()],
        "platform": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
    }


def heading(name: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the first fields of a benchmark's JSON."""
    return {
        "benchmark": name,
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": machine(),
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
