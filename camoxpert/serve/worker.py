"""One thread that does the work, and a short queue before it."""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future

from camoxpert.serve.answers import Answer, Fault

MOST_WAITING = 4
"""Images that wait while one is worked on; further ones are turned away."""
SLOWEST_RETRY = 60
"""Seconds; nobody is asked to come back later than that."""

Work = Callable[[], Answer]


class Worker:
    """Does one piece of work at a time, in the order in which they came.

    A single thread: memory is that of one image, the device is not shared, and the libraries keep
    one pool of threads instead of one for every request.

    Args:
        clock: seconds, monotonic; a test gives its own.

    Attributes:
        cancelled: pieces that were never done because their sender left.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._condition = threading.Condition()
        self._waiting: deque[tuple[Future[Answer], Work]] = deque()
        self._closed = False
        self._mean_seconds = 1.0
        self.cancelled = 0
        self._thread = threading.Thread(target=self._run, name="serve-worker", daemon=True)
        self._thread.start()

    def check_free(self) -> None:
        """Raise Fault if nothing more may wait."""
        with self._condition:
            self._check_free()

    def submit(self, work: Work) -> Future[Answer]:
        """Queue a piece of work.

        Raises:
            Fault: too much is waiting, or the server is closing.
        """
        future: Future[Answer] = Future()
        with self._condition:
            self._check_free()
            self._waiting.append((future, work))
            self._condition.notify()
        return future

    def cancel(self, future: Future[Answer], *, left: bool = False) -> bool:
        """Take a piece of work out of the queue, so that another may wait in its place.

        Args:
            future: what ``submit`` returned.
            left: its sender has left, which is counted.

        Returns:
            Whether it was waiting; what has begun is finished.
        """
        with self._condition:
            place = next((i for i, (own, _) in enumerate(self._waiting) if own is future), None)
            if place is None:
                return False
            del self._waiting[place]
            self.cancelled += left
        return future.cancel()

    def close(self) -> None:
        """Turn away what waits, and finish what is being worked on, however long it takes.

        A thread that is still inside torch when the interpreter exits aborts the process (exit
        code 134).
        """
        with self._condition:
            self._closed = True
            turned_away = list(self._waiting)
            self._waiting.clear()
            self._condition.notify()
        for future, _ in turned_away:
            if future.set_running_or_notify_cancel():
                future.set_exception(closing())
        self._thread.join()

    def _check_free(self) -> None:
        if self._closed:
            raise closing()
        if len(self._waiting) >= MOST_WAITING:
            seconds = math.ceil(self._mean_seconds * (1 + len(self._waiting)))
            retry = ("Retry-After", str(min(max(seconds, 1), SLOWEST_RETRY)))
            raise Fault(
                503, f"{MOST_WAITING} images are waiting already. Try again later.", (retry,)
            )

    def _run(self) -> None:
        while True:
            with self._condition:
                while not self._waiting and not self._closed:
                    self._condition.wait()
                if self._closed:
                    return
                future, work = self._waiting.popleft()
            # Cancelled by its caller, not with ``cancel``.
            if not future.set_running_or_notify_cancel():
                continue
            started = self._clock()
            try:
                future.set_result(work())
            except BaseException as error:
                future.set_exception(error)
            self._mean_seconds += 0.2 * (self._clock() - started - self._mean_seconds)
            # The next wait would keep the last image alive.
            del future, work


def closing() -> Fault:
    """Return what is answered once the server was asked to stop."""
    return Fault(503, "The server is closing.")
