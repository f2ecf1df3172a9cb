"""The documentation site: built without a warning, complete, and independent of the internet."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType

import pytest
import yaml

import camoxpert
from camoxpert.cli import COMMANDS, KINDS, command_parser

pytest.importorskip("mkdocs", reason="mkdocs is not installed")
pytest.importorskip("mkdocstrings", reason="mkdocstrings is not installed")

ROOT = Path(__file__).parents[2]
NAMES = [(name,) for name in COMMANDS] + list(KINDS)


def load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("docs_site", ROOT / "tools" / "docs_site.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def build(target: Path, root: Path = ROOT) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(root), "NO_MKDOCS_2_WARNING": "1"}
    command = [sys.executable, "-m", "mkdocs", "build", "--site-dir", str(target)]
    return subprocess.run(
        command, cwd=root, env=environment, capture_output=True, text=True, timeout=250
    )


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("site")
    done = build(target)
    assert done.returncode == 0 and "WARNING" not in done.stderr, done.stderr
    return target


class Reader(HTMLParser):
    """Collects what a page loads, what it links to, its anchors and its text."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.links: list[str] = []
        self.anchors: set[str] = set()
        self.text = ""
        self.feed(page.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        if "src" in values:
            self.loads.append(values["src"])
        if "href" in values:
            (self.loads if tag == "link" else self.links).append(values["href"])
        self.anchors |= {values[name] for name in ("id", "name") if values.get(name)}

    def handle_data(self, data: str) -> None:
        self.text += data


def test_nothing_comes_from_the_internet(site: Path) -> None:
    pages = list(site.rglob("*.html"))
    assert len(pages) > 40
    for page in pages:
        foreign = [url for url in Reader(page).loads if re.match(r"(https?:)?//", url)]
        assert not foreign, (page, foreign)
    styles = "".join(path.read_text() for path in site.rglob("*.css"))
    assert not re.search(r"(url\(|@import )[\"']?(https?:)?//", styles)


def test_every_link_leads_to_a_page_or_file_of_the_site(site: Path) -> None:
    pages = {path: Reader(path) for path in site.rglob("*.html") if path.name != "404.html"}
    checked = 0
    for page, read in pages.items():
        for link in read.links:
            if re.match(r"[a-z]+:", link):
                continue
            path, _, anchor = link.partition("#")
            target = (page.parent / path).resolve() if path else page
            assert target.is_file(), (page, link)
            if anchor and target in pages and not anchor.startswith("__"):
                assert anchor in pages[target].anchors, (page, link)
            checked += 1
    assert checked > 2000


@pytest.mark.parametrize("words", NAMES, ids=" ".join)
def test_a_commands_page_holds_its_help(site: Path, words: tuple[str, ...]) -> None:
    page = site / "commands" / f"{'-'.join(words)}.html"
    said = " ".join(Reader(page).text.split())
    parser, _, _ = command_parser(words)
    formatter = parser._get_formatter()
    for action in parser._actions:
        for part in (*action.option_strings, formatter._expand_help(action)):
            assert " ".join(part.replace("`", "").split()) in said, part


def test_the_reference_names_the_whole_public_api(site: Path) -> None:
    anchors = Reader(site / "reference.html").anchors
    public = {name for name in camoxpert.__all__ if not name.startswith("__")}
    missing = {name for name in public if f"camoxpert.{name}" not in anchors}
    assert not missing
    assert any(anchor.endswith("Predictor.stream") for anchor in anchors)


def test_a_page_that_nobody_placed_stands_under_more(site: Path) -> None:
    filled = load()._filled([{"Start": ["index.md"]}, {"More": ["*"]}], ["new.md"])
    assert filled == [{"Start": ["index.md"]}, {"More": ["new.md"]}]
    assert load()._filled([{"More": ["*"]}], []) == []
    text = Reader(site / "index.html").text
    for page in (ROOT / "docs").glob("*.md"):
        title = page.read_text().partition("\n")[0].removeprefix("# ")
        assert title.replace("`", "") in text, f"{page.name} is not in the navigation"


def test_links_between_files_become_links_of_the_site() -> None:
    tool = load()
    text = "[a](../examples) [b](data.md#cache) [c](https://x.y) [d](#e)\n```\n[f](../g)\n```"
    assert tool.relinked(text, "docs/api.md", "api.md") == (
        "[a](source/examples/index.md) [b](data.md#cache) [c](https://x.y) [d](#e)\n"
        "```\n[f](../g)\n```"
    )
    assert tool.relinked("[a](docs/api.md#x) [b](LICENSE)", "README.md", "project/README.md") == (
        "[a](../api.md#x) [b](../source/LICENSE.md)"
    )


def test_help_is_shown_as_it_is() -> None:
    escaped = load()._escaped("<a> *b* [none] `--c <d>` 50 %")
    assert escaped == r"\<a\> \*b\* \[none\] `--c <d>` 50 %"


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """Return the settings of a site of one page, in a repository of its own."""
    (tmp_path / "docs").mkdir()
    (tmp_path / "tools").mkdir()
    tool = (ROOT / "tools" / "docs_site.py").read_text()
    (tmp_path / "tools" / "docs_site.py").write_text(tool)
    (tmp_path / "camoxpert").symlink_to(ROOT / "camoxpert")
    settings = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
    kept = {name: settings[name] for name in ("site_name", "strict", "validation", "hooks")}
    kept |= {"theme": {"name": "material", "font": False}, "use_directory_urls": False}
    kept["nav"] = ["index.md", {"More": ["*"]}]
    (tmp_path / "mkdocs.yml").write_text(yaml.safe_dump(kept))
    return tmp_path


def test_files_that_pages_link_to_become_part_of_the_site(small: Path) -> None:
    (small / "notebooks").mkdir()
    (small / "notebooks" / "a.ipynb").write_text("{}")
    (small / "notebooks" / "b.py").write_text("print(1)\n")
    text = "# Page\n\n[x](../notebooks/a.ipynb) [y](../notebooks) [z](new.md)\n"
    (small / "docs" / "index.md").write_text(text)
    (small / "docs" / "new.md").write_text("# New\n")
    done = build(small / "site", small)
    assert done.returncode == 0 and "WARNING" not in done.stderr, done.stderr
    source = small / "site" / "source" / "notebooks"
    assert (source / "a.ipynb").read_text() == "{}"
    listed = Reader(source / "index.html").links
    assert "a.ipynb" in listed and "b.py.html" in listed
    page = Reader(small / "site" / "index.html")
    assert "source/notebooks/a.ipynb" in page.links and "More" in page.text


@pytest.mark.parametrize("link", ["../nowhere.py", "gone.md", "index.md#no-such-heading"])
def test_a_link_to_nothing_fails_the_build(small: Path, link: str) -> None:
    (small / "docs" / "index.md").write_text(f"# Page\n\n[x]({link})\n")
    done = build(small / "site", small)
    assert done.returncode != 0
    assert link.removeprefix("../") in done.stderr and "index.md" in done.stderr
