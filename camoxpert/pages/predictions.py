"""The page about a folder of predictions, from its ledger: counts, times, examples, failures."""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import count as counting
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np

from camoxpert.files import leads_outside
from camoxpert.metrics.groups import SIZES, size_class
from camoxpert.pages import charts
from camoxpert.pages.pictures import fit
from camoxpert.pages.render import Chart, Picture, draw, inline_jpeg, write_page
from camoxpert.runs.jobs import ItemRow, JobSummary, WorkerSummary

SHOWN = 12
"""Pictures of a gallery."""
SIDE = 220
"""Longest side of a picture, pixels."""
FAILURES = 50
"""Failures that are listed."""
PLACES = (
    ("overlay", "overlays", ".jpg"),
    ("map", "maps", ".png"),
    ("mask", "masks", ".png"),
    ("cutout", "cutouts", ".png"),
)
"""Pictures by kind: folder and suffix; the first that was written is shown."""
BEHIND = 128
"""Grey behind cut-outs."""


@dataclass
class Gallery:
    """The items with the largest values, found in one pass.

    Attributes:
        title: of the gallery.
        rows: heap of (value, -order, row): among equals the first stay.
    """

    title: str
    rows: list[tuple[float, int, ItemRow]] = field(default_factory=list)
    _order: Any = field(default_factory=counting)

    def offer(self, value: float, row: ItemRow) -> None:
        """Keep the row if it is among the largest."""
        entry = (value, -next(self._order), row)
        if len(self.rows) < SHOWN:
            heapq.heappush(self.rows, entry)
        else:
            heapq.heappushpop(self.rows, entry)

    def best(self) -> list[ItemRow]:
        """Return the rows, largest first."""
        return [row for _, _, row in sorted(self.rows, reverse=True)]


@dataclass
class Survey:
    """What the rows of a ledger say, collected in constant memory.

    Attributes:
        statuses: rows by status.
        sizes: predictions by size of the object, see ``metrics.groups``.
        confidences: predictions with an object by confidence, in tenths.
    presences: predictions of a model with the presence head by presence, in tenths.
        reasons: failures without the name of their file, by frequency.
        failures: (item, reason), the first of them.
        galleries: examples.
    """

    statuses: Counter[str] = field(default_factory=Counter)
    sizes: Counter[int] = field(default_factory=Counter)
    confidences: Counter[int] = field(default_factory=Counter)
    presences: Counter[int] = field(default_factory=Counter)
    failures: list[tuple[str, str]] = field(default_factory=list)
    surest: Gallery = field(default_factory=lambda: Gallery("Most confident"))
    doubtful: Gallery = field(default_factory=lambda: Gallery("Least confident"))
    largest: Gallery = field(default_factory=lambda: Gallery("Largest objects"))
    empty: Gallery = field(default_factory=lambda: Gallery("Nothing found"))

    def add(self, row: ItemRow) -> None:
        """Count a row."""
        self.statuses[str(row["status"])] += 1
        if row["status"] != "ok":
            if len(self.failures) < FAILURES:
                self.failures.append((str(row["item"]), str(row.get("reason", ""))))
            return
        fraction, confidence = row.get("object_fraction"), row.get("confidence")
        if not isinstance(fraction, int | float) or not isinstance(confidence, int | float):
            # A video: its frames have a table of their own.
            self.statuses["video"] += 1
            return
        self.sizes[size_class(fraction)] += 1
        presence = row.get("presence")
        if isinstance(presence, int | float):
            self.presences[min(9, int(10 * presence))] += 1
        if not fraction:
            # With a presence those that most likely hold something come first.
            self.empty.offer(presence if isinstance(presence, int | float) else 0, row)
            return
        self.confidences[min(9, int(10 * confidence))] += 1
        self.surest.offer(confidence, row)
        self.doubtful.offer(-confidence, row)
        self.largest.offer(fraction, row)


class WorkerLine(NamedTuple):
    """A worker of the last call: its name, images, images per second and shares of its time."""

    name: str
    images: int
    rate: str
    shares: str


@dataclass(frozen=True)
class PredictionsPage:
    """The values of ``predictions.html.j2``."""

    folder: str
    tiles: list[tuple[str, str]]
    settings: list[tuple[str, str]]
    histograms: Chart
    galleries: list[tuple[str, list[Picture]]]
    workers: list[WorkerLine]
    stages: list[tuple[str, str]]
    failures: list[tuple[str, str]]
    more_failures: int


