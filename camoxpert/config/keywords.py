"""Settings as keyword arguments and mappings, for Python callers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from camoxpert.config.aliases import ALIASES, accepted
from camoxpert.config.load import load_config
from camoxpert.config.schema import to_dict
from camoxpert.config.tree import Config, leaves
from camoxpert.errors import ConfigError
from camoxpert.text import did_you_mean


def config_from_keywords(
    config: Config | Mapping[str, Any] | str | Path | None, settings: Mapping[str, Any]
) -> Config:
    """Return the settings of a file, tree or mapping, with keyword arguments over them.

    Args:
        config: YAML file, settings tree, nested mapping, or None for the defaults.
        settings: values by flag name (``epochs``), by dotted name with ``__`` for the dots
            (``train__epochs``), or by group (``train={"epochs": 2}``).

    Raises:
        ConfigError: an unknown name, with the nearest one; a wrong value, or a conflict.
    """
    file = config if isinstance(config, (str, Path)) else None
    values: dict[str, Any] = {}
    if isinstance(config, Config):
        values = _flatten(to_dict(config))
    elif isinstance(config, Mapping):
        values = _flatten(config)
    return load_config(file=file, flags=values | _flatten(settings))


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return dotted path -> value; flag names at the top count as the settings they stand for."""
    paths = set(accepted())
    groups = {path.rpartition(".")[0] for path in paths}
    flags = {
        known.flag.removeprefix("--").replace("-", "_"): known.path
        for known in leaves()
        if known.flag
    }
    flags |= {old.flag.removeprefix("--").replace("-", "_"): old.path for old in ALIASES}
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        path = f"{prefix}{key}".replace("__", ".")
        path = path if prefix or path in paths else flags.get(path, path)
        if path in groups and isinstance(value, Mapping):
            flat |= _flatten(value, f"{path}.")
        elif path in paths:
            flat[path] = str(value) if isinstance(value, Path) else _plain(value)
        else:
            known = [*(name.replace(".", "__") for name in paths), *flags]
            hint = did_you_mean(str(key), known, otherwise=" See `train --print-config`.")
            raise ConfigError(f"Unknown setting {key}.{hint}")
    return flat


def _plain(value: Any) -> Any:
    """Return paths in lists as text."""
    if isinstance(value, (list, tuple)):
        return [str(item) if isinstance(item, Path) else item for item in value]
    return value
