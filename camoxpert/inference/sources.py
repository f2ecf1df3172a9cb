"""Images to predict from files, folders, globs and CSV tables, and the names of their outputs."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from camoxpert.data.files.csv_paths import listed_file, text_file
from camoxpert.data.files.image_io import read_image, rgb_pixels
from camoxpert.errors import DataError

SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp"}


@dataclass(frozen=True)
class Photo:
    """An input image and the relative name of its outputs."""

    path: Path
    name: str


ImageInput = str | Path | NDArray[np.uint8] | Image.Image | Photo
"""A file, uint8 RGB pixels (H, W, 3) or grey ones (H, W), or a Pillow image."""


def find_photos(inputs: Sequence[str], *, allow_outside: bool = False) -> list[Photo]:
    """Expand files, folders (recursive), globs and CSV files (column ``image``) into photos.

    Two inputs that would write the same output are an error, because one result would be lost.

    Args:
        inputs: paths and globs as given on the command line.
        allow_outside: a CSV may name images outside its folder.

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
                f"No image found for {text!r}. Give an image, a folder with images, a glob that "
                f"matches images, or a CSV file with a column 'image'. Known endings: "
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
    """Expand a glob that the shell did not expand; ``Path.glob`` takes only relative patterns."""
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
        return read_image(image, max_pixels=max_pixels)
    raise DataError(
        f"A {type(image).__name__} is not an image. Give a path, a uint8 array or a Pillow image."
    )
