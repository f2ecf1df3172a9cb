"""The images of a data set that are shown: the best, the worst, and those taken for the other kind.

Only what is shown is kept in memory.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from camoxpert.data.files.image_io import write_jpeg
from camoxpert.metrics.scoring import Claim, Row
from camoxpert.runs.scores import GalleryEntry

Picture = NDArray[np.uint8]
SHOWN = ("wFmeasure", "Smeasure", "MAE")
"""Scores printed below a picture."""
BEST, WORST, FALSE_ALARM, MISSED = "best", "worst", "false_alarm", "missed"
PRESENCE, MASK_SHARE = "presence", "mask share"
"""What images without and with an object are ranked by: the probability of the head, or without one
the share of the image that the mask covers."""


class Gallery:
    """Keeps the pictures of only the ``size`` images that come first in each kind."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._kept: dict[str, list[tuple[float, int, Row, str, float, Picture]]] = {
            kind: [] for kind in (BEST, WORST, FALSE_ALARM, MISSED)
        }
        self._order = itertools.count()
        self._some_are_empty = False

    def offer(self, row: Row, picture: Callable[[], Picture]) -> None:
        """Keep an image if its weighted F is among the best or worst; only then call ``picture``.

        Images without an object, of which every map has the same weighted F, are neither.
        """
        value = float(row["wFmeasure"])
        if math.isnan(value) or not row["object_fraction"]:
            return
        self._offer(BEST, value, row, "wFmeasure", value, picture)
        self._offer(WORST, -value, row, "wFmeasure", value, picture)

    def offer_presence(
        self, row: Row, claim: Claim, probability: float | None, picture: Callable[[], Picture]
    ) -> None:
        """Keep an image if it is among those that look most as if it were of the other kind.

        Args:
            row: of the image.
            claim: of its map.
            probability: that it holds any object; None: there is no head, and only false masks and
                objects without any mask are shown.
            picture: makes the picture.
        """
        kind = MISSED if claim.present else FALSE_ALARM
        self._some_are_empty |= not claim.present
        if probability is not None:
            key = -probability if claim.present else probability
            self._offer(kind, key, row, PRESENCE, probability, picture)
        elif claim.present != (claim.share > 0):
            # Larger objects are worse to miss.
            key = float(row["object_fraction"]) if claim.present else claim.share
            self._offer(kind, key, row, MASK_SHARE, claim.share, picture)

    def _offer(
        self,
        kind: str,
        key: float,
        row: Row,
        measure: str,
        value: float,
        picture: Callable[[], Picture],
    ) -> None:
        heap = self._kept[kind]
        if not self.size or (len(heap) == self.size and key <= heap[0][0]):
            return
        push = heapq.heappush if len(heap) < self.size else heapq.heapreplace
        push(heap, (key, next(self._order), row, measure, value, picture()))

    def write(self, output: Path, dataset: str, method: str, file: str) -> list[GalleryEntry]:
        """Write ``images/FILE_best_1.jpg`` and so on under ``output``; return their entries.

        Missed objects are shown where there are images without one.
        """
        entries: list[GalleryEntry] = []
        for kind, heap in self._kept.items():
            if kind == MISSED and not self._some_are_empty:
                continue
            ordered = sorted(heap, reverse=True)
            for rank, (_, _, row, measure, value, picture) in enumerate(ordered, 1):
                path = output / "images" / f"{file}_{kind}_{rank}.jpg"
                write_jpeg(path, picture)
                entries.append(
                    {
                        "dataset": dataset,
                        "kind": kind,
                        "name": row["name"],
                        "measure": measure,
                        "values": {method: value},
                        "scores": {key: row[key] for key in SHOWN},
                        "panel": path.relative_to(output).as_posix(),
                    }
                )
        return entries
