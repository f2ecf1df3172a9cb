"""The templates: every value is escaped, a missing one is an error, and nothing is loaded."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers.pages import active_parts
from jinja2 import UndefinedError

from camoxpert.pages.render import ENVIRONMENT, draw

ROOT = Path(__file__).parents[2]
TEMPLATES = ENVIRONMENT.list_templates()
EVIL = "'\"><script>alert(1)</script>"


@pytest.mark.parametrize("name", TEMPLATES)
def test_no_template_switches_escaping_off(name: str) -> None:
    assert ENVIRONMENT.loader is not None
    source, _, _ = ENVIRONMENT.loader.get_source(ENVIRONMENT, name)
    assert "safe" not in source and "autoescape" not in source
    # The page of `serve` has one, in a file of its own server.
    script = '<script src="/page.js" defer></script>' if name == "serve.html.j2" else ""
    assert "<script" not in source.replace(script, "")


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


@pytest.mark.parametrize(
    "backend",
    [
        "module://matplotlib_inline.backend_inline",
        "module://ipykernel.pylab.backend_inline",
        "no such backend",
        "QtAgg",
    ],
)
def test_a_notebooks_backend_changes_no_chart(backend: str) -> None:
    """Notebooks export their backend to programs that may not have it, or have no display."""
    code = (
        "import os, sys\n"
        "from camoxpert.pages.charts import _empty_figure, plot_phases\n"
        "assert plot_phases({'train': 1.0}).startswith(b'\\x89PNG')\n"
        "canvas = type(_empty_figure(2, 2).canvas).__module__\n"
        "assert canvas == 'matplotlib.backends.backend_agg', canvas\n"
        f"assert os.environ['MPLBACKEND'] == {backend!r}\n"
        "assert not {'matplotlib.pyplot', 'ipykernel', 'torch'} & set(sys.modules)\n"
    )
    environment = {**os.environ, "MPLBACKEND": backend, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_charts_are_drawn_in_one_place() -> None:
    """pyplot takes the backend of the environment; no other module may import matplotlib."""
    importing = {
        path.name
        for path in (ROOT / "camoxpert").rglob("*.py")
        if re.search(r"^\s*(from|import) matplotlib", path.read_text(), re.MULTILINE)
    }
    assert importing == {"charts.py"}
    assert "pyplot" not in (ROOT / "camoxpert" / "pages" / "charts.py").read_text()
