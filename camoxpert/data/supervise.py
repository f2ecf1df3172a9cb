"""Data workers that die or hang are restarted; the batches of an epoch stay the same.

torch's own watch raises wherever the main process happens to be, even in the middle of an optimizer
step. Here a death is noticed only while waiting for a batch. The workers are then restarted, once
per epoch, from the first batch that was not delivered; samples are pure functions of their place,
so nothing else changes. No other file touches the private parts of torch's DataLoader.
"""

from __future__ import annotations

import signal
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Generic, TypeVar

import torch
from torch.utils.data import DataLoader

from camoxpert import console, stop
from camoxpert.data.samples.sampler import BatchPlaces
from camoxpert.errors import DataError
from camoxpert.text import shorten

B = TypeVar("B")

# How often torch checks its workers while it waits; also the DataLoader's ``timeout``, which
# would otherwise keep it from checking.
POLL_SECONDS = 5.0
# A restart helps against a process that was killed, not against a sample that kills.
RESTARTS = 1
TIMED_OUT = "DataLoader timed out"


def start_worker(worker: int) -> None:
    """Prepare a worker: one thread, and deaf to signals meant for the main process."""
    import cv2

    cv2.setNumThreads(0)
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def loader_options(
    num_workers: int, *, start_method: str, persistent: bool, prefetch: int, timeout: float
) -> dict[str, Any]:
    """Return the DataLoader's options about workers; ``timeout`` as ``Supervised`` takes it."""
    # A private generator: iter(DataLoader) otherwise draws from torch's global one.
    options: dict[str, Any] = {"num_workers": num_workers, "generator": torch.Generator()}
    if num_workers:
        options |= {
            "persistent_workers": persistent,
            "prefetch_factor": prefetch,
            "worker_init_fn": start_worker,
            "multiprocessing_context": start_method,
            # torch looks for dead workers at this interval; ``Supervised`` decides about hangs.
            "timeout": min(POLL_SECONDS, timeout or POLL_SECONDS),
        }
    return options


class Supervised(Generic[B]):
    """A DataLoader that survives one death or hang of its workers per epoch.

    Args:
        make: builds the DataLoader; called again when its workers died.
        sampler: of that DataLoader.
        names: of all samples.
        timeout: seconds without a batch after which workers count as hung; 0 waits without limit.

    Attributes:
        loader: the DataLoader.
        running: the iterator whose workers live now; empty when none do.
    """

    def __init__(
        self,
        make: Callable[[], DataLoader[Any]],
        sampler: BatchPlaces,
        names: Sequence[str],
        *,
        timeout: float = 0.0,
    ) -> None:
        self.loader = make()
        self.running: list[Any] = []
        self._make = make
        self._sampler = sampler
        self._names = names
        self._timeout = timeout
        # Workers ignore SIGTERM (see start_worker), which is how the interpreter ends its children:
        # without this an exception that keeps a loader alive would hang the exit.
        self._finalizer = weakref.finalize(self, end_workers, self.running)

    def close(self) -> None:
        """End the worker processes; the loader cannot be used afterwards."""
        self._finalizer()

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[B]:
        """Yield batches; raise faults that came as values.

        Raises:
            DataError: a fault, or workers that died or hung again after a restart.
        """
        delivered, failures, finished = 0, 0, False
        iterator: Iterator[Any] | None = None
        try:
            while True:
                try:
                    if iterator is None:
                        iterator = self._begin(delivered)
                    batch = self._next(iterator)
                except StopIteration:
                    finished = True
                    return
                except (RuntimeError, OSError, EOFError) as error:
                    if not self._failed(error):
                        raise
                    failures += 1
                    self._end_failed(error, delivered, last=failures > RESTARTS)
                    iterator = None
                    continue
                if isinstance(batch, DataError):
                    raise batch
                delivered += 1
                yield batch
        finally:
            if self.loader.num_workers and not (finished and self.loader.persistent_workers):
                # Left early: what kept workers prepared ahead must not reach the next epoch.
                end_workers(self.running)
                self.loader = self._make()

    def _begin(self, delivered: int) -> Iterator[Any]:
        """Start the workers at a batch, without torch's watch."""
        previous = signal.getsignal(signal.SIGCHLD) if hasattr(signal, "SIGCHLD") else None
        try:
            # Workers that start while Stopped is raised would be nobody's, and hang the exit.
            with self._sampler.at_batch(delivered), stop.current().deferred():
                iterator = iter(self.loader)
                self.running[:] = [iterator]
            stop.check()
            return iterator
        finally:
            if (
                previous is not None
                and threading.current_thread() is threading.main_thread()
                and signal.getsignal(signal.SIGCHLD) is not previous
            ):
                # A signal handler that raises would end an optimizer step half way.
                signal.signal(signal.SIGCHLD, previous)

    def _failed(self, error: BaseException) -> bool:
        """Whether the workers failed; a fault of our own code in one keeps its traceback.

        How a death shows depends on what the worker was doing: a closed pipe, a message that ends
        early, or torch's own words.
        """
        return is_timeout(error) or is_worker_death(error) or any_dead(self.running)

    def _end_failed(self, error: Exception, delivered: int, *, last: bool) -> None:
        """End the workers and warn that new ones will start; raise DataError if ``last``."""
        kill_workers(self.running)
        # Persistent workers belong to their loader, which would ask the dead again.
        self.loader = self._make()
        waited_for = shorten(self._names[i] for i in self._sampler.batch_indices(delivered))
        hung = is_timeout(error)
        if last and hung:
            raise worker_hang(self._timeout, waited_for) from error
        if last:
            raise worker_death(error, waited_for) from error
        what = "gave no answer in time" if hung else f"died ({_reason(error)})"
        console.warn(
            f"A data worker {what}; waited for: {waited_for}. The workers are restarted, which is "
            f"allowed once per epoch; no batch is lost or changed."
        )

    def _next(self, iterator: Iterator[Any]) -> Any:
        """Wait for a batch.

        Waits are counted, not timed: a process that was suspended for an hour finds its workers as
        they were.
        """
        waits = 0
        while True:
            try:
                return next(iterator)
            except RuntimeError as error:
                waits += 1
                patient = not self._timeout or waits * self.loader.timeout < self._timeout
                if not is_timeout(error) or not patient:
                    raise


