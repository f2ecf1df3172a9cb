"""Images to predict from files, folders, globs and lists, and the names of their outputs."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from camoxpert.data.files.image_io import read_image, rgb_pixels
from camoxpert.data.files.listing import (
    ARCHIVE_SUFFIXES,
    IMAGE_SUFFIXES,
    OUTPUT_COCO,
    OUTPUT_FOLDERS,
    OUTPUT_RECORD,
    OUTPUT_SUMMARY,
    OUTPUT_TABLE,
    VIDEO_SUFFIXES,
    endings,
    is_image_name,
    is_predict_output,
    is_side_file,
    list_files,
)
from camoxpert.errors import ConfigError, DataError
from camoxpert.files import why_missing
from camoxpert.inference.lists import (
    LIST_SUFFIXES,
    STANDARD_INPUT,
    files_in_table,
    files_on_stdin,
)
from camoxpert.text import count, shorten


@dataclass(frozen=True, slots=True)
class Photo:
    """An input image, the relative name of its outputs, and (name, file) of what other sensors saw
    of it."""

    path: Path
    name: str
    modalities: tuple[tuple[str, Path], ...] = ()

    @property
    def files(self) -> tuple[Path, ...]:
        """What its outputs are made from."""
        return (self.path, *(path for _, path in self.modalities))


ImageInput = str | Path | NDArray[np.uint8] | Image.Image | Photo
"""A file, uint8 RGB pixels (H, W, 3) or grey ones (H, W), or a Pillow image."""


@dataclass(frozen=True)
class Photos:
    """Input images and videos, and what was found beside them.

    Attributes:
        photos: with names that differ.
        videos: with names that differ from those of photos and of the folders in them.
        notes: sentences about files that are not images and about results of earlier calls.
    """

    photos: list[Photo]
    notes: tuple[str, ...] = ()
    videos: tuple[Photo, ...] = ()


def find_photos(inputs: Sequence[str], *, allow_outside: bool = False) -> list[Photo]:
    """Return the photos that ``look_for_photos`` finds.

    Raises:
        DataError: as there; or an input is a video.
    """
    found = look_for_photos(inputs, allow_outside=allow_outside)
    if found.videos:
        raise DataError(
            f"{found.videos[0].path} is a video. `camoxpert predict` takes videos; here, give its "
            "frames as arrays or files."
        )
    return found.photos


def look_for_photos(
    inputs: Sequence[str],
    *,
    allow_outside: bool = False,
    output: Path | None = None,
    column: str | None = None,
) -> Photos:
    """Expand files, folders (recursive), globs, tables and standard input into photos.

    Results of predict are not predicted. Links to missing files, and missing files in lists, are
    photos that cannot be read. A photo has the name of its file without the ending, below the
    folder that was given; see ``keep_apart`` for photos that would share a name.

    Args:
        inputs: paths and globs as given on the command line; ``-`` for names on standard input.
        allow_outside: a table may name images outside its folder.
        output: folder of the results.
        column: of the names in CSV and Parquet files; None: ``image``.

    Raises:
        DataError: an input matches nothing, or two share an output name.
        ConfigError: ``column`` without a table, or an input for which a package is missing.
    """
    photos: list[Photo] = []
    notes: list[str] = []
    tables = 0
    for text in inputs:
        path = Path(text)
        own: list[str] = []
        if text == STANDARD_INPUT:
            found = [Photo(*named) for named in files_on_stdin()]
        elif path.is_dir():
            found = _in_folder(path, output, own)
        elif path.is_file() and path.suffix.lower() in LIST_SUFFIXES:
            tables += 1
            listed = files_in_table(path, column or "image", allow_outside=allow_outside)
            found = [Photo(*named) for named in listed]
        elif path.is_file():
            found = [_single(path)]
        else:
            found = _matching(text, output, own)
        if not found:
            told = "".join(f" {note}." for note in own)
            raise DataError(
                f"No image found in {text!r}.{told} Known endings: "
                f"{', '.join(sorted(IMAGE_SUFFIXES))}."
            )
        photos += found
        notes += own
    if column is not None and not tables:
        raise ConfigError(
            f"--column {column}: it is a column of a CSV or Parquet file, and no input is one."
        )
    apart = keep_apart(photos)
    videos = [item for item in apart if is_video_name(item.path)]
    if videos:
        apart = [item for item in apart if not is_video_name(item.path)]
    return Photos(apart, tuple(notes), tuple(videos))


def is_video_name(path: Path) -> bool:
    """Return whether a file's ending is one of a video."""
    return path.suffix.lower() in VIDEO_SUFFIXES


