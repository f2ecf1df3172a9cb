"""Predict folders of photos into pictures and a table; repeating a call finishes a stopped one."""

from __future__ import annotations

import csv
import os
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

from camoxpert import console, stop
from camoxpert.errors import DataError
from camoxpert.files import append_here, write_rows
from camoxpert.inference.prediction import KINDS, Prediction
from camoxpert.inference.predictor import Predictor
from camoxpert.inference.record import (
    Record,
    Settings,
    Source,
    model_digest,
    open_record,
    source_of,
)
from camoxpert.inference.sources import Photo
from camoxpert.text import count

COLUMNS = ("image", "height", "width", "object_fraction", "confidence", "seconds")
WRITERS = 2
"""Threads that encode and write pictures beside the forward pass."""
WAITING = 8
"""Photos that may wait to be written: a photo of 12 megapixels takes 84 MB."""


@dataclass(frozen=True)
class PhotoOptions:
    """What is written for each photo.

    Attributes:
        kinds: pictures to write: map (probability, 0..255), mask (0 or 255), cutout (RGBA),
            overlay.
        batch_size: images per forward pass.
        threshold: probability above which a pixel is object, for mask and table.
        overwrite: predict photos whose outputs exist again.
    """

    kinds: Sequence[str] = KINDS
    batch_size: int = 8
    threshold: float = 0.5
    overwrite: bool = False


@dataclass
class BatchResult:
    """Counts of a list of photos, and (path, reason) of the unreadable ones."""

    done: int = 0
    skipped: int = 0
    replaced: int = 0
    failed: list[tuple[Path, str]] = field(default_factory=list)


def predict_photos(
    predictor: Predictor, photos: Sequence[Photo], output: Path, options: PhotoOptions
) -> BatchResult:
    """Predict every photo at its original size and write the outputs.

    Photos whose outputs are complete and up to date are skipped, so that the same call finishes a
    stopped one; see ``record``. An unreadable photo is reported; the others are still predicted.

    Args:
        predictor: the model.
        photos: inputs.
        output: folder for ``maps/``, ``masks/``, ``cutouts/``, ``overlays/``, ``results.csv`` and
            ``predictions.jsonl``.
        options: what to write.

    Raises:
        ConfigError: the folder holds pictures made with other settings, or of unknown origin.
        DataError: an output would be written outside ``output``, or cannot be written.
        Stopped: the command was asked to stop.
    """
    settings = Settings(
        model=model_digest(predictor.checkpoint),
        checkpoint=os.path.abspath(predictor.checkpoint.path),
        img_size=predictor.img_size,
        precision=predictor.precision.name,
        threshold=options.threshold,
    )
    with open_record(output, settings) as record, Table(output / "results.csv") as table:
        result = BatchResult()
        todo = list(photos)
        if options.overwrite:
            if record.is_new:
                names = {photo.name for photo in photos}
                others = [name for name in record.made if name not in names]
                if others:
                    console.warn(
                        f"{output} still holds pictures of {count(len(others), 'photo')} made with "
                        "other settings"
                    )
                table.clear()
                record.restart()
        else:
            record.require_same()
            todo, replaced = record.left_to_do(photos, options.kinds, set(table.rows))
            result.skipped = len(photos) - len(todo)
            result.replaced = len(replaced)
            if record.is_new:
                table.clear()
                record.restart()
        attempts = predictor.attempts(
            todo, threshold=options.threshold, batch_size=options.batch_size
        )
        sources = {photo.name: source_of(photo.path) for photo in todo}
        with (
            console.progress("predict", total=len(todo)) as bar,
            _Writing(output, options.kinds, record, table) as writing,
        ):
            for photo, found in attempts:
                stop.check()
                bar.update()
                if isinstance(found, DataError):
                    result.failed.append((photo.path, str(found)))
                    continue
                # Between pictures and row nothing is lost, but the photo would be predicted again.
                with stop.current().deferred():
                    writing.add(photo, sources[photo.name], found)
                    result.done += 1
    return result


