"""Open users' CSV files and resolve the paths in them, which must stay in the CSV's folder."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from camoxpert.errors import DataError


@contextmanager
def text_file(path: Path, *, errors: str = "strict") -> Iterator[IO[str]]:
    """Open a CSV; bad encoding or a broken row raises DataError."""
    with path.open(newline="", encoding="utf-8-sig", errors=errors) as file:
        try:
            yield file
        except (UnicodeError, csv.Error) as error:
            raise DataError(f"{path} is not a CSV in UTF-8: {error}. Save it as UTF-8.") from error


def listed_file(
    table: Path, text: str | None, line: int, *, allow_outside: bool = False
) -> tuple[Path, str]:
    """Return the file that a row names, and a relative name for it without ``..``.

    Symlinks are resolved first: a link that leads out of the folder counts as outside.

    Args:
        table: the CSV; paths are relative to its folder.
        text: the path in the row.
        line: line number of the row, for messages.
        allow_outside: also accept absolute paths, ``..`` and symlinks that lead out.

    Raises:
        DataError: the path is empty or leads outside.
    """
    root = table.parent.resolve()
    written = Path(text or "")
    try:
        file = (root / written).resolve()
    except (OSError, RuntimeError, ValueError) as error:
        # A symlink loop or a NUL byte.
        raise DataError(f"{table}, line {line}: {text!r} is not a path ({error}).") from error
    inside = not written.is_absolute() and file.is_relative_to(root)
    if not text or file == root or not (inside or allow_outside):
        raise DataError(
            f"{table}, line {line}: {text!r} is not a path inside the CSV's folder. Paths are "
            f"relative to that folder and may not lead out of it. Put the CSV beside the images, "
            f"or use --allow-outside if you trust this CSV."
        )
    if inside:
        return file, file.relative_to(root).with_suffix("").as_posix()
    parts = [part for part in written.parts if part not in ("..", written.anchor)]
    return file, Path(*parts).with_suffix("").as_posix()
