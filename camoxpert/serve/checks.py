"""Which requests are answered: of this server's own page, of programs, never of other sites.

A browser lets every page on the web send requests to 127.0.0.1. Three rules keep them out: the
``Host`` must be an address or a name of this server (a site that lets its own name lead here, DNS
rebinding, sends its own name), a request with an ``Origin`` must come from this server's page, and
an image must be sent as a content type that other sites cannot send without being allowed to.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Collection
from email.message import Message

from camoxpert.serve.answers import Fault

MOST_BYTES = 20_000_000
"""Of an image file that is sent."""
HOST = re.compile(r"(\[[0-9a-fA-F:.]+\]|[A-Za-z0-9._-]+)(?::[0-9]{1,5})?")


def check_host(headers: Message, names: Collection[str]) -> None:
    """Raise Fault unless the request names this server.

    Args:
        headers: of the request.
        names: lower-case names of this server. Every address is accepted: who types one is not led
            here by a name. Ports are not compared: a tunnel or a container changes them.
    """
    given = headers.get_all("Host") or []
    match = HOST.fullmatch(given[0]) if len(given) == 1 else None
    if match is None:
        raise Fault(400, "The request needs one header Host with a name or an address.")
    name = match[1].lower()
    if name not in names and not is_address(name.strip("[]")):
        raise Fault(
            403,
            "This server does not answer under that name. Open it by its address, as the command "
            "printed it.",
        )


def check_same_site(headers: Message) -> None:
    """Raise Fault if the page of another site sends the request."""
    origin = headers.get("Origin")
    foreign = origin is not None and origin.partition("://")[2].lower() != headers["Host"].lower()
    if foreign or headers.get("Sec-Fetch-Site", "same-origin") not in ("same-origin", "none"):
        raise Fault(403, "Pages of other sites may not send images to this server.")


def check_type(headers: Message) -> None:
    """Raise Fault unless the body is said to be an image or plain bytes.

    A missing type, text and forms are what pages of other sites can send without asking.
    """
    kind = headers.get_content_type()
    if not kind.startswith("image/") and kind != "application/octet-stream":
        raise Fault(
            415,
            "Send the image file itself as the body, with Content-Type: image/jpeg, image/png ... "
            "or application/octet-stream.",
        )


def body_length(headers: Message) -> int:
    """Return the length of the body.

    Raises:
        Fault: it is missing, ambiguous, or above MOST_BYTES.
    """
    given = headers.get_all("Content-Length") or []
    text = given[0].strip() if len(given) == 1 else ""
    if headers.get("Transfer-Encoding") is not None or not (text.isascii() and text.isdigit()):
        raise Fault(411, "The request needs one Content-Length, and no Transfer-Encoding.")
    # Python refuses to convert thousands of digits.
    length = int(text) if len(text) < 16 else MOST_BYTES + 1
    if length > MOST_BYTES:
        raise Fault(
            413,
            f"The file is too large: at most {MOST_BYTES // 1_000_000} MB are taken. Save the "
            "image smaller, or as JPEG.",
        )
    if length == 0:
        raise Fault(400, "The body is empty. Send an image file.")
    return length


def is_address(text: str) -> bool:
    """Return whether a text is an IP address."""
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True
