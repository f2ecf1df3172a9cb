"""From scored images to what is written: one result per method and data set, tables, curves, page.

Everything is written after the last image; each file is whole or not there.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from camoxpert.console import bar
from camoxpert.files import write_bytes, write_json, write_rows
from camoxpert.metrics import HIGHER_IS_BETTER, Evaluator
from camoxpert.metrics.statistics import (
    Scores,
    breakdown,
    compare,
    confidence_intervals,
    count_label,
    size_label,
)
from camoxpert.pages import charts, tables

DECIDING = ("wFmeasure", "Smeasure", "IoU", "MAE")
"""The first of these that was computed ranks images and methods."""


def summarise(
    evaluator: Evaluator, *, method: str, dataset: str, intervals: bool = True
) -> dict[str, Any]:
    """Return everything that is reported of one method on one data set, as plain Python."""
    rows = evaluator.rows()
    ends = confidence_intervals(Scores(evaluator)) if intervals and len(rows) > 1 else {}
    return {
        "dataset": dataset,
        "method": method,
        "num_images": evaluator.num_images,
        "num_skipped": evaluator.num_skipped,
        "scores": evaluator.results(),
        "intervals": {key: [end.low, end.high] for key, end in ends.items()},
        "protocol": evaluator.protocol,
        "empty_gt": evaluator.empty_gt,
        "data_hash": evaluator.data_hash(),
        "breakdown": break_down(rows, evaluator.keys),
        "curves": {key: np.asarray(curve).tolist() for key, curve in evaluator.curves().items()},
    }


def break_down(
    rows: Sequence[Mapping[str, Any]], keys: Sequence[str]
) -> dict[str, dict[str, dict[str, float]]]:
    """Return the scores by class, sub-class, object size and number of objects.

    Classes come from the images' names (COD10K: Aquatic, and Aquatic/Crab below it). A division
    with a single part is left out.
    """
    groups = [str(row["group"]) for row in rows]
    divisions = {
        "class": [group.split("/")[0] for group in groups],
        "sub-class": [group if "/" in group else "" for group in groups],
        "object size": [size_label(row["object_fraction"]) for row in rows],
        "objects": [count_label(row["num_objects"]) for row in rows],
    }
    parts = {name: breakdown(rows, labels, keys) for name, labels in divisions.items()}
    return {name: table for name, table in parts.items() if len(table) > 1}


FEW_METHODS = 4
"""Up to so many, every two methods are compared; of more, each with the best."""


def compare_all(
    scored: Mapping[str, Mapping[str, Evaluator]],
    *,
    check_stop: Callable[[], None] = lambda: None,
) -> list[dict[str, Any]]:
    """Compare methods two by two on each data set where they saw the same images.

    Args:
        scored: data set -> method -> evaluator.
        check_stop: called before each comparison; raises to stop.

    Returns:
        One entry per data set and pair, the better one (by ``DECIDING``) first.
    """
    entries = []
    for dataset, methods in scored.items():
        scores = {name: Scores(evaluator) for name, evaluator in methods.items()}
        order = ranked(methods)
        pairs = list(combinations(order, 2))
        if len(order) > FEW_METHODS:
            pairs = [(a, b) for a, b in pairs if a == order[0]]
        for a, b in bar(pairs, description=f"compare on {dataset}", total=len(pairs)):
            check_stop()
            if scores[a].names != scores[b].names:
                continue
            found = compare(scores[a], scores[b])
            entries.append(
                {
                    "dataset": dataset,
                    "a": a,
                    "b": b,
                    "measures": {key: value._asdict() for key, value in found.items()},
                }
            )
    return entries


def ranked(methods: Mapping[str, Evaluator]) -> list[str]:
    """Return the methods' names, the best first."""
    evaluators = list(methods.values())
    key = deciding_key(evaluators[0].keys)
    sign = -1 if HIGHER_IS_BETTER[key] else 1
    return sorted(methods, key=lambda name: sign * methods[name].results()[key])


def deciding_key(keys: Sequence[str]) -> str:
    """Return the measure by which images and methods are ranked."""
    return next((key for key in DECIDING if key in keys), keys[0])


def write_tables(
    folder: Path, results: Sequence[Mapping[str, Any]], keys: Sequence[str], *, stem: str = "scores"
) -> None:
    """Write the score table as CSV, Markdown and LaTeX."""
    for suffix, make in (
        ("csv", tables.csv_table),
        ("md", tables.markdown_table),
        ("tex", tables.latex_table),
    ):
        write_text(folder / f"{stem}.{suffix}", make(results, keys))


def write_curves(
    folder: Path, results: Sequence[Mapping[str, Any]], files: Mapping[str, str] | None = None
) -> None:
    """Write the precision-recall, F and E curves of each data set as PNG, a line per method.

    Args:
        folder: where to.
        results: of ``summarise``.
        files: data set -> file name without ending; by default a safe form of its name.
    """
    for dataset in dict.fromkeys(result["dataset"] for result in results):
        curves = {r["method"]: r["curves"] for r in results if r["dataset"] == dataset}
        try:
            picture = charts.plot_curves(curves)
        except Exception as error:
            # Matplotlib missing, or a name it cannot draw: no reason to lose the scores.
            print(f"warning: no curves are drawn: {error}", file=sys.stderr)
            return
        name = files[dataset] if files else safe_name(dataset)
        write_bytes(folder / f"{name}.png", picture)


def write_result(folder: Path, result: Mapping[str, Any], evaluator: Evaluator) -> None:
    """Write ``<data set>.json`` and the per-image ``<data set>.csv``."""
    stem = safe_name(result["dataset"])
    write_rows(folder / f"{stem}.csv", evaluator.rows())
    write_json(folder / f"{stem}.json", result)


def write_text(path: Path, text: str) -> None:
    """Write a text file, whole or not at all."""
    write_bytes(path, text.encode("utf-8", "surrogateescape"))


def safe_name(name: str) -> str:
    """Turn any text into a file name that stays in its folder."""
    return re.sub(r"[^\w.-]+", "_", name).lstrip(".") or "unnamed"


def file_names(names: Sequence[str]) -> dict[str, str]:
    """Return a file name for each name, no two the same on any disk."""
    taken: set[str] = set()
    files = {}
    for name in dict.fromkeys(names):
        candidate, number = safe_name(name), 1
        while candidate.lower() in taken:
            number += 1
            candidate = f"{safe_name(name)}-{number}"
        taken.add(candidate.lower())
        files[name] = candidate
    return files
