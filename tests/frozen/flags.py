"""Every flag of every command, and every setting with its default, as the program itself says."""

from __future__ import annotations

import argparse
import contextlib
import io
from typing import Any
from unittest import mock

import yaml

from camoxpert.cli import COMMANDS, KINDS, main

# Tried in turn on a flag whose values are not listed: the first that is accepted tells which
# setting the flag sets.
VALUES = ("8", "64", "3", "0.25", "0.75", "0.00001", "cpu", "other")
# What a flag cannot do without.
NEEDED = {
    "--unlabeled": ("--teacher", "other"),
    "--base-batch": ("--scale-lr", "linear"),
    "--synthetic-share": ("--synthetic", "other"),
    "--keep-rgb --no-keep-rgb": ("--init-from", "other", "--modalities", "depth"),
    "--support-weights": ("--support-encoder", "other"),
    "--reference-data": ("--support-encoder", "other"),
}
# Commands whose flags of all settings are frozen with those of ``train``.
LIKE_TRAIN = ("sweep",)


class Built(Exception):
    """Leaves the program with its parser."""


def parser_of(*command: str) -> argparse.ArgumentParser:
    """Return the parser that the program builds for a command, or for a kind of it."""

    def leave(parser: argparse.ArgumentParser, *arguments: Any, **options: Any) -> None:
        raise Built(parser)

    with mock.patch.object(argparse.ArgumentParser, "parse_known_args", leave):
        try:
            main([*command])
        except Built as built:
            return built.args[0]
    raise AssertionError(f"{command} parses nothing")


def describe(parser: argparse.ArgumentParser) -> dict[str, dict[str, Any]]:
    """Return what can be typed; help texts and internal names left out."""
    table: dict[str, dict[str, Any]] = {}
    position = 0
    for action in parser._actions:
        if isinstance(action, argparse._HelpAction):
            continue
        position += not action.option_strings
        name = " ".join(action.option_strings) or f"argument {position}"
        table[name] = {
            "kind": type(action).__name__,
            "nargs": action.nargs,
            "choices": choices_of(action),
            "required": action.required,
            "type": getattr(action.type, "__name__", None),
            "const": action.const,
            "default": action.default,
        }
    return table


def choices_of(action: argparse.Action) -> list[str] | None:
    """Return the values a flag takes; settings list theirs in the metavar, as {a,b}."""
    if action.choices is not None:
        return list(action.choices)
    shown = action.metavar
    if isinstance(shown, str) and shown.startswith("{"):
        return shown.strip("{}").split(",")
    return None


def settings(*words: str) -> dict[str, Any] | None:
    """Return dotted name -> value as ``train --print-config`` prints it; None where refused."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(io.StringIO()):
        if main(["train", *words, "--print-config"]) != 0:
            return None
    return flat(yaml.safe_load(printed.getvalue()))


def flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in tree.items():
        found |= (
            flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
        )
    return found


def effects(name: str, entry: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    """Return what typing a flag of ``train`` changes, and the defaults it changes them from."""
    changes: dict[str, Any] = {}
    needed = NEEDED.get(name, ())
    if needed:
        defaults = settings(*needed) or defaults
    for option in name.split():
        values = [[]] if entry["nargs"] == 0 else [[v] for v in entry["choices"] or VALUES]
        for value in values:
            now = settings(*needed, option, *value)
            changed = {k: v for k, v in (now or {}).items() if v != defaults[k]}
            if changed:
                changes[" ".join([option, *value])] = changed
                break
    assert changes, f"no value tried with {name} changes a setting"
    touched = {path for changed in changes.values() for path in changed}
    return {"sets": changes, "default": {path: defaults[path] for path in touched}}


def collect() -> dict[str, Any]:
    """Return {"flags": "command: flag" -> what it takes, "settings": name -> default}."""
    defaults = settings()
    assert defaults is not None
    tables = {command: describe(parser_of(command)) for command in COMMANDS}
    found: dict[str, Any] = {}
    for name, entry in tables["train"].items():
        # A setting's flag has no default of its own: what is not typed is not set.
        if entry["default"] == argparse.SUPPRESS:
            found[name] = effects(name, entry, defaults)
    flags = {
        f"{command}: {name}": entry | (found[name] if entry["default"] == argparse.SUPPRESS else {})
        for command, table in tables.items()
        for name, entry in table.items()
        if command not in LIKE_TRAIN or entry["default"] != argparse.SUPPRESS
    }
    for kind in KINDS:
        # Those of all settings are frozen with ``train``.
        own = describe(parser_of(*kind)).items()
        kept = {name: entry for name, entry in own if entry["default"] != argparse.SUPPRESS}
        flags |= {f"{' '.join(kind)}: {name}": entry for name, entry in kept.items()}
    return {"flags": flags, "settings": defaults}
