"""The open connections of a server: counted once, refused above a limit, closed at the end."""

from __future__ import annotations

import socket
import threading
import time
from collections import deque
from contextlib import suppress

MOST_CONNECTIONS = 32
"""Open at once, each with a thread; further ones are answered with 503."""
LINGER_SECONDS = 2.0
"""For a refused sender to read its answer: closing while it still sends would destroy that."""
MOST_DISCARDED = 1_000_000
"""Bytes of a refused sender that are discarded at one look."""


class Connections:
    """Counts connections; every method may be called by any thread, except ``refuse`` and ``look``,
    which the accepting thread calls.

    Args:
        most: that may be open at once.
    """

    def __init__(self, most: int = MOST_CONNECTIONS) -> None:
        self.most = most
        self._condition = threading.Condition()
        self._open: set[socket.socket] = set()
        self._refused: deque[tuple[float, socket.socket]] = deque()

    def __len__(self) -> int:
        """Return the number of open connections."""
        return len(self._open)

    def enter(self, connection: socket.socket) -> bool:
        """Count a connection; return whether there is room for it."""
        with self._condition:
            if len(self._open) >= self.most:
                return False
            self._open.add(connection)
            return True

    def leave(self, connection: socket.socket) -> None:
        """Give back the place of a connection, once or more often."""
        with self._condition:
            self._open.discard(connection)
            self._condition.notify_all()

    def refuse(self, connection: socket.socket, answer: bytes) -> None:
        """Send an answer without waiting, and close the connection when the sender has read it."""
        try:
            connection.settimeout(0)
            connection.send(answer)
            connection.shutdown(socket.SHUT_WR)
        except OSError:
            connection.close()
            return
        if len(self._refused) >= self.most:
            self._refused.popleft()[1].close()
        self._refused.append((time.monotonic() + LINGER_SECONDS, connection))

    def look(self) -> None:
        """Close the refused connections whose senders have left or had their time."""
        for _ in range(len(self._refused)):
            until, connection = self._refused.popleft()
            if time.monotonic() < until and not _discarded(connection):
                self._refused.append((until, connection))
            else:
                connection.close()

    def end_reading(self) -> None:
        """Read no further from any connection: who sends nothing is not waited for."""
        with self._condition:
            for connection in self._open:
                with suppress(OSError):
                    connection.shutdown(socket.SHUT_RD)
        while self._refused:
            self._refused.popleft()[1].close()

    def wait_until_closed(self, seconds: float) -> None:
        """Wait until no connection is open, at most so long."""
        with self._condition:
            self._condition.wait_for(lambda: not self._open, seconds)


def _discarded(connection: socket.socket) -> bool:
    """Discard what has arrived; return whether the sender has closed its side."""
    discarded = 0
    try:
        while discarded < MOST_DISCARDED:
            piece = connection.recv(65_536)
            if not piece:
                return True
            discarded += len(piece)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return False
