"""What the documentation names exists: commands, flags, settings, files, functions and tests."""

from __future__ import annotations

import ast
import inspect
import re
import sys
from pathlib import Path

import pytest
from helpers.docs import PAGES, ROOT, blocks, commands, inline_code, shell_lines

import camoxpert
from camoxpert.cli import COMMANDS, KINDS, command_parser
from camoxpert.config.tree import leaves
from camoxpert.errors import ConfigError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


def named_tests(text: str) -> list[tuple[str, str]]:
    """Return (file, test) of every test a page names; a bare test is in the last named file."""
    found, file = [], ""
    for word in re.findall(r"`([^`]*test_[^`]*)`", text):
        path, _, name = word.rpartition("::")
        file = path or file
        place = file.removeprefix("tests/") if "/" in file else f"faults/{file}"
        found.append((place, name))
    return found


def test_every_test_named_by_the_reliability_page_exists() -> None:
    named = named_tests((ROOT / "docs" / "reliability.md").read_text())
    assert len(named) > 80
    for file, name in named:
        path = ROOT / "tests" / file
        assert path.is_file(), file
        assert re.search(rf"def {name}\(", path.read_text()), f"{file}::{name}"


def test_the_reader_of_names() -> None:
    text = "| x | `test_a.py::test_b`, `test_c` | `data/test_d.py::test_e` |"
    assert named_tests(text) == [
        ("faults/test_a.py", "test_b"),
        ("faults/test_a.py", "test_c"),
        ("data/test_d.py", "test_e"),
    ]


