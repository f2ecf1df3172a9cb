"""Predicting folders of photos: decode in threads, predict in batches, write what was asked for."""

from __future__ import annotations

import csv
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from camoxpert.console import bar
from camoxpert.data.files.csv_paths import listed_file, text_file
from camoxpert.data.files.image_io import read_image, write_jpeg, write_png
from camoxpert.errors import DataError
from camoxpert.files import append_here, leads_outside
from camoxpert.inference.predictor import Predictor
from camoxpert.inference.score import to_uint8
from camoxpert.pages.plots import cutout, overlay

KINDS = ("map", "mask", "cutout", "overlay")
SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp"}
FOLDERS = {"map": "maps", "mask": "masks", "cutout": "cutouts", "overlay": "overlays"}


@dataclass(frozen=True)
class Photo:
    """An input image and the relative name its outputs get."""

    path: Path
    name: str


@dataclass
class BatchResult:
    """What became of a list of photos: counts, and (path, reason) of the unreadable ones."""

    done: int = 0
    skipped: int = 0
    failed: list[tuple[Path, str]] = field(default_factory=list)


def find_photos(inputs: Sequence[str], *, allow_outside: bool = False) -> list[Photo]:
    """Expand files, folders (recursive), globs and CSV files (column ``image``) into photos.

    Two inputs that would write the same output are an error, not one result lost.

    Args:
        inputs: as typed.
        allow_outside: a CSV may name images outside its own folder.

    Raises:
        DataError: an input matches nothing, or two share an output name.
    """
    photos: list[Photo] = []
    for text in inputs:
        path = Path(text)
        if path.is_dir():
            files = sorted(p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES)
            found = [Photo(p, p.relative_to(path).with_suffix("").as_posix()) for p in files]
        elif path.is_file() and path.suffix.lower() == ".csv":
            found = _from_csv(path, allow_outside)
        elif path.is_file():
            found = [Photo(path, path.stem)]
        else:
            matches = sorted(_glob(text))
            found = [Photo(p, p.stem) for p in matches if p.suffix.lower() in SUFFIXES]
        if not found:
            raise DataError(
                f"No image found for {text!r}: not an image, a folder with images, a glob that "
                f"matches, or a CSV file with a column 'image'. Known endings: "
                f"{', '.join(sorted(SUFFIXES))}."
            )
        photos += found
    seen: dict[str, Path] = {}
    for photo in photos:
        if photo.name in seen and seen[photo.name] != photo.path:
            raise DataError(
                f"{seen[photo.name]} and {photo.path} would both be written as {photo.name!r}. "
                "Predict them into separate output folders."
            )
        seen[photo.name] = photo.path
    return [Photo(path, name) for name, path in seen.items()]


def _glob(pattern: str) -> Iterator[Path]:
    """Expand a glob the shell did not; ``Path.glob`` takes relative patterns only."""
    path = Path(pattern)
    root = Path(path.anchor) if path.is_absolute() else Path()
    relative = path.relative_to(path.anchor) if path.is_absolute() else path
    return root.glob(str(relative)) if str(relative) != "." else iter(())


def _from_csv(path: Path, allow_outside: bool) -> list[Photo]:
    with text_file(path) as file:
        reader = csv.DictReader(file)
        if not reader.fieldnames or "image" not in reader.fieldnames:
            raise DataError(f"{path} has no column 'image' (its columns: {reader.fieldnames}).")
        return [
            Photo(*listed_file(path, row["image"], number, allow_outside=allow_outside))
            for number, row in enumerate(reader, start=2)
        ]


def output_path(output: Path, kind: str, name: str) -> Path:
    """Return where one output of a photo goes; always inside ``output``.

    Raises:
        DataError: the name, or a link that lies in ``output``, leads out of it.
    """
    suffix = ".jpg" if kind == "overlay" else ".png"
    path = output / FOLDERS[kind] / f"{name}{suffix}"
    if leads_outside(output / FOLDERS[kind], path) or leads_outside(output, path):
        raise DataError(
            f"{path} would be written outside of {output}: {path.parent} is a link or leads out. "
            f"Remove it, or name another folder with -o."
        )
    return path


