"""Parts of an HTML page that a browser would load or run."""

from __future__ import annotations

import re
from html.parser import HTMLParser

FORBIDDEN = {"script", "iframe", "object", "embed", "link", "base", "form", "frame"}
LOADING = {"src", "href", "srcset", "poster", "data", "action", "formaction", "xlink:href"}


class _Reader(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.in_style = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in FORBIDDEN:
            self.found.append(f"<{tag}>")
        self.in_style = tag == "style"
        for name, value in attrs:
            if name.startswith("on"):
                self.found.append(f"{tag} {name}={value}")
            if name in LOADING and not (value or "").startswith(("data:image/", "#")):
                self.found.append(f"{tag} {name}={value}")
            if name == "style" and re.search(r"url\(|expression\(", value or ""):
                self.found.append(f"{tag} {name}={value}")

    def handle_endtag(self, tag: str) -> None:
        self.in_style = False

    def handle_data(self, data: str) -> None:
        if self.in_style and re.search(r"url\(|@import", data):
            self.found.append(f"style {data[:40]}")


def active_parts(page: str) -> list[str]:
    """Return everything on a page that runs code or loads something."""
    reader = _Reader()
    reader.feed(page)
    reader.close()
    return reader.found
