"""Stopping a command: Ctrl-C, SIGTERM and the deadline end it at a safe point with ``Stopped``.

Outside a training step the signal's handler raises ``Stopped`` on the spot: every file is written
atomically, so no file is left half written. Inside ``deferred()`` a request is only noted, and the
code inside decides when to stop. The deadline has no signal: ``check()`` and every
``console.track`` loop check the clock.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import FrameType

from camoxpert.errors import Stopped

DEADLINE_CODE = 75
# Exit codes with which a command can be asked to stop; the first of several requests counts.
STOP_CODES = (130, 143, 129, DEADLINE_CODE)
REASONS = {
    130: "Ctrl-C",
    143: "SIGTERM",
    129: "SIGHUP: the terminal was closed",
    DEADLINE_CODE: "--max-hours is over",
}


class Stop:
    """Whether this process was asked to stop, and with which exit code.

    Args:
        max_hours: deadline from now, or None.
        clock: seconds, monotonic; a test gives its own.

    Attributes:
        agreed: exit code that all processes of a distributed run agreed on, or 0.
    """

    def __init__(self, max_hours: float | None = None, clock: Callable[[], float] = time.monotonic):
        self.clock = clock
        self.deadline = None if max_hours is None else clock() + max_hours * 3600
        self.signal_number = 0
        self.agreed = 0
        self._deferrals = 0
        self._outcomes = ["Nothing was left half done."]

    def handle(self, number: int, frame: FrameType | None) -> None:
        """Note the signal and raise Stopped unless deferred; Ctrl-C after a signal exits now."""
        if self.signal_number and number == signal.SIGINT:
            os._exit(130)
        repeated = bool(self.signal_number)
        self.signal_number = self.signal_number or number
        if not repeated:
            self.check()

    def code(self) -> int:
        """Return 0 to continue, or the exit code to stop with: 130, 143, 129 or 75."""
        if self.signal_number:
            return 128 + self.signal_number
        if self.deadline is not None and self.clock() >= self.deadline:
            return DEADLINE_CODE
        return 0

    def agree(self, codes: Iterable[int]) -> int:
        """Note the requests of all processes; return the code they stop with, or 0."""
        wanted = set(codes)
        found = next((code for code in STOP_CODES if code in wanted), 0)
        self.agreed = self.agreed or found
        return self.agreed

    def check(self) -> None:
        """Raise Stopped if a stop was requested and is not deferred."""
        if not self._deferrals and self.code():
            raise self.stopped()

    def stopped(self, outcome: str = "") -> Stopped:
        """Return the exception that ends the command, for its caller to raise.

        Args:
            outcome: state of the work, for the user; empty: that of the innermost ``outcome``
                block.
        """
        code = self.agreed or self.code()
        reason = REASONS.get(code, "signal")
        error = Stopped(f"Stopped ({reason}). {outcome or self._outcomes[-1]}")
        error.exit_code = code
        return error

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Only note requests inside the block, such as a training step or a collective call."""
        self._deferrals += 1
        try:
            yield
        finally:
            self._deferrals -= 1

    @contextmanager
    def undeferred(self) -> Iterator[None]:
        """Lift all deferrals for the block, and raise at once what was requested before it."""
        kept, self._deferrals = self._deferrals, 0
        try:
            self.check()
            yield
        finally:
            self._deferrals = kept

    @contextmanager
    def outcome(self, text: str) -> Iterator[None]:
        """Set the sentence that a Stopped raised inside the block ends with."""
        self._outcomes.append(text)
        try:
            yield
        finally:
            self._outcomes.pop()


_current = Stop()


def current() -> Stop:
    """Return the stop request of the running command (never requested outside ``watch``)."""
    return _current


def check() -> None:
    """Raise Stopped if the running command was asked to stop and the request is not deferred."""
    if threading.current_thread() is threading.main_thread():
        _current.check()


@contextmanager
def watch(max_hours: float | None = None) -> Iterator[Stop]:
    """Route SIGINT, SIGTERM, SIGHUP and the deadline to ``Stopped`` for the block.

    SIGHUP stays ignored where it is, as under ``nohup``. In a thread other than the main one
    signals stay as they are.
    """
    global _current
    stop, before = Stop(max_hours), _current
    numbers = [signal.SIGINT, signal.SIGTERM]
    # Windows has no SIGHUP.
    hangup = getattr(signal, "SIGHUP", None)
    if hangup is not None and signal.getsignal(hangup) is not signal.SIG_IGN:
        numbers.append(hangup)
    main = threading.current_thread() is threading.main_thread()
    previous = {number: signal.signal(number, stop.handle) for number in numbers} if main else {}
    _current = stop
    try:
        yield stop
    finally:
        _current = before
        for number, handler in previous.items():
            signal.signal(number, handler)


@contextmanager
def outcome(text: str) -> Iterator[None]:
    """Set the sentence that a Stopped raised inside the block ends with."""
    with _current.outcome(text):
        yield
