"""Where made images come from: the rows of ``provenance.jsonl`` beside them."""

from __future__ import annotations

import filecmp
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from camoxpert.data.files.image_io import read_image
from camoxpert.data.files.manifest import Manifest
from camoxpert.errors import DataError
from camoxpert.files import path_text, read_jsonl

PROVENANCE = "provenance.jsonl"
"""File in the folder of a made data set: a JSON object for each image, with its path below the
folder in ``image`` and the files that it was made from in ``sources``, each with its ``path``."""

THUMBNAIL = 16
"""Side at which pictures of one name are compared, in pixels."""
MOST_DIFFERENCE, LEAST_CORRELATION = 3.0, 0.95
"""Mean difference in grey levels and correlation at that side for which they are the same one: of
180 pictures copies in JPEG of quality 50, or of half the size, had 1.4 at most and 0.996 at least,
and no other picture had less than 3.9."""


@dataclass(frozen=True)
class Origin:
    """What a made image was made from.

    Attributes:
        sources: files.
        tested: why a source counted as a test image when the image was made; "": none did.
    """

    sources: tuple[Path, ...]
    tested: str = ""


def read_origins(folder: Path) -> dict[Path, Origin]:
    """Return made image -> what it was made from, for the rows of a folder's provenance.

    Relative paths are below the folder. A missing file has no rows.

    Args:
        folder: of the made data set, or its CSV file.
    """
    place = folder.parent if folder.is_file() else folder
    found: dict[Path, Origin] = {}
    for row in read_jsonl(place / PROVENANCE):
        image = row.get("image") if isinstance(row, dict) else None
        if isinstance(image, str):
            sources = tuple(place / path_text(text) for text in _paths(row.get("sources")))
            tested = str(row.get("test_source") or "")
            found[(place / path_text(image)).resolve()] = Origin(sources, tested)
    return found


def _paths(sources: Any) -> Iterator[str]:
    for source in sources if isinstance(sources, list) else ():
        path = source.get("path") if isinstance(source, Mapping) else source
        if isinstance(path, str):
            yield path


@dataclass(frozen=True)
class Known:
    """An image of a run.

    Attributes:
        path: its file.
        part: where it is used: training, validation, or the name of a test set.
    """

    path: Path
    part: str


class Finder:
    """Finds the image of a run that a source is, also where the data was moved or copied since.

    Args:
        parts: the images of the run by use.
    """

    def __init__(self, parts: Mapping[str, Manifest]) -> None:
        known = [
            Known(pair.image, part) for part, manifest in parts.items() for pair in manifest.pairs
        ]
        self._by_path = {image.path.resolve(): image for image in known}
        self._by_name: dict[str, list[Known]] = defaultdict(list)
        self._by_stem: dict[str, list[Known]] = defaultdict(list)
        self._found: dict[Path, Known | None] = {}
        for image in known:
            self._by_name[image.path.name].append(image)
            self._by_stem[image.path.stem].append(image)

    def find(self, source: Path) -> Known | None:
        """Return the image that a source is; None if the run has no such image.

        It is the same file, or one of the same name with the same bytes or, encoded or sized anew
        and whatever its suffix, the same picture. Where the source is gone, it is the image whose
        path ends like it, with the name of the folder at least.
        """
        found = self._by_path.get(source.resolve())
        if found is not None:
            return found
        if source not in self._found:
            # Several images are made from one source.
            self._found[source] = self._find_elsewhere(source)
        return self._found[source]

    def _find_elsewhere(self, source: Path) -> Known | None:
        namesakes = self._by_name.get(source.name, [])
        if source.is_file():
            same = next((k for k in namesakes if _same_content(k.path, source)), None)
            others = self._by_stem.get(source.stem, [])
            return same or next((k for k in others if _same_picture(k.path, source)), None)
        alike = [(_common_end(known.path, source), known) for known in namesakes]
        best = max((number for number, _ in alike), default=0)
        return next((known for number, known in alike if number == best >= 2), None)


def _same_content(one: Path, other: Path) -> bool:
    try:
        return filecmp.cmp(one, other, shallow=False)
    except OSError:
        return False


def _same_picture(one: Path, other: Path) -> bool:
    """Return whether two files show the same picture: small and grey they are nearly equal."""
    try:
        first, second = (_thumbnail(path) for path in (one, other))
    except DataError:
        return False
    if np.abs(first - second).mean() > MOST_DIFFERENCE:
        return False
    first, second = first - first.mean(), second - second.mean()
    scale = float(np.sqrt(np.square(first).sum() * np.square(second).sum()))
    # Two flat pictures of one grey level are the same.
    return scale < 1 or float((first * second).sum()) / scale >= LEAST_CORRELATION


def _thumbnail(path: Path) -> np.ndarray:
    # Whole: decoded smaller, odd sides stretch, by as much as copies differ.
    image = read_image(path)
    grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
    small = cv2.resize(grey, (THUMBNAIL, THUMBNAIL), interpolation=cv2.INTER_AREA)
    return small.astype(np.float32)


def _common_end(one: Path, other: Path) -> int:
    """Return how many parts two paths have in common at their ends."""
    number = 0
    for a, b in zip(reversed(one.parts), reversed(other.parts), strict=False):
        if a != b:
            break
        number += 1
    return number
