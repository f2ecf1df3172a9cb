"""What a cross-validation found: how good, how sure, and which images to look at."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict

import numpy as np

from camoxpert.config import changed_settings, load_config
from camoxpert.crossval.collect import Collected, compare_methods, compared_images
from camoxpert.crossval.heldout import FoldScores
from camoxpert.evaluation.results import break_down, deciding_key
from camoxpert.metrics import Evaluator
from camoxpert.metrics.presence import presence_scores
from camoxpert.metrics.statistics import Scores, confidence_intervals
from camoxpert.pages.report import quick_sentences
from camoxpert.runs.info import versions
from camoxpert.runs.records import StageRecord, read_info

FOUND = 0.5
"""IoU below which an object counts as not found."""
LISTED = 30
"""Images listed as worth a look."""


class Spread(TypedDict):
    """A score over folds: mean and standard deviation (n - 1); None for a single fold."""

    mean: float
    deviation: float | None


class Pooled(TypedDict):
    """A score over all held-out images with its 95 % interval."""

    value: float
    low: float
    high: float


class FoldEntry(TypedDict):
    """A fold in the summary."""

    fold: int
    name: str
    repeat: int
    images: int
    unreadable: list[str]
    scores: dict[str, float]
    best_epoch: int | None
    best_scores: dict[str, float]
    hours: float
    stages: list[StageRecord]


class Suspect(TypedDict):
    """An image that models that never saw it contradict."""

    name: str
    fold: int  # of the first repeat
    IoU: list[float]  # by repeat
    wFmeasure: float
    sure: float
    suspicion: float  # (1 - IoU) x sure, 0..1
    wrong: int  # repeats with IoU < 0.5


class Difference(TypedDict):
    """This method minus another one on the same folds."""

    other: str
    place: str  # of the other's folder, relative to that of this one
    measures: dict[str, dict[str, float]]  # difference, low, high, p_value
    folds: dict[str, Spread]  # of the differences of folds
    images: int  # scored by both
    left_out: int  # without an object, scored by one of the two alone


class Summary(TypedDict):
    """The content of ``summary.json``."""

    command: list[str]
    versions: dict[str, str]
    settings: dict[str, Any]
    splits: dict[str, Any]
    quick: list[str]  # what makes its runs quick ones; [] for whole ones
    empty_gt: str
    out_of_fold: dict[str, Pooled]
    over_folds: dict[str, Spread]
    best_epoch: dict[str, Spread]
    folds: list[FoldEntry]
    breakdown: dict[str, dict[str, dict[str, float]]]
    presence: dict[str, float]
    suspects: list[Suspect]
    wrong_always: list[str]
    comparisons: list[Difference]


def summarise(
    found: Collected, others: Sequence[Collected] = (), *, command: Sequence[str] = ()
) -> Summary:
    """Return the summary of all folds.

    Args:
        found: the folds.
        others: of other methods on the same folds.
        command: the command line.

    Raises:
        DataError: another method was trained on other folds.
    """
    differences = [_difference(found, other) for other in others]
    folds = [_fold(found, number) for number in range(1, found.splits.total + 1)]
    suspects = _suspects(found)
    repeats = found.splits.repeats
    return {
        "command": list(command),
        "versions": versions(),
        "settings": _settings(found.folds[0].path),
        "splits": {
            "hash": found.splits.digest,
            "folds": found.splits.folds,
            "repeats": repeats,
            "classes": list(found.splits.classes),
            "seed": found.splits.seed,
            "images": len(found.splits.images),
            "groups": len({image.group for image in found.splits.images}),
            "held_out": len(found.scores.names),
        },
        "quick": quick_sentences(read_info(found.folds[0].path)),
        "empty_gt": found.repeats[0].empty_gt,
        "out_of_fold": _pooled(found),
        "over_folds": spread([fold["scores"] for fold in folds]),
        "best_epoch": spread([fold["best_scores"] for fold in folds]),
        "folds": folds,
        "breakdown": _breakdown(found.repeats),
        "presence": _presence(found),
        "suspects": suspects[:LISTED],
        "wrong_always": sorted(s["name"] for s in suspects if s["wrong"] == repeats),
        "comparisons": differences,
    }


def spread(scores: Sequence[Mapping[str, float]]) -> dict[str, Spread]:
    """Return mean and deviation of each measure, over the folds that scored an image.

    A fold of images without an object, or of unreadable ones alone, has no scores and is left out.
    Measures that another fold lacks are left out as well; {} if no fold has scores.
    """
    scores = [own for own in scores if own]
    keys = [key for key in scores[0] if all(key in own for own in scores)] if scores else []
    found: dict[str, Spread] = {}
    for key in keys:
        values = np.array([own[key] for own in scores], np.float64)
        deviation = float(values.std(ddof=1)) if len(values) > 1 else None
        found[key] = {"mean": float(values.mean()), "deviation": deviation}
    return found


def _pooled(found: Collected) -> dict[str, Pooled]:
    number = len(found.scores.names)
    values = found.scores.statistics(np.full((1, number), 1 / number))[0]
    ends = confidence_intervals(found.scores, units_N=found.units_N)
    return {
        key: {"value": float(value), "low": ends[key].low, "high": ends[key].high}
        for key, value in zip(found.scores.keys, values, strict=True)
    }


def _fold(found: Collected, number: int) -> FoldEntry:
    fold = found.folds[number - 1]
    info, best = read_info(fold.path), fold.about.get("best") or {}
    return {
        "fold": number,
        "name": found.splits.name_of(number),
        "repeat": found.splits.repeat_of(number) + 1,
        "images": fold.evaluator.num_images,
        "unreadable": list(fold.about.get("unreadable", [])),
        "scores": _scores_of(fold),
        "best_epoch": best.get("epoch"),
        "best_scores": dict(best.get("scores", {})),
        "hours": sum(info.get("phases", {}).values()) / 3600,
        "stages": list(info.get("stages", [])),
    }


def _scores_of(fold: FoldScores, names: Collection[str] | None = None) -> dict[str, float]:
    """Return the scores of a fold, or those of some images; {} where none of them was scored."""
    if not fold.evaluator.num_images:
        return {}
    return fold.evaluator.results() if names is None else Scores(fold.evaluator).part(names).means()


def _suspects(found: Collected) -> list[Suspect]:
    """Return all images, the most suspicious first: sure and wrong, the mean over repeats."""
    tables = [{row["name"]: row for row in repeat.rows()} for repeat in found.repeats]
    fold_of = {name: fold.fold for fold in reversed(found.folds) for name in fold.sure}
    sure: dict[str, list[float]] = {}
    for fold in found.folds:
        for name, value in fold.sure.items():
            sure.setdefault(name, []).append(value)
    suspects: list[Suspect] = []
    for name in found.scores.names:
        ious = [float(table[name]["IoU"]) for table in tables]
        doubts = [(1 - iou) * own for iou, own in zip(ious, sure[name], strict=True)]
        suspects.append(
            {
                "name": name,
                "fold": fold_of[name],
                "IoU": ious,
                "wFmeasure": float(np.mean([table[name]["wFmeasure"] for table in tables])),
                "sure": float(np.mean(sure[name])),
                "suspicion": float(np.mean(doubts)),
                "wrong": sum(iou < FOUND for iou in ious),
            }
        )
    return sorted(suspects, key=lambda s: (-s["suspicion"], s["name"]))


def _breakdown(repeats: Sequence[Evaluator]) -> dict[str, dict[str, dict[str, float]]]:
    """Return the scores by class and object size, the mean over repeats."""
    tables = [break_down(repeat.rows(), repeat.keys) for repeat in repeats]
    return {
        division: {
            part: {
                key: float(np.mean([table[division][part][key] for table in tables]))
                for key in values
            }
            for part, values in parts.items()
        }
        for division, parts in tables[0].items()
    }


def _presence(found: Collected) -> dict[str, float]:
    """Return how well images with and without an object are told apart, the mean over repeats."""
    tables = []
    for number, repeat in enumerate(found.repeats):
        known: dict[str, float] = {}
        for fold in found.folds:
            if found.splits.repeat_of(fold.fold) == number:
                known |= fold.probabilities
        scored = presence_scores(repeat.claims(), known or None, intervals=False)
        if scored is not None:
            tables.append(scored.scores)
    if not tables:
        return {}
    return {key: float(np.mean([table[key] for table in tables])) for key in tables[0]}


def _difference(found: Collected, other: Collected) -> Difference:
    measures, names = compare_methods(found, other), compared_images(found, other)
    pairs = [
        (_scores_of(one, names), _scores_of(two, names))
        for one, two in zip(found.folds, other.folds, strict=True)
    ]
    gaps = [{k: one[k] - two[k] for k in measures if k in one and k in two} for one, two in pairs]
    return {
        "other": str(other.folder),
        "place": os.path.relpath(other.folder, found.folder),
        "measures": {key: dict(value._asdict()) for key, value in measures.items()},
        "folds": spread(gaps),
        "images": len(names),
        "left_out": len(set(found.scores.names) ^ set(other.scores.names)),
    }


def _settings(run: Path) -> dict[str, Any]:
    config = load_config(file=run / "config.yaml")
    return {
        path: value
        for path, value in changed_settings(config).items()
        if not path.startswith(("run.", "data.splits", "data.fold", "model.init_from"))
    }


def main_measure(summary: Summary) -> str:
    """Return the measure by which the summary is headed."""
    return deciding_key(tuple(summary["out_of_fold"]))
