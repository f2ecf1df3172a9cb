"""What a file of weights says of itself, which somebody else may have written: checked before it is
used."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from camoxpert.errors import CheckpointError

NUMBER = (int, float)
SHARED_SHAPE: dict[str, Any] = {
    "state": {"*": NUMBER},
    "scores": {},
    "data_hash": str,
    "backbone_weights": {"*": str},
    "results": [{"scores": {}, "intervals": {}, "presence": {}}],
    "training": {"parameters": NUMBER, "gmacs": NUMBER, "images": {}, "versions": {}},
    "license": str,
}
"""Of shared weights; see ``share.about_of``."""
EXPORTED_SHAPE: dict[str, Any] = {
    "format": str,
    "precision": str,
    "outputs": [str],
    "static": [int],
    "least_side": int,
    "presence": {"images": int},
    "guidance": {"features": int},
    "scores": {},
    "state": {},
}
"""Of an exported file; see ``export.job.about_of``."""
WORDS: Mapping[Any, str] = {str: "text", int: "a whole number", NUMBER: "a number"}


def check_shape(path: Path, about: Mapping[str, Any], shape: Mapping[str, Any]) -> None:
    """Raise CheckpointError if metadata has values of other types; null is as good as missing.

    Args:
        path: of the file.
        about: its metadata.
        shape: key -> a type, a list of one shape, or a mapping of such (``*``: any other key).
    """
    _check(path, "", about, shape)


def _check(path: Path, name: str, value: Any, shape: Any) -> None:
    if value is None:
        return
    if isinstance(shape, Mapping):
        if not isinstance(value, Mapping):
            raise wrong(path, name, value, "a mapping")
        for key, entry in value.items():
            inner = shape.get(key, shape.get("*"))
            if inner is not None:
                _check(path, f"{name}.{key}" if name else str(key), entry, inner)
    elif isinstance(shape, list):
        if not isinstance(value, Sequence) or isinstance(value, str):
            raise wrong(path, name, value, "a list")
        for index, entry in enumerate(value):
            if entry is None:
                raise wrong(path, name, value, "a list without gaps")
            _check(path, f"{name}[{index}]", entry, shape[0])
    elif not isinstance(value, shape) or isinstance(value, bool):
        raise wrong(path, name, value, WORDS[shape])


def wrong(path: Path, name: str, value: Any, wanted: str) -> CheckpointError:
    """Return the error for a value that cannot be."""
    shown = repr(value)
    shown = shown if len(shown) <= 60 else f"{shown[:60]}..."
    return CheckpointError(
        f"{path}: its metadata is damaged, or not of this program: {name} must be {wanted}, and is "
        f"{shown}. Get the file again from where it was made."
    )
