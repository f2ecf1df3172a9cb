"""Filling the settings tree: defaults < file < flags < dotted overrides, everything checked.

OmegaConf and YAML stay in this module; everything below sees frozen dataclasses.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args, get_origin

from camoxpert.config.checks import check_conflicts, nearest
from camoxpert.config.tree import Config, Leaf, leaves
from camoxpert.errors import ConfigError

REFERENCE = re.compile(r"\$\{(\w+(?:\.\w+)*)\}")
DEEPEST = 20
"""Levels of nesting that a settings file may have."""
LONGEST = 200
"""Characters of a value that others may refer to."""


def load_config(
    *,
    file: str | Path | None = None,
    flags: Mapping[str, Any] | None = None,
    overrides: Sequence[str] = (),
) -> Config:
    """Merge defaults < file < flags < overrides, check everything, return the frozen tree.

    Args:
        file: YAML file with any part of the tree, or None.
        flags: dotted path -> value, only what the user typed.
        overrides: ``path=value`` strings.

    Raises:
        ConfigError: unknown name (with the nearest one), wrong type, out of range, or a conflict.
    """
    merged = read_yaml(Path(file)) if file is not None else {}
    source = f" (in {file})" if file is not None else ""
    values = _flatten(merged, source)
    values.update(flags or {})
    table = {leaf.path: leaf for leaf in leaves()}
    for override in overrides:
        path, value = _parse_override(override, table)
        values[path] = value
    config = build_config(values)
    check_conflicts(config)
    return config


def build_config(values: Mapping[str, Any]) -> Config:
    """Return the defaults with ``values`` (dotted path -> value) over them, each checked."""
    table = {leaf.path: leaf for leaf in leaves()}
    for path in values:
        if path not in table:
            raise ConfigError(_unknown(path, list(table)))
    checked = {
        path: _check_range(_coerce(value, table[path].type, path), table[path])
        for path, value in values.items()
    }
    return _construct(Config, "", checked)


def config_from_dict(tree: Mapping[str, Any]) -> Config:
    """Rebuild a tree that ``to_dict`` made, for example the one inside a checkpoint."""
    return build_config(_flatten(tree, ""))


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a settings file: mappings, lists and scalars only, nothing resolved from outside the
    file."""
    if not path.is_file():
        raise ConfigError(
            f"--config: there is no file {path}. Recipes that come with the project are in "
            f"configs/."
        )
    if path.stat().st_size > 1_000_000:
        raise ConfigError(f"{path} is larger than 1 MB: that is not a settings file.")
    import yaml
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        text = path.read_text(encoding="utf-8")
        _check_tokens(text, path)
        # Never resolved by OmegaConf: its resolvers could copy the environment into saved files.
        tree = OmegaConf.to_container(OmegaConf.create(text), resolve=False)
    except (yaml.YAMLError, OmegaConfBaseException, ValueError, RecursionError) as error:
        # ValueError: text in another encoding, a date that is none, a number of 5000 digits.
        raise ConfigError(
            f"{path} cannot be read as YAML: {' '.join(str(error).split())[:300]}"
        ) from error
    if not isinstance(tree, dict):
        raise ConfigError(f"{path} must hold a mapping of settings such as 'optim: {{lr: 3e-4}}'.")
    plain = {key: value for key, value in _walk(tree) if isinstance(value, (str, int, float))}
    return typing.cast("dict[str, Any]", _substitute(tree, plain, path))


