"""Photos with what other sensors saw of them: files in folders, or arrays."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from camoxpert import console
from camoxpert.data.files.modalities import (
    files_below,
    normalised,
    read_plane,
    require_aligned,
)
from camoxpert.errors import ConfigError, DataError
from camoxpert.inference.sources import ImageInput, Photo
from camoxpert.models.modalities import require_known
from camoxpert.text import count, shorten

Measured = str | Path | NDArray[Any]
"""A file, or an array (H, W) of numbers."""


@dataclass(frozen=True)
class Aligned:
    """An image and what other sensors saw of it, by name."""

    image: ImageInput
    modalities: Mapping[str, Measured]


def aligned(images: Sequence[ImageInput], modalities: Any) -> list[Aligned]:
    """Return images with what other sensors saw of each.

    Args:
        images: any that ``predict`` takes.
        modalities: name -> file or array, for each image.

    Raises:
        ConfigError: not one mapping for each image.
    """
    given = [modalities] if isinstance(modalities, Mapping) else list(modalities)
    if len(given) != len(images) or not all(isinstance(one, Mapping) for one in given):
        raise ConfigError(
            f"modalities: one mapping from names to files or arrays for each image; "
            f"{count(len(images), 'image')} and {len(given)} were given."
        )
    return [Aligned(image, dict(seen)) for image, seen in zip(images, given, strict=True)]


def photograph(image: Any) -> Any:
    """Return the image of what was given."""
    return image.image if isinstance(image, Aligned) else image


def planes_of(
    image: Any, names: Sequence[str], pixels_HWC: NDArray[np.uint8], *, max_pixels: int
) -> list[NDArray[np.uint8]]:
    """Return the planes of an image, in the order of the model; a single 0 for one that is missing.

    Args:
        image: a photo with files, an image with arrays or files, or anything else, which has none.
        names: modalities of the model.
        pixels_HWC: of the image.
        max_pixels: larger files are refused.

    Returns:
        uint8 (h, w) each; [] for an image that comes with nothing.

    Raises:
        DataError: a file cannot be read, or shows another section.
        ConfigError: the model does not know one of them.
    """
    given: dict[str, Measured] = {}
    if isinstance(image, (Aligned, Photo)):
        given = {name: seen for name, seen in dict(image.modalities).items() if seen is not None}
    require_known(list(given), names)
    if not given:
        return []
    size = (pixels_HWC.shape[0], pixels_HWC.shape[1])
    planes = []
    for name in names:
        plane = np.zeros((1, 1), np.uint8)
        if name in given:
            plane = _plane(given[name], name, max_pixels)
            what = name if isinstance(given[name], np.ndarray) else f"{given[name]} ({name})"
            path = f" {image.path}" if isinstance(image, Photo) else ""
            require_aligned(plane.shape, size, what=what, image=path)
        planes.append(plane)
    return planes


def _plane(seen: Measured, name: str, max_pixels: int) -> NDArray[np.uint8]:
    if isinstance(seen, (str, Path)):
        return read_plane(Path(seen), max_pixels=max_pixels)
    values = np.squeeze(np.asarray(seen))
    if values.ndim != 2 or values.dtype.kind not in "uif" or not values.size:
        raise DataError(
            f"{name}: an array of {values.dtype} and shape {np.asarray(seen).shape} is not a "
            "modality. Give numbers of shape (H, W)."
        )
    return normalised(values)


def with_files(
    photos: Sequence[Photo], folders: Mapping[str, Path]
) -> tuple[list[Photo], list[str]]:
    """Return photos with the files of modalities, and notes about what is missing.

    A file belongs to the photo of the same name, with the folders below the one that was given, or
    of the same file name.

    Args:
        photos: to predict.
        folders: modality -> folder.

    Raises:
        DataError: no such folder, two of its files share a name, one has the name of two photos, or
            none belongs to a photo.
    """
    files: list[list[tuple[str, Path]]] = [[] for _ in photos]
    notes = []
    for name, folder in sorted(folders.items()):
        try:
            named = files_below(folder)
        except DataError as error:
            raise DataError(f"--modality {name}: {error}") from error
        lacking = []
        taken: dict[Path, Photo] = {}
        for photo, own in zip(photos, files, strict=True):
            path = named.get(photo.name) or named.get(photo.path.stem)
            if path is None:
                lacking.append(photo.name)
                continue
            other = taken.setdefault(path, photo)
            if other.path != photo.path:
                raise DataError(
                    f"--modality {name}: {path} has the name of {other.path} and of {photo.path}, "
                    f"and belongs to one of them. Put it in the folder below {folder} that its "
                    f"photo has, or predict the folders in calls of their own."
                )
            own.append((name, path))
        if len(lacking) == len(photos):
            raise DataError(
                f"--modality {name} {folder}: no file there has the name of a photo (photos: "
                f"{shorten(lacking)}; files: {shorten(sorted(named)) or 'none'})."
            )
        if lacking:
            notes.append(
                f"{name}: {len(lacking)} of {count(len(photos), 'photo')} have no file in "
                f"{folder} and are predicted without: {shorten(lacking)}"
            )
    done = [replace(p, modalities=tuple(own)) for p, own in zip(photos, files, strict=True)]
    return done, notes


def say_photographs_alone(names: Sequence[str], what: str) -> None:
    """Print that the modalities of a model are not used; nothing for a model without any.

    Args:
        names: of the modalities.
        what: takes photographs alone, for the sentence.
    """
    if names:
        console.decide(
            "modalities",
            f"{what} takes photographs alone; {', '.join(names)} of this model's training are not "
            f"used, as if they were missing (`predict --modality` uses them)",
        )
