"""Scoring a checkpoint on whole data sets: scores, per-image table, curves and a picture
gallery."""

from __future__ import annotations

import heapq
import itertools
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from camoxpert.config import DataConfig
from camoxpert.console import bar
from camoxpert.data.files.image_io import write_jpeg
from camoxpert.data.files.manifest import Manifest
from camoxpert.data.loader import build_eval_loader
from camoxpert.errors import DataError
from camoxpert.evaluation.results import safe_name, summarise, write_curves, write_result
from camoxpert.files import leads_outside
from camoxpert.inference.predictor import Predictor
from camoxpert.inference.score import Item, score
from camoxpert.metrics import RESULT_KEYS, Evaluator
from camoxpert.pages.plots import panel
from camoxpert.pages.tables import aligned, format_value


class Gallery:
    """Keeps the pictures of the ``size`` best and worst images by weighted F, and no others."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._best: list[tuple[float, int, dict[str, Any], Any]] = []
        self._worst: list[tuple[float, int, dict[str, Any], Any]] = []
        self._order = itertools.count()

    def offer(self, row: dict[str, Any], picture: Callable[[], np.ndarray]) -> None:
        """Consider an image; ``picture`` is called only if it is kept for now."""
        value, order = float(row["wFmeasure"]), next(self._order)
        if math.isnan(value):  # skipped: it has no object
            return
        for heap, key in ((self._best, value), (self._worst, -value)):
            if not self.size or (len(heap) == self.size and key <= heap[0][0]):
                continue
            push = heapq.heappush if len(heap) < self.size else heapq.heapreplace
            push(heap, (key, order, row, picture()))

    def write(self, folder: Path, root: Path) -> dict[str, list[dict[str, Any]]]:
        """Write the panels; return their rows with paths relative to ``root``, extremes first."""
        result: dict[str, list[dict[str, Any]]] = {}
        for kind, heap in (("best", self._best), ("worst", self._worst)):
            entries = []
            for rank, (_, _, row, picture) in enumerate(sorted(heap, reverse=True), 1):
                path = folder / f"{kind}_{rank}_{safe_name(row['name'])}.jpg"
                write_jpeg(path, picture)
                kept = {k: row[k] for k in ("name", "wFmeasure", "Smeasure", "MAE")}
                entries.append({**kept, "panel": path.relative_to(root).as_posix()})
            result[kind] = entries
        return result


def evaluate_set(
    predictor: Predictor,
    name: str,
    manifest: Manifest,
    *,
    output: Path,
    batch_size: int,
    num_workers: int,
    gallery: int,
    protocol: str = "pysod",
    empty_gt: str = "pysod",
    intervals: bool = True,
    checkpoint_name: str = "best",
    method: str = "",
) -> dict[str, Any]:
    """Score one data set; write ``evaluation/<name>.json``, ``.csv``, ``.png`` (curves) and the
    gallery under ``output``.

    Everything is written after the last image: an interrupted call leaves no half table.

    Args:
        predictor: the model.
        name: of the data set.
        manifest: its images.
        output: folder for results, usually the run's.
        batch_size: images the loader reads at a time; it does not change a number.
        num_workers: data worker processes.
        gallery: best and worst images kept.
        protocol, empty_gt: of the Evaluator.
        intervals: also bootstrap confidence intervals.
        checkpoint_name: goes into the result.
        method: name in tables and in the ledger; by default the output folder's.

    Returns:
        The content of the JSON file.
    """
    for folder in (output / "evaluation", output / "images" / safe_name(name)):
        # A run folder may come from somebody else.
        if leads_outside(output, folder / "file"):
            raise DataError(
                f"{folder} is a link that leads out of {output}. Remove it, or name another folder "
                f"with -o."
            )
    started = time.monotonic()
    evaluator, everything = (Evaluator(protocol=protocol, empty_gt=empty_gt) for _ in range(2))
    pictures = Gallery(gallery)
    loader = build_eval_loader(
        manifest,
        DataConfig(img_size=predictor.img_size, max_pixels=predictor.config.data.max_pixels),
        batch_size=batch_size,
        num_workers=num_workers,
        keep_images=gallery > 0,
    )

    def seen(item: Item, prediction: Callable[[], np.ndarray], row: dict[str, Any]) -> None:
        everything.add(item.name, np.full_like(item.mask, 255), item.mask)
        original = item.original
        if original is not None:
            pictures.offer(
                row,
                lambda: panel(
                    original,
                    item.mask,
                    prediction() / np.float32(255),
                    stretch=protocol == "pysod",
                ),
            )

    batches = bar(loader, description=f"evaluate {name}", total=len(loader))
    score(
        predictor.model,
        batches,
        device=predictor.device,
        evaluator=evaluator,
        groups={pair.name: pair.group for pair in manifest.pairs},
        context=predictor.context,
        seen=seen,
    )
    result = summarise(
        evaluator, method=method or output.resolve().name, dataset=name, intervals=intervals
    )
    result |= {
        "baseline": {"all_foreground": everything.results()},
        "checkpoint": checkpoint_name,
        "img_size": predictor.img_size,
        "precision": predictor.precision.name,
        "seconds": time.monotonic() - started,
        "gallery": pictures.write(output / "images" / safe_name(name), output),
    }
    write_curves(output / "evaluation", [result])
    write_result(output / "evaluation", result, evaluator)
    return result


def score_table(results: list[dict[str, Any]], keys: tuple[str, ...] = RESULT_KEYS) -> str:
    """Lay the scores of several data sets out as an aligned text table, three decimals."""
    head = ["data set", "images", *keys]
    body = [
        [r["dataset"], str(r["num_images"]), *(format_value(key, r["scores"][key]) for key in keys)]
        for r in results
    ]
    first, *rest = aligned([head, *body]).splitlines()
    return "\n".join([first, "-" * len(first), *rest])