def keep_apart(photos: Sequence[Photo]) -> list[Photo]:
    """Return the photos with names that differ; a photo that is there twice once.

    Photos of one name keep the endings of their files in it: ``a.jpg`` and ``a.png`` become
    ``a.jpg`` and ``a.png`` instead of ``a`` twice. That depends on the photos, not on their order.

    Raises:
        DataError: names are the same with their endings.
    """
    names = [photo.name for photo in photos]
    longer: set[int] = set()
    while shared := _shared_names(photos, names):
        grow = {n for n, name in enumerate(names) if name in shared} - longer
        if not grow:
            name, (one, other) = next(iter(shared.items()))
            raise DataError(
                f"{one} and {other} would both be written as {name!r}. Predict them into separate "
                "output folders, or give the folder that holds both (or a glob with **): then "
                "sub-folders are part of the names."
            )
        longer |= grow
        for n in grow:
            names[n] += photos[n].path.suffix
    kept: dict[str, Photo] = {}
    for name, photo in zip(names, photos, strict=True):
        kept.setdefault(name, photo if name == photo.name else Photo(photo.path, name))
    return list(kept.values())


def _shared_names(photos: Sequence[Photo], names: Sequence[str]) -> dict[str, tuple[Path, Path]]:
    """Return the names that several files have, each with two of the files."""
    files: dict[str, Path] = {}
    shared = {}
    for photo, name in zip(photos, names, strict=True):
        other = files.setdefault(name, photo.path)
        if other is not photo.path and os.path.abspath(other) != os.path.abspath(photo.path):
            shared[name] = (other, photo.path)
    videos = {name: file for name, file in files.items() if is_video_name(file)}
    if videos:
        # The frames of a video are written into a folder of its name.
        for photo, name in zip(photos, names, strict=True):
            while name := name.rpartition("/")[0]:
                if name in videos:
                    shared[name] = (videos[name], photo.path)
    return shared


def _in_folder(path: Path, output: Path | None, notes: list[str]) -> list[Photo]:
    """Return the photos in a folder and its sub-folders; note what is not predicted."""
    listing = list_files(path, nested=True, enter=lambda folder: not _is_result(folder, output))
    if listing.folders:
        notes.append(f"Results of predict are not predicted again: {shorten(listing.folders)}")
    others = [file for file in listing.others if not _of_predict(file)]
    if others:
        notes.append(
            f"{count(len(others), 'file')} in {path} are not images of a known kind and are not "
            f"predicted: {endings(others)}"
        )
    return [Photo(p, _name_below(p, path)) for p in listing.images]


def _is_result(folder: Path, output: Path | None, *, film: bool = False) -> bool:
    """Return whether a folder holds pictures that predict wrote, now or in an earlier call.

    Only the folders that predict makes are results: it may write them beside the photos. ``film``:
    whether videos that it wrote are.
    """
    if folder.name not in (*OUTPUT_FOLDERS, *(("videos",) if film else ())):
        return False
    ours = output is not None and folder.parent.resolve() == output.resolve()
    return ours or is_predict_output(folder.parent)


def _of_predict(file: Path) -> bool:
    """Return whether a file is the table, the ledger or the summary of results of predict."""
    known = (OUTPUT_TABLE, OUTPUT_RECORD, OUTPUT_SUMMARY, OUTPUT_COCO)
    return file.name in known and is_predict_output(file.parent)


