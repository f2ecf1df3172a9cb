"""Checks of the places that a command will write to, made before its work."""

from __future__ import annotations

import csv
from collections.abc import Sequence
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


def check_table(flag: str, file: str | Path | None, columns: Sequence[str]) -> None:
    """Raise ConfigError if a file cannot be written, or is another table than one with these
    columns: it may be the user's data. None is not checked."""
    check_file(flag, file)
    if not file or not Path(file).exists():
        return
    try:
        with Path(file).open(encoding="utf-8-sig", errors="replace", newline="") as stream:
            head = next(csv.reader(stream), [])
    except (OSError, csv.Error):
        head = [""]
    if head and head != list(columns):
        raise ConfigError(
            f"{flag}: {file} exists, and it is not a table that this command wrote before. Nothing "
            f"was started; name another place with {flag}."
        )


def _check(flag: str, named: str | Path, folder: Path, kind: str) -> None:
    try:
        require_writable(folder)
    except OSError as error:
        raise ConfigError(
            f"{flag}: {named} cannot be written: {why_unwritable(error)}. Nothing was started; "
            f"name another {kind} with {flag}."
        ) from error
