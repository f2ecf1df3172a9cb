"""How command lines end: the exit code, and how the first line on stderr begins."""

from __future__ import annotations

from pathlib import Path

import pytest

from frozen import exits, store


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("exits")
    exits.prepare(made)
    return made


@pytest.mark.parametrize("name", exits.LINES)
def test_ending(name: str, folder: Path) -> None:
    golden, now = store.read("exits"), exits.run(exits.LINES[name], folder)
    message = store.differences({name: golden[name]}, {name: now}, "exits")
    assert not message, message


def test_table_and_golden_file_have_the_same_lines() -> None:
    assert store.read("exits").keys() == exits.LINES.keys()


def test_the_control_is_another_fault(folder: Path) -> None:
    """Another code and another text are both seen."""
    missing = exits.run("train --dataset-path {tmp}/elsewhere", folder)
    for name in ("no data", "evaluate nothing there", "settings"):
        golden = store.read("exits")[name]
        assert missing["code"] != golden["code"] and missing["stderr"] != golden["stderr"]
        said = store.differences({name: golden}, {name: missing}, "exits")
        assert said.startswith(f"changed: {name}: ")
