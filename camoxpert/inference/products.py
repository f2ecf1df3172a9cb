"""What a command makes of its items: its files, its table, and the words of its messages."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from camoxpert.errors import DataError
from camoxpert.files import leads_outside
from camoxpert.runs.jobs import ItemRow


@dataclass(frozen=True)
class Table:
    """The table that is written from a ledger.

    Attributes:
        name: of the file.
        columns: its first line.
        cells: returns the cells of an item's row of the ledger.
        command: that writes it, for messages.
        extra: further columns, each there if the head of the ledger says so under its name.
    """

    name: str
    columns: tuple[str, ...]
    cells: Callable[[ItemRow], list[str]]
    command: str
    extra: tuple[str, ...] = ()

    def head(self, settings: Mapping[str, Any] | None) -> tuple[str, ...]:
        """Return the first line of the table of a ledger with this head."""
        return (*self.columns, *(name for name in self.extra if (settings or {}).get(name)))


TABLE = "results.csv"


def table_row(row: ItemRow) -> list[str]:
    """Return the cells of an item's row of the table of ``predict``, in the order of COLUMNS."""
    return [
        row["item"],
        str(row["height"]),
        str(row["width"]),
        f"{row['object_fraction']:.6f}",
        f"{row['confidence']:.4f}",
        f"{row['seconds'].get('forward', 0.0):.4f}",
        *([f"{row['presence']:.4f}"] if "presence" in row else []),
    ]


COLUMNS = ("image", "height", "width", "object_fraction", "confidence", "seconds")
RESULTS = Table(TABLE, COLUMNS, table_row, "predict", ("presence",))


@dataclass(frozen=True)
class Product:
    """The files of a command's items.

    Attributes:
        ledger: name of the ledger.
        folders: kind of file -> its folder, below the folder of the results; a ledger keeps a bit
            for each kind, in this order.
        suffixes: kind -> ending, where it is not ``.png``.
        item: what an item is called.
        again: what ``--overwrite`` does, as in "add --overwrite to predict again".
        scratch: further folders in which unfinished files may be.
    """

    ledger: str
    folders: Mapping[str, str]
    suffixes: Mapping[str, str]
    item: str
    again: str
    scratch: tuple[str, ...] = ()

    def path(self, output: Path, kind: str, name: str) -> Path:
        """Return the path of one file of an item, always inside ``output``.

        Raises:
            DataError: the name, or a symlink in ``output``, leads out of it.
        """
        path = output / self.folders[kind] / f"{name}{self.suffixes.get(kind, '.png')}"
        if leads_outside(output / self.folders[kind], path) or leads_outside(output, path):
            raise DataError(
                f"{path} would be written outside {output}: {path.parent} is a symlink or leads "
                "out. Remove it, or name another folder with -o."
            )
        return path