def write_predictions_page(
    path: Path,
    rows: Iterable[ItemRow],
    *,
    folder: Path,
    settings: Mapping[str, Any],
    summary: JobSummary,
    finished: bool,
) -> Path:
    """Write the page.

    Args:
        path: the page.
        rows: of the ledger, the last of every item; read once, a million take half a minute.
        folder: with the pictures.
        settings: the head of the ledger.
        summary: content of ``predict.json``: where the time of the last call went; {} unknown.
        finished: the call that wrote the ledger was not stopped.
    """
    survey = Survey()
    for row in rows:
        survey.add(row)
    done, failed = survey.statuses["ok"], survey.statuses["failed"]
    found = sum(survey.confidences.values())
    tiles = [
        (f"{done}", "predicted"),
        (f"{failed}", "failed"),
        (f"{found}", "with an object"),
        (f"{survey.sizes[0]}", "nothing found"),
    ]
    if videos := survey.statuses["video"]:
        tiles.append((f"{videos}", "videos"))
    workers = [worker for worker in summary.get("workers", ()) if worker.get("images")]
    if summary.get("wall_seconds"):
        rate = sum(worker["images"] for worker in workers) / summary["wall_seconds"]
        tiles.append((f"{rate:.1f}", "images per second, last call"))
    galleries = (survey.doubtful, survey.surest, survey.largest, survey.empty)
    pictures = [(g.title, [_picture(folder, row) for row in g.best()]) for g in galleries]
    counts = {
        "object size (share of the image)": {
            SIZES[size]: survey.sizes[size] for size in range(len(SIZES)) if survey.sizes[size]
        },
        "confidence (mean probability inside)": _tenths(survey.confidences),
    }
    if survey.presences:
        counts["presence (probability of any object)"] = _tenths(survey.presences)
    page = PredictionsPage(
        folder=f"{folder}" + ("" if finished else ": stopped before its end"),
        tiles=tiles,
        settings=[(key, str(value)) for key, value in settings.items() if value is not None],
        histograms=draw(lambda: charts.plot_counts(counts), "object sizes and confidence"),
        galleries=[(title, [p for p in shown if p is not None]) for title, shown in pictures],
        workers=[_worker(worker) for worker in workers],
        stages=_stages(workers),
        failures=survey.failures,
        more_failures=failed - len(survey.failures),
    )
    return write_page(path, "predictions.html.j2", page)


def _tenths(counts: Mapping[int, int]) -> dict[str, int]:
    return {
        f"{tenth / 10:.1f} to {(tenth + 1) / 10:.1f}": counts.get(tenth, 0) for tenth in range(10)
    }


def _picture(folder: Path, row: ItemRow) -> Picture | None:
    """Return the first picture that was written for an item and still exists."""
    for kind, place, suffix in PLACES:
        path = folder / place / f"{row['item']}{suffix}"
        if kind not in row.get("kinds", ()) or leads_outside(folder, path):
            continue
        try:
            pixels = cv2.imdecode(np.fromfile(path, np.uint8), cv2.IMREAD_UNCHANGED)
        except (OSError, cv2.error):
            continue
        if pixels is None:
            continue
        if pixels.ndim == 3 and pixels.shape[2] == 4:
            # The photograph is whole below a cut-out's transparency.
            alpha = pixels[..., 3:] / np.float32(255)
            pixels = np.rint(pixels[..., :3] * alpha + BEHIND * (1 - alpha)).astype(np.uint8)
        _, data = cv2.imencode(".jpg", fit(pixels, SIDE), [cv2.IMWRITE_JPEG_QUALITY, 85])
        share = f"{row['object_fraction']:.1%}, confidence {row['confidence']:.2f}"
        if "presence" in row:
            share += f", presence {row['presence']:.2f}"
        return Picture(inline_jpeg(data.tobytes()), f"{row['item']}: {share}")
    return None


def _worker(worker: WorkerSummary) -> WorkerLine:
    shares = worker.get("loop_shares", {})
    parts = (f"{place} {share:.0%}" for place, share in shares.items() if share >= 0.005)
    return WorkerLine(
        str(worker["worker"]),
        int(worker["images"]),
        f"{worker.get('images_per_second', 0):.1f}",
        ", ".join(parts),
    )


def _stages(workers: list[WorkerSummary]) -> list[tuple[str, str]]:
    """Return milliseconds an image of every stage, over all workers."""
    images = sum(worker["images"] for worker in workers)
    seconds: Counter[str] = Counter()
    for worker in workers:
        seconds.update(worker.get("thread_seconds", {}))
    return [(stage, f"{1e3 * value / images:.1f} ms") for stage, value in seconds.items()]