def predict_photos(
    predictor: Predictor,
    photos: Sequence[Photo],
    output: Path,
    *,
    kinds: Sequence[str] = KINDS,
    batch_size: int = 8,
    threshold: float = 0.5,
    overwrite: bool = False,
    check_stop: Callable[[], None] | None = None,
) -> BatchResult:
    """Predict every photo at its original size and write the outputs.

    Photos whose outputs are all there are passed over, so that the same call finishes a stopped
    one.
    An unreadable photo is reported and the others go on.

    Args:
        predictor: the model.
        photos: inputs.
        output: folder for ``maps/``, ``masks/``, ``cutouts/``, ``overlays/`` and ``results.csv``.
        kinds: outputs to write: map (probability, 0..255), mask (0 or 255), cutout (RGBA), overlay.
        batch_size: images per forward pass.
        threshold: probability above which a pixel is object, for mask and table.
        overwrite: predict again what is already there.
        check_stop: called between batches; raises to stop.
    """
    result = BatchResult()
    todo = []
    for photo in photos:
        paths = [output_path(output, kind, photo.name) for kind in kinds]
        if not overwrite and all(p.is_file() and not p.is_symlink() for p in paths):
            result.skipped += 1
        else:
            todo.append(photo)
    table = output / "results.csv"
    output.mkdir(parents=True, exist_ok=True)
    if overwrite or table.is_symlink():
        table.unlink(missing_ok=True)
    fresh = not table.is_file()
    with (
        append_here(table) as file,
        bar(None, description="predict", total=len(todo)) as progress,
    ):
        writer = csv.writer(file)
        if fresh:
            writer.writerow(
                ["image", "height", "width", "object_fraction", "confidence", "seconds"]
            )
        for loaded in _loaded(todo, batch_size, predictor.config.data.max_pixels, result):
            if check_stop is not None:
                check_stop()
            started = time.monotonic()
            images = torch.stack([predictor.prepare(image) for _, image in loaded])
            maps = predictor(images, [image.shape[:2] for _, image in loaded])
            each = (time.monotonic() - started) / len(loaded)
            for (photo, image), probability in zip(loaded, maps, strict=True):
                write_outputs(output, photo.name, image, probability, kinds, threshold)
                inside = probability > threshold
                sure = float(probability[inside].mean()) if inside.any() else 0.0
                height, width = probability.shape
                writer.writerow(
                    [
                        photo.name,
                        height,
                        width,
                        f"{inside.mean():.6f}",
                        f"{sure:.4f}",
                        f"{each:.4f}",
                    ]
                )
                result.done += 1
            file.flush()
            progress.update(len(loaded))
    return result


def write_outputs(
    output: Path,
    name: str,
    image_HWC: np.ndarray,
    probability_HW: np.ndarray,
    kinds: Sequence[str],
    threshold: float,
) -> None:
    """Write the asked-for pictures of one image, each atomically."""
    mask = np.where(probability_HW > threshold, np.uint8(255), np.uint8(0))
    for kind in kinds:
        path = output_path(output, kind, name)
        if kind == "map":
            write_png(path, to_uint8(probability_HW))
        elif kind == "mask":
            write_png(path, mask)
        elif kind == "cutout":
            write_png(path, cutout(image_HWC, probability_HW))
        else:
            write_jpeg(path, overlay(image_HWC, mask))


def _loaded(
    photos: Sequence[Photo], batch_size: int, max_pixels: int, result: BatchResult
) -> Iterator[list[tuple[Photo, np.ndarray]]]:
    """Yield batches of decoded photos; the next batch decodes while this one is predicted."""

    def decode(photo: Photo) -> tuple[Photo, np.ndarray | DataError]:
        try:
            return photo, read_image(photo.path, max_pixels=max_pixels)
        except DataError as error:
            return photo, error

    with ThreadPoolExecutor(max_workers=2) as pool:
        chunks = [photos[i : i + batch_size] for i in range(0, len(photos), batch_size)]
        ahead = [pool.submit(decode, photo) for photo in chunks[0]] if chunks else []
        for index in range(len(chunks)):
            current = ahead
            following = chunks[index + 1] if index + 1 < len(chunks) else []
            ahead = [pool.submit(decode, photo) for photo in following]
            good = []
            for photo, image in (future.result() for future in current):
                if isinstance(image, DataError):
                    result.failed.append((photo.path, str(image)))
                else:
                    good.append((photo, image))
            if good:
                yield good
