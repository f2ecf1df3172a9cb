"""Predict folders of photos into pictures and a table; repeating a call finishes a stopped one."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from camoxpert import console, stop
from camoxpert.errors import DataError
from camoxpert.files import append_here
from camoxpert.inference.prediction import KINDS, output_path
from camoxpert.inference.predictor import Predictor
from camoxpert.inference.sources import Photo

COLUMNS = ("image", "height", "width", "object_fraction", "confidence", "seconds")


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
    failed: list[tuple[Path, str]] = field(default_factory=list)


def predict_photos(
    predictor: Predictor, photos: Sequence[Photo], output: Path, options: PhotoOptions
) -> BatchResult:
    """Predict every photo at its original size and write the outputs.

    Photos whose outputs are complete are skipped, so that the same call finishes a stopped one. An
    unreadable photo is reported; the others are still predicted.

    Args:
        predictor: the model.
        photos: inputs.
        output: folder for ``maps/``, ``masks/``, ``cutouts/``, ``overlays/`` and ``results.csv``.
        options: what to write.

    Raises:
        DataError: an output would be written outside ``output``, or cannot be written.
        Stopped: the command was asked to stop.
    """
    result = BatchResult()
    todo = []
    for photo in photos:
        paths = [output_path(output, kind, photo.name) for kind in options.kinds]
        if not options.overwrite and all(p.is_file() and not p.is_symlink() for p in paths):
            result.skipped += 1
        else:
            todo.append(photo)
    table = output / "results.csv"
    output.mkdir(parents=True, exist_ok=True)
    if options.overwrite or table.is_symlink():
        table.unlink(missing_ok=True)
    fresh = not table.is_file()
    attempts = predictor.attempts(todo, threshold=options.threshold, batch_size=options.batch_size)
    with append_here(table) as file, console.progress("predict", total=len(todo)) as bar:
        writer = csv.writer(file)
        if fresh:
            writer.writerow(COLUMNS)
        for photo, found in attempts:
            stop.check()
            bar.update()
            if isinstance(found, DataError):
                result.failed.append((photo.path, str(found)))
                continue
            # No stop between pictures and row: the next call would skip the photo, and its row
            # would never be written.
            with stop.current().deferred():
                found.save(output, options.kinds)
                writer.writerow(
                    [
                        found.name,
                        *found.size,
                        f"{found.object_fraction:.6f}",
                        f"{found.confidence:.4f}",
                        f"{found.seconds:.4f}",
                    ]
                )
                file.flush()
            result.done += 1
    return result
