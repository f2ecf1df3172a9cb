"""Restart data workers that die or hang; the batches of an epoch stay the same.

torch's SIGCHLD handler raises wherever the main process happens to be, even in the middle of an
optimizer step. Here a death is noticed only while waiting for a batch. The workers are then
restarted, once per epoch, from the first batch that was not delivered. Samples are pure functions
of their position, so nothing else changes. Only this file uses private parts of torch's DataLoader.

A killed worker keeps the locks it held and leaves the message it was writing unfinished, and torch
waits for both without limit. So workers take no lock that the main process takes (``Latch``), and
reading a message ends when its writer is dead (``read_from_living``).
"""

from __future__ import annotations

import ctypes
import functools
import multiprocessing
import os
import signal
import sys
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import wait
from multiprocessing.context import BaseContext
from typing import Any, Generic, TypeVar

import torch
from torch.utils.data import DataLoader
from torch.utils.data._utils.signal_handling import _remove_worker_pids

from camoxpert import console, stop
from camoxpert.data.samples.sampler import BatchPlaces
from camoxpert.errors import DataError
from camoxpert.text import shorten

B = TypeVar("B")

# Interval at which torch checks its workers while it waits. It is also the DataLoader's
# ``timeout``, which would otherwise prevent these checks.
POLL_SECONDS = 5.0
# A restart helps if a process was killed, not if a sample crashes it.
RESTARTS = 1
TIMED_OUT = "DataLoader timed out"


def start_worker(worker: int) -> None:
    """Prepare a worker: use one thread, ignore signals meant for the main process."""
    import cv2

    cv2.setNumThreads(0)
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if hasattr(signal, "SIGHUP"):
        signal.signal(signal.SIGHUP, signal.SIG_IGN)


def loader_options(
    num_workers: int, *, start_method: str, persistent: bool, prefetch: int, timeout: float
) -> dict[str, Any]:
    """Return the DataLoader's worker options; ``timeout`` as in ``Supervised``."""
    # A private generator: iter(DataLoader) otherwise draws from torch's global one.
    options: dict[str, Any] = {"num_workers": num_workers, "generator": torch.Generator()}
    if num_workers:
        options |= {
            "persistent_workers": persistent,
            "prefetch_factor": prefetch,
            "worker_init_fn": start_worker,
            "multiprocessing_context": without_event_lock(start_method),
            # torch looks for dead workers at this interval; ``Supervised`` detects hangs.
            "timeout": min(POLL_SECONDS, timeout or POLL_SECONDS),
        }
    return options


class Latch:
    """A multiprocessing event that is set once, read at any time, and never waited for.

    torch's workers read their event for every batch. ``multiprocessing.Event`` takes a lock for
    that, which a worker killed at that moment keeps, and the main process then waits for it.
    """

    def __init__(self, context: BaseContext) -> None:
        self._passed = context.RawValue(ctypes.c_bool, False)

    def is_set(self) -> bool:
        """Return whether ``set`` was called in any process."""
        return bool(self._passed.value)

    def set(self) -> None:
        """Let ``is_set`` be true from now on, in all processes."""
        self._passed.value = True


def without_event_lock(start_method: str) -> BaseContext:
    """Return the multiprocessing context of a start method, with ``Latch`` as its ``Event``."""
    plain = multiprocessing.get_context(start_method)
    made = type(plain)()
    made.Event = functools.partial(Latch, plain)  # type: ignore[assignment]
    return made


class Supervised(Generic[B]):
    """A DataLoader that survives one death or hang of its workers per epoch.

    Args:
        make: builds the DataLoader; called again after its workers died.
        sampler: sampler of that DataLoader.
        names: names of all samples.
        timeout: seconds without a batch after which workers count as hung; 0 waits without limit.

    Attributes:
        loader: the DataLoader.
        running: the iterator whose workers are running; empty if there is none.
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
        self._unpinned: list[BaseException] = []
        # Workers ignore SIGTERM (see start_worker), which is how the interpreter ends its children:
        # without this an exception that keeps a loader alive would hang the exit.
        self._finalizer = weakref.finalize(self, end_workers, self.running)

    def close(self) -> None:
        """End the worker processes; the loader cannot be used afterwards."""
        self._finalizer()

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[B]:
        """Yield batches; raise a DataError that a worker returned as a value.

        Raises:
            DataError: a sample cannot be read, or workers died or hung again after a restart.
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
                # Left early: batches that workers read ahead must not reach the next epoch.
                end_workers(self.running)
                self.loader = self._make()

    def _begin(self, delivered: int) -> Iterator[Any]:
        """Start the workers at batch ``delivered``, unknown to torch's SIGCHLD handler."""
        # Workers started while Stopped is raised would never be ended and would hang the exit.
        with self._sampler.at_batch(delivered), stop.current().deferred():
            iterator = iter(self.loader)
            self.running[:] = [iterator]
            unwatch(iterator)
            read_from_living(iterator, self._timeout)
            self._unpinned = errors_of_pinning(iterator)
        stop.check()
        return iterator

    def _failed(self, error: BaseException) -> bool:
        """Return whether the workers failed; errors of our own code in one keep their traceback.

        A dead worker appears as a closed pipe, a truncated message or torch's own error, depending
        on what it was doing.
        """
        return is_timeout(error) or is_worker_death(error) or any_dead(self.running)

    def _end_failed(self, error: Exception, delivered: int, *, last: bool) -> None:
        """End the workers and warn that new ones will start; raise DataError if ``last``."""
        kill_workers(self.running)
        # Persistent workers belong to their loader, which would use the dead ones again.
        self.loader = self._make()
        waited_for = shorten(self._names[i] for i in self._sampler.batch_indices(delivered))
        hung = is_timeout(error)
        if last and hung:
            raise worker_hang(self._timeout, waited_for) from error
        if last:
            raise worker_death(error, waited_for) from error
        what = "did not answer in time" if hung else f"died ({_reason(error)})"
        console.warn(
            f"A data worker {what}; waited for: {waited_for}. The workers are restarted, which is "
            f"allowed once per epoch; no batch is lost or changed."
        )

    def _next(self, iterator: Iterator[Any]) -> Any:
        """Wait for a batch and return it.

        Waits are counted, not timed: a process that was suspended for an hour does not take its
        workers for hung.
        """
        waits = 0
        while True:
            try:
                return next(iterator)
            except RuntimeError as error:
                if self._unpinned:
                    raise self._unpinned.pop() from error
                waits += 1
                patient = not self._timeout or waits * self.loader.timeout < self._timeout
                if not is_timeout(error) or not patient:
                    raise


