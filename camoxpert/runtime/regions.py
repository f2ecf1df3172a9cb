"""Named parts of a training step that a profiler can listen to; no cost while none does."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

Listener = Callable[[str], AbstractContextManager[object]]

_listener: Listener = nullcontext


def region(name: str) -> AbstractContextManager[object]:
    """Return a context that marks its block as the named part of the step."""
    return _listener(name)


@contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Enter ``listener(name)`` around every region inside the block.

    Args:
        listener: such as ``ComponentTimer.region`` or ``torch.profiler.record_function``.
    """
    global _listener
    before, _listener = _listener, listener
    try:
        yield
    finally:
        _listener = before
