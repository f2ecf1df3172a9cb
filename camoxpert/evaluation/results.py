"""Results of scored images, one for each method and data set, and comparisons between methods."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations

import numpy as np

from camoxpert import console
from camoxpert.errors import DataError
from camoxpert.evaluation.experts import ExpertTable
from camoxpert.evaluation.options import ScoringOptions
from camoxpert.evaluation.robustness import Robustness
from camoxpert.evaluation.shots import ShotTable, SubsetTable
from camoxpert.metrics import HIGHER_IS_BETTER, Evaluator
from camoxpert.metrics.groups import count_label, size_label
from camoxpert.metrics.presence import PresenceScores, presence_scores
from camoxpert.metrics.scoring import Row
from camoxpert.metrics.statistics import Scores, breakdown, compare, confidence_intervals
from camoxpert.runs.scores import (
    AskedTables,
    Breakdown,
    ComparisonEntry,
    ResultEntry,
    SourceEntry,
)
from camoxpert.text import count

DECIDING = ("wFmeasure", "Smeasure", "IoU", "MAE")
"""The first of these that was computed ranks images and methods."""
FEW_METHODS = 4
"""Up to this many methods, every pair is compared; of more, each method with the best."""


@dataclass(frozen=True)
class ModelSource:
    """What was scored: a checkpoint.

    Attributes:
        checkpoint: name of its file.
        weights: sha256 of that file.
        img_size: side of its input, pixels.
        precision: fp32, bf16 or fp16.
        baseline: ``all_foreground``: the scores of marking every pixel as object, which a model
            has to beat.
        zoom: images were looked at in two sizes.
    """

    checkpoint: str
    weights: str
    img_size: int
    precision: str
    baseline: dict[str, dict[str, float]]
    zoom: bool = False

    def entry(self) -> SourceEntry:
        """Return it as ``scores.json`` holds it."""
        return {
            "checkpoint": self.checkpoint,
            "weights": self.weights,
            "img_size": self.img_size,
            "precision": self.precision,
            "baseline": self.baseline,
            "zoom": self.zoom,
        }


@dataclass(frozen=True)
class MapSource:
    """What was scored: prediction maps.

    Attributes:
        num_missing: masks without a map that were left out.
        num_extra: maps without a mask that were left out.
        resize: error, or bilinear: maps were resized to their masks.
        gt_threshold: levels of grey masks above it count as object; None: no grey masks.
    """

    num_missing: int
    num_extra: int
    resize: str
    gt_threshold: int | None

    def entry(self) -> SourceEntry:
        """Return it as ``scores.json`` holds it."""
        return {
            "num_missing": self.num_missing,
            "num_extra": self.num_extra,
            "resize": self.resize,
            "gt_threshold": self.gt_threshold,
        }


@dataclass(frozen=True)
class EvaluationResult:
    """The result of one method on one data set.

    Attributes:
        dataset, method: names.
        num_images: images in the scores.
        num_skipped: images without an object that were left out.
        unreadable: images that could not be read and are missing from the scores, with the reason.
        scores: measure -> value, a fraction (HCE: a count).
        intervals: measure -> (low, high), 95 %; empty where they were not asked for.
        protocol, empty_gt: how the images were scored.
        data_hash: of the images' names and masks.
        breakdown: division (class, object size, ...) -> part -> measure -> value.
        curves: E, F, precision and recall over the thresholds 255 ... 0.
        seconds: time that scoring took.
        source: what was scored.
        robustness: scores under corruptions; None: not asked for.
        experts: what each expert was chosen for; None: the model has no choice of experts.
        presence: how well images with an object are told from those without; None: all have one.
        shots: scores by the number of references; None: not asked for.
        modalities: scores by what the model is shown of each image; None: it takes photographs
            alone, or the images have nothing else.
        split: of the images: test, val or train; all: the data set has none. "": maps.
    """

    dataset: str
    method: str
    num_images: int
    num_skipped: int
    scores: dict[str, float]
    intervals: dict[str, tuple[float, float]]
    protocol: str
    empty_gt: str
    data_hash: str
    breakdown: Breakdown
    curves: dict[str, list[float]]
    seconds: float
    source: ModelSource | MapSource
    unreadable: tuple[str, ...] = ()
    robustness: Robustness | None = None
    experts: ExpertTable | None = None
    presence: PresenceScores | None = None
    shots: ShotTable | None = None
    modalities: SubsetTable | None = None
    split: str = ""

    def to_dict(self) -> ResultEntry:
        """Return the entry of ``scores.json``: all values, with those of ``source`` beside them."""
        asked: AskedTables = {}
        if self.robustness is not None:
            asked["robustness"] = self.robustness.entry()
        if self.experts is not None:
            asked["experts"] = self.experts.entry()
        if self.presence is not None:
            asked["presence"] = self.presence.entry()
        if self.shots is not None:
            asked["shots"] = self.shots.entry()
        if self.modalities is not None:
            asked["modalities"] = self.modalities.entry()
        return {
            "dataset": self.dataset,
            "method": self.method,
            "num_images": self.num_images,
            "num_skipped": self.num_skipped,
            "scores": self.scores,
            "intervals": self.intervals,
            "protocol": self.protocol,
            "empty_gt": self.empty_gt,
            "data_hash": self.data_hash,
            "breakdown": self.breakdown,
            "curves": self.curves,
            "seconds": self.seconds,
            "unreadable": self.unreadable,
            "split": self.split,
            **asked,
            "num_unreadable": len(self.unreadable),
            **self.source.entry(),
        }


@dataclass(frozen=True)
class Scored:
    """A result and the scores of its images; ``columns``: more of the per-image table, by name."""

    result: EvaluationResult
    evaluator: Evaluator
    columns: Mapping[str, Row] = field(default_factory=dict)

    def rows(self) -> list[Row]:
        """Return the scored images with their columns, sorted by name."""
        return [{**row, **self.columns.get(row["name"], {})} for row in self.evaluator.rows()]

    def table(self) -> list[Row]:
        """Return the per-image table: ``rows``, and images without an object that were left out of
        the scores, for what is known of them."""
        rows = {row["name"]: row for row in self.rows()}
        for name, own in self.columns.items() if rows else ():
            if name not in rows:
                nothing = dict.fromkeys(next(iter(rows.values())), "")
                rows[name] = {**nothing, "name": name, "object_fraction": 0.0, "num_objects": 0}
                rows[name] |= own
        return [rows[name] for name in sorted(rows)]


def summarise(
    evaluator: Evaluator,
    options: ScoringOptions,
    *,
    method: str,
    dataset: str,
    seconds: float,
    source: ModelSource | MapSource,
    unreadable: Sequence[str] = (),
    probabilities: Mapping[str, float] | None = None,
) -> Scored:
    """Return the result of one method on one data set from the scores of its images.

    Args:
        evaluator: with the scores.
        options: how they were made.
        method, dataset: names.
        seconds: time that scoring took.
        source: what was scored.
        unreadable: see ``EvaluationResult``.
        probabilities: image -> probability that it holds any object; None: the method gives none.

    Raises:
        DataError: every image was left out, because none has an object.
    """
    if not evaluator.num_images and evaluator.num_skipped:
        raise DataError(
            f"{method} on {dataset}: none of the {evaluator.num_skipped} images has "
            f"an object, and --empty-gt skip leaves them all out. Score this data set with "
            f"another --empty-gt, or leave it out."
        )
    rows = evaluator.rows()
    enough = options.intervals and len(rows) > 1
    ends = confidence_intervals(Scores(evaluator)) if enough else {}
    claims = evaluator.claims()
    presence = presence_scores(
        claims,
        probabilities,
        from_files=isinstance(source, MapSource),
        intervals=options.intervals,
    )
    columns: dict[str, Row] = {name: {} for name in claims}
    for name, probability in (probabilities or {}).items():
        columns[name]["presence"] = probability
    if presence is not None:
        for name, claim in claims.items():
            columns[name]["mask_fraction"] = claim.share
    result = EvaluationResult(
        dataset=dataset,
        method=method,
        num_images=evaluator.num_images,
        num_skipped=evaluator.num_skipped,
        scores=evaluator.results(),
        intervals={key: (end.low, end.high) for key, end in ends.items()},
        protocol=evaluator.protocol,
        empty_gt=evaluator.empty_gt,
        data_hash=evaluator.data_hash(),
        breakdown=break_down(rows, evaluator.keys),
        curves={key: np.asarray(curve).tolist() for key, curve in evaluator.curves().items()},
        seconds=seconds,
        source=source,
        unreadable=tuple(unreadable),
        presence=presence,
    )
    return Scored(result, evaluator, columns)


def break_down(rows: Sequence[Row], keys: Sequence[str]) -> Breakdown:
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


def compare_all(scored: Sequence[Scored]) -> list[ComparisonEntry]:
    """Compare methods in pairs on each data set where they have scores of the same images.

    Returns:
        One entry per data set and pair, the better one (by ``DECIDING``) first.
    """
    entries: list[ComparisonEntry] = []
    for dataset, methods in by_dataset(scored).items():
        if len(methods) < 2:
            continue
        scores = {name: Scores(evaluator) for name, evaluator in methods.items()}
        order = ranked(methods)
        pairs = list(combinations(order, 2))
        if len(order) > FEW_METHODS:
            pairs = [(a, b) for a, b in pairs if a == order[0]]
        for a, b in console.track(pairs, f"compare on {dataset}"):
            if scores[a].names != scores[b].names:
                continue
            found = compare(scores[a], scores[b])
            measures = {key: value._asdict() for key, value in found.items()}
            entries.append({"dataset": dataset, "a": a, "b": b, "measures": measures})
    return entries


def note_void(dataset: str, evaluator: Evaluator) -> None:
    """Say how many images have void pixels, if any has; on stderr, for stdout may hold JSON."""
    if evaluator.num_with_void:
        console.note(
            f"void        {dataset}: {evaluator.num_with_void} of {evaluator.num_images} masks "
            "have unlabelled pixels (void); no measure counts them"
        )


def note_presence(scored: Sequence[Scored]) -> None:
    """Warn of maps whose false masks say nothing."""
    for item in scored:
        found = item.result.presence
        if found is not None and found.stretched:
            console.warn(
                f"{item.result.dataset}: the maps of {item.result.method} were stretched to their "
                "full range one by one before they were saved, so each of the "
                f"{count(found.num_empty, 'image')} without an object has a mask. That says "
                "nothing of the model and is not counted; save the maps as the model gave them."
            )


def by_dataset(scored: Sequence[Scored]) -> dict[str, dict[str, Evaluator]]:
    """Return data set -> method -> evaluator."""
    table: dict[str, dict[str, Evaluator]] = {}
    for item in scored:
        table.setdefault(item.result.dataset, {})[item.result.method] = item.evaluator
    return table


def by_method(
    results: Sequence[EvaluationResult],
) -> dict[str, dict[str, float]] | dict[str, dict[str, dict[str, float]]]:
    """Return method -> data set -> scores; of a single method, data set -> scores."""
    table: dict[str, dict[str, dict[str, float]]] = {}
    for result in results:
        more = {} if result.presence is None else result.presence.scores
        table.setdefault(result.method, {})[result.dataset] = {**result.scores, **more}
    return table if len(table) > 1 else next(iter(table.values()))


def ranked(methods: Mapping[str, Evaluator]) -> list[str]:
    """Return the methods' names, the best first."""
    evaluators = list(methods.values())
    key = deciding_key(evaluators[0].keys)
    sign = -1 if HIGHER_IS_BETTER[key] else 1
    return sorted(methods, key=lambda name: sign * methods[name].results()[key])


def deciding_key(keys: Sequence[str]) -> str:
    """Return the measure by which images and methods are ranked."""
    return next((key for key in DECIDING if key in keys), keys[0])
