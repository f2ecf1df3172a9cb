"""Choose the number of data workers, how far they read ahead, and how they start."""

from __future__ import annotations

import math
import multiprocessing
import sys

from camoxpert.runtime.host import usable_cores

MAX_WORKERS = 8
# Images per second that keep a device busy with a small backbone; a CPU trains a tenth of that.
WANTED_RATE = {"cuda": 2000.0, "cpu": 200.0}
# A sample that takes less time costs more to pass between processes than to make.
HAND_OVER_SECONDS = 2e-4
# Share of the free shared memory that batches read ahead may take.
SHARED_MEMORY_SHARE = 0.5


def choose_num_workers(
    wanted: int | None, *, seconds: float = 5e-3, device: str = "cuda", processes: int = 1
) -> tuple[int, str]:
    """Return the number of worker processes and why.

    Args:
        wanted: number set by the user, or None to choose.
        seconds: measured time of one sample in one process.
        device: type of the device that trains.
        processes: training processes that share this machine's cores.
    """
    made = f"a sample takes {1e3 * seconds:.2g} ms"
    if wanted is not None:
        return wanted, "as asked"
    cores = max(1, usable_cores() // processes)
    shared = f" (the share of each of {processes} processes)" if processes > 1 else ""
    if cores == 1:
        return 0, f"workers do not help on a single core{shared}"
    if seconds < HAND_OVER_SECONDS:
        return 0, f"{made}, less than passing it between processes"
    rate = WANTED_RATE.get(device, WANTED_RATE["cpu"])
    workers = max(1, min(cores, MAX_WORKERS, math.ceil(rate * seconds)))
    rate = workers / seconds
    return workers, f"{made}; {workers} of {cores} cores{shared} make {rate:.0f} images/s"


def choose_prefetch(
    wanted: int, *, num_workers: int, batch_bytes: int, shared: int | None, processes: int = 1
) -> tuple[int, str]:
    """Return how many batches each worker prepares ahead, and why if fewer than wanted.

    The batches are kept in shared memory, which is small in containers: a worker that fills it
    dies.

    Args:
        wanted: number in the settings.
        num_workers, batch_bytes: number of workers, and size of one batch.
        shared: free bytes of shared memory; None if there is no limit.
        processes: training processes that share it.
    """
    if not num_workers or shared is None:
        return wanted, ""
    one = max(1, processes * num_workers * batch_bytes)
    fitting = int(SHARED_MEMORY_SHARE * shared / one)
    if fitting >= wanted:
        return wanted, ""
    free = f"{shared / 1e6:.1f} MB of shared memory are free"
    if one > shared:
        return 1, (
            f"warning: {one / 1e6:.1f} MB of shared memory are needed for one batch per worker, "
            f"but {free}; a worker that fills it dies. Use --num-workers 0, or give the "
            f"container more (docker: --shm-size)"
        )
    return max(1, fitting), f"{max(1, fitting)} batches ahead instead of {wanted}: {free}"


def choose_start_method(wanted: str) -> tuple[str, str]:
    """Return the start method of worker processes, and why."""
    known = multiprocessing.get_all_start_methods()
    if wanted != "auto":
        return wanted, "as asked"
    if "fork" in known and sys.platform == "linux":
        return "fork", "workers share loaded memory and start immediately"
    return "spawn", f"the only safe start method on {sys.platform}"
