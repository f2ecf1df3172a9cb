"""What every HTML page of the program shares: one file, no script, nothing from elsewhere."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape
from pathlib import Path

from camoxpert.files import write_bytes
from camoxpert.pages.style import STYLE


def write_html(path: Path, title: str, sections: Iterable[str]) -> Path:
    """Write a page, whole or not at all.

    Args:
        path: file.
        title: plain text.
        sections: HTML; whatever came from users must be escaped in it.
    """
    page = (
        "<!doctype html>\n<html lang='en'><head><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width,initial-scale=1'>"
        f"<title>{escape(title)}</title><style>{STYLE}</style></head>"
        f"<body><main>{''.join(sections)}</main></body></html>\n"
    )
    # File names may hold bytes that are no text.
    return write_bytes(path, page.encode("utf-8", "replace"))
