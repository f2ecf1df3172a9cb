"""Asking a run to stop: signals and the deadline only set a flag; the loop acts on it between
steps."""

from __future__ import annotations

import fcntl
import os
import signal
import time
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import IO

from camoxpert.errors import Stopped

DEADLINE_CODE = 75
# With which a run can be asked to stop; the first of several wishes counts.
STOP_CODES = (130, 143, DEADLINE_CODE)


class StopFlag:
    """Whether a run should stop, and with which exit code.

    Args:
        max_hours: deadline from now, or None.
        clock: seconds, monotonic; a test gives its own.
    """

    def __init__(self, max_hours: float | None = None, clock: Callable[[], float] = time.monotonic):
        self.clock = clock
        self.deadline = None if max_hours is None else clock() + max_hours * 3600
        self.signal_number = 0
        self.agreed = 0

    def handle(self, number: int, frame: FrameType | None) -> None:
        """Note the signal; a second Ctrl-C leaves at once. No output and no file access in here."""
        if self.signal_number and number == signal.SIGINT:
            os._exit(130)
        self.signal_number = number

    def code(self) -> int:
        """Return 0 to go on, or the exit code to stop with: 130, 143 or 75."""
        if self.signal_number:
            return 128 + self.signal_number
        if self.deadline is not None and self.clock() >= self.deadline:
            return DEADLINE_CODE
        return 0

    def agree(self, wishes: Mapping[str, float]) -> None:
        """Note what the processes of a run want together: ``stop 75`` and its like -> how many."""
        wanted = [code for code in STOP_CODES if wishes.get(f"stop {code}")]
        self.agreed = self.agreed or (wanted[0] if wanted else 0)

    def check(self, what: str) -> None:
        """Raise Stopped if asked to stop; for places where nothing needs saving."""
        if self.code():
            raise self.stopped(what)

    def stopped(self, what: str) -> Stopped:
        """Build the exception that ends the run."""
        code = self.agreed or self.code()
        why = {130: "Ctrl-C", 143: "SIGTERM", DEADLINE_CODE: "--max-hours is over"}.get(
            code, "signal"
        )
        error = Stopped(f"Stopped ({why}). {what}")
        error.exit_code = code
        return error


@contextmanager
def watch(flag: StopFlag) -> Iterator[StopFlag]:
    """Route SIGINT and SIGTERM to the flag for the time of the block."""
    numbers = (signal.SIGINT, signal.SIGTERM)
    try:
        previous = {number: signal.signal(number, flag.handle) for number in numbers}
    except ValueError:
        # Not the main thread (a notebook's helper, a test): signals stay as they are.
        yield flag
        return
    try:
        yield flag
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def try_lock(run_dir: Path) -> IO[str] | None:
    """Claim a run folder for this process; None where another live process has it.

    The kernel drops the lock when the process dies, however it dies. Its data workers let go of it
    at once: they outlive a killed parent by seconds, and the same command would begin a new run.
    """
    # A link somebody planted under this name is refused, not followed.
    handle = os.open(run_dir / ".lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
    file = os.fdopen(handle, "w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        return None
    except OSError:
        # A file system without locks: nobody can claim anything there.
        pass
    _HELD.add(file)
    return file


_HELD: weakref.WeakSet[IO[str]] = weakref.WeakSet()


def _let_go() -> None:
    """Close the locks that a forked process inherited; those of its parent stay."""
    for file in list(_HELD):
        file.close()
    _HELD.clear()


os.register_at_fork(after_in_child=_let_go)
