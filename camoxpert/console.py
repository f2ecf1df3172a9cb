"""What the user sees: decisions and results on stdout, notes, warnings and progress on stderr.

Ranks above 0 of a distributed run are silent because of this module alone. Progress is a live line
on a terminal and an occasional plain line in a log file.
"""

from __future__ import annotations

import io
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager
from types import TracebackType
from typing import NoReturn, TextIO, TypeVar, cast

from tqdm import tqdm

from camoxpert import stop

T = TypeVar("T")
LOG_EVERY_SECONDS = 30.0
LABEL_WIDTH = 12

_silent = False
_muted = False
_decisions: list[str] = []
_listeners: list[Callable[[str], None]] = []


class _Nowhere(io.TextIOBase):
    """Stands for the standard error of a process without one (a daemon, pythonw)."""

    def write(self, text: str) -> int:
        return len(text)


_NOWHERE = _Nowhere()


def _stderr() -> TextIO:
    """Return the standard error; ``print`` would write to stdout where there is none."""
    missing = sys.stderr is None or sys.stderr.closed
    # It has what the callers use of a TextIO: ``write`` and ``flush``.
    return cast(TextIO, _NOWHERE) if missing else sys.stderr


def set_silent(silent: bool) -> None:
    """Silence this process, because another rank prints for the run, or undo that."""
    global _silent
    _silent = silent


@contextmanager
def muted() -> Iterator[None]:
    """Print nothing inside the block: neither lines nor warnings nor bars; listeners still hear."""
    global _muted
    before, _muted = _muted, True
    try:
        yield
    finally:
        _muted = before


def _quiet() -> bool:
    return _silent or _muted


def say(text: str = "") -> None:
    """Print a line of results or status to stdout."""
    if not _quiet() and sys.stdout is not None and not sys.stdout.closed:
        print(text, flush=True)


def decide(topic: str, text: str) -> None:
    """Print a decision with its reason under a topic, and remember it for ``run.json``.

    An empty topic continues the decision before it.
    """
    line = f"{topic:<{LABEL_WIDTH}}{text}"
    _decisions.append(line)
    say(line)


@contextmanager
def remembering() -> Iterator[list[str]]:
    """Return the list that collects the decisions made inside the block."""
    global _decisions
    before, _decisions = _decisions, []
    try:
        yield _decisions
    finally:
        _decisions = before


def note(text: str) -> None:
    """Print a remark to stderr: stdout may hold a table or JSON that a program reads."""
    if not _quiet():
        print(text, file=_stderr(), flush=True)


def warn(text: str) -> None:
    """Print a warning to stderr and pass it to the listeners, such as the log of a run."""
    for listener in _listeners:
        listener(text)
    note(f"{'warning':<{LABEL_WIDTH}}{text}")


@contextmanager
def heard_by(listener: Callable[[str], None]) -> Iterator[None]:
    """Call ``listener`` with the text of every warning inside the block, also on silent ranks."""
    _listeners.append(listener)
    try:
        yield
    finally:
        _listeners.remove(listener)


@contextmanager
def progress(description: str, *, total: int | None, done: int = 0) -> Iterator[tqdm[NoReturn]]:
    """Show a progress bar that the block updates by hand; it should call ``stop.check`` itself.

    In a log file or a notebook the bar is a line every half minute, and nothing for what takes
    less.

    Args:
        description: shown before the bar.
        total: number of items, or None if unknown.
        done: items that were finished before.
    """
    live = _stderr().isatty()
    with tqdm(
        desc=description,
        total=total,
        initial=done,
        ascii=" #",
        file=_stderr() if live else _Lines(),
        leave=False,
        ncols=None if live else 80,
        delay=0 if live else LOG_EVERY_SECONDS,
        mininterval=0.1 if live else LOG_EVERY_SECONDS,
        maxinterval=LOG_EVERY_SECONDS,
        disable=_quiet(),
    ) as bar:
        yield bar


def track(iterable: Iterable[T], description: str, *, total: int | None = None) -> Iterator[T]:
    """Iterate under a progress bar, and stop between two items when a stop was requested.

    Args:
        iterable: the items.
        description: shown before the bar.
        total: number of items; None takes ``len(iterable)`` if it has a length.

    Raises:
        Stopped: Ctrl-C, SIGTERM or the deadline.
    """
    if total is None and isinstance(iterable, Sized):
        total = len(iterable)
    with progress(description, total=total) as bar:
        for item in iterable:
            stop.check()
            yield item
            bar.update()


class TrainingBar:
    """The bar of one epoch.

    ``Epoch 1/30: 45%|####      | 1350/3000 [02:15<03:10, 8.2it/s, loss=1.2340, gpu=87%, data=3%]``

    Args:
        total: micro-batches of the epoch.
        epoch, epochs: position, from 1.
        stage: shown behind the epoch, or "".
        initial: micro-batches already done (a resumed epoch).
        live: True on a terminal, False in a log file; None asks stderr.
    """

    def __init__(
        self,
        *,
        total: int,
        epoch: int,
        epochs: int,
        stage: str = "",
        initial: int = 0,
        live: bool | None = None,
    ) -> None:
        label = f"Epoch {epoch}/{epochs}" + (f" ({stage})" if stage else "")
        self._live = (_stderr().isatty() if live is None else live) and not _quiet()
        self._last_line = time.monotonic()
        self._tenths = 10 * initial // max(total, 1)
        self._bar = tqdm(
            total=total,
            initial=initial,
            desc=label,
            ascii=" #",
            bar_format="{desc}: {percentage:.0f}%|{bar:10}| {n_fmt}/{total_fmt} "
            "[{elapsed}<{remaining}, {rate_fmt}{postfix}]",
            # Carriage returns garble a log file: tqdm stays silent, _log_line prints instead.
            file=_stderr() if self._live else io.StringIO(),
            leave=False,
            mininterval=0.2,
        )

    def update(
        self,
        n: int = 1,
        *,
        loss: float | None,
        gpu: str,
        memory: int | None,
        data_wait: float | None,
    ) -> None:
        """Advance by ``n`` micro-batches.

        Args:
            n: micro-batches done.
            loss: of the step before, or None.
            gpu: text of the monitor, such as ``gpu=87%``.
            memory: peak bytes on the device, or None.
            data_wait: share of the time spent waiting for data, 0..1, or None.
        """
        parts = [f"loss={loss:.4f}" if loss is not None else "", gpu]
        parts.append(f"mem={memory / 1e9:.1f}G" if memory is not None else "")
        parts.append(f"data={data_wait:.0%}" if data_wait is not None else "")
        self._bar.set_postfix_str(", ".join(part for part in parts if part), refresh=False)
        self._bar.update(n)
        if not self._live and not _quiet():
            self._log_line()

    def text(self) -> str:
        """Return the bar as it would be shown now."""
        return str(self._bar)

    def _log_line(self) -> None:
        tenths = 10 * int(self._bar.n) // max(int(self._bar.total or 0), 1)
        due = time.monotonic() - self._last_line >= LOG_EVERY_SECONDS
        if due or tenths == 10 > self._tenths:
            self._last_line = time.monotonic()
            self._tenths = tenths
            print(self.text(), file=_stderr(), flush=True)

    def close(self) -> None:
        """Remove the live bar; its numbers are in the log records."""
        self._bar.close()

    def __enter__(self) -> TrainingBar:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


class _Lines(io.TextIOBase):
    """Turns a bar's redrawing into lines."""

    def write(self, text: str) -> int:
        line = text.strip()
        if line:
            print(line, file=_stderr(), flush=True)
        return len(text)
