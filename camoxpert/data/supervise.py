"""Data workers die or hang; the batches of an epoch stay the same.

torch's own watch raises wherever the main process happens to be, in the middle of an optimizer step
too. Here a death is noticed only while a batch is waited for. The workers are then started anew,
once an epoch, from the first batch that was not delivered; samples are pure functions of their
place, so nothing else changes.
"""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch.utils.data import DataLoader

from camoxpert.data.samples.sampler import BatchPlaces
from camoxpert.data.unreadable import some
from camoxpert.errors import DataError

Report = Callable[[str], None]

# How often torch looks after its workers while it waits; also the DataLoader's ``timeout``, which
# would otherwise keep it from looking.
POLL_SECONDS = 5.0
# Starting anew helps against a process that was killed, not against a sample that kills.
RESTARTS = 1
TIMED_OUT = "DataLoader timed out"


def to_stderr(text: str) -> None:
    """Say it where nobody else listens."""
    print(f"warning     {text}", file=sys.stderr, flush=True)


class Supervised:
    """A DataLoader that survives one death or hang of its workers an epoch.

    Args:
        make: builds the DataLoader.
        sampler: of that DataLoader.
        names: of all samples.
        timeout: seconds without a batch after which workers are taken for hung; 0 waits for ever.
        report: receives what happened, in words.

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
        report: Report | None = None,
    ) -> None:
        self.loader = make()
        self.running: list[Any] = []
        self._make = make
        self._sampler = sampler
        self._names = names
        self._timeout = timeout
        self._report = report or to_stderr

    def __iter__(self) -> Iterator[Any]:
        """Yield batches; raise faults that came as values.

        Raises:
            DataError: a fault, or workers that died or hung again after they were started anew.
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
                    self._start_anew_after(error, delivered, last=failures > RESTARTS)
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
            with self._sampler.at_batch(delivered):
                iterator = iter(self.loader)
            self.running[:] = [iterator]
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

    def _start_anew_after(self, error: Exception, delivered: int, *, last: bool) -> None:
        kill_workers(self.running)
        # Kept workers belong to their loader, which would ask the dead again.
        self.loader = self._make()
        waited_for = some(self._names[i] for i in self._sampler.batch_indices(delivered))
        hung = is_timeout(error)
        if last and hung:
            raise worker_hang(self._timeout, waited_for) from error
        if last:
            raise worker_death(error, waited_for) from error
        what = "gave no answer in time" if hung else f"died ({_reason(error)})"
        self._report(
            f"A data worker {what}; waited for: {waited_for}. The workers start anew, as they may "
            f"once an epoch; no batch is lost or changed."
        )

    def _next(self, iterator: Iterator[Any]) -> Any:
        """Wait for a batch.

        Waits are counted, not timed: a process that was stopped for an hour finds its workers as
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
    """Whether an exception is torch's way to say that no batch came in time."""
    return TIMED_OUT in str(error)


def is_worker_death(error: BaseException) -> bool:
    """Whether an exception is torch's way to say that a data worker died."""
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
    """Return the readable form of data workers that answer no more."""
    return DataError(
        f"No data worker delivered a batch for {seconds:g} s, twice in one epoch; waited for: "
        f"{waited_for}. Is the disk or network that holds these files alive? Raise "
        "data.worker_timeout where it is only slow (0 waits for ever), or use --num-workers 0."
    )


def any_dead(running: Sequence[Any]) -> bool:
    """Whether a worker process of running iterators has ended."""
    # The end of its pipe is seen a moment before the process is gone.
    return any(worker.join(timeout=0.2) or not worker.is_alive() for worker in _workers(running))


def end_workers(running: list[Any]) -> None:
    """Ask the worker processes of running iterators to end; make those that do not."""
    workers = _workers(running)
    whole = all(worker.is_alive() for worker in workers)
    _ask_to_end(list(running), seconds=10.0 if whole else 1.0)
    for worker in workers:
        if worker.is_alive():
            # SIGTERM is ignored (see start_worker), and the interpreter's exit would wait for ever.
            worker.kill()
    running.clear()


def kill_workers(running: list[Any]) -> None:
    """End worker processes of which one died or hangs, at once."""
    for worker in _workers(running):
        worker.kill()
    _ask_to_end(list(running), seconds=1.0)
    running.clear()


def _ask_to_end(iterators: list[Any], *, seconds: float) -> None:
    """Let torch tidy up, and wait no longer than that.

    A worker that was killed may hold a lock that torch's tidying up asks for, and keeps it for
    ever. So a thread asks, and is left behind where it gets no answer.
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
        # The interpreter is ending and starts no threads; its processes are killed next.
        return
    asking.join(seconds)


def _workers(running: Sequence[Any]) -> list[Any]:
    return [worker for iterator in running for worker in getattr(iterator, "_workers", ())]


def _reason(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
