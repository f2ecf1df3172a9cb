"""What each expert does best: the scores and the kind of the images that it was chosen for.

Shape letters: H, W height and width; N images.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from camoxpert.metrics.scoring import Row
from camoxpert.metrics.statistics import group_p_value
from camoxpert.runs.scores import ExpertEntry, ExpertsEntry

SCORES = ("wFmeasure", "IoU")
"""Measures of the table, where they were computed."""
PROPERTIES = ("object_fraction", "texture", "contrast")
WINDOW = 9
"""Side of the window that texture is measured in, in pixels of the network's input."""


@dataclass(frozen=True)
class ExpertUse:
    """The images that one expert of a level was chosen for.

    Attributes:
        level, expert: names.
        images: those whose first choice it was.
        share: of all images.
        means: measures and properties of these images; without a value where no image has one.
    """

    level: str
    expert: str
    images: int
    share: float
    means: dict[str, float]


@dataclass(frozen=True)
class ExpertTable:
    """What each expert was chosen for on one data set.

    Attributes:
        keys: measures and properties, in the order of the columns.
        uses: every expert of every level.
        p_values: level -> key -> two-sided p-value of the hypothesis that the choice is unrelated
            to it; empty where no statistics were asked for.
    """

    keys: tuple[str, ...]
    uses: tuple[ExpertUse, ...]
    p_values: dict[str, dict[str, float]]

    def entry(self) -> ExpertsEntry:
        """Return it as ``scores.json`` holds it."""
        uses: list[ExpertEntry] = [
            {
                "level": use.level,
                "expert": use.expert,
                "images": use.images,
                "share": use.share,
                "means": use.means,
            }
            for use in self.uses
        ]
        return {"keys": self.keys, "uses": uses, "p_values": self.p_values}


def column(level: str) -> str:
    """Return the name of the column that holds the choice of a level."""
    return f"expert at {level}"


def expert_table(
    rows: Sequence[Row], levels: Sequence[str], experts: Sequence[str], *, statistics: bool = True
) -> ExpertTable:
    """Return what each expert was chosen for.

    Args:
        rows: of the images: measures, ``PROPERTIES`` and the expert that each level chose.
        levels, experts: names.
        statistics: also test whether the choice is related to the measures and properties.
    """
    keys = (*(key for key in SCORES if key in rows[0]), *PROPERTIES)
    values = {key: np.array([float(row[key]) for row in rows]) for key in keys}
    uses: list[ExpertUse] = []
    p_values: dict[str, dict[str, float]] = {}
    for level in levels:
        chosen_N = np.array([experts.index(row[column(level)]) for row in rows])
        uses += _uses(level, experts, chosen_N, values)
        if statistics:
            p_values[level] = {
                key: group_p_value(chosen_N[known], values[key][known])
                for key in keys
                if (known := np.isfinite(values[key])).any()
            }
    return ExpertTable(keys, tuple(uses), p_values)


def _uses(
    level: str,
    experts: Sequence[str],
    chosen_N: NDArray[np.int64],
    values: Mapping[str, NDArray[np.float64]],
) -> Iterator[ExpertUse]:
    for index, expert in enumerate(experts):
        own_N = chosen_N == index
        means = {}
        for key, value_N in values.items():
            known = value_N[own_N & np.isfinite(value_N)]
            if known.size:
                means[key] = float(known.mean())
        number = int(own_N.sum())
        yield ExpertUse(level, expert, number, number / len(chosen_N), means)


def texture(picture_HWC: NDArray[np.uint8]) -> float:
    """Return how busy an image is, 0..1: the mean over all pixels of the standard deviation of the
    grey levels in a small window around them, white being 1."""
    grey_HW = picture_HWC.mean(2) / 255
    mean_HW = cv2.blur(grey_HW, (WINDOW, WINDOW))
    variance_HW = cv2.blur(np.square(grey_HW), (WINDOW, WINDOW)) - np.square(mean_HW)
    return float(np.sqrt(np.maximum(variance_HW, 0)).mean())


def object_contrast(
    picture_HWC: NDArray[np.uint8],
    mask_HW: NDArray[np.bool_],
    void_HW: NDArray[np.bool_] | None = None,
) -> float:
    """Return how much the object stands out by its colour, 0..1: the distance between the mean RGB
    colour of the object and that of the ring around it, black to white being 1.

    The ring is a sixteenth of the image's side wide. NaN without an object, or without a ring.

    Args:
        picture_HWC: RGB.
        mask_HW: the object.
        void_HW: pixels that nobody labelled, which are not in the ring.
    """
    reach = max(1, mask_HW.shape[0] // 16)
    grown_HW = cv2.dilate(mask_HW.view(np.uint8), np.ones((2 * reach + 1,) * 2, np.uint8)) > 0
    ring_HW = grown_HW & ~mask_HW
    if void_HW is not None:
        ring_HW &= ~void_HW
    if not mask_HW.any() or not ring_HW.any():
        return math.nan
    difference = picture_HWC[mask_HW].mean(0) - picture_HWC[ring_HW].mean(0)
    return float(np.linalg.norm(difference) / (255 * math.sqrt(3)))


def shrunk(mask_HW: NDArray[np.bool_], size: tuple[int, int]) -> NDArray[np.bool_]:
    """Return a mask at (width, height): pixels of which half is marked, or any of a tiny object."""
    share_HW = cv2.resize(mask_HW.astype(np.float32), size, interpolation=cv2.INTER_AREA)
    marked_HW: NDArray[np.bool_] = share_HW >= 0.5
    return marked_HW if marked_HW.any() else share_HW > 0
