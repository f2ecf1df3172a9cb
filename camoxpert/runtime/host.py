"""Cores, memory and shared memory that this process may use.

Containers (Kaggle, Docker, Slurm) give a process less than the machine has; the limits read here
are those of the process.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import MutableMapping
from pathlib import Path

CGROUP = Path("/sys/fs/cgroup")

PASSIVE = {"OMP_WAIT_POLICY": "PASSIVE", "KMP_BLOCKTIME": "0"}
"""Waiting OpenMP threads sleep at once: GNU's and LLVM's library read the first variable, Intel's
only the second."""
WAIT_POLICIES = (*PASSIVE, "GOMP_SPINCOUNT", "KMP_LIBRARY")
"""Variables by which a user decides this."""


def wait_passively(variables: MutableMapping[str, str] = os.environ) -> bool:
    """Let the OpenMP threads of this process sleep while they wait for each other.

    Threads that spin keep the cores from the thread they wait for: beside one other busy process a
    training step on two cores took 13 s instead of 0.4, and 1.1 with sleeping threads, which lose
    nothing on a quiet machine. The library reads its settings when torch is loaded.

    Args:
        variables: the environment to change.

    Returns:
        Whether it was changed: not where the user decided, and not after torch was loaded.
    """
    if "torch" in sys.modules or any(name in variables for name in WAIT_POLICIES):
        return False
    variables.update(PASSIVE)
    return True


def usable_cores() -> int:
    """Return the processor cores this process may run on."""
    affinity = getattr(os, "sched_getaffinity", None)
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    quota = _cpu_quota()
    return max(1, min(cores, quota)) if quota else cores


def available_memory() -> int | None:
    """Return the bytes of memory this process can still take, or None if that is unknown."""
    known = [b for b in (_host_available(), _cgroup_available()) if b is not None]
    return min(known) if known else None


def free_shared_memory() -> int | None:
    """Return the free bytes of /dev/shm, through which data workers pass batches; None if there
    is none."""
    try:
        return shutil.disk_usage("/dev/shm").free
    except OSError:
        return None


def _host_available() -> int | None:
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError, IndexError):
        pass
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (OSError, ValueError, AttributeError):
        return None


def _cgroup_available() -> int | None:
    """Return what the control group leaves, counting file caches as free; None without a limit."""
    places = (
        ("memory.max", "memory.current", "memory.stat", "inactive_file"),
        (
            "memory/memory.limit_in_bytes",
            "memory/memory.usage_in_bytes",
            "memory/memory.stat",
            "total_inactive_file",
        ),
    )
    for limit_name, used_name, stat_name, cache_name in places:
        try:
            limit = int((CGROUP / limit_name).read_text())
            used = int((CGROUP / used_name).read_text())
            stat = dict(line.split() for line in (CGROUP / stat_name).read_text().splitlines())
        except (OSError, ValueError):
            # "max" is not a number: there is no limit.
            continue
        # Version 1 writes an absurdly large number for "no limit".
        if limit < 1 << 60:
            return max(0, limit - used + int(stat.get(cache_name, 0)))
    return None


def _cpu_quota() -> int | None:
    try:
        quota, period = (CGROUP / "cpu.max").read_text().split()
        return max(1, int(quota) // int(period))
    except (OSError, ValueError):
        return None
