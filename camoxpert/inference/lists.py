"""Files to predict that a table or standard input names, in constant memory per name."""

from __future__ import annotations

import codecs
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from camoxpert.data.files.csv_paths import TABLE_SUFFIXES, ListedFiles, read_table
from camoxpert.errors import ConfigError, DataError
from camoxpert.text import did_you_mean

PARQUET_SUFFIXES = (".parquet", ".pq")
LIST_SUFFIXES = (*TABLE_SUFFIXES, *PARQUET_SUFFIXES)
STANDARD_INPUT = "-"
ROWS_AT_ONCE = 65_536

Named = tuple[Path, str]
"""A file and the relative name of its outputs, without the ending."""


def files_in_table(path: Path, column: str, *, allow_outside: bool) -> list[Named]:
    """Return the files that a column of a CSV or Parquet file names.

    They need not exist: a missing one is an input that cannot be read.

    Args:
        path: the table; paths in it are relative to its folder.
        column: name, in any case.
        allow_outside: it may name files outside its folder.

    Raises:
        DataError: the table cannot be read, has no such column, or a path is empty or leads out.
        ConfigError: a Parquet file, and pyarrow is not installed.
    """
    if path.suffix.lower() in PARQUET_SUFFIXES:
        listed = ListedFiles(path, allow_outside=allow_outside, unit="row")
        rows = enumerate(_parquet_cells(path, column), 1)
        return [listed.find(text or "", number, column=column) for number, text in rows]
    listed = ListedFiles(path, allow_outside=allow_outside)
    key = column.lower()
    return [listed.find(row[key], n, column=key) for n, row in read_table(path, (key,))]


def _parquet_cells(path: Path, column: str) -> Iterator[str | None]:
    """Yield the cells of one column; the others are not read."""
    try:
        import pyarrow
        from pyarrow import parquet, types
    except ImportError as error:
        raise ConfigError(
            f"{path} is a Parquet file, and pyarrow is not installed: "
            'pip install "camoxpert[parquet]".'
        ) from error
    try:
        with parquet.ParquetFile(path) as file:
            schema = file.schema_arrow
            found = _column_named(schema.names, column, path)
            kind = schema.field(found).type
            kind = kind.value_type if types.is_dictionary(kind) else kind
            if not (types.is_string(kind) or types.is_large_string(kind)):
                raise DataError(f"{path}: the column {found!r} holds {kind}, not text.")
            for batch in file.iter_batches(ROWS_AT_ONCE, columns=[found]):
                yield from batch.column(0).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path} cannot be read as a Parquet file: {error}.") from error


def _column_named(names: list[str], column: str, path: Path) -> str:
    """Return the name of a column as the file spells it."""
    if column in names:
        return column
    for name in names:
        if name.lower() == column.lower():
            return name
    raise DataError(
        f"{path} has no column {column!r}.{did_you_mean(column, names)} It has: "
        f"{', '.join(names) or 'nothing'}. --column names another one."
    )


def files_on_stdin() -> list[Named]:
    """Return the files that standard input names: one a line, or separated by NUL.

    A name cannot hold a NUL: input that holds one, as from ``find -print0``, is separated by it.

    Raises:
        ConfigError: standard input is a keyboard.
        DataError: it names nothing, or something that cannot be a file.
    """
    if sys.stdin.isatty():
        raise ConfigError(
            "- reads names of images from standard input, which is a keyboard here. Pipe them in: "
            "find photos -name '*.jpg' | camoxpert predict MODEL - -o out"
        )
    data = sys.stdin.buffer.read().removeprefix(codecs.BOM_UTF8)
    if b"\0" in data:
        names = data.split(b"\0")
    else:
        names = [line.removesuffix(b"\r") for line in data.split(b"\n")]
    found = [_named(os.fsdecode(name), n) for n, name in enumerate(names, 1) if name.strip()]
    if not found:
        raise DataError("Standard input (-) names no image.")
    return found


def _named(text: str, number: int) -> Named:
    """Return a path as it is, and its name without ``..`` and root."""
    path = Path(text)
    parts = [part for part in path.parts if part not in ("..", path.anchor)]
    if not parts:
        raise DataError(f"Standard input, name {number}: {text!r} cannot be a file.")
    return path, Path(*parts).with_suffix("").as_posix()
