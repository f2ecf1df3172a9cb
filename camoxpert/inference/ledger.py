"""The ledger of a folder of results: the truth about which item is done, with what settings.

``predictions.jsonl`` is only appended to while a run works. It has a line ``settings`` (the head),
then a row for each item and attempt, and a line ``commit`` behind the rows of each chunk, written
with them and synced to the disk; rows without it are those of a chunk that a kill cut short, and do
not count. Files are renamed into place before their row is written, so that an item that counts has
its files, and an item that does not is done again, which is harmless. A run that ends puts the rows
into the order of its items, adds the line ``finished`` and writes ``results.csv`` from them.

Rows::

    {"item": "sub/a", "status": "ok", "attempt": 1, "source": "/photos/sub/a.jpg", "size": 81234,
     "mtime_ns": ..., "ctime_ns": ..., "digest": "sha256 ...", "kinds": ["mask"], "height": 768,
     "width": 1024, "object_fraction": 0.0312, "confidence": 0.91,
     "seconds": {"read": 0.01, "forward": 0.1, "write": 0.02}, "worker": "cpu"}
    {"item": "b", "status": "failed", "attempt": 1, ..., "reason": "b.jpg is damaged ..."}

In memory an item takes about 250 bytes: its name and a few numbers. Everything else stays in the
file and is read by its place in it.
"""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
import tempfile
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from camoxpert.errors import DataError
from camoxpert.files import append_here, try_lock, write_whole
from camoxpert.inference.products import RESULTS, Table
from camoxpert.runs.jobs import ItemRow, SourceFacts

LEDGER = "predictions.jsonl"
OK, FAILED = 1, 2
STATUS = {"ok": OK, "failed": FAILED}
MARKS = ("settings", "commit", "finished")
ROWS_A_COMMIT = 1000
"""Items between two commits of a ledger in order: rows before a commit wait in memory."""

Row = dict[str, Any]


@dataclass(frozen=True)
class Source:
    """The file of an item as it was when it was read."""

    source: str
    size: int
    mtime_ns: int
    ctime_ns: int

    @property
    def stamp(self) -> int:
        """64 bits that change when the file does; not its path."""
        return stamp_of(self.size, self.mtime_ns, self.ctime_ns)


def stamp_of(size: int, mtime_ns: int, ctime_ns: int) -> int:
    """Return the stamp of a file; it is kept in memory only, never written."""
    # The hash of numbers, unlike that of text, is the same in every process.
    return hash((size, mtime_ns, ctime_ns)) & 0xFFFF_FFFF_FFFF_FFFF


def source_of(path: str | Path) -> Source | None:
    """Return the present state of a file; None if there is none."""
    try:
        found = Path(path).stat()
    except OSError:
        return None
    return Source(os.path.abspath(path), found.st_size, found.st_mtime_ns, found.st_ctime_ns)


