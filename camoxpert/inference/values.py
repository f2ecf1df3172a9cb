"""Values that callers of the Python API give; numpy's numbers are as good as Python's."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any

from camoxpert.errors import ConfigError
from camoxpert.text import did_you_mean


def whole_number(name: str, value: Any, least: int | None = None) -> int:
    """Return a value as int; raise ConfigError for anything but a whole number of at least
    ``least``."""
    if not isinstance(value, Integral) or isinstance(value, bool):
        raise ConfigError(f"{name} must be a whole number; got {value!r}.")
    if least is not None and value < least:
        raise ConfigError(f"{name} must be at least {least}; got {value}.")
    return int(value)


def finite_number(name: str, value: Any) -> float:
    """Return a value as float; raise ConfigError for anything but a finite number."""
    if not isinstance(value, Real) or isinstance(value, bool) or not math.isfinite(value):
        raise ConfigError(f"{name} must be a number; got {value!r}.")
    return float(value)


def one_of(name: str, value: Any, known: Sequence[str]) -> str:
    """Return a value that is one of some words; raise ConfigError for any other."""
    if value not in known:
        hint = did_you_mean(str(value), known)
        raise ConfigError(f"{name} must be {' or '.join(known)}; got {value!r}.{hint}")
    return str(value)
