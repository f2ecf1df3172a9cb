"""The command line stays: its flags, what they take, what they set, and every default."""

from __future__ import annotations

import argparse
from typing import Any

import pytest

from camoxpert.cli import COMMANDS, KINDS
from frozen import flags, store


@pytest.fixture(scope="module")
def now() -> dict[str, Any]:
    return store.plain(flags.collect())


def test_flags_of_all_commands(now: dict[str, Any]) -> None:
    message = store.differences(store.read("flags")["flags"], now["flags"], "flags")
    assert not message, message


def test_settings_and_their_defaults(now: dict[str, Any]) -> None:
    message = store.differences(store.read("flags")["settings"], now["settings"], "flags")
    assert not message, message


def test_no_command_is_left_out(now: dict[str, Any]) -> None:
    named = {name.partition(":")[0] for name in now["flags"]}
    assert named == {*COMMANDS, *map(" ".join, KINDS)}


def test_the_control_is_a_parser_with_other_flags() -> None:
    """One flag gone, one new, one with another default: each is named."""
    made = []
    for default, extra in ((1, "--old"), (2, "--new")):
        parser = argparse.ArgumentParser()
        parser.add_argument("--size", type=int, default=default)
        parser.add_argument(extra)
        parser.add_argument("kind", choices=("a", "b"))
        made.append(store.plain(flags.describe(parser)))
    lines = store.differences(*made, "flags").splitlines()
    assert [line.split(": ")[:2] for line in lines[:3]] == [
        ["removed", "--old"],
        ["added", "--new"],
        ["changed", "--size"],
    ]
    assert made[0]["argument 1"]["choices"] == ["a", "b"]


def test_the_control_is_another_setting() -> None:
    changed = flags.settings("optim.lr=0.5")
    assert changed is not None and flags.settings("--lr", "nonsense") is None
    message = store.differences(store.read("flags")["settings"], changed, "flags")
    assert message.startswith("changed: optim.lr: ") and message.count("\n") == 1
