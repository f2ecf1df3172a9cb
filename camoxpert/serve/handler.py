"""One request: checked, read, answered. No part of it becomes a path or part of an answer."""

from __future__ import annotations

import errno
import io
import re
import socket
import time
from collections.abc import Callable
from concurrent.futures import wait
from contextlib import suppress
from functools import partial
from http.client import HTTPException
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import IO, TYPE_CHECKING
from urllib.parse import parse_qsl

from camoxpert.serve.analysis import KINDS
from camoxpert.serve.answers import Answer, Fault, warn_of
from camoxpert.serve.checks import (
    MOST_BYTES,
    body_length,
    check_host,
    check_same_site,
    check_type,
)
from camoxpert.serve.reading import LimitedReader, receive
from camoxpert.serve.worker import closing

if TYPE_CHECKING:
    from camoxpert.serve.server import Server

FULL = (errno.ENOSPC, errno.EDQUOT)
POSTS = {f"/api/{kind}": kind for kind in KINDS}
LOOK_SECONDS = 0.2
"""Between two looks whether the sender of a waiting image is still there."""
NUMBER = re.compile(r"[0-9]{1,20}(\.[0-9]{0,20})?([eE]-?[0-9]{1,3})?|\.[0-9]{1,20}")
TEXTS = {
    414: "The address is too long.",
    431: "The headers are too long.",
    501: "The method is not known here.",
    505: "The version of HTTP is not known here.",
}
"""What the standard library refuses; its own sentences quote the request."""


