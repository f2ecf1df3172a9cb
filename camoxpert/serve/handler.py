"""One request: checked, read, answered. No part of it becomes a path or part of an answer."""

from __future__ import annotations

import errno
import io
import socket
from collections.abc import Callable
from concurrent.futures import CancelledError
from concurrent.futures import TimeoutError as NotInTime
from contextlib import suppress
from functools import partial
from http.client import HTTPException
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import TYPE_CHECKING
from urllib.parse import parse_qsl

from camoxpert import console
from camoxpert.serve.analysis import KINDS
from camoxpert.serve.answers import Answer, Fault
from camoxpert.serve.checks import (
    MOST_BYTES,
    body_length,
    check_host,
    check_same_site,
    check_type,
)
from camoxpert.serve.reading import LimitedReader, receive

if TYPE_CHECKING:
    from camoxpert.serve.server import Server

FULL = (errno.ENOSPC, errno.EDQUOT)
POSTS = {f"/api/{kind}": kind for kind in KINDS}
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = (
    ("Content-Security-Policy", POLICY),
    ("X-Content-Type-Options", "nosniff"),
    ("X-Frame-Options", "DENY"),
    ("Referrer-Policy", "no-referrer"),
    ("Cross-Origin-Resource-Policy", "same-origin"),
    ("Cross-Origin-Opener-Policy", "same-origin"),
    ("Cache-Control", "no-store"),
    ("Connection", "close"),
)
"""Of every answer."""
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
        """Close the connection; read the rest of a refused body first."""
        with suppress(OSError, ValueError, HTTPException):
            if self._unread:
                self._drain()
        super().finish()

    def _serve(self, answering: Callable[[], Answer]) -> None:
        try:
            check_host(self.headers, self.server.names)
            answer = answering()
        except Fault as fault:
            answer = fault.answer()
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
        if self.headers.get("Expect", "").lower() == "100-continue":
            self.send_response_only(100)
            self.end_headers()
        self._limits.allow(length, self.server.patience.body)
        try:
            # In a folder that only this process's user can enter, under a name that nobody sent.
            file = NamedTemporaryFile(dir=self.server.folder, delete=False)  # noqa: SIM115
            path = Path(file.name)
            try:
                with file:
                    receive(self.rfile, length, file)  # type: ignore[arg-type]
                self._unread = False
                return self._worked_on(path, POSTS[place], threshold)
            finally:
                path.unlink(missing_ok=True)
        except OSError as error:
            if error.errno not in FULL:
                raise
            raise Fault(507, "The server has no room for the file.") from None

    def _worked_on(self, path: Path, kind: str, threshold: float | None) -> Answer:
        work = partial(self.server.analyst.answer, path, kind, threshold)
        future = self.server.worker.submit(work)
        try:
            return future.result(self.server.patience.work)
        except Fault:
            raise
        except (NotInTime, CancelledError):
            future.cancel()
            raise Fault(503, "The image was not worked on in time. Try again later.") from None
        except Exception as error:
            console.warn(f"an image could not be worked on: {type(error).__name__}: {error}")
            raise Fault(500, "The server failed on this image; its window says why.") from None

    def _refuse_method(self) -> Answer:
        raise Fault(405, "Only GET and POST are known here.", (("Allow", "GET, HEAD, POST"),))

    def _send(self, answer: Answer) -> None:
        self.close_connection = True
        self.connection.settimeout(self.server.patience.send)
        self.send_response(answer.status)
        length = ("Content-Length", str(len(answer.body)))
        for header in (*HEADERS, ("Content-Type", answer.content_type), length, *answer.headers):
            self.send_header(*header)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(answer.body)

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
        threshold = float(text)
    except ValueError:
        name, threshold = "", 0.0
    if name != "threshold" or not 0 <= threshold <= 1:
        raise Fault(400, "The only parameter is threshold, a number from 0 to 1.")
    return threshold