class Index:
    """What a ledger says of each item, in a few numbers.

    Attributes:
        kinds: names of files that rows list, in the order of their bits.
    """

    def __init__(self, kinds: Sequence[str]) -> None:
        self.kinds = tuple(kinds)
        self._bits = {kind: 1 << bit for bit, kind in enumerate(self.kinds)}
        self.clear()

    def clear(self) -> None:
        """Forget all items."""
        self._slot: dict[str, int] = {}
        self._status = array("B")
        self._kinds = array("B")
        self._attempts = array("H")
        self._stamps = array("Q")
        self._offsets = array("Q")

    def __len__(self) -> int:
        return len(self._slot)

    def __iter__(self) -> Iterator[str]:
        return iter(self._slot)

    def add(self, row: Mapping[str, Any], offset: int) -> None:
        """Note the row that begins at ``offset`` of the file; it replaces an earlier one.

        Raises:
            KeyError, ValueError, TypeError: the row is not one of ours.
        """
        status = STATUS[row["status"]]
        kinds = 0
        for kind in row.get("kinds", ()):
            kinds |= self._bits[kind]
        size, stamp = row["size"], 0
        if size is not None:
            stamp = stamp_of(size, row["mtime_ns"], row["ctime_ns"])
        name, attempt = row["item"], min(int(row["attempt"]), 65535)
        slot = self._slot.setdefault(name, len(self._slot))
        if slot == len(self._status):
            self._status.append(status)
            self._kinds.append(kinds)
            self._attempts.append(attempt)
            self._stamps.append(stamp)
            self._offsets.append(offset)
        else:
            self._status[slot], self._kinds[slot] = status, kinds
            self._attempts[slot], self._stamps[slot] = attempt, stamp
            self._offsets[slot] = offset

    def move(self, names: Sequence[str], places: Sequence[int]) -> None:
        """Note the order and the places of rows that were rewritten."""
        old = self._slot
        self._slot = {name: number for number, name in enumerate(names)}
        for column in (self._status, self._kinds, self._attempts, self._stamps):
            column[:] = array(column.typecode, [column[old[name]] for name in names])
        self._offsets = array("Q", places)

    def slot(self, name: str) -> int | None:
        """Return the number of an item; None for one without a row."""
        return self._slot.get(name)

    def status(self, name: str) -> int:
        """Return OK, FAILED, or 0 for an item without a row."""
        slot = self._slot.get(name)
        return 0 if slot is None else self._status[slot]

    def has_kinds(self, name: str) -> frozenset[str]:
        """Return the kinds of files that are up to date."""
        slot = self._slot.get(name)
        bits = 0 if slot is None else self._kinds[slot]
        return frozenset(kind for bit, kind in enumerate(self.kinds) if bits >> bit & 1)

    def attempts(self, name: str) -> int:
        """Return how often the item was tried."""
        slot = self._slot.get(name)
        return 0 if slot is None else self._attempts[slot]

    def stamp(self, name: str) -> int:
        """Return the stamp of the item's source; 0: unknown."""
        return self._stamps[self._slot[name]]

    def offset(self, name: str) -> int:
        """Return where the item's row begins."""
        return self._offsets[self._slot[name]]


