"""HTML pages from jinja2 templates: each is one file without scripts or external resources.

Templates escape every value, so names, settings and records from elsewhere stay text.
"""

from __future__ import annotations

import base64
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from camoxpert.files import write_bytes
from camoxpert.pages import pictures
from camoxpert.pages.tables import LOWER_IS_BETTER
from camoxpert.text import count


class Picture(NamedTuple):
    """An inlined picture: its data URI and its caption."""

    source: str
    caption: str


class Chart(NamedTuple):
    """An inlined chart: its name and its data URI, or why it could not be drawn."""

    name: str
    source: str = ""
    fault: str = ""


def write_page(path: Path, template: str, page: object) -> Path:
    """Render a template with ``page``, and write the file whole or not at all."""
    text = ENVIRONMENT.get_template(template).render(page=page)
    # File names may hold bytes that are not text.
    return write_bytes(path, text.encode("utf-8", "replace"))


def draw(make: Callable[[], bytes], name: str) -> Chart:
    """Return a chart from its PNG; without matplotlib, or with unusable records, say so instead."""
    try:
        return inline_png(name, make())
    except Exception as error:
        return Chart(name, fault=str(error))


def inline_png(name: str, data: bytes) -> Chart:
    """Return a chart from its PNG file."""
    return Chart(name, f"data:image/png;base64,{_base64(data)}")


def inline_jpeg(data: bytes) -> str:
    """Return a JPEG file as a data URI."""
    return f"data:image/jpeg;base64,{_base64(data)}"


def number(value: object) -> str:
    """Return three decimals, or a dash for anything that is not a number."""
    return f"{value:.3f}" if isinstance(value, int | float) else "–"


def arrow(measure: str) -> str:
    """Return the direction in which a measure gets better."""
    return "↓" if measure in LOWER_IS_BETTER else "↑"


def p_value(value: float) -> str:
    """Return a p-value with three decimals."""
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()


ENVIRONMENT = Environment(
    loader=FileSystemLoader(Path(__file__).parent / "templates"),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
ENVIRONMENT.filters.update(number=number, arrow=arrow, count=count, p_value=p_value)
ENVIRONMENT.globals["legend"] = (
    ("found", pictures.TRUE_POSITIVE),
    ("false alarm", pictures.FALSE_POSITIVE),
    ("missed", pictures.FALSE_NEGATIVE),
)
