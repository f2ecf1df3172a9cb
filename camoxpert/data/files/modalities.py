"""What other sensors saw of a scene (depth, heat and the like): which files, and their values.

A file has one channel and shows what its image shows, at any resolution. Its values are scaled by
percentiles of its own, because sensors, units and ranges differ: a plane is uint8 with 0 where
nothing was measured and 1 to 255 elsewhere. A modality that an image lacks is a plane of 0.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np

from camoxpert.data.files.image_io import MAX_PIXELS, probe, read_values, require_whole
from camoxpert.data.files.layouts import Found
from camoxpert.data.files.listing import list_files
from camoxpert.data.files.names import match_names
from camoxpert.data.files.pairing import Pair, Pairing, by_name
from camoxpert.errors import DataError
from camoxpert.files import why_missing
from camoxpert.text import count, shorten

PERCENTILES = (2.0, 98.0)
"""Of the measured values: they become 1 and 255, what lies beyond is cut."""
LEVELS = 254
FLAT = 128
"""Level of a plane whose values are all the same."""
ARRAY = ".npy"
ASPECT = 0.05
"""How far the aspect ratio of a plane may differ from that of its image, as a fraction."""


def read_plane(path: Path, *, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Return the plane of a file, uint8 (H, W): 0 unknown, 1 to 255 from near the lowest to near
    the highest measured value.

    Raises:
        DataError: unreadable, in colour, or not an array of numbers.
    """
    values = _read_array(path, max_pixels) if path.suffix.lower() == ARRAY else None
    return normalised(read_values(path, max_pixels=max_pixels) if values is None else values)


def normalised(values_HW: np.ndarray) -> np.ndarray:
    """Scale measured values to a plane by their 2nd and 98th percentile.

    Unknown are values that are not finite, and 0 in integers of more than 8 bits, as depth cameras
    write it; they are in no percentile.

    Args:
        values_HW: any numbers.
    """
    wide = values_HW.dtype.kind in "iu" and values_HW.dtype.itemsize > 1
    known = values_HW != 0 if wide else np.isfinite(values_HW)
    measured = values_HW[known].astype(np.float64)
    if not measured.size:
        return np.zeros(values_HW.shape, np.uint8)
    low, high = np.percentile(measured, PERCENTILES)
    plane = np.zeros(values_HW.shape, np.uint8)
    if high > low:
        scaled = np.clip((measured - low) / (high - low), 0, 1)
        plane[known] = 1 + np.rint(LEVELS * scaled).astype(np.uint8)
    else:
        plane[known] = FLAT
    return plane