def unwatch(iterator: Any) -> None:
    """Take an iterator's workers off the list that torch's SIGCHLD handler checks.

    The handler is installed once per process by whichever DataLoader starts workers first, perhaps
    one that is not ours, and it stays. So the handler is left alone and finds nothing to report.
    """
    if getattr(iterator, "_worker_pids_set", False):
        _remove_worker_pids(id(iterator))
        iterator._worker_pids_set = False


def read_from_living(iterator: Any, timeout: float) -> None:
    """Let reading a message end with an EOFError if no worker will finish writing it.

    A message of more than 4 KB can be written in parts while its pipe is full. All workers and the
    main process hold the writing end, so a writer's death closes nothing.

    Args:
        iterator: the iterator of a DataLoader whose workers have started, or that has none.
        timeout: as in ``Supervised``.
    """
    if not getattr(iterator, "_workers", None):
        return
    # Nothing that must arrive is ever put there from here, and a dead worker may hold its lock.
    iterator._worker_result_queue.cancel_join_thread()
    if hasattr(iterator, "_pin_memory_thread"):
        # A thread of its own reads there, an error would end it loudly, and ours waits for nobody.
        return
    reader = iterator._worker_result_queue._reader

    def read(handle: int, count: int) -> bytes:
        waits = 0
        while not wait([handle], POLL_SECONDS):
            if any_dead([iterator]):
                raise EOFError("it ended while it sent a batch")
            waits += 1
            if timeout and waits * POLL_SECONDS >= timeout:
                raise EOFError(f"{TIMED_OUT} in the middle of a message")
        return os.read(handle, count)

    # Pipes of Windows have no such method, and end with their writer.
    if hasattr(reader, "_recv"):
        reader._recv = functools.partial(reader._recv, read=read)


def errors_of_pinning(iterator: Any) -> list[BaseException]:
    """Return a list that gets the error that ends torch's thread for pinned memory, if it has one.

    That thread reads what workers send. Reading what a dead worker sent fails there, and nobody
    handles it: Python would print a traceback, and who waits for batches would learn nothing.
    """
    errors: list[BaseException] = []

    def keep(_: threading.Thread) -> None:
        error = sys.exc_info()[1]
        if error is not None:
            errors.append(error)

    thread = getattr(iterator, "_pin_memory_thread", None)
    if thread is not None:
        thread._invoke_excepthook = keep
    return errors


def is_timeout(error: BaseException) -> bool:
    """Return whether torch raised the error because no batch came in time."""
    return TIMED_OUT in str(error)


def is_worker_death(error: BaseException) -> bool:
    """Return whether torch raised the error because a data worker died."""
    text = str(error)
    # The last one: /dev/shm is full, and the worker that filled it could still report it.
    signs = ("DataLoader worker (pid", "shared memory", "write to file </torch_")
    return any(sign in text for sign in signs)


def worker_death(error: BaseException, waited_for: str = "") -> DataError:
    """Return the error that reports a dead data worker."""
    samples = f"; waited for: {waited_for}" if waited_for else ""
    return DataError(
        f"A data worker died ({_reason(error)}){samples}. Often the machine is out of memory or "
        "shared memory: lower --num-workers or data.prefetch_factor, or use --num-workers 0."
    )


def worker_hang(seconds: float, waited_for: str) -> DataError:
    """Return the error that reports data workers that no longer answer."""
    return DataError(
        f"No data worker delivered a batch for {seconds:g} s, twice in one epoch; waited for: "
        f"{waited_for}. Check the disk or network that holds these files. If it is only slow, "
        "raise data.worker_timeout (0 waits without limit) or use --num-workers 0."
    )


def any_dead(running: Sequence[Any]) -> bool:
    """Return whether a worker process of running iterators has ended."""
    # Its pipe closes a moment before the process has ended.
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
    """Kill all workers of running iterators after one died or hung."""
    for worker in _workers(running):
        worker.kill()
    _ask_to_end(list(running), seconds=1.0)
    running.clear()


def _ask_to_end(iterators: list[Any], *, seconds: float) -> None:
    """Let torch shut down its workers, and wait at most ``seconds``.

    A worker that was killed may hold a lock that torch's shutdown waits for without limit. So a
    thread calls the shutdown and is abandoned if it does not return.
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
