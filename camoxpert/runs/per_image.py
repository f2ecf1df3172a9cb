"""The scores of single images that a run's evaluation wrote."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from camoxpert.runs.scores import RunResult
from camoxpert.text import file_names

ImageScores = dict[str, dict[str, float]]
"""Image -> measure -> score."""


def image_scores(run_dir: Path, results: Sequence[RunResult], result: RunResult) -> ImageScores:
    """Return the scores of the images of one result; {} where its table is missing or damaged.

    Images without an object that were left out of the scores have none.

    Args:
        run_dir: a run folder.
        results: all entries of its ``scores.json``, in their order: it decides file names.
        result: one of them.
    """
    methods = file_names(str(entry.get("method")) for entry in results)
    datasets = file_names(str(entry.get("dataset")) for entry in results)
    name = f"{methods[str(result.get('method'))]}/{datasets[str(result.get('dataset'))]}.csv"
    return read_image_scores(run_dir / "evaluation" / "per_image" / name)


def read_image_scores(file: Path) -> ImageScores:
    """Return the scores in a table of images; {} if it cannot be read."""
    try:
        with file.open(encoding="utf-8", errors="surrogateescape", newline="") as stream:
            rows = list(csv.DictReader(stream))
    except (OSError, csv.Error):
        return {}
    found = {row["name"]: _numbers(row) for row in rows if row.get("name")}
    return {name: scores for name, scores in found.items() if scores}


def _numbers(row: Mapping[str, Any]) -> dict[str, float]:
    """Return the cells of a row that are numbers, without those that describe its mask."""
    numbers = {}
    for key, text in row.items():
        try:
            value = float(text)
        except (TypeError, ValueError):
            continue
        if math.isfinite(value) and key not in DESCRIBING:
            numbers[key] = value
    return numbers


DESCRIBING = (
    *("name", "object_fraction", "num_objects", "texture", "contrast", "presence"),
    "mask_fraction",
)
"""Columns that are not scores."""
