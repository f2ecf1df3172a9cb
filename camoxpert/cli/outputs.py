"""Checks of the places that a command will write to, made before its work."""

from __future__ import annotations

from pathlib import Path

from camoxpert.errors import ConfigError
from camoxpert.files import require_writable, why_unwritable


def check_folder(flag: str, folder: str | Path) -> None:
    """Raise ConfigError if no files can be written into a folder, which need not exist."""
    if Path(folder).is_file():
        raise ConfigError(f"{flag} {folder} is a file. Name a folder.")
    _check(flag, folder, Path(folder), "folder")


def check_file(flag: str, file: str | Path | None) -> None:
    """Raise ConfigError if a file cannot be written; None is not checked."""
    if not file:
        return
    if Path(file).is_dir():
        raise ConfigError(f"{flag} {file} is a folder; give a file.")
    _check(flag, file, Path(file).parent, "file")


def _check(flag: str, named: str | Path, folder: Path, kind: str) -> None:
    try:
        require_writable(folder)
    except OSError as error:
        raise ConfigError(
            f"{flag}: {named} cannot be written: {why_unwritable(error)}. Nothing was started; "
            f"name another {kind} with {flag}."
        ) from error
