"""Scoring a checkpoint on whole data sets: scores, per-image table, curves and a picture
gallery."""

from __future__ import annotations

import csv
import heapq
import itertools
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from camoxpert.data.image_io import write_jpeg
from camoxpert.data.loader import build_eval_loader
from camoxpert.data.manifest import Manifest
from camoxpert.inference.predictor import Predictor
from camoxpert.metrics import Evaluator
from camoxpert.observe.plots import panel
from camoxpert.observe.progress import bar
from camoxpert.observe.runlog import write_json
from camoxpert.training.validation import score


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
    checkpoint_name: str = "best",
    check_stop: Callable[[], None] | None = None,
) -> dict[str, Any]:
    """Score one data set; write ``evaluation/<name>.json``, ``.csv`` and the gallery under
    ``output``.

    Everything is written after the last image: an interrupted call leaves no half table.

    Returns:
        The content of the JSON file.
    """
    started = time.monotonic()
    evaluator, everything = (Evaluator(protocol=protocol, empty_gt=empty_gt) for _ in range(2))
    pictures = Gallery(gallery)
    loader = build_eval_loader(
        manifest,
        img_size=predictor.img_size,
        batch_size=batch_size,
        num_workers=num_workers,
        max_pixels=predictor.config.data.max_pixels,
        keep_images=gallery > 0,
    )

    def seen(batch: Any, position: int, prediction: np.ndarray, row: dict[str, Any]) -> None:
        mask = batch.full_masks[position]
        everything.add(row["name"], np.full_like(prediction, 255), mask)
        if gallery:
            image, probability = batch.originals[position], prediction / np.float32(255)
            pictures.offer(row, lambda: panel(image, mask, probability))

    batches = bar(loader, description=f"evaluate {name}", total=len(loader))
    score(
        predictor.model,
        batches,
        device=predictor.device,
        evaluator=evaluator,
        context=predictor.context,
        seen=seen,
        check_stop=check_stop,
    )
    curves = {key: np.asarray(curve).tolist() for key, curve in evaluator.curves().items()}
    stem = safe_name(name)
    result = {
        "dataset": name,
        "num_images": evaluator.num_images,
        "scores": evaluator.results(),
        "baseline": {"all_foreground": everything.results()},
        "protocol": protocol,
        "empty_gt": empty_gt,
        "data_hash": manifest.content_hash(),
        "checkpoint": checkpoint_name,
        "img_size": predictor.img_size,
        "precision": predictor.precision.name,
        "seconds": time.monotonic() - started,
        "curves": curves,
        "gallery": pictures.write(output / "images" / stem, output),
    }
    write_rows(output / "evaluation" / f"{stem}.csv", evaluator.rows())
    write_json(output / "evaluation" / f"{stem}.json", result)
    return result


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write dictionaries as CSV, all at once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    temporary.replace(path)


def score_table(results: list[dict[str, Any]], keys: tuple[str, ...]) -> str:
    """Lay the scores of several data sets out as an aligned text table, three decimals."""
    head = ["data set", "images", *keys]
    body = [
        [r["dataset"], str(r["num_images"]), *(f"{r['scores'][key]:.3f}" for key in keys)]
        for r in results
    ]
    widths = [max(len(row[i]) for row in [head, *body]) for i in range(len(head))]
    lines = [
        "  ".join(
            cell.ljust(w) if i == 0 else cell.rjust(w)
            for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in [head, *body]
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def safe_name(name: str) -> str:
    """Turn any text into a file name that stays in its folder."""
    return re.sub(r"[^\w.-]+", "_", name).lstrip(".") or "unnamed"
