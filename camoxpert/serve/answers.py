"""What the server answers: bytes with a status, or a fault with one readable sentence."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from camoxpert.files import finite


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


class Fault(Exception):
    """A request that gets no result; its text is shown to the user and quotes nothing of it.

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
