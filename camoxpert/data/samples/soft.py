"""Soft maps of a teacher: one grey PNG for each image, a square of the side of decoded pairs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from camoxpert.data.files.image_io import read_map
from camoxpert.data.files.manifest import Manifest
from camoxpert.errors import DataError


@dataclass(frozen=True)
class SoftMaps:
    """Where the maps of a run's images are.

    Attributes:
        paths: (data set, name) -> uint8 PNG; 0..255 stands for probabilities 0..1.
        side: side of the square maps, that of decoded pairs.
        teacher: who made them, for the user.
    """

    paths: Mapping[tuple[str, str], Path]
    side: int
    teacher: str = ""

    def of(self, manifest: Manifest) -> list[Path | None]:
        """Return the maps of a manifest's pairs, in its order; None for images without one."""
        return [self.paths.get((pair.dataset, pair.name)) for pair in manifest.pairs]

    def read(self, path: Path | None) -> np.ndarray:
        """Return a map, uint8 (S, S).

        Raises:
            DataError: there is none, or it is damaged or of another size.
        """
        if path is None:
            raise DataError("An image has no map of the teacher, although it can be read now.")
        pixels = read_map(path)
        if pixels.shape != (self.side, self.side):
            raise DataError(
                f"The map {path} is {pixels.shape[1]}x{pixels.shape[0]} and should be "
                f"{self.side}x{self.side}. Remove it: it is made again."
            )
        return pixels
