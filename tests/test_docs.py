"""The tests that the documentation names exist."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]


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