class Handler(BaseHTTPRequestHandler):
    """Answers one request of a connection and closes it."""

    protocol_version = "HTTP/1.1"
    server: Server

    def setup(self) -> None:
        """Put limits on what is read."""
        super().setup()
        self.rfile.close()
        self._limits = LimitedReader(self.connection, self.server.patience.head)
        self.rfile = io.BufferedReader(self._limits)
        self._unread = True

    def do_GET(self) -> None:
        """Answer with the page, its style and script, or what the model is."""
        self._serve(self._get)

    def do_HEAD(self) -> None:
        """Answer as to GET, without the body."""
        self._serve(self._get)

    def do_POST(self) -> None:
        """Answer with the result of an image."""
        self._serve(self._post)

    def do_OPTIONS(self) -> None:
        """Refuse: pages of other sites ask so whether they may send an image."""
        self._serve(self._refuse_method)

    do_PUT = do_DELETE = do_PATCH = do_OPTIONS

    def handle_expect_100(self) -> bool:
        """Wait with "100 Continue" until the headers were checked; ``_post`` sends it."""
        return True

    def version_string(self) -> str:
        """Return the name of the program without versions."""
        return "camoxpert"

    def log_message(self, format: str, *given: object) -> None:
        """Print nothing: it would be text of the sender's."""

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Answer what the standard library refuses, without quoting the request."""
        self._send(Fault(code, TEXTS.get(code, "The request cannot be understood.")).answer())

    def finish(self) -> None:
        """Close the connection; read first what else was sent.

        It is the rest of a refused body, or bytes that no Content-Length announced.
        """
        with suppress(OSError, ValueError, HTTPException):
            if self._unread or self._more_came():
                self._drain()
        super().finish()

    def _serve(self, answering: Callable[[], Answer]) -> None:
        try:
            check_host(self.headers, self.server.names)
            answer = answering()
        except Fault as fault:
            answer = fault.answer()
        except (ConnectionError, TimeoutError):
            # The sender has left, or takes nothing.
            raise
        except Exception as error:
            warn_of("a request failed", error)
            text = "The server failed on this request; its window says why. Try again."
            answer = Fault(500, text).answer()
        self._send(answer)

    def _get(self) -> Answer:
        # Most have no body.
        self._unread = "Content-Length" in self.headers or "Transfer-Encoding" in self.headers
        path = self.path.partition("?")[0]
        if path in self.server.assets:
            return self.server.assets[path]
        if path in POSTS:
            raise Fault(405, "Send an image with POST.", (("Allow", "POST"),))
        raise Fault(404, "There is nothing here. The page is at /.")

    def _post(self) -> Answer:
        place, _, query = self.path.partition("?")
        if place in self.server.assets:
            return self._refuse_method()
        if place not in POSTS:
            raise Fault(404, f"There is nothing here. Images go to {', '.join(POSTS)}.")
        check_same_site(self.headers)
        check_type(self.headers)
        length = body_length(self.headers)
        threshold = threshold_of(query)
        # Before the body: it would be sent for nothing.
        self.server.worker.check_free()
        expects = self.headers.get("Expect", "").lower() == "100-continue"
        if expects and self.request_version != "HTTP/1.0":
            self.send_response_only(100)
            self.end_headers()
        self._limits.allow(length, self.server.patience.body)
        try:
            file = self.server.uploads.create()
            path = Path(file.name)
            try:
                with file:
                    self._receive(length, file)
                self._unread = False
                return self._analysed(path, POSTS[place], threshold)
            finally:
                # Where it was never decoded.
                path.unlink(missing_ok=True)
        except OSError as error:
            if error.errno not in FULL:
                raise
            raise Fault(
                507, "The server's disk has no room for the file. Try again later."
            ) from None

    def _receive(self, length: int, file: IO[bytes]) -> None:
        """Read the body into a file."""
        try:
            receive(self.rfile, length, file)
        except Fault:
            if self.server.closed:
                raise closing() from None
            raise

    def _analysed(self, path: Path, kind: str, threshold: float | None) -> Answer:
        """Queue an image and return its answer."""
        worker = self.server.worker
        future = worker.submit(partial(self.server.analyst.answer, path, kind, threshold))
        until = time.monotonic() + self.server.patience.work
        while not wait([future], LOOK_SECONDS).done:
            # A read that is not waited for: an end means that the sender has closed its side.
            if self._sender_left() and worker.cancel(future, left=True):
                raise ConnectionAbortedError("the sender has left")
            if time.monotonic() > until:
                worker.cancel(future)
                raise Fault(503, "The image was not analysed in time. Try again later.")
        error = future.exception()
        if isinstance(error, Fault):
            raise error
        if error is not None:
            warn_of("an image could not be analysed", error)
            raise Fault(
                500, "The server failed on this image; its window says why. Try another image."
            )
        return future.result()

    def _sender_left(self) -> bool:
        self.connection.settimeout(0)
        try:
            return not self.connection.recv(1, socket.MSG_PEEK) and not self.server.closed
        except BlockingIOError:
            return False
        except OSError:
            return True

    def _refuse_method(self) -> Answer:
        raise Fault(405, "Only GET and POST are known here.", (("Allow", "GET, HEAD, POST"),))

    def _send(self, answer: Answer) -> None:
        self.close_connection = True
        # The limit of a socket is for all that is sent at once, not for a piece of it.
        longer = len(answer.body) / MOST_BYTES
        self.connection.settimeout(self.server.patience.send * (1 + longer))
        self.send_response(answer.status)
        for header in answer.all_headers:
            self.send_header(*header)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(answer.body)

    def _more_came(self) -> bool:
        # A connection that is closed with unread bytes is reset, and its answer may be lost.
        self.connection.settimeout(0)
        try:
            return bool(self.connection.recv(1, socket.MSG_PEEK))
        except BlockingIOError:
            return False

    def _drain(self) -> None:
        self.connection.shutdown(socket.SHUT_WR)
        self._limits.allow(2 * MOST_BYTES, self.server.patience.rest)
        while self.rfile.read(65_536):
            pass


def threshold_of(query: str) -> float | None:
    """Return the threshold of a query, None where it has none.

    Raises:
        Fault: another parameter, or a value out of range.
    """
    if not query:
        return None
    try:
        ((name, text),) = parse_qsl(query, strict_parsing=True, max_num_fields=1)
    except ValueError:
        name = text = ""
    # float() also takes 0.5_0, spaces and the digits of other alphabets.
    threshold = float(text) if NUMBER.fullmatch(text) else -1.0
    if name != "threshold" or not 0 <= threshold <= 1:
        raise Fault(400, "The only parameter is threshold, a number from 0 to 1.")
    return threshold