def _single(path: Path) -> Photo:
    """Return a file that was named; an archive is refused with what to do."""
    if path.suffix.lower() in ARCHIVE_SUFFIXES:
        raise DataError(f"{path} is an archive. Unpack it and give the folder.")
    return Photo(path, path.stem)


def _matching(text: str, output: Path | None, notes: list[str]) -> list[Photo]:
    """Return the photos that a glob matches; note the other files.

    Raises:
        DataError: nothing has that name.
    """
    pattern = any(mark in text for mark in "*?[")
    try:
        matches = sorted(_glob(text)) if pattern else []
    except ValueError as error:
        raise DataError(f"{text!r} is not a pattern: {error}. Use photos/**/*.jpg.") from error
    if not matches:
        raise DataError(f"No file matches {text!r}." if pattern else why_missing(text))
    hidden = [
        p
        for p in matches
        if p.is_dir()
        or is_side_file(p.name)
        or _of_predict(p)
        or any(_is_result(folder, output, film=is_video_name(p)) for folder in p.parents)
    ]
    if hidden:
        notes.append(
            f"{len(hidden)} of {len(matches)} matches of {text!r} are folders, hidden files or "
            f"results of predict and are not predicted, for example {hidden[0]}"
        )
    files = [p for p in matches if p not in set(hidden)]
    others = [p for p in files if not (is_image_name(p) or is_video_name(p))]
    if others:
        notes.append(
            f"{count(len(others), 'file')} that {text!r} matches are not images of a known kind "
            f"and are not predicted: {endings(others)}"
        )
    root = _fixed_part(text)
    left_out = set(others)
    return [Photo(p, _name_below(p, root)) for p in files if p not in left_out]


def _fixed_part(pattern: str) -> Path | None:
    """Return the folder before the wildcards of a pattern with ``**``; None for other patterns."""
    parts = Path(pattern).parts
    if "**" not in parts:
        return None
    fixed = next(n for n, part in enumerate(parts) if any(mark in part for mark in "*?["))
    return Path(*parts[:fixed])


def _name_below(path: Path, root: Path | None) -> str:
    """Return a file's name without its ending, with the folders below ``root``."""
    return path.stem if root is None else path.relative_to(root).with_suffix("").as_posix()


def _glob(pattern: str) -> Iterator[Path]:
    """Expand a glob that the shell did not expand; ``Path.glob`` takes only relative patterns."""
    path = Path(pattern)
    root = Path(path.anchor) if path.is_absolute() else Path()
    relative = path.relative_to(path.anchor) if path.is_absolute() else path
    return root.glob(str(relative)) if str(relative) != "." else iter(())


def name_of(image: ImageInput, otherwise: str) -> str:
    """Return the name of an image's outputs: a file's stem, or ``otherwise`` for an array."""
    if isinstance(image, Photo):
        return image.name
    file = getattr(image, "filename", "") if isinstance(image, Image.Image) else image
    return Path(file).stem or otherwise if isinstance(file, (str, Path)) else otherwise


def read_pixels(image: ImageInput, *, max_pixels: int) -> NDArray[np.uint8]:
    """Return an image as uint8 RGB (H, W, 3), upright.

    Raises:
        DataError: an unreadable or too large file, or pixels of another shape or type.
    """
    if isinstance(image, Image.Image):
        return rgb_pixels(image)
    if isinstance(image, np.ndarray):
        if image.dtype == np.uint8 and image.size:
            if image.ndim == 2:
                return np.repeat(image[..., None], 3, axis=2)
            if image.ndim == 3 and image.shape[2] == 3:
                return np.ascontiguousarray(image)
        raise DataError(
            f"An array of {image.dtype} and shape {image.shape} is not an image. Give uint8 RGB "
            "pixels of shape (H, W, 3), or grey ones of shape (H, W)."
        )
    if isinstance(image, Photo):
        return read_image(image.path, max_pixels=max_pixels)
    if isinstance(image, (str, Path)):
        return read_image(Path(image).expanduser(), max_pixels=max_pixels)
    raise DataError(
        f"A {type(image).__name__} is not an image. Give a path, a uint8 array or a Pillow image."
    )
