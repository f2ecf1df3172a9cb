"""Numbers that callers of the Python API give; numpy's are as good as Python's."""

from __future__ import annotations

import math
from numbers import Integral, Real
from typing import Any

from camoxpert.errors import ConfigError


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
