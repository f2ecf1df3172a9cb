"""Pages of the documentation site that are made when it is built; mkdocs.yml names it as hook.

Three kinds: a page for every command, from its parser, so that it cannot go stale; a page for every
file of the repository that a page links to, so that no link leaves the site; and the entries of the
navigation that stand for them (``commands``, ``../FILE``, and ``*`` for pages that it does not
name).
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from camoxpert.cli import COMMANDS, KINDS, command_parser, overview  # noqa: E402

LINK = re.compile(r"(?<=\]\()(?![a-z]+:|#|/)([^)\s#]+)(#[^)\s]*)?(?=\))")
FENCE = "````"
# Shown as they are: a browser, or the program that opens them, knows better.
COPIED = {".ipynb", ".jpg", ".png", ".svg"}
LANGUAGES = {".py": "python", ".json": "json", ".yaml": "yaml", ".sh": "bash", ".toml": "toml"}


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Put the pages that are made, and those that nobody placed, into the navigation."""
    named = set(_strings(config.nav))
    docs = Path(config.docs_dir)
    pages = sorted(path.relative_to(docs).as_posix() for path in docs.rglob("*.md"))
    config.extra["files_in_nav"] = [entry.removeprefix("../") for entry in named if _outside(entry)]
    config.nav = _filled(config.nav, [page for page in pages if page not in named])
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are made."""
    made: dict[str, str | Path] = {"commands/index.md": commands_page()}
    for words in [(name,) for name in COMMANDS] + list(KINDS):
        made[f"commands/{'-'.join(words)}.md"] = command_page(*words)
    made |= linked_pages(files, config)
    for path, content in made.items():
        source = (
            {"abs_src_path": str(content)} if isinstance(content, Path) else {"content": content}
        )
        files.append(File.generated(config, path, inclusion=InclusionLevel.NOT_IN_NAV, **source))
    return files


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """Point links to files of the repository at their pages."""
    path = page.file.src_uri
    return markdown if page.file.generated_by else relinked(markdown, f"docs/{path}", path)


def linked_pages(files: Files, config: MkDocsConfig) -> dict[str, str | Path]:
    """Return every file that a page, or one of these, links to: path in the site -> its page.

    Of files that are copied it is their path.
    """
    made: dict[str, str | Path] = {}
    found = [(entry, "mkdocs.yml") for entry in config.extra["files_in_nav"]]
    for file in files.documentation_pages():
        page = f"docs/{file.src_uri}"
        found += [(target, page) for target in targets(file.content_string, page)]
    while found:
        target, source = found.pop()
        place = place_of(target)
        if target.startswith("docs/") or place in made:
            continue
        if not (ROOT / target).exists():
            raise FileNotFoundError(f"{source} links to {target}, which does not exist.")
        made[place], more = file_page(target, place)
        found += [(further, target) for further in more]
    return made


def file_page(target: str, place: str) -> tuple[str | Path, list[str]]:
    """Return the page of a file or folder (the path of one that is copied), and what it links to.

    Args:
        target: its path in the repository.
        place: path of its page in the site.
    """
    path = ROOT / target
    if path.is_dir():
        shown = sorted(p.name for p in path.iterdir() if p.suffix in {*LANGUAGES, *COPIED})
        links = {name: PurePosixPath(place_of(f"{target}/{name}")).name for name in shown}
        rows = [f"- [{name}]({link})" for name, link in links.items()]
        return f"# {target}/\n\n" + "\n".join(rows), [f"{target}/{name}" for name in shown]
    if path.suffix in COPIED:
        return path, []
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".md":
        return relinked(text, target, place), targets(text, target)
    return f"# {target}\n\n{FENCE}{LANGUAGES.get(path.suffix, 'text')}\n{text}{FENCE}\n", []


def place_of(target: str) -> str:
    """Return where in the site a file of the repository is shown."""
    if target.startswith("docs/"):
        return target.removeprefix("docs/")
    if target.endswith(".md"):
        return f"project/{target}"
    if PurePosixPath(target).suffix in COPIED:
        return f"source/{target}"
    return f"source/{target}/index.md" if (ROOT / target).is_dir() else f"source/{target}.md"


def targets(text: str, source: str) -> list[str]:
    """Return the files of the repository that a page links to, as paths from its root."""
    return [resolved(match[1], source) for line in _prose(text) for match in LINK.finditer(line)]


def relinked(text: str, source: str, place: str) -> str:
    """Return a page with its links between files of the repository turned into links of the site.

    Args:
        text: the page.
        source: its path in the repository.
        place: its path in the site.
    """

    def link(match: re.Match[str]) -> str:
        target = place_of(resolved(match[1], source))
        return os.path.relpath(target, PurePosixPath(place).parent) + (match[2] or "")

    return "\n".join(line if fenced else LINK.sub(link, line) for line, fenced in _lines(text))


def resolved(link: str, source: str) -> str:
    """Return the path from the repository's root that a link of ``source`` means."""
    return os.path.normpath(PurePosixPath(source).parent / link)


