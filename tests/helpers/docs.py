"""Reads the pages of the documentation: shell lines, commands, inline code, Python blocks."""

from __future__ import annotations

import itertools
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = [
    *(ROOT / name for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md")),
    *sorted((ROOT / "docs").glob("*.md")),
]
SHELL = ("bash", "sh", "console", "shell")
# First words of the lines that make an unnamed block a shell block.
PROGRAMS = ("camoxpert", "python", "torchrun", "make", "pip", "pipx", "curl", "find", "docker")


def blocks(text: str) -> Iterator[tuple[str, str]]:
    """Yield (language, content) of every fenced block, without its indentation."""
    for found in re.finditer(r"^( *)```(\w*)[^\n]*\n(.*?)^\1```", text, re.DOTALL | re.MULTILINE):
        indent, language, content = found.groups()
        yield language, re.sub(rf"^{indent}", "", content, flags=re.MULTILINE)


def shell_lines(text: str) -> list[str]:
    """Return the lines of shell blocks; lines that end in a backslash are joined with the next.

    Of a block without a language only lines that start with a known program are taken: it may
    hold the output of a command, too.
    """
    found = []
    for language, content in blocks(text):
        for line in re.sub(r"\s*\\\n\s*", " ", content).splitlines():
            line = line.strip().removeprefix("$ ").removeprefix("!")
            known = line.split(" ")[0] in PROGRAMS
            if (
                line
                and not line.startswith("#")
                and (language in SHELL or (not language and known))
            ):
                found.append(line)
    return found


def inline_code(text: str) -> list[str]:
    """Return what stands between backticks outside of fenced blocks, line breaks as spaces."""
    prose = re.sub(r"^( *)```.*?^\1```", "", text, flags=re.DOTALL | re.MULTILINE)
    return [" ".join(span.split()) for span in re.findall(r"(?<!`)`([^`]+)`(?!`)", prose)]


def commands(line: str) -> list[tuple[list[str], bool]]:
    """Return the calls of our program in a shell line: the words after its name.

    The notation of usage lines is resolved: ``{a,b}`` and ``a|b`` are each of them, ``[--flag X]``
    is given, and ``...`` stands for more, which the second value tells.
    """
    found = []
    for part in re.split(r"\s(?:\||&&|;)\s", line):
        partial = "..." in part
        part = re.sub(r"(?<=\s)\[([^\]]*)\](?=\s|$)", r"\1", part.replace("...", ""))
        for words in _expanded(shlex.split(part, comments=True)):
            call = after_the_name(words)
            if call:
                found.append((call, partial))
    return found


def after_the_name(words: list[str]) -> list[str] | None:
    """Return the words behind ``camoxpert`` or ``train_ultimate.py``; None for other programs."""
    words = [word for word in words if not re.fullmatch(r"[A-Z_]+=\S*", word)]
    for index, word in enumerate(words):
        before = words[:index]
        if word == "train_ultimate.py" and before[:1] in (["python"], ["torchrun"]):
            return words[index + 1 :]
        if word == "camoxpert" and (not before or before[0] == "pipx"):
            return words[index + 1 :]
    return None


def _expanded(words: list[str]) -> Iterator[list[str]]:
    choices = [
        re.split("[,|]", word.strip("{}")) if re.fullmatch(r"\{.*\}|\w+(\|\w+)+", word) else [word]
        for word in words
    ]
    return (list(chosen) for chosen in itertools.product(*choices))
