"""Settings and flags of earlier versions that are values of other settings today.

Old config files, overrides, checkpoints and commands keep their meaning: whatever reads settings
translates these first.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from camoxpert.config.checks import coerce
from camoxpert.config.tree import leaves
from camoxpert.errors import ConfigError


@dataclass(frozen=True)
class Alias:
    """An old setting, and the value of a present one that it stands for.

    Attributes:
        path: the old setting.
        target: the setting that replaced it.
        type: of the old setting.
        neutral: the old default, which changes nothing.
        value: of the target where the old setting is not neutral; None: the old setting's own.
        refuses: values of the target that contradict it in the same file or command.
        flag: the old flag, still accepted.
        shown: how the flag is written where it changes something.
        help: one line for ``--help``.
        free: the value of the target that leaves the choice open: where it is named, a command that
            gives the target any other value than that or ours contradicts itself.
    """

    path: str
    target: str
    type: Any
    neutral: Any
    value: Any
    refuses: tuple[str, ...]
    flag: str
    shown: str
    help: str
    free: Any = None


ALIASES = (
    Alias(
        path="train.amp",
        target="train.precision",
        type=bool,
        neutral=True,
        value="fp32",
        refuses=("bf16", "fp16"),
        flag="--amp",
        shown="--no-amp",
        help="--amp: as --precision auto; --no-amp: as --precision fp32",
    ),
    Alias(
        path="train.skip_stage1",
        target="train.stage1_epochs",
        type=bool,
        neutral=False,
        value=0,
        refuses=(),
        flag="--skip-stage1",
        shown="--skip-stage1",
        help="train everything from the start, as --stage1-epochs 0",
    ),
    Alias(
        path="train.resume_from",
        target="train.resume",
        type=str,
        neutral="",
        value=None,
        refuses=("never",),
        flag="--resume-from",
        shown="--resume-from",
        help="as --resume PATH",
        free="auto",
    ),
)


def accepted() -> dict[str, Any]:
    """Return dotted path -> type of every setting, present and old."""
    return {known.path: known.type for known in leaves()} | {old.path: old.type for old in ALIASES}


def merge(merged: dict[str, Any], values: Mapping[str, Any], *, typed: bool = False) -> None:
    """Put the values of a file or a command over those merged before, old settings translated.

    A neutral old setting takes back what it set before: ``--amp`` after ``amp: false`` in a file.

    Args:
        merged: dotted path -> value of present settings; changed.
        values: dotted path -> value.
        typed: they are a command's, not those of a file, which may hold every setting.

    Raises:
        ConfigError: an old and a present setting contradict each other.
    """
    old = {alias.path for alias in ALIASES}
    merged.update({path: value for path, value in values.items() if path not in old})
    for alias in ALIASES:
        if alias.path not in values:
            continue
        value = coerce(values[alias.path], alias.type, alias.path)
        if value != alias.neutral:
            given, asked = values.get(alias.target), value if alias.value is None else alias.value
            other = typed and alias.free is not None and given not in (None, asked, alias.free)
            if given in alias.refuses or other:
                raise ConfigError(
                    f"{alias.shown} and --{alias.target.removeprefix('train.')} {given} contradict "
                    f"each other. Give one of them."
                )
            merged[alias.target] = asked
        elif alias.target not in values and merged.get(alias.target) == alias.value:
            merged.pop(alias.target, None)