class Ledger:
    """The ledger of one folder, open for appending; see ``open_ledger``.

    Args:
        folder: of the results.
        kinds: of files that rows list.
        name: of its file.
        table: that is written from it; None: none.

    Attributes:
        earlier: the head of the rows that count; None: there is none.
        index: the items that count.
        finished: whether the last call into the folder came to its end.
    """

    def __init__(
        self,
        folder: Path,
        kinds: Sequence[str],
        *,
        name: str = LEDGER,
        table: Table | None = RESULTS,
    ) -> None:
        self.folder = folder
        self.path = folder / name
        self.table = table
        self.earlier: dict[str, Any] | None = None
        self.index = Index(kinds)
        self.finished = False
        self._changed = False
        self._torn: int | None = None
        self._read()

    @property
    def made(self) -> list[str]:
        """Names of the items that have results."""
        return [name for name in self.index if self.index.status(name) == OK]

    def restart(self, head: Mapping[str, Any]) -> None:
        """Forget all rows, and write the settings of the coming ones.

        At once, before any file is written or replaced: a call that is killed in its first chunk
        leaves files of which the ledger knows the settings, and no row says that one of them is
        still what an earlier call made.

        Raises:
            DataError: they cannot be written.
        """
        self.index.clear()
        self.earlier = dict(head)
        self._write([json.dumps({"settings": self.earlier}), json.dumps({"commit": 0})])

    def append(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Write the rows of a chunk, all or none, and wait until they are on the disk.

        Raises:
            DataError: they cannot be written.
        """
        lines = [json.dumps(row) for row in rows]
        offset = self._write([*lines, json.dumps({"commit": len(rows)})])
        for row, line in zip(rows, lines, strict=True):
            self.index.add(row, offset)
            # ASCII: json escapes everything else.
            offset += len(line) + 1

    def _write(self, lines: Sequence[str]) -> int:
        """Append lines and wait until they are on the disk; return where they begin."""
        try:
            with append_here(self.path) as file:
                if self._torn is not None:
                    file.truncate(self._torn)
                offset = file.seek(0, os.SEEK_END)
                file.write("\n".join(lines) + "\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise self._unwritable(error) from error
        self._torn, self._changed, self.finished = None, True, False
        return offset

    def row(self, name: str) -> ItemRow:
        """Return the last row of an item, read from the file."""
        with self.path.open("rb") as file:
            file.seek(self.index.offset(name))
            row: ItemRow = json.loads(file.readline())
        return row

    def rows(self) -> Iterator[ItemRow]:
        """Yield the last row of every item, read from the file."""
        with self.path.open("rb") as file:
            for name in self.index:
                file.seek(self.index.offset(name))
                yield json.loads(file.readline())

    def finish(self, order: Iterable[str], *, complete: bool) -> None:
        """Put the rows into order and write the table from them.

        Args:
            order: names of the items of this call; those of other calls keep their places.
            complete: every item of the call has a row.

        Raises:
            DataError: a file cannot be written.
        """
        if not self._changed and self.finished >= complete and self._has_table():
            return
        mine = dict.fromkeys(name for name in order if self.index.status(name))
        ordered = iter(mine)
        sequence = [next(ordered) if name in mine else name for name in self.index]
        try:
            with self._table() as add:
                # Without a row, too: a part that had nothing to do is finished.
                if self.path.exists() and self.earlier is not None:
                    self._rewrite(sequence, complete, add)
        except OSError as error:
            raise self._unwritable(error) from error
        self._changed = False

    def _has_table(self) -> bool:
        return self.table is None or (self.folder / self.table.name).is_file()

    def _rewrite(
        self, sequence: Sequence[str], complete: bool, add: Callable[[bytes], object]
    ) -> None:
        """Rewrite the ledger: head, all attempts of each item in order, end.

        Args:
            sequence: the items.
            complete: add the line that says so.
            add: called with the line of the last attempt of each item.
        """
        earlier = self._attempts_before_last()
        places = array("Q")

        def write(file: IO[bytes]) -> None:
            with self.path.open("rb") as old:
                file.write(json.dumps({"settings": self.earlier}).encode() + b"\n")
                since = 0
                for name in sequence:
                    if since == ROWS_A_COMMIT:
                        file.write(json.dumps({"commit": since}).encode() + b"\n")
                        since = 0
                    since += 1
                    for offset in earlier.get(name, ()):
                        old.seek(offset)
                        file.write(old.readline())
                    old.seek(self.index.offset(name))
                    line = old.readline()
                    places.append(file.tell())
                    file.write(line)
                    add(line)
                file.write(json.dumps({"commit": since}).encode() + b"\n")
                if complete:
                    file.write(b'{"finished": true}\n')

        write_whole(self.path, write, durable=True)
        self.index.move(sequence, places)
        self.finished = complete

    def _attempts_before_last(self) -> dict[str, list[int]]:
        """Return the places of rows that later attempts replaced; few items have any."""
        again = {name for name in self.index if self.index.attempts(name) > 1}
        found: dict[str, list[int]] = {}
        if again:
            for kind, entry, offset, _ in self._lines():
                if kind == "settings":
                    found.clear()
                    continue
                name = entry.get("item")
                if name in again and offset != self.index.offset(name):
                    found.setdefault(name, []).append(offset)
        return found

    @contextmanager
    def _table(self) -> Iterator[Callable[[bytes], object]]:
        """Write the table from the lines of the ledger that the block gives to the function."""
        if self.table is None:
            yield lambda line: None
            return
        with tempfile.TemporaryFile() as scratch:
            text = io.TextIOWrapper(scratch, encoding="utf-8", errors="surrogateescape", newline="")
            writer = csv.writer(text)
            writer.writerow(self.table.head(self.earlier))
            cells = self.table.cells

            def add(line: bytes) -> None:
                row = json.loads(line)
                if row["status"] == "ok":
                    writer.writerow(cells(row))

            yield add
            text.flush()
            scratch.seek(0)
            write_whole(
                self.folder / self.table.name, lambda file: shutil.copyfileobj(scratch, file)
            )
            text.detach()

    def _read(self) -> None:
        """Read the file up to the last commit; what a kill left behind it is cut off later."""
        waiting: list[tuple[Row, int]] = []
        head: dict[str, Any] | None = None
        good = 0
        for kind, entry, offset, end in self._lines():
            if kind == "settings":
                head, waiting = entry["settings"], []
            elif kind == "row":
                waiting.append((entry, offset))
            elif kind == "commit":
                if head is not None:
                    self.index.clear()
                    self.earlier, head = head, None
                for row, place in waiting:
                    self._note(row, place)
                waiting = []
            self.finished = kind == "finished"
            if kind in ("commit", "finished"):
                good = end
        if self.path.is_file() and self.path.stat().st_size > good:
            self._torn = good

    def _note(self, row: Row, offset: int) -> None:
        try:
            self.index.add(row, offset)
        except (KeyError, ValueError, TypeError):
            # A row of another version: the item is done again.
            return

    def _lines(self) -> Iterator[tuple[str, dict[str, Any], int, int]]:
        """Yield (kind, content, place, end) of every whole line; damaged ones are left out."""
        if not self.path.is_file():
            return
        with self.path.open("rb") as file:
            end = 0
            for line in file:
                place, end = end, end + len(line)
                if not line.endswith(b"\n"):
                    return
                try:
                    entry = json.loads(line)
                    kind = "row" if "item" in entry else next(k for k in MARKS if k in entry)
                except (ValueError, TypeError, StopIteration):
                    continue
                yield kind, entry, place, end

    def _unwritable(self, error: OSError) -> DataError:
        return DataError(
            f"{self.path} could not be written: {error.strerror or error}. Make room, or name "
            "another folder with -o; the same call does what is missing."
        )


@contextmanager
def open_ledger(
    folder: Path, kinds: Sequence[str], *, name: str = LEDGER, table: Table | None = RESULTS
) -> Iterator[Ledger]:
    """Read a ledger of a folder and keep other calls out of it during the block.

    Args:
        folder, kinds, name, table: see ``Ledger``.

    Raises:
        DataError: another process works on the folder, or it cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = folder / f".{name.removesuffix('.jsonl')}.lock"
        for path in (lock, folder / name):
            if path.is_symlink():
                path.unlink()
        held = try_lock(lock)
    except OSError as error:
        raise DataError(
            f"{folder} cannot be written: {error.strerror or error}. Name another folder with -o."
        ) from error
    if held is None:
        raise DataError(
            f"Another process is working on {folder}. Wait for it, or name another folder with -o."
        )
    try:
        try:
            if table is not None:
                _require_own_table(folder / table.name, table)
            ledger = Ledger(folder, kinds, name=name, table=table)
        except OSError as error:
            raise DataError(f"{folder} cannot be read: {error}.") from error
        yield ledger
    finally:
        held.release()


def _require_own_table(path: Path, table: Table) -> None:
    """Raise DataError if the file of the table is another table."""
    if not path.is_file() or path.is_symlink():
        return
    with path.open(encoding="utf-8", errors="replace", newline="") as file:
        first = next(csv.reader(file), list(table.columns))
    if tuple(first) not in (table.columns, (*table.columns, *table.extra)):
        raise DataError(
            f"{path} is not a table of `{table.command}` (its columns: {', '.join(first)}). Move "
            "it, or name another folder with -o."
        )


def as_fields(source: Source | None) -> SourceFacts:
    """Return the fields of a row that describe its source."""
    if source is None:
        return {"source": None, "size": None, "mtime_ns": None, "ctime_ns": None}
    return {
        "source": source.source,
        "size": source.size,
        "mtime_ns": source.mtime_ns,
        "ctime_ns": source.ctime_ns,
    }