def commands_page() -> str:
    """Return the overview, with links to the page of every command."""
    rows = []
    for name, text in COMMANDS.items():
        rows.append(f"| [`{name}`]({name}.md) | {text} |")
        for (of, kind), (_, what) in KINDS.items():
            if of == name:
                rows.append(f"| [`{name} {kind}`]({name}-{kind}.md) | {what} |")
    table = "\n".join(["| command | does |", "| --- | --- |", *rows])
    return f"# Commands\n\n{table}\n\n`camoxpert --help` prints:\n\n```text\n{overview()}\n```\n"


def command_page(*words: str) -> str:
    """Return the page of a command, or of a kind of it: what its ``--help`` prints."""
    os.environ["COLUMNS"] = "80"
    parser, _, _ = command_parser(words)
    parts = [
        f"# camoxpert {' '.join(words)}",
        f"{(parser.description or '').capitalize()}",
        f"```text\n{parser.format_usage()}```",
    ]
    for group in parser._action_groups:
        actions = [action for action in group._group_actions if action.help != argparse.SUPPRESS]
        if actions:
            title = (group.title or "").capitalize()
            parts += [f"## {title}", *(_entry(parser, action) for action in actions)]
    if parser.epilog:
        before, _, examples = parser.epilog.partition("examples:\n")
        parts += [_escaped(before.strip())] if before.strip() else []
        lines = "\n".join(line.strip() for line in examples.splitlines())
        parts += ["## Examples", f"```bash\n{lines}\n```"] if examples else []
    return "\n\n".join(parts) + "\n"


def _entry(parser: argparse.ArgumentParser, action: argparse.Action) -> str:
    formatter = parser._get_formatter()
    names = formatter._format_action_invocation(action)
    text = formatter._expand_help(action) if action.help else ""
    return f"`{names}`\n\n:   {_escaped(text)}"


def _escaped(text: str) -> str:
    """Escape what Markdown would read as markup, except between backticks."""
    parts = re.split(r"(`[^`]*`)", text)
    return "".join(
        part if part.startswith("`") else re.sub(r"([\\*_<>\[\]#~^])", r"\\\1", part)
        for part in parts
    )


def _lines(text: str) -> Iterator[tuple[str, bool]]:
    """Yield every line, and whether it is part of a fenced block."""
    fenced = False
    for line in text.split("\n"):
        marks = line.lstrip().startswith("```")
        yield line, fenced or marks
        fenced ^= marks


def _prose(text: str) -> Iterator[str]:
    return (line for line, fenced in _lines(text) if not fenced)


def _outside(entry: str) -> bool:
    return entry.startswith("../")


def _strings(nav: Any) -> Iterator[str]:
    """Yield the pages that a navigation names."""
    if isinstance(nav, str):
        yield nav
    for part in nav.values() if isinstance(nav, dict) else nav if isinstance(nav, list) else ():
        yield from _strings(part)


def _filled(nav: Any, unplaced: list[str]) -> Any:
    """Return a navigation with pages for its placeholders."""
    if isinstance(nav, dict):
        return {title: _filled(part, unplaced) for title, part in nav.items()}
    if isinstance(nav, list):
        parts = [_filled(part, unplaced) for part in nav]
        flat = [p for part in parts for p in (part if isinstance(part, list) else [part])]
        # A title over nothing is no entry.
        return [part for part in flat if not (isinstance(part, dict) and [] in part.values())]
    if nav == "*":
        return unplaced
    if nav == "commands":
        words = [(name,) for name in COMMANDS] + list(KINDS)
        pages = [{" ".join(w): f"commands/{'-'.join(w)}.md"} for w in sorted(words)]
        return ["commands/index.md", *pages]
    return place_of(nav.removeprefix("../")) if _outside(nav) else nav
