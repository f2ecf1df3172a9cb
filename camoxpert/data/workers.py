"""Data worker processes: how many, how they start, and how long they may take."""

from __future__ import annotations

import math
import multiprocessing
import signal
import sys
from typing import Any

import torch

from camoxpert.data.supervise import POLL_SECONDS
from camoxpert.data.supervise import is_worker_death as is_worker_death
from camoxpert.data.supervise import worker_death as worker_death
from camoxpert.runtime.host import usable_cores

MAX_WORKERS = 8
# Images per second that keep a device busy with a small backbone; what a CPU trains is a tenth.
WANTED_RATE = {"cuda": 2000.0, "cpu": 200.0}
# A sample that is ready sooner costs more to hand over than to make.
HAND_OVER_SECONDS = 2e-4
# Of the free shared memory that batches may wait in.
SHARED_MEMORY_SHARE = 0.5


def choose_num_workers(
    wanted: int | None, *, seconds: float = 5e-3, device: str = "cuda", processes: int = 1
) -> tuple[int, str]:
    """Return the number of worker processes and why.

    Args:
        wanted: as asked, or None.
        seconds: measured time that one sample takes one process.
        device: where the step runs.
        processes: training processes that share this machine's cores.
    """
    made = f"a sample takes {1e3 * seconds:.2g} ms"
    if wanted is not None:
        return wanted, "as asked"
    cores = max(1, usable_cores() // processes)
    shared = f" (the share of each of {processes} processes)" if processes > 1 else ""
    if cores == 1:
        return 0, f"a single core gains nothing from workers{shared}"
    if seconds < HAND_OVER_SECONDS:
        return 0, f"{made}, less than handing it over would"
    rate = WANTED_RATE.get(device, WANTED_RATE["cpu"])
    workers = max(1, min(cores, MAX_WORKERS, math.ceil(rate * seconds)))
    rate = workers / seconds
    return workers, f"{made}; {workers} of {cores} cores{shared} make {rate:.0f} images/s"


def choose_prefetch(
    wanted: int, *, num_workers: int, batch_bytes: int, shared: int | None, processes: int = 1
) -> tuple[int, str]:
    """Return the batches each worker prepares ahead, and why where they are fewer than asked for.

    They wait in shared memory, of which containers have little: a worker that fills it dies.

    Args:
        wanted: as the settings say.
        num_workers, batch_bytes: what is prepared.
        shared: free bytes of shared memory; None where there is no limit.
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
            f"warning: {one / 1e6:.1f} MB of shared memory are needed for one batch ahead in each "
            f"worker, and {free}; a worker that fills it dies. Use --num-workers 0, or give the "
            f"container more (docker: --shm-size)"
        )
    return max(1, fitting), f"{max(1, fitting)} batches ahead instead of {wanted}: {free}"


def choose_start_method(wanted: str) -> tuple[str, str]:
    """Return how worker processes start, and why."""
    known = multiprocessing.get_all_start_methods()
    if wanted != "auto":
        return wanted, "as asked"
    if "fork" in known and sys.platform == "linux":
        return "fork", "workers share what is loaded already, and start at once"
    return "spawn", f"the only safe way on {sys.platform}"


def start_worker(worker: int) -> None:
    """Prepare a worker: one thread, and deaf to signals meant for the main process."""
    import cv2

    cv2.setNumThreads(0)
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def loader_options(
    num_workers: int,
    *,
    persistent: bool,
    prefetch: int,
    start_method: str = "auto",
    timeout: float = 0.0,
) -> dict[str, Any]:
    """Return the DataLoader's options about workers; ``timeout`` as ``Supervised`` takes it."""
    # A private generator: iter(DataLoader) otherwise draws from torch's global one.
    options: dict[str, Any] = {"num_workers": num_workers, "generator": torch.Generator()}
    if num_workers:
        options |= {
            "persistent_workers": persistent,
            "prefetch_factor": prefetch,
            "worker_init_fn": start_worker,
            "multiprocessing_context": choose_start_method(start_method)[0],
            # torch looks for dead workers when this is over; whoever waits decides about longer.
            "timeout": min(POLL_SECONDS, timeout or POLL_SECONDS),
        }
    return options
