"""Files that are written whole or not at all, by every part of the program."""

from __future__ import annotations

import csv
import io
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

# Asking for it means setting it, which is only safe before there are threads.
UMASK = os.umask(0o022)
os.umask(UMASK)


def write_whole(path: Path, write: Callable[[IO[bytes]], object], *, durable: bool = False) -> Path:
    """Write a file beside its place and move it there: readers see the old one or the new one.

    Args:
        path: the file; its folder is made.
        write: receives the open file.
        durable: wait until the content is on the disk, so that a power cut cannot leave an empty
            file under the new name. Takes milliseconds.

    Raises:
        OSError: no space, no permission; nothing is left behind.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=".", suffix=".tmp")
    temporary = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            write(file)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        # mkstemp makes private files; results are as private as the user's others.
        temporary.chmod(0o666 & ~UMASK)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return path


def append_here(path: Path) -> IO[str]:
    """Open a text file at its end, never through a link: one that lies in its place goes.

    A link somebody left in a folder of results would otherwise lead the lines into another file.
    """
    if path.is_symlink():
        path.unlink()
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0)
    return os.fdopen(os.open(path, flags, 0o644), "a", encoding="utf-8", newline="")


def leads_outside(root: Path, path: Path) -> bool:
    """Whether a file under ``root`` would be written elsewhere, through ``..`` or a linked folder.

    The file itself may be a link: ``write_whole`` replaces it. ``root`` may be a link, too.
    """
    return not path.parent.resolve().is_relative_to(root.resolve())


def write_bytes(path: Path, data: bytes, *, durable: bool = False) -> Path:
    """Write bytes, whole or not at all; see ``write_whole``."""
    return write_whole(path, lambda file: file.write(data), durable=durable)


def write_rows(
    path: Path, rows: Sequence[Mapping[str, Any]], fields: Sequence[str] | None = None
) -> Path:
    """Write dictionaries as CSV, whole or not at all.

    Args:
        path: the file.
        rows: all with the same keys.
        fields: the columns; None takes those of the first row.
    """
    text = io.StringIO(newline="")
    columns = fields if fields is not None else list(rows[0]) if rows else []
    writer = csv.DictWriter(text, fieldnames=columns)
    writer.writeheader()
    writer.writerows(rows)
    # File names may hold bytes that are no UTF-8: they go out as they came in.
    return write_bytes(path, text.getvalue().encode("utf-8", "surrogateescape"))