def parse(words: list[str], *, tolerant: bool) -> None:
    """Parse a call as the program does, its settings included.

    ``tolerant``: it is part of a sentence or of a usage line, so that arguments may be left out.
    """
    if words[0] == "help":
        words = [*words[1:], "--help"]
    if words[0] in ("--help", "--version", "-V") or words[0].isupper():
        return
    assert words[0] in COMMANDS, f"no command {words[0]}"
    if "--config" in words:
        at = words.index("--config")
        # Another file than those of the project is the reader's own.
        if not words[at + 1].startswith("configs/"):
            words = [*words[:at], *words[at + 2 :]]
    parser, module, count = command_parser(words)
    if "--help" in words:
        return
    try:
        options, rest = parser.parse_checked(words[count:])
        if hasattr(module, "read_config"):
            module.read_config(options, rest)
        else:
            known = {leaf.path for leaf in leaves()}
            assert all("=" in word and word.partition("=")[0] in known for word in rest), rest
    except ConfigError as error:
        left_out = re.search(r"required|expected|: '[A-Z]+'|'[A-Z_]+' ", str(error))
        if not (tolerant and left_out):
            raise AssertionError(f"{' '.join(words)}: {error}") from error


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_every_command_of_a_page_parses(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    text = page.read_text()
    for line in shell_lines(text):
        for words, partial in commands(line):
            parse(words, tolerant=partial)
    for span in inline_code(text):
        first = span.split(" ")[0]
        named = f"camoxpert {span}" if first in COMMANDS and " " in span else span
        named = re.sub(
            r" (\w+(?:\|\w+)+)(?= |$)", lambda m: f" {{{m[1].replace('|', ',')}}}", named
        )
        for words, _ in commands(named):
            parse(words, tolerant=True)


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_every_other_shell_line_names_what_exists(page: Path) -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    known_extras = set(extras["optional-dependencies"])
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    text = page.read_text()
    for line in [*shell_lines(text), *inline_code(text)]:
        first, *words = line.partition("#")[0].split() or [""]
        if first == "make" and words and words[0] != "...":
            named = {word for word in words if "=" not in word}
            assert named <= targets or " " not in line, line
        if first == "pip":
            named = {e for group in re.findall(r"\[([\w,]+)\]", line) for e in group.split(",")}
            assert named <= known_extras, line
        if first == "python" and words and words[0].endswith(".py") and not THEIRS.match(line):
            assert (ROOT / words[0]).is_file(), line


def known_flags() -> set[str]:
    parsers = [command_parser(words)[0] for words in [(name,) for name in COMMANDS] + list(KINDS)]
    return {flag for parser in parsers for a in parser._actions for flag in a.option_strings}


# Flags of other programs, and of the old script and the projects that coming-from.md describes.
FOREIGN = {
    *("--help", "--version", "--max-restarts", "--data-binary", "--rm", "--spec"),
    *("--t-mult", "--use-ddp", "--local_rank", "--use-cod-specialized"),
    *("--amp", "--cfg-options", "--show-dir"),
}
# Their scripts: what is typed after these names is not checked.
THEIRS = re.compile(
    r"(python|sh) (inference|eval_existingOnes|gen_best_ep|tools/(train|test|dist_train))\."
    r"|\./train"
)


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_every_flag_and_setting_of_a_page_exists(page: Path) -> None:
    flags = known_flags() | FOREIGN
    settings = {leaf.path for leaf in leaves()}
    groups = {path.partition(".")[0] for path in settings}
    text = page.read_text()
    for span in [*inline_code(text), *shell_lines(text)]:
        if THEIRS.match(span):
            continue
        ours = re.sub(r"\btorchrun .*?train_ultimate.py", "", span)
        named = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", ours))
        script = re.match(r"python ((?:tools|tests)/\S+\.py)", span)
        if script:
            source = (ROOT / script[1]).read_text()
            named = {flag for flag in named if f'"{flag}"' not in source}
        assert named <= flags, (span, named - flags)
        for path in re.findall(r"(?<![\w./])([a-z]+\.[a-z_]+(?:\.[a-z_]+)*)(?=$|=|\s(?!=))", span):
            if path.partition(".")[0] in groups and Path(path).suffix not in SUFFIXES:
                inner = any(setting.startswith(f"{path}.") for setting in settings)
                group, _, name = path.partition(".")
                of_a_model = group == "model" and hasattr(camoxpert.Predictor, name)
                assert path in settings or inner or of_a_model, (span, path)


# Of files that are called like a group of settings: run.json, train.py, data.md.
SUFFIXES = {
    *(".json", ".jsonl", ".py", ".md", ".csv", ".html", ".yaml", ".sh", ".txt", ".jpg", ".png"),
    *(".pt", ".safetensors", ".onnx", ".xml", ".ipynb"),
}


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_python_blocks_use_the_api_as_it_is(page: Path) -> None:
    for language, content in blocks(page.read_text()):
        if language != "python":
            continue
        for node in ast.walk(ast.parse(content)):
            if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "camoxpert":
                assert hasattr(camoxpert, node.attr), node.attr
            if isinstance(node, ast.Call):
                check_keywords(node)


def check_keywords(call: ast.Call) -> None:
    owner, _, name = ast.unparse(call.func).partition(".")
    place = {"camoxpert": camoxpert, "model": camoxpert.Predictor}.get(owner)
    if place is None or not name.isidentifier():
        return
    taken = inspect.signature(getattr(place, name)).parameters
    if not any(p.kind is p.VAR_KEYWORD for p in taken.values()):
        assert {k.arg for k in call.keywords} <= set(taken), ast.unparse(call)


@pytest.mark.parametrize(
    "line",
    [
        "camoxpert trian --dataset-path a",
        "camoxpert evaluate runs/x --dataa b",
        "torchrun --standalone train_ultimate.py train --dataset-path a optim.lrr=3",
        "find . | camoxpert predict runs/x - -o out --ouput y",
        "camoxpert benchmark {moe,speed}",
    ],
)
def test_the_check_sees_a_wrong_command(line: str) -> None:
    with pytest.raises(AssertionError):
        for words, partial in commands(line):
            parse(words, tolerant=partial)


def test_the_reader_of_commands() -> None:
    assert commands("OMP_NUM_THREADS=1 python train_ultimate.py train --lr 1  # fast") == [
        (["train", "--lr", "1"], False)
    ]
    assert commands("camoxpert doctor DATA [DATA ...] [-o DIR]") == [
        (["doctor", "DATA", "DATA", "-o", "DIR"], True)
    ]
    assert commands("camoxpert benchmark {moe,data}") == [
        (["benchmark", "moe"], False),
        (["benchmark", "data"], False),
    ]
    assert commands("pip install camoxpert") == []
    text = "```\n$ camoxpert a \\\n  b\nprinted\n```\n    ```bash\n    ls\n    ```\n`x\ny`"
    assert shell_lines(text) == ["camoxpert a b", "ls"]
    assert inline_code(text) == ["x y"]


def test_pages_hold_commands_at_all() -> None:
    calls = [c for page in PAGES for line in shell_lines(page.read_text()) for c in commands(line)]
    assert len(calls) > 60


def slugs(text: str) -> set[str]:
    """Return the anchors of a page's headings, as GitHub and the site make them."""
    titles = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).strip().replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_every_link_of_a_page_leads_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\((?![a-z]+:)([^)\s]+)\)", page.read_text()):
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        assert target.exists(), link
        if anchor and target.suffix == ".md":
            assert anchor in slugs(target.read_text()), link


def test_the_readme_is_short_and_shows_one_picture() -> None:
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) < 150 and text.count("![") == 1
    assert "badge" not in text and "shields.io" not in text