def _check_tokens(text: str, path: Path) -> None:
    """Refuse what a settings file never needs and a hostile one is made of, before it is built.

    Raises:
        ConfigError: an alias (tiny files expand without bound), a tag (objects), a resolver (the
            environment), or brackets nested without end.
        yaml.YAMLError: not YAML.
    """
    import yaml

    starts: tuple[type, ...] = (yaml.FlowMappingStartToken, yaml.FlowSequenceStartToken)
    starts += (yaml.BlockMappingStartToken, yaml.BlockSequenceStartToken)
    ends = (yaml.FlowMappingEndToken, yaml.FlowSequenceEndToken, yaml.BlockEndToken)
    depth = 0
    for token in yaml.scan(text):
        if isinstance(token, yaml.AliasToken):
            raise ConfigError(f"{path} uses a YAML alias (*name); write the value out.")
        if isinstance(token, yaml.TagToken):
            raise ConfigError(f"{path} uses a YAML tag (!{token.value[-1]}); leave it out.")
        depth += isinstance(token, starts) - isinstance(token, ends)
        if depth > DEEPEST:
            raise ConfigError(f"{path} is nested deeper than any settings are.")
        if isinstance(token, yaml.ScalarToken) and "${" in REFERENCE.sub("", token.value):
            raise ConfigError(
                f"{path}: {token.value[:100]!r} uses a resolver; only ${{other.setting}} is "
                f"allowed."
            )


def _substitute(node: Any, plain: Mapping[str, Any], path: Path) -> Any:
    """Return a copy with every ${other.setting} replaced by that setting's own value."""
    if isinstance(node, dict):
        return {key: _substitute(value, plain, path) for key, value in node.items()}
    if isinstance(node, list):
        return [_substitute(value, plain, path) for value in node]
    if not isinstance(node, str) or "${" not in node:
        return node

    def value_of(name: str) -> Any:
        value = plain.get(name)
        # References to references could double a value a hundred times over.
        if value is None or len(str(value)) > LONGEST or "${" in str(value):
            raise ConfigError(
                f"{path}: ${{{name}}} must name a setting of this file that has a short plain "
                f"value."
            )
        return value

    whole = REFERENCE.fullmatch(node)
    if whole:
        return value_of(whole[1])
    return REFERENCE.sub(lambda match: str(value_of(match[1])), node)


def _construct(cls: type, prefix: str, values: Mapping[str, Any]) -> Any:
    hints = typing.get_type_hints(cls)
    arguments: dict[str, Any] = {}
    for field in dataclasses.fields(cls):
        path = f"{prefix}{field.name}"
        if dataclasses.is_dataclass(hints[field.name]):
            arguments[field.name] = _construct(
                typing.cast("type", hints[field.name]), f"{path}.", values
            )
        elif path in values:
            arguments[field.name] = values[path]
    return cls(**arguments)


