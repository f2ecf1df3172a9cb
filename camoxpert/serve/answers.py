"""What the server answers: bytes with a status, or a fault with one readable paragraph."""

from __future__ import annotations

import json
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

from camoxpert import console
from camoxpert.files import finite

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


@dataclass(frozen=True)
class Answer:
    """An answer.

    Attributes:
        body: what is sent.
        content_type: of the body.
        status: HTTP status.
        headers: more headers; none of their values comes from a request.
    """

    body: bytes
    content_type: str
    status: int = 200
    headers: tuple[tuple[str, str], ...] = ()

    @property
    def all_headers(self) -> tuple[tuple[str, str], ...]:
        """Every header that is sent, except the server's name and the date."""
        length = ("Content-Length", str(len(self.body)))
        return (*HEADERS, ("Content-Type", self.content_type), length, *self.headers)


class Fault(Exception):
    """A request without a result, whatever the reason: the only error of a check or a reader.

    Its text is shown to the user and quotes nothing of the request.

    Args:
        status: HTTP status, 400 or above.
        text: what is wrong and what to do.
        headers: more headers of the answer.
    """

    def __init__(self, status: int, text: str, headers: tuple[tuple[str, str], ...] = ()) -> None:
        super().__init__(text)
        self.status = status
        self.headers = headers

    def answer(self) -> Answer:
        """Return the fault as ``{"error": text}``."""
        return json_answer({"error": str(self)}, status=self.status, headers=self.headers)


def json_answer(
    value: Any, *, status: int = 200, headers: tuple[tuple[str, str], ...] = ()
) -> Answer:
    """Return a value as JSON; numbers that are not finite become null."""
    body = json.dumps(finite(value), allow_nan=False).encode()
    return Answer(body, "application/json", status, headers)


def response(answer: Answer) -> bytes:
    """Return an answer as it is sent, for a sender whose request is not read."""
    lines = [f"HTTP/1.1 {answer.status} {HTTPStatus(answer.status).phrase}"]
    lines += [f"{name}: {value}" for name, value in answer.all_headers]
    return "\r\n".join((*lines, "", "")).encode("latin-1") + answer.body


def warn_of(what: str, error: BaseException) -> None:
    """Print an unexpected error; its text may hold bytes of an image or a request.

    Args:
        what: what failed, as the start of a sentence.
        error: the error.
    """
    text = "".join(letter if letter.isprintable() else " " for letter in str(error))
    console.warn(f"{what}: {type(error).__name__}: {text[:500]}")