def is_timeout(error: BaseException) -> bool:
    """Whether an exception is how torch reports that no batch came in time."""
    return TIMED_OUT in str(error)


def is_worker_death(error: BaseException) -> bool:
    """Whether an exception is how torch reports the death of a data worker."""
    text = str(error)
    # The last one: /dev/shm is full, and the worker that filled it could still say so.
    signs = ("DataLoader worker (pid", "shared memory", "write to file </torch_")
    return any(sign in text for sign in signs)


def worker_death(error: BaseException, waited_for: str = "") -> DataError:
    """Return the readable form of a data worker's death."""
    samples = f"; waited for: {waited_for}" if waited_for else ""
    return DataError(
        f"A data worker died ({_reason(error)}){samples}. Often the machine ran out of memory or "
        "shared memory: lower --num-workers or data.prefetch_factor, or use --num-workers 0."
    )


def worker_hang(seconds: float, waited_for: str) -> DataError:
    """Return the readable form of data workers that no longer answer."""
    return DataError(
        f"No data worker delivered a batch for {seconds:g} s, twice in one epoch; waited for: "
        f"{waited_for}. Is the disk or network that holds these files alive? Raise "
        "data.worker_timeout where it is only slow (0 waits without limit), or use --num-workers 0."
    )


def any_dead(running: Sequence[Any]) -> bool:
    """Whether a worker process of running iterators has ended."""
    # The end of its pipe is seen a moment before the process is gone.
    return any(worker.join(timeout=0.2) or not worker.is_alive() for worker in _workers(running))


def end_workers(running: list[Any]) -> None:
    """Ask the worker processes of running iterators to end; kill those that do not."""
    workers = _workers(running)
    whole = all(worker.is_alive() for worker in workers)
    _ask_to_end(list(running), seconds=10.0 if whole else 1.0)
    for worker in workers:
        if worker.is_alive():
            # SIGTERM is ignored (see start_worker): the interpreter's exit would hang.
            worker.kill()
    running.clear()


def kill_workers(running: list[Any]) -> None:
    """Kill worker processes of which one died or hangs."""
    for worker in _workers(running):
        worker.kill()
    _ask_to_end(list(running), seconds=1.0)
    running.clear()


def _ask_to_end(iterators: list[Any], *, seconds: float) -> None:
    """Let torch shut its workers down, and wait no longer than that.

    A worker that was killed may hold a lock that torch's shutdown waits for without limit. So a
    thread calls it, and is abandoned if it does not return.
    """

    def ask() -> None:
        for iterator in iterators:
            shutdown = getattr(iterator, "_shutdown_workers", None)
            if shutdown is not None:
                shutdown()

    asking = threading.Thread(target=ask, daemon=True)
    try:
        asking.start()
    except RuntimeError:
        # The interpreter is shutting down and starts no threads; the workers are killed next.
        return
    asking.join(seconds)


def _workers(running: Sequence[Any]) -> list[Any]:
    return [worker for iterator in running for worker in getattr(iterator, "_workers", ())]


def _reason(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