def _walk(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    items = (
        tree.items()
        if isinstance(tree, dict)
        else enumerate(tree)
        if isinstance(tree, list)
        else ()
    )
    for key, value in items:
        yield f"{prefix}{key}", value
        yield from _walk(value, f"{prefix}{key}.")


def _flatten(tree: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Turn nested mappings into dotted paths; a mapping where a value belongs is reported by its
    path."""
    known = {leaf.path for leaf in leaves()}
    groups = {path.rsplit(".", 1)[0] for path in known} | {path.split(".", 1)[0] for path in known}
    flat: dict[str, Any] = {}

    def descend(node: Mapping[str, Any], prefix: str) -> None:
        for key, value in node.items():
            path = f"{prefix}{key}"
            if path in groups:
                if not isinstance(value, Mapping):
                    raise ConfigError(
                        f"{path} is a group of settings, not a value{source}; got {value!r}."
                    )
                descend(value, f"{path}.")
            elif path in known:
                flat[path] = value
            else:
                raise ConfigError(_unknown(path, sorted(known | groups)) + source)

    descend(tree, "")
    return flat


def parse_text(text: str, leaf: Leaf) -> Any:
    """Turn what was typed for a setting into a value; text settings are taken as they stand.

    Raises:
        ConfigError: not readable as YAML.
    """
    if leaf.type is str:
        return text
    import yaml

    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        # ValueError: a date that is none, a number of 5000 digits.
        shown = text if len(text) <= 80 else f"{text[:80]}..."
        raise ConfigError(f"The value of {leaf.path} cannot be read: {shown!r}.") from error


def _parse_override(text: str, table: Mapping[str, Leaf]) -> tuple[str, Any]:
    path, equals, value = text.partition("=")
    if not equals or not path or path.startswith("-"):
        raise ConfigError(
            f"Cannot understand the argument {text!r}. Overrides are written group.name=value, "
            "for example optim.lr=3e-4."
        )
    if path not in table:
        raise ConfigError(_unknown(path, list(table)))
    return path, parse_text(value, table[path])


def _unknown(path: str, known: list[str]) -> str:
    close = difflib.get_close_matches(path, known, n=1, cutoff=0.6)
    if not close:
        # People remember the last word and forget its group.
        last = path.rsplit(".", 1)[-1]
        tails = {name.rsplit(".", 1)[-1]: name for name in known}
        close = [
            tails[tail] for tail in difflib.get_close_matches(last, list(tails), n=1, cutoff=0.6)
        ]
    hint = f" Did you mean {close[0]}?" if close else " `train --print-config` lists every setting."
    return f"Unknown setting {path}.{hint}"


def _type_name(kind: Any) -> str:
    names = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}
    if get_origin(kind) in (types.UnionType, typing.Union):
        return f"{_type_name(get_args(kind)[0])} or auto"
    if get_origin(kind) is tuple:
        return f"a list ({_type_name(get_args(kind)[0])} each)"
    return names.get(kind, str(kind))


def _coerce(value: Any, kind: Any, path: str) -> Any:
    """Convert ``value`` to the declared type where nothing is lost, or say what was expected."""
    origin = get_origin(kind)
    if origin in (types.UnionType, typing.Union):
        # What is unset is chosen by the program: "auto" says the same in a word.
        return None if value in (None, "auto") else _coerce(value, get_args(kind)[0], path)
    if origin is tuple:
        members = get_args(kind)
        items = (
            [value] if isinstance(value, (str, int, float)) and members[-1] is Ellipsis else value
        )
        if isinstance(items, (list, tuple)) and (
            members[-1] is Ellipsis or len(items) == len(members)
        ):
            return tuple(_coerce(item, members[0], path) for item in items)
    elif kind is bool:
        if isinstance(value, bool):
            return value
    elif kind is int:
        if isinstance(value, int) and not isinstance(value, bool):
            return value
        if isinstance(value, float) and value.is_integer():
            return int(value)
    elif kind is float:
        number = _as_float(value)
        if number is not None:
            return number
    elif kind is str:
        # YAML 1.1 reads off and on as booleans; the choices of some settings are exactly these
        # words.
        if isinstance(value, bool):
            return "on" if value else "off"
        if isinstance(value, (str, int)):
            return str(value)
    raise ConfigError(f"{path} must be {_type_name(kind)}, got {value!r}.")


def _as_float(value: Any) -> float | None:
    if isinstance(value, str):
        # YAML 1.1 reads 3e-4 (no dot) as text; people write it all the time.
        try:
            value = float(value)
        except ValueError:
            return None
    if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
        return float(value)
    return None


def _check_range(value: Any, leaf: Leaf) -> Any:
    metadata = leaf.metadata
    name = f"{leaf.path} ({metadata['flag']})" if metadata["flag"] else leaf.path
    if metadata["choices"] and value not in metadata["choices"]:
        raise ConfigError(
            f"{name} must be one of {', '.join(metadata['choices'])}; got {value}."
            f"{nearest(str(value), metadata['choices'])}"
        )
    if value is None or isinstance(value, (str, tuple)):
        return value
    if metadata["minimum"] is not None and value < metadata["minimum"]:
        raise ConfigError(f"{name} must be at least {metadata['minimum']:g}; got {value:g}.")
    if metadata["maximum"] is not None and value > metadata["maximum"]:
        raise ConfigError(f"{name} must be at most {metadata['maximum']:g}; got {value:g}.")
    if metadata["above"] is not None and value <= metadata["above"]:
        raise ConfigError(f"{name} must be above {metadata['above']:g}; got {value:g}.")
    return value
