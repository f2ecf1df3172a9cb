"""Read a request within limits of time and size, whoever sends it and however slowly."""

from __future__ import annotations

import http.client
import io
import socket
import time
from dataclasses import dataclass
from typing import IO

from camoxpert.serve.answers import Fault

HEAD_BYTES = 131_072
"""Of the request line and the headers; the standard library takes lines of up to 64 KiB."""
PIECE = 65_536


@dataclass(frozen=True)
class Patience:
    """How long a server waits for those who ask it, seconds.

    Attributes:
        head: for the request line and the headers.
        body: for all of a body; by default 20 MB at 3 Mbit/s.
        work: for the image to be worked on, and those before it.
        send: for all of an answer to be taken, and as long again for every 20 MB of it.
        rest: for the rest of a body that was refused. A connection that is closed before is an
            error to a browser, which then shows no answer.
        closing: for answers to be taken when the server is stopped; the image that is being
            analysed is finished first, without a limit.
    """

    head: float = 10.0
    body: float = 60.0
    work: float = 600.0
    send: float = 60.0
    rest: float = 5.0
    closing: float = 10.0


class LimitedReader(io.RawIOBase):
    """Reads from a connection until a deadline, and no more than a number of bytes.

    A timeout of the socket alone starts again with every byte: one byte a second would hold a
    connection for as long as its sender likes.

    Args:
        connection: a connected socket.
        seconds: for the head of the request.
    """

    def __init__(self, connection: socket.socket, seconds: float) -> None:
        self._connection = connection
        self._left = 0
        self._deadline = 0.0
        self.allow(HEAD_BYTES, seconds)

    def allow(self, more_bytes: int, seconds: float) -> None:
        """Allow so many bytes more, until so many seconds from now."""
        self._left += more_bytes
        self._deadline = time.monotonic() + seconds

    def readable(self) -> bool:
        """Return True."""
        return True

    # Narrower than any writable buffer: BufferedReader gives one of these two.
    def readinto(self, buffer: bytearray | memoryview) -> int:  # type: ignore[override]
        """Read what is there; return the number of bytes, 0 at the end.

        Raises:
            TimeoutError: the time is over.
            HTTPException: the bytes are used up; the standard library answers it.
        """
        remaining = self._deadline - time.monotonic()
        if remaining <= 0:
            raise TimeoutError("the time for the request is over")
        if self._left <= 0:
            raise http.client.HTTPException("the request is too long")
        self._connection.settimeout(remaining)
        with memoryview(buffer) as whole, whole[: self._left] as part:
            number = self._connection.recv_into(part)
        self._left -= number
        return number


def receive(source: io.BufferedIOBase, length: int, file: IO[bytes]) -> None:
    """Copy a body of known length into a file, piece by piece.

    Raises:
        Fault: it ends early or takes too long.
    """
    left = length
    try:
        while left:
            piece = source.read1(min(left, PIECE))
            if not piece:
                raise Fault(400, "The body ends before its Content-Length. Send it again.")
            file.write(piece)
            left -= len(piece)
    except TimeoutError:
        raise Fault(408, "The file took too long to arrive. Send it again.") from None
