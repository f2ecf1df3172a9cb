"""How a setting is declared, and how a tree of settings is walked.

Nothing here imports torch or numpy, so that a typo is answered at once.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Leaf:
    """One setting: where it is in the tree, and what its declaration says."""

    path: str
    type: Any
    default: Any
    help: str
    flag: str | None = None
    choices: tuple[str, ...] = ()
    minimum: float | None = None
    maximum: float | None = None
    above: float | None = None
    bare: str | None = None


def setting(
    default: Any,
    help: str,
    *,
    flag: str | None = None,
    choices: tuple[str, ...] = (),
    minimum: float | None = None,
    maximum: float | None = None,
    above: float | None = None,
    bare: str | None = None,
) -> Any:
    """Declare one setting of the tree.

    Args:
        default: its value where nobody sets it.
        help: one line for ``--help``.
        flag: its flag in ``train``, if it has one.
        choices: the texts it may be.
        minimum: smallest number it may be.
        maximum: largest number it may be.
        above: number that it must exceed.
        bare: what the flag without a value means.
    """
    declared = {
        "help": help,
        "flag": flag,
        "choices": choices,
        "minimum": minimum,
        "maximum": maximum,
        "above": above,
        "bare": bare,
    }
    return dataclasses.field(default=default, metadata=declared)


def walk(cls: type, prefix: str = "") -> Iterator[Leaf]:
    """Yield every setting of a tree of dataclasses in declaration order."""
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        path = f"{prefix}{field.name}"
        if dataclasses.is_dataclass(hints[field.name]):
            yield from walk(hints[field.name], f"{path}.")
        else:
            yield Leaf(path, hints[field.name], field.default, **field.metadata)


def to_dict(config: Any) -> dict[str, Any]:
    """Return a tree as nested plain dictionaries, lists and scalars."""
    plain: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            value = to_dict(value)
        plain[field.name] = list(value) if isinstance(value, tuple) else value
    return plain


def get_setting(config: Any, path: str) -> Any:
    """Return the value at a dotted path."""
    value = config
    for part in path.split("."):
        value = getattr(value, part)
    return value
