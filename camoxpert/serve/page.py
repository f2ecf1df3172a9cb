"""What the server sends without an image: the page, its style and script, and what the model is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from camoxpert.pages.render import ENVIRONMENT
from camoxpert.serve.answers import Answer, json_answer
from camoxpert.text import count


@dataclass(frozen=True)
class PageFacts:
    """What the page shows before an image is sent.

    Attributes:
        facts: of the model, in words.
        presence: ``calibrated`` or ``uncalibrated``; empty: the model has no presence head.
        threshold: at which the slider stands first, percent.
        bytes: of a file at most.
        megabytes, megapixels: limits in words.
    """

    facts: tuple[str, ...]
    presence: str
    threshold: int
    bytes: int
    megabytes: str
    megapixels: str


def assets(model: Mapping[str, Any], *, device: str) -> dict[str, Answer]:
    """Return path -> answer of everything that is sent to GET.

    Args:
        model: see ``Analyst.describe``.
        device: that works on the images, in words.
    """
    limits, experts = model["limits"], model["experts"]
    mixture = f"{count(len(experts), 'expert')} on {len(model['levels'])} levels"
    facts = PageFacts(
        facts=(
            f"{model['backbone']} at {model['img_size']} px",
            *([mixture] if experts else []),
            device,
        ),
        presence=model["presence"] or "",
        threshold=round(100 * model["threshold"]),
        bytes=limits["bytes"],
        megabytes=f"{limits['bytes'] / 1e6:g}",
        megapixels=f"{limits['pixels'] / 1e6:g}",
    )
    page = ENVIRONMENT.get_template("serve.html.j2").render(page=facts)
    style = "\n".join(_source(name) for name in ("style.css", "serve.css"))
    return {
        "/": Answer(page.encode(), "text/html; charset=utf-8"),
        "/page.css": Answer(style.encode(), "text/css; charset=utf-8"),
        "/page.js": Answer(_source("serve.js").encode(), "text/javascript; charset=utf-8"),
        "/api/model": json_answer(dict(model)),
    }


def _source(name: str) -> str:
    return ENVIRONMENT.get_template(name).render()
