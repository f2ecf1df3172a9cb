"""The templates: every value is escaped, a missing one is an error, and nothing is loaded."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from helpers.pages import active_parts
from jinja2 import UndefinedError

from camoxpert.pages.render import ENVIRONMENT, draw

TEMPLATES = ENVIRONMENT.list_templates()
EVIL = "'\"><script>alert(1)</script>"


@pytest.mark.parametrize("name", TEMPLATES)
def test_no_template_switches_escaping_off(name: str) -> None:
    assert ENVIRONMENT.loader is not None
    source, _, _ = ENVIRONMENT.loader.get_source(ENVIRONMENT, name)
    assert "safe" not in source and "autoescape" not in source and "<script" not in source


@pytest.mark.parametrize("call", ["chart(x)", "gallery([x])", "tiles([(e, e)])", "pairs([(e, e)])"])
def test_shared_parts_escape_names(call: str) -> None:
    picture = SimpleNamespace(source="data:image/png;base64,xx", caption=EVIL, name=EVIL, fault="")
    text = "{% from 'macros.html.j2' import chart, gallery, pairs, tiles %}{{ " + call + " }}"
    page = ENVIRONMENT.from_string(text).render(x=picture, e=EVIL)
    assert active_parts(page) == [] and "&lt;script&gt;" in page


def test_a_missing_value_is_an_error() -> None:
    with pytest.raises(UndefinedError):
        ENVIRONMENT.from_string("{{ page.nothing }}").render(page=SimpleNamespace())


def test_a_chart_that_fails_says_why() -> None:
    def fail() -> bytes:
        raise ValueError("no such record")

    assert draw(fail, "time").fault == "no such record" and not draw(fail, "time").source
    assert draw(lambda: b"png", "time").source == "data:image/png;base64,cG5n"
