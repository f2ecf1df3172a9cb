"""Command-line flags made from the settings tree, and the settings made from what was typed.

``train`` and ``profile`` take every setting that has a flag (``add_setting_flags``,
``read_config``); other commands name the settings they share with them (``add_flags``).
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, get_origin

from camoxpert.config.aliases import ALIASES, Alias, accepted
from camoxpert.config.checks import check_value
from camoxpert.config.load import load_config, parse_text
from camoxpert.config.schema import Leaf
from camoxpert.config.tree import Config, leaves

# Group of `train --help` -> first words of the settings in it; the longest that fits decides.
GROUPS = {
    "data": ("data.",),
    "model": ("model.",),
    "training": ("loss.", "optim.", "train."),
    "memory and speed": (
        *("data.num_workers", "data.cache", "data.strict_cache", "data.augment_on"),
        *("model.dispatch", "train.batch_size", "train.effective_batch_size"),
        *("train.stage2_batch_size", "train.accumulation_steps", "train.precision", "train.tf32"),
        *("train.compile", "train.channels_last", "train.gradient_checkpointing", "train.device"),
    ),
    "results": ("run.", "train.max_hours", "train.resume", "train.allow_data_change"),
}
OVERRIDE = re.compile(r"(data|model|loss|optim|train|run)\.[\w.]+=.*", re.DOTALL)


def add_setting_flags(parser: argparse.ArgumentParser) -> None:
    """Add ``--config`` and the flags of all settings, in groups."""
    parser.add_argument("--config", metavar="FILE", help="YAML file of settings (see configs/)")
    for name in GROUPS:
        group = parser.add_argument_group(name)
        for leaf in leaves():
            if leaf.flag and group_of(leaf.path) == name:
                # Only what was typed arrives, under the dotted path: files may say the rest.
                _declare(group, leaf, default=argparse.SUPPRESS, dest=leaf.path)
                for alias in ALIASES:
                    if alias.target == leaf.path:
                        _declare_alias(group, alias)


def add_flags(
    group: argparse._ActionsContainer,
    paths: Sequence[str],
    *,
    defaults: Mapping[str, Any] | None = None,
) -> None:
    """Add the flags of some settings to a command that has no settings tree of its own.

    Each value arrives checked, under the setting's last name (``options.layout``).

    Args:
        group: a parser or an argument group.
        paths: dotted paths of the settings.
        defaults: dotted path -> default of this command where it is not that of ``train``.
    """
    table = {leaf.path: leaf for leaf in leaves()}
    for path in paths:
        leaf = table[path]
        default = (defaults or {}).get(path, leaf.default)
        options: dict[str, Any] = {"dest": path.rpartition(".")[2]}
        if leaf.type == tuple[str, ...]:
            options["type"] = _name_reader(leaf)
            default = list(default)  # "extend" adds to it
        elif leaf.choices or leaf.type not in (bool, str):  # any text is right for the others
            options["type"] = _reader(leaf)
        _declare(group, leaf, default=default, **options)


def group_of(path: str) -> str:
    """Return the group of ``--help`` that a setting belongs to."""
    fits = {start: name for name, starts in GROUPS.items() for start in starts}
    return fits[max((start for start in fits if path.startswith(start)), key=len)]


def read_config(
    options: argparse.Namespace, rest: Sequence[str], beneath: Mapping[str, Any] | None = None
) -> Config:
    """Merge defaults, file, flags and overrides of one command line.

    Args:
        options: what was typed.
        rest: the overrides.
        beneath: settings of another file, between those of ``--config`` and what was typed; it
            makes several trainings of them, and checks the settings of each for contradictions.
    """
    types = accepted()
    typed = {path: value for path, value in vars(options).items() if path in types}
    overrides = list(rest)
    for path, values in typed.items():
        if isinstance(values, list):
            # `--dataset-path A B optim.lr=3e-4`: a list swallows the override behind it.
            overrides += [value for value in values if OVERRIDE.fullmatch(str(value))]
            typed[path] = [value for value in values if not OVERRIDE.fullmatch(str(value))]
    flags = {
        path: parse_text(value, types[path], path) if isinstance(value, str) else value
        for path, value in typed.items()
    }
    return load_config(
        file=options.config,
        flags={**(beneath or {}), **flags},
        overrides=overrides,
        conflicts=beneath is None,
    )


def _declare(
    group: argparse._ActionsContainer, leaf: Leaf, *, default: Any, **options: Any
) -> None:
    """Add one setting's flag."""
    flag = leaf.flag or "--" + leaf.path.rpartition(".")[2].replace("_", "-")
    shown = _shown(leaf.default if default == argparse.SUPPRESS else default)
    help = f"{leaf.help} [{shown}]".replace("%", "%%")
    options |= {"default": default, "help": help}
    if leaf.type is bool:
        action = group.add_argument(flag, action=argparse.BooleanOptionalAction, **options)
        action.help = help  # before Python 3.13 the action added "(default: False)"
        return
    if leaf.bare is not None:
        options |= {"nargs": "?", "const": leaf.bare}
    if get_origin(leaf.type) is tuple:
        options["nargs"] = "+"
    if leaf.type == tuple[str, ...]:
        options["action"] = "extend"  # a list of names grows with each use; numbers are replaced
    name = "{" + ",".join(leaf.choices) + "}" if leaf.choices else _metavar(flag)
    group.add_argument(flag, metavar=name, **options)


def _declare_alias(group: argparse._ActionsContainer, alias: Alias) -> None:
    options: dict[str, Any] = {"action": argparse.BooleanOptionalAction}
    if alias.type is not bool:
        options = {"metavar": _metavar(alias.flag)}
    group.add_argument(
        alias.flag, dest=alias.path, default=argparse.SUPPRESS, help=alias.help, **options
    )


def _shown(default: Any) -> str:
    """Return how ``--help`` writes a default."""
    if isinstance(default, bool):
        return "on" if default else "off"
    if default is None:
        return "unset"
    return "none" if default in ("", ()) else str(default)


def _metavar(flag: str) -> str:
    return flag.removeprefix("--").upper().replace("-", "_")


def _reader(leaf: Leaf) -> Callable[[str], Any]:
    """Return what turns a typed text into the setting's checked value."""

    def read(text: str) -> Any:
        return check_value(parse_text(text, leaf.type, leaf.path), leaf)

    read.__name__ = getattr(leaf.type, "__name__", str(leaf.type))
    return read


def _name_reader(leaf: Leaf) -> Callable[[str], str]:
    """Return what checks one name of a setting that is a list of names."""

    def read(text: str) -> str:
        check_value((text,), leaf)
        return text

    read.__name__ = "name"
    return read