class Table:
    """``results.csv``: a row for each image, appended as they are made.

    A row that replaces an earlier one is appended as well; leaving the block removes the earlier
    one, as does the next call after a kill.

    Raises:
        DataError: the file is another table, or cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: dict[str, list[str]] = {}
        self._repeats = False
        if path.is_file() and not path.is_symlink():
            with path.open(encoding="utf-8", errors="surrogateescape", newline="") as file:
                lines = [line for line in csv.reader(file) if line]
            if lines and tuple(lines[0]) != COLUMNS:
                raise DataError(
                    f"{path} is not a table of `predict` (its columns: {', '.join(lines[0])}). "
                    "Move it, or name another folder with -o."
                )
            # A killed call can leave half a line.
            whole = [line for line in lines[1:] if len(line) == len(COLUMNS)]
            self.rows = {line[0]: line for line in whole}
            self._repeats = len(self.rows) < len(lines) - 1

    def __enter__(self) -> Table:
        if self._repeats:
            self._rewrite()
        return self

    def __exit__(self, *error: object) -> None:
        if self._repeats:
            with stop.current().deferred():
                self._rewrite()

    def clear(self) -> None:
        """Remove all rows."""
        self.rows, self._repeats = {}, False
        self.path.unlink(missing_ok=True)

    def add(self, found: Prediction) -> None:
        """Append the row of an image."""
        row = [
            found.name,
            *(str(side) for side in found.size),
            f"{found.object_fraction:.6f}",
            f"{found.confidence:.4f}",
            f"{found.seconds:.4f}",
        ]
        self._repeats |= found.name in self.rows
        self.rows[found.name] = row
        try:
            with append_here(self.path) as file:
                # File names may hold bytes that are not UTF-8: they are written as they were read.
                file.reconfigure(errors="surrogateescape")  # type: ignore[attr-defined]
                writer = csv.writer(file)
                if not file.tell():
                    writer.writerow(COLUMNS)
                writer.writerow(row)
        except OSError as error:
            raise DataError(f"{self.path} could not be written: {error}.") from error

    def _rewrite(self) -> None:
        rows = [dict(zip(COLUMNS, row, strict=True)) for row in self.rows.values()]
        try:
            write_rows(self.path, rows, COLUMNS)
        except OSError as error:
            raise DataError(f"{self.path} could not be written: {error}.") from error
        self._repeats = False


class _Writing:
    """Writes pictures in threads, and their rows in the order of the photos.

    Leaving the block, for whatever reason, first finishes everything that was added.
    """

    def __init__(self, output: Path, kinds: Sequence[str], record: Record, table: Table) -> None:
        self.output, self.kinds = output, kinds
        self.record, self.table = record, table
        self._pool = ThreadPoolExecutor(max_workers=WRITERS)
        self._waiting: deque[tuple[Photo, Source | None, Prediction, Future[list[Path]]]] = deque()

    def add(self, photo: Photo, source: Source | None, found: Prediction) -> None:
        """Queue the pictures of a photo; wait for the oldest if many are waiting.

        Raises:
            DataError: pictures of an earlier photo could not be written.
        """
        future = self._pool.submit(found.save, self.output, self.kinds)
        self._waiting.append((photo, source, found, future))
        while len(self._waiting) > WAITING or (self._waiting and self._waiting[0][-1].done()):
            self._finish_oldest()

    def _finish_oldest(self) -> None:
        photo, source, found, future = self._waiting.popleft()
        future.result()
        self.table.add(found)
        self.record.note(photo, source, self.kinds)

    def __enter__(self) -> _Writing:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        first: DataError | None = None
        with stop.current().deferred():
            while self._waiting:
                try:
                    self._finish_oldest()
                except DataError as found:
                    first = first or found
            self._pool.shutdown()
        if first is not None and error is None:
            raise first
