"""The space of a sweep: which settings are tried, and with which values.

::

    optim.lr: {low: 3e-4, high: 1e-2, log: true}
    model.top_k: {low: 1, high: 3}
    optim.scheduler: [cosine, poly]
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import UnionType
from typing import TYPE_CHECKING, Any, get_args, get_origin

from camoxpert.config import Config, Leaf, get_setting, leaves, read_yaml
from camoxpert.config.checks import check_value, coerce
from camoxpert.errors import ConfigError
from camoxpert.files import why_missing
from camoxpert.runs.identity import FILES, FREE, PLACES
from camoxpert.text import closest, did_you_mean

if TYPE_CHECKING:
    from optuna.trial import Trial

KEYS = ("low", "high", "log", "int", "step", "choices")
"""What may be said of a setting."""
NEAR = 1e-8
"""Parts of a step by which a value of a range may be off."""
NOT_LEARNED = ("data.source_size", "train.max_skipped_steps")
SPLITTING = (
    *("data.val_fraction", "data.group_copies", "data.calibration_fraction", "data.layout"),
    *("data.noncam", "data.resize", "data.max_pixels", "train.seed", "train.select"),
    *("data.fold", "data.modalities", "train.validate_every"),
)
"""Settings that decide what the score of a trial is."""


@dataclass(frozen=True)
class Dimension:
    """One setting of a space: choices, or a range.

    Attributes:
        path: dotted path of the setting.
        choices: values to choose from; () for a range.
        low, high: ends of the range, both included.
        log: on a logarithmic scale.
        whole: whole numbers only.
        step: between values of the range; None: any.
    """

    path: str
    choices: tuple[Any, ...] = ()
    low: float = 0.0
    high: float = 0.0
    log: bool = False
    whole: bool = False
    step: float | None = None

    def suggest(self, trial: Trial) -> None:
        """Let a trial draw a value."""
        if self.choices:
            trial.suggest_categorical(self.path, [json.dumps(value) for value in self.choices])
        elif self.whole:
            step = 1 if self.step is None else int(self.step)
            trial.suggest_int(self.path, int(self.low), int(self.high), step=step, log=self.log)
        else:
            trial.suggest_float(self.path, self.low, self.high, step=self.step, log=self.log)

    def value(self, drawn: Any) -> Any:
        """Return the setting that a drawn value stands for."""
        return json.loads(drawn) if self.choices else drawn

    def drawn(self, value: Any) -> Any:
        """Return what would have to be drawn for a setting; None if it is outside."""
        if self.choices:
            plain = list(value) if isinstance(value, tuple) else value
            known = [list(c) if isinstance(c, tuple) else c for c in self.choices]
            return json.dumps(known[known.index(plain)]) if plain in known else None
        if not isinstance(value, (int, float)) or not self.low <= value <= self.high:
            return None
        if self.step is not None:
            # 0.3 % 0.1 is not 0: as near as Optuna asks for.
            steps = (value - self.low) / self.step
            if abs(steps - round(steps)) > NEAR:
                return None
        if self.whole:
            return int(value) if value == int(value) else None
        return value

    def to_dict(self) -> dict[str, Any]:
        """Return the dimension as plain values."""
        if self.choices:
            return {"choices": list(self.choices)}
        return {name: getattr(self, name) for name in ("low", "high", "log", "whole", "step")}


def read_space(path: Path) -> tuple[Dimension, ...]:
    """Read a space; settings are dotted, or nested as in a settings file.

    Raises:
        ConfigError: not readable, an unknown setting (with the nearest one), one that no sweep may
            change, or values that cannot be.
    """
    if not path.is_file():
        raise ConfigError(f"--space: {why_missing(path, 'file')}")
    space = tuple(_dimension(*entry, path) for entry in _entries(read_yaml(path), path))
    if not space:
        raise ConfigError(
            f"--space {path} names no setting. Write for example 'optim.lr: {{low: 1e-4, high: "
            f"1e-2, log: true}}'."
        )
    return space


def values_of(space: tuple[Dimension, ...], drawn: Mapping[str, Any]) -> dict[str, Any]:
    """Return dotted path -> value of what a trial drew."""
    return {dim.path: dim.value(drawn[dim.path]) for dim in space}


def start_of(space: tuple[Dimension, ...], config: Config) -> dict[str, Any]:
    """Return what stands for the settings as they are; {} if one is outside of the space."""
    found = {dim.path: dim.drawn(get_setting(config, dim.path)) for dim in space}
    return {} if None in found.values() else found


def _entries(node: Mapping[str, Any], file: Path, prefix: str = "") -> Iterator[tuple[Leaf, Any]]:
    table = {leaf.path: leaf for leaf in leaves()}
    for key, entry in node.items():
        path = f"{prefix}{key}"
        if path in table:
            yield table[path], entry
        elif isinstance(entry, Mapping) and any(p.startswith(f"{path}.") for p in table):
            yield from _entries(entry, file, f"{path}.")
        else:
            tails = {known.rpartition(".")[2]: known for known in table}
            near = closest(path, table) or tails.get(closest(path.rpartition(".")[2], tails) or "")
            hint = f" Did you mean {near}?" if near else " `train --print-config` lists them."
            raise ConfigError(f"--space {file}: unknown setting {path}.{hint}")


def _dimension(leaf: Leaf, entry: Any, file: Path) -> Dimension:
    where = f"--space {file}: {leaf.path}"
    if leaf.path.startswith(("run.", "train.quick.")) or leaf.path in {
        *NOT_LEARNED,
        *FREE,
        *PLACES,
        *FILES,
    }:
        raise ConfigError(
            f"{where} does not say what a model learns and cannot be searched. Use its flag."
        )
    if leaf.path in SPLITTING:
        raise ConfigError(
            f"{where} decides how trials are scored: their scores could not be compared. Set it "
            f"with its flag."
        )
    if isinstance(entry, list):
        entry = {"choices": entry}
    if not isinstance(entry, Mapping) or not entry:
        raise ConfigError(
            f"{where} must be a list of values, or a range such as {{low: 1, high: 8}}; got "
            f"{entry!r}."
        )
    for key in entry:
        if key not in KEYS:
            raise ConfigError(f"{where}: unknown word {key}.{did_you_mean(str(key), KEYS)}")
    if "choices" in entry:
        return _choices(leaf, entry, where)
    return _range(leaf, entry, where)


def _choices(leaf: Leaf, entry: Mapping[str, Any], where: str) -> Dimension:
    values = entry["choices"]
    if len(entry) > 1 or not isinstance(values, list) or len(values) < 2:
        raise ConfigError(f"{where}: choices are a list of at least two values; got {values!r}.")
    chosen: list[Any] = []
    for value in values:
        checked = _checked(value, leaf, where)
        if checked in chosen:
            raise ConfigError(f"{where}: {value!r} is given twice.")
        chosen.append(checked)
    return Dimension(leaf.path, tuple(chosen))


def _range(leaf: Leaf, entry: Mapping[str, Any], where: str) -> Dimension:
    kind = get_args(leaf.type)[0] if get_origin(leaf.type) is UnionType else leaf.type
    if kind not in (int, float):
        raise ConfigError(f"{where} is not a number: give a list of values, not a range.")
    if "low" not in entry or "high" not in entry:
        raise ConfigError(f"{where}: a range needs low and high.")
    low, high = (_checked(entry[end], leaf, where) for end in ("low", "high"))
    log, whole = (
        coerce(entry.get(word, False), bool, f"{where}: {word}") for word in ("log", "int")
    )
    whole = whole or kind is int
    step = entry.get("step")
    if step is not None:
        step = coerce(step, int if whole else float, f"{where}: step")
        if step <= 0 or log:
            raise ConfigError(f"{where}: a step is above 0 and not on a logarithmic scale.")
    if None in (low, high) or low >= high:
        raise ConfigError(f"{where}: low must be below high; got {low} and {high}.")
    if step is not None and step > high - low:
        raise ConfigError(f"{where}: a step of {step:g} is more than from {low:g} to {high:g}.")
    if log and low <= 0:
        raise ConfigError(f"{where}: on a logarithmic scale low must be above 0; got {low:g}.")
    if whole and (low != int(low) or high != int(high)):
        raise ConfigError(f"{where}: whole numbers between {low:g} and {high:g} have odd ends.")
    return Dimension(leaf.path, (), low, high, log, whole, step)


def _checked(value: Any, leaf: Leaf, where: str) -> Any:
    try:
        return check_value(value, leaf)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error