def resize_known(plane_HW: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resize a plane to (height, width): the mean of what is known, unknown where most is unknown.

    Unknown pixels have no value that could blend with their neighbours'.
    """
    height, width = size
    shrinks = min(plane_HW.shape) > min(size)
    way = cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
    share, total = (
        cv2.resize(part.astype(np.float32), (width, height), interpolation=way)
        for part in (plane_HW > 0, plane_HW)
    )
    return joined_known(total, share)


def joined_known(total_HW: np.ndarray, share_HW: np.ndarray) -> np.ndarray:
    """Return the plane of resampled values and of the share of each that is known, float 0..1."""
    means = np.rint(total_HW / np.maximum(share_HW, 1e-6)).clip(1, 255)
    plane: np.ndarray = np.where(share_HW >= 0.5, means, 0).astype(np.uint8)
    return plane


def read_planes(
    pair: Pair,
    names: Sequence[str],
    size: tuple[int, int],
    side: int,
    *,
    max_pixels: int = MAX_PIXELS,
) -> np.ndarray:
    """Return the planes of a pair as squares, uint8 (S, S, M), 0 for a modality that it lacks.

    Args:
        pair: its files.
        names: modalities, in order.
        size: (height, width) of the image, or of a smaller copy.
        side: S, pixels.
        max_pixels: larger files are refused.

    Raises:
        DataError: a file is unreadable, or has another aspect ratio than the image.
    """
    files = dict(pair.modalities)
    planes = np.zeros((side, side, len(names)), np.uint8)
    for number, name in enumerate(names):
        if name in files:
            plane = read_plane(files[name], max_pixels=max_pixels)
            require_aligned(
                plane.shape, size, what=f"{files[name]} ({name})", image=f" {pair.image}"
            )
            planes[..., number] = resize_known(plane, (side, side))
    return planes


def require_aligned(
    plane: tuple[int, ...], image_size: tuple[int, int], *, what: str, image: str
) -> None:
    """Raise DataError for a plane that cannot show what its image shows, by the aspect ratios."""
    ratio = abs(math.log(plane[0] * image_size[1] / (plane[1] * image_size[0])))
    # One pixel of a small file is more than the limit.
    pixel = 1 / min(*plane, *image_size)
    if ratio > max(ASPECT, pixel):
        raise DataError(
            f"{what} is {plane[1]}x{plane[0]} pixels and its image{image} "
            f"{image_size[1]}x{image_size[0]}: another aspect ratio. Both must show the same "
            "section, upright; the resolution may differ. Crop or turn the file."
        )


def with_modalities(pairing: Pairing, names: Sequence[str]) -> Pairing:
    """Return a pairing of two folders with the files of modalities, as far as images have any.

    They are looked for in a folder that is called like the modality, in any case, beside the folder
    of images (``Depth/`` beside ``Imgs/``), by the image's name. A note says what is missing.

    Raises:
        DataError: two files of a modality share a name.
    """
    files: dict[str, list[tuple[str, Path]]] = {pair.name: [] for pair in pairing.pairs}
    notes = list(pairing.notes)
    where = f"{pairing.found.dataset} {pairing.found.source.split}"
    for name in names:
        folder = folder_of(pairing.found, name)
        found = {} if folder is None else _matched(files, folder, name, notes, where)
        for image, path in found.items():
            files[image].append((name, path))
        lacking = [image for image in files if image not in found]
        if lacking:
            place = folder or f"a folder {name} beside {pairing.found.images}"
            notes.append(
                f"{where}: {len(lacking)} of {count(len(files), 'image')} have no {name} (looked "
                f"in {place}), for example {lacking[0]}"
            )
    pairs = tuple(replace(p, modalities=tuple(files[p.name])) for p in pairing.pairs)
    return replace(pairing, pairs=pairs, notes=tuple(notes))


def _matched(
    images: Iterable[str], folder: Path, name: str, notes: list[str], where: str
) -> dict[str, Path]:
    """Return image -> file of a modality in its folder."""
    named = files_below(folder)
    match = match_names(list(images), list(named), advice=f"Keep one kind of files in {folder}.")
    if match.rule:
        notes.append(f"{where}: {name} matched by a rule: {match.rule}")
    unused = sorted(set(named) - set(match.partner.values()))
    if unused:
        notes.append(f"{where}: {len(unused)} files of {name} have no image ({shorten(unused)})")
    return {image: named[other] for image, other in match.partner.items()}


def files_below(folder: Path) -> dict[str, Path]:
    """Return the files of a folder of a modality by name, sub-folders included.

    Raises:
        DataError: no such folder, or two of its files share a name.
    """
    if not folder.is_dir():
        raise DataError(why_missing(folder, "folder"))
    listing = list_files(folder, nested=True)
    arrays = [path for path in listing.others if path.suffix.lower() == ARRAY]
    named, doubled = by_name([*listing.images, *arrays], folder)
    if doubled:
        first, second = doubled[0]
        raise DataError(f"{first} and {second} have the same name. Remove one of them.")
    return named


def folder_of(found: Found, name: str) -> Path | None:
    """Return the folder of a modality that belongs to a folder of images; None: there is none."""
    images = found.images
    start, dash, _ = images.name.rpartition("-")
    places = [(images, name)] if images == found.masks else []
    places.append((images.parent, f"{start}{dash}{name}" if dash else name))
    places.append((images.parent, name))
    for parent, wanted in places:
        folder = _inside(parent, wanted)
        if folder is not None:
            # Splits may be folders of it: Images/Train, Depth/Train.
            return _inside(folder, images.name) or folder
    above = _inside(images.parent.parent, name)
    return None if above is None else _inside(above, images.name)


def _inside(parent: Path, name: str) -> Path | None:
    """Return the folder of a name, in any case, in another."""
    try:
        found = sorted(p for p in parent.iterdir() if p.name.lower() == name.lower())
    except OSError:
        return None
    return next((path for path in found if path.is_dir()), None)


def require_whole_file(path: Path, *, max_pixels: int = MAX_PIXELS) -> None:
    """Raise DataError for a file of a modality that is truncated, as far as its ends show."""
    if path.suffix.lower() == ARRAY:
        _read_array(path, max_pixels)
    else:
        require_whole(path, probe(path, max_pixels=max_pixels))


def _read_array(path: Path, max_pixels: int) -> np.ndarray:
    """Return the numbers (H, W) of a file of numpy's."""
    try:
        # Mapped: the size is known before anything is read, and no pickle is.
        values = np.load(path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError as error:
        raise DataError(why_missing(path, "file")) from error
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"{path} cannot be read as an array of numpy: {error}.") from error
    values = np.squeeze(values)
    if values.ndim != 2 or values.dtype.kind not in "uif" or not values.size:
        raise DataError(
            f"{path} holds {values.dtype} of shape {values.shape}; a modality is one number for "
            "each pixel, (H, W)."
        )
    if values.size > max_pixels:
        raise DataError(
            f"{path} has {values.shape[1]}x{values.shape[0]} pixels, more than the limit of "
            f"{max_pixels}. It was not read. Shrink it, or raise the limit with --max-pixels."
        )
    return np.array(values)


def counted(pairs: Iterable[Pair], names: Sequence[str]) -> dict[str, int]:
    """Return how many pairs have each modality."""
    have = [name for pair in pairs for name, _ in pair.modalities]
    return {name: have.count(name) for name in names}
