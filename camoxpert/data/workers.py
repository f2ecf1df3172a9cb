"""Data worker processes: how many, how they start, and what their death means."""

from __future__ import annotations

import math
import multiprocessing
import signal
import sys
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch.utils.data import DataLoader

from camoxpert.data.resources import usable_cores
from camoxpert.errors import DataError

T = TypeVar("T")

MAX_WORKERS = 8
# Images per second that keep a device busy with a small backbone; what a CPU trains is a tenth.
WANTED_RATE = {"cuda": 2000.0, "cpu": 200.0}
# A sample that is ready sooner costs more to hand over than to make.
HAND_OVER_SECONDS = 2e-4
# Of the free shared memory that batches may wait in.
SHARED_MEMORY_SHARE = 0.5


def choose_num_workers(
    wanted: int | None, *, seconds: float = 5e-3, device: str = "cuda"
) -> tuple[int, str]:
    """Return the number of worker processes and why.

    Args:
        wanted: as asked, or None.
        seconds: measured time that one sample takes one process.
        device: where the step runs.
    """
    made = f"a sample takes {1e3 * seconds:.2g} ms"
    if wanted is not None:
        return wanted, "as asked"
    cores = usable_cores()
    if cores == 1:
        return 0, "a single core gains nothing from workers"
    if seconds < HAND_OVER_SECONDS:
        return 0, f"{made}, less than handing it over would"
    rate = WANTED_RATE.get(device, WANTED_RATE["cpu"])
    workers = max(1, min(cores, MAX_WORKERS, math.ceil(rate * seconds)))
    return workers, f"{made}; {workers} of {cores} cores make {workers / seconds:.0f} images/s"


def choose_prefetch(
    wanted: int, *, num_workers: int, batch_bytes: int, shared: int | None
) -> tuple[int, str]:
    """Return the batches each worker prepares ahead, and why where they are fewer than asked for.

    They wait in shared memory, of which containers have little: a worker that fills it dies.

    Args:
        wanted: as the settings say.
        num_workers, batch_bytes: what is prepared.
        shared: free bytes of shared memory; None where there is no limit.
    """
    if not num_workers or shared is None:
        return wanted, ""
    fitting = int(SHARED_MEMORY_SHARE * shared / max(1, num_workers * batch_bytes))
    if fitting >= wanted:
        return wanted, ""
    return max(1, fitting), (
        f"{max(1, fitting)} batches ahead instead of {wanted}: {shared / 1e6:.0f} MB of shared "
        f"memory are free"
    )


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
    num_workers: int, *, persistent: bool, prefetch: int, start_method: str = "auto"
) -> dict[str, Any]:
    """Return the DataLoader's options about workers."""
    # A private generator: iter(DataLoader) otherwise draws from torch's global one.
    options: dict[str, Any] = {"num_workers": num_workers, "generator": torch.Generator()}
    if num_workers:
        options |= {
            "persistent_workers": persistent,
            "prefetch_factor": prefetch,
            "worker_init_fn": start_worker,
            "multiprocessing_context": choose_start_method(start_method)[0],
        }
    return options


def checked(loader: DataLoader[Any], running: list[Any]) -> Iterator[Any]:
    """Yield batches; raise faults that came as values, and say what a dead worker means."""
    try:
        iterator = iter(loader)
        running[:] = [iterator]
        for batch in iterator:
            if isinstance(batch, DataError):
                raise batch
            yield batch
    except (RuntimeError, OSError, EOFError) as error:
        # How a death shows depends on what the worker was doing: a closed pipe, a message that
        # ends early, or torch's own words. A fault of our own code in a worker keeps its traceback.
        if not is_worker_death(error) and not _despite_watch(lambda: _any_dead(running), True):
            raise
        # Its siblings end now, and with them torch's watch: it would raise again, anywhere.
        _despite_watch(lambda: end_workers(running), None)
        raise worker_death(error) from error


def is_worker_death(error: BaseException) -> bool:
    """Whether an exception is torch's way to say that a data worker died."""
    return "DataLoader worker (pid" in str(error) or "shared memory" in str(error)


def worker_death(error: BaseException) -> DataError:
    """Return the readable form of a data worker's death."""
    reason = " ".join(str(error).split())[:200] or type(error).__name__
    return DataError(
        f"A data worker died ({reason}). Often the machine ran out of memory or shared memory: "
        "lower --num-workers or data.prefetch_factor, or use --num-workers 0."
    )


def _despite_watch(call: Callable[[], T], otherwise: T) -> T:
    """Call; where torch's watch interrupts with news of a death, call once more, or give up.

    The watch is a signal handler: it raises wherever the program happens to be, here too.
    """
    for _ in range(2):
        try:
            return call()
        except RuntimeError as error:
            if not is_worker_death(error):
                raise
    return otherwise


def _any_dead(running: list[Any]) -> bool:
    workers = [w for iterator in running for w in getattr(iterator, "_workers", ())]
    # The end of its pipe is seen a moment before the process is gone.
    return any(worker.join(timeout=0.2) or not worker.is_alive() for worker in workers)


def end_workers(running: list[Any]) -> None:
    """End the worker processes of running iterators."""
    for iterator in running:
        shutdown = getattr(iterator, "_shutdown_workers", None)
        if shutdown is not None:
            shutdown()
    running.clear()
