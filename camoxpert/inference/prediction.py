"""The prediction for one image, and the pictures made from it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from camoxpert.data.files.image_io import write_jpeg, write_png
from camoxpert.errors import ConfigError
from camoxpert.inference.products import Product
from camoxpert.inference.score import to_uint8
from camoxpert.pages import pictures
from camoxpert.text import did_you_mean

PICTURES = ("map", "mask", "cutout", "overlay")
"""Pictures of a prediction: probability map (grey), mask (0 or 255), RGBA cut-out, overlay."""
FOLDERS = {
    "map": "maps",
    "mask": "masks",
    "cutout": "cutouts",
    "overlay": "overlays",
    "coco": "coco_parts",
    "labelme": "labelme",
    "video": "videos",
}
TIMES = "timestamps"
"""Folder of the tables of videos."""
KINDS = tuple(FOLDERS)
"""Everything that is written for an image; a ledger keeps a bit for each, in this order."""
SUFFIXES = {"overlay": ".jpg", "coco": ".json", "labelme": ".json", "video": ".mp4"}


@dataclass(frozen=True, eq=False)
class Prediction:
    """A model's prediction for one image.

    Attributes:
        name: name of the image, and of the files that ``save`` writes.
        image_HWC: the image, uint8 RGB (H, W, 3).
        probability_HW: probability that a pixel belongs to a hidden object, float32 (H, W) in 0..1,
            at the image's own size.
        seconds: time of the forward pass, divided equally among the images of its batch.
        threshold: probability above which a pixel counts as object.
        presence: probability that the image contains a hidden object; None: the model has no head
            for it.
    """

    name: str
    image_HWC: NDArray[np.uint8] = field(repr=False)
    probability_HW: NDArray[np.float32] = field(repr=False)
    seconds: float
    threshold: float = 0.5
    presence: float | None = None

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of the image in pixels."""
        height, width = self.probability_HW.shape
        return height, width

    @property
    def mask_HW(self) -> NDArray[np.bool_]:
        """True on the object, bool (H, W)."""
        mask_HW: NDArray[np.bool_] = self.probability_HW > self.threshold
        return mask_HW

    @property
    def object_fraction(self) -> float:
        """Share of the image that the object covers, 0..1."""
        return self._shape_of(self.mask_HW)[0]

    @property
    def confidence(self) -> float:
        """Mean probability inside the mask, 0..1; 0 where nothing was found."""
        return self._shape_of(self.mask_HW)[1]

    def _shape_of(self, inside_HW: NDArray[np.bool_]) -> tuple[float, float]:
        """Return the share of the image inside the mask, and the mean probability there."""
        number = np.count_nonzero(inside_HW)
        confidence = float(self.probability_HW[inside_HW].mean()) if number else 0.0
        return number / inside_HW.size, confidence

    def fields(self) -> dict[str, float]:
        """Return what tables say of the prediction: size, share of the object, confidence, and the
        presence of a model with the head."""
        height, width = self.size
        fraction, confidence = self._shape_of(self.mask_HW)
        return {
            "height": height,
            "width": width,
            "object_fraction": fraction,
            "confidence": confidence,
            **({} if self.presence is None else {"presence": self.presence}),
        }

    def cutout(self) -> NDArray[np.uint8]:
        """Return the image with the probability as its alpha channel, uint8 RGBA (H, W, 4)."""
        return pictures.cutout(self.image_HWC, self.probability_HW)

    def overlay(self) -> NDArray[np.uint8]:
        """Return the image with the object tinted and outlined, uint8 RGB (H, W, 3)."""
        return pictures.overlay(self.image_HWC, self.mask_HW)

    def save(self, folder: str | Path, kinds: Sequence[str] = PICTURES) -> list[Path]:
        """Write pictures under ``folder``, as ``camoxpert predict -o folder`` does.

        Args:
            folder: gets ``maps/NAME.png``, ``masks/NAME.png``, ``cutouts/NAME.png`` and
                ``overlays/NAME.jpg``.
            kinds: any of ``map``, ``mask``, ``cutout`` and ``overlay``.

        Returns:
            The files, in the order of ``kinds``; each is written completely or not at all.

        Raises:
            ConfigError: an unknown kind.
            DataError: a file would be written outside ``folder``, or cannot be written.
        """
        for kind in kinds:
            if kind not in PICTURES:
                hint = did_you_mean(kind, PICTURES)
                raise ConfigError(
                    f"Unknown picture {kind!r}.{hint} Choose from {', '.join(PICTURES)}."
                )
        paths = [output_path(Path(folder), kind, self.name) for kind in kinds]
        for kind, path in zip(kinds, paths, strict=True):
            if kind == "map":
                write_png(path, to_uint8(self.probability_HW))
            elif kind == "mask":
                write_png(path, self.mask_HW.view(np.uint8) * np.uint8(255))
            elif kind == "cutout":
                write_png(path, self.cutout())
            else:
                write_jpeg(path, self.overlay())
        return paths


def emptied(
    map_HW: NDArray[np.float32], presence: float | None, min_presence: float | None
) -> NDArray[np.float32]:
    """Return a map, or one of zeros where the presence is below the least that counts.

    Args:
        map_HW: probabilities.
        presence: of the image; None: the model has no head for it.
        min_presence: see ``--min-presence``; None: every map stays.
    """
    if presence is None or min_presence is None or presence >= min_presence:
        return map_HW
    return np.zeros_like(map_HW)


PREDICTIONS = Product(
    "predictions.jsonl", FOLDERS, SUFFIXES, item="photo", again="predict again", scratch=(TIMES,)
)
"""What ``predict`` makes of photos."""


def output_path(output: Path, kind: str, name: str) -> Path:
    """Return the path of one file of an image, always inside ``output``; see ``Product.path``."""
    return PREDICTIONS.path(output, kind, name)
