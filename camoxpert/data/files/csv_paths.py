"""Read users' CSV files and resolve the paths in them, which must stay in the CSV's folder.

Spreadsheets and other systems write them with commas, semicolons or tabs, in UTF-8 or UTF-16, with
any line ends, spaces around cells, ``Image`` for ``image``, and backslashes in paths.
"""

from __future__ import annotations

import codecs
import csv
import io
import os
import re
from collections.abc import Sequence
from pathlib import Path

from camoxpert.errors import DataError
from camoxpert.files import path_text
from camoxpert.text import did_you_mean

TABLE_SUFFIXES = (".csv", ".tsv")
DELIMITERS = ",;\t|"
SEPARATOR_LINE = re.compile(r'\A"?sep=.?"?[,;\t|]*(\r\n|\r|\n)', re.IGNORECASE)
"""Excel's own first line, which names the mark between cells."""
Row = tuple[int, dict[str, str]]
"""Line number in the file, and column -> cell."""


def read_table(path: Path, columns: Sequence[str], *, errors: str = "strict") -> list[Row]:
    """Return the rows of a CSV; column names are in lower case, cells without spaces around them.

    Args:
        path: the file.
        columns: names that the header must have, in any case.
        errors: how bytes that are not UTF-8 are read.

    Raises:
        DataError: bad encoding, a missing column, or a row with too many cells.
    """
    # An empty line instead: lines keep their numbers.
    text = SEPARATOR_LINE.sub("\n", _text_of(path, errors))
    first = next((line for line in text.splitlines() if line.strip()), "")
    # What gives the wanted columns is right; a decimal comma in a cell would mislead a guess.
    delimiter = max(DELIMITERS, key=lambda mark: len(set(_header(first, mark)) & set(columns)))
    header = _header(first, delimiter)
    for column in columns:
        if column not in header:
            shown = ", ".join(header) or "nothing"
            raise DataError(
                f"{path} has no column {column!r}.{did_you_mean(column, header)} It needs the "
                f"columns {', '.join(columns)}; its first line names: {shown}."
            )
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, skipinitialspace=True)
    rows = []
    try:
        for cells in reader:
            if not any(cell.strip() for cell in cells):
                continue
            if len(cells) > len(header) and any(cell.strip() for cell in cells[len(header) :]):
                raise DataError(
                    f"{path}, line {reader.line_num}: {len(cells)} cells, but the first line names "
                    f'{len(header)}. Put a path that holds {delimiter!r} in "quotes".'
                )
            named = dict(zip(header, (cell.strip() for cell in cells), strict=False))
            rows.append((reader.line_num, {column: named.get(column, "") for column in header}))
    except csv.Error as error:
        raise DataError(f"{path}, line {reader.line_num}: not a row of a CSV ({error}).") from error
    return rows[1:]


def _header(line: str, delimiter: str) -> list[str]:
    try:
        cells = next(csv.reader([line], delimiter=delimiter, skipinitialspace=True), [])
    except csv.Error:
        return []
    return [cell.strip().lower() for cell in cells]


def _text_of(path: Path, errors: str) -> str:
    """Return a file's text: UTF-16 by its mark, else UTF-8."""
    data = path.read_bytes()
    wide = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        return path_text(data.decode("utf-16" if wide else "utf-8-sig", errors))
    except UnicodeError as error:
        raise DataError(f"{path} is not a CSV in UTF-8: {error}. Save it as UTF-8.") from error


def listed_file(
    table: Path, text: str, line: int, *, column: str, allow_outside: bool = False
) -> tuple[Path, str]:
    """Return the file that one row names; see ``ListedFiles``."""
    return ListedFiles(table, allow_outside=allow_outside).find(text, line, column=column)


class ListedFiles:
    """Finds the files that the rows of a table name.

    Symlinks are resolved first: a link that leads out of the folder counts as outside. A folder is
    resolved once, so that a million rows cost a look at each file and not at all folders above it.

    Args:
        table: the file; paths are relative to its folder.
        allow_outside: also accept absolute paths, ``..`` and symlinks that lead out.
        unit: what the rows are called in messages.
    """

    def __init__(self, table: Path, *, allow_outside: bool = False, unit: str = "line") -> None:
        self._table, self._allow_outside, self._unit = table, allow_outside, unit
        self._root = table.parent.resolve()
        # Folder as written -> where it is, and the prefix of names in it; None: not inside.
        self._folders: dict[str, tuple[str, str] | None] = {}

    def find(self, text: str, line: int, *, column: str) -> tuple[Path, str]:
        """Return the file that a row names, and a relative name for it without ``..``.

        Args:
            text: the path in the row; ``\\`` is read as ``/`` unless a file has it in its name.
            line: number of the row, for messages.
            column: name of the cell's column, for messages.

        Raises:
            DataError: the path is empty or leads outside.
        """
        found = self._plain(text)
        if found is not None:
            return found
        place = f"{self._table}, {self._unit} {line}"
        if not text:
            raise DataError(f"{place}: the cell {column!r} is empty.")
        written = Path(text)
        try:
            if "\\" in text and not (self._root / written).exists():
                written = Path(text.replace("\\", "/"))
            file = (self._root / written).resolve()
        except (OSError, RuntimeError, ValueError) as error:
            # A symlink loop or a NUL byte.
            raise DataError(f"{place}: {text!r} is not a path ({error}).") from error
        inside = not written.is_absolute() and file.is_relative_to(self._root)
        if file == self._root or not (inside or self._allow_outside):
            raise DataError(
                f"{place}: {text!r} is not a path inside the table's folder. Paths are relative to "
                "that folder and may not lead out of it. Put the table beside the images, or use "
                "--allow-outside if you trust it."
            )
        if inside:
            # The name is that of the table: a symlink's target may be called by its content.
            name = Path(os.path.normpath(written))
            if ".." in name.parts:
                # Out of the folder and back into it.
                name = file.relative_to(self._root)
            return file, name.with_suffix("").as_posix()
        parts = [part for part in written.parts if part not in ("..", written.anchor)]
        return file, Path(*parts).with_suffix("").as_posix()

    def _plain(self, text: str) -> tuple[Path, str] | None:
        """Return the file of a plain path inside the folder; None for any other text."""
        folder, _, name = text.rpartition("/")
        if not name or name in (".", "..") or "\\" in text or "\0" in text:
            return None
        if folder not in self._folders:
            self._folders[folder] = self._folder_inside(folder, text)
        known = self._folders[folder]
        if known is None or (path := Path(f"{known[0]}/{name}")).is_symlink():
            return None
        dot = name.rfind(".")
        return path, known[1] + (name[:dot] if 0 < dot < len(name) - 1 else name)

    def _folder_inside(self, folder: str, text: str) -> tuple[str, str] | None:
        try:
            real = (self._root / folder).resolve()
        except (OSError, RuntimeError, ValueError):
            return None
        if text.startswith("/") or not real.is_relative_to(self._root):
            return None
        prefix = real.relative_to(self._root).as_posix()
        return str(real), "" if prefix == "." else f"{prefix}/"
