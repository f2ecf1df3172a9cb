"""What of a score is left under corruptions: retention, the corrupted score over the clean one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from camoxpert.metrics import HIGHER_IS_BETTER, Evaluator
from camoxpert.metrics.statistics import ratio_intervals
from camoxpert.runs.scores import RobustnessEntry

OVERALL = "mean"
"""Key of the mean over all corruptions, beside their names."""


@dataclass(frozen=True)
class CorruptedScore:
    """The scores of one corruption at one severity.

    Attributes:
        corruption, severity: which.
        scores: measure -> value.
        retention: measure -> value over that of the clean images; without measures that are better
            when lower, and without those that are 0 on clean images.
    """

    corruption: str
    severity: int
    scores: dict[str, float]
    retention: dict[str, float]


@dataclass(frozen=True)
class Robustness:
    """The scores of one model on one data set under corruptions.

    Attributes:
        measure: the one whose retention is averaged and shown.
        severities: scored severities, ascending.
        seed: of the corruptions.
        scores: one entry per corruption and severity.
        means: corruption, and OVERALL -> mean retention; empty if the clean score is 0.
        intervals: the same keys -> (low, high), 95 % over images; empty where not asked for.
        picture: file with examples, relative to ``scores.json``; "": none.
    """

    measure: str
    severities: tuple[int, ...]
    seed: int
    scores: tuple[CorruptedScore, ...]
    means: dict[str, float]
    intervals: dict[str, tuple[float, float]]
    picture: str = ""

    def entry(self) -> RobustnessEntry:
        """Return it as ``scores.json`` holds it."""
        return {
            "measure": self.measure,
            "severities": self.severities,
            "seed": self.seed,
            "scores": [
                {
                    "corruption": one.corruption,
                    "severity": one.severity,
                    "scores": one.scores,
                    "retention": one.retention,
                }
                for one in self.scores
            ],
            "means": self.means,
            "intervals": self.intervals,
            "picture": self.picture,
        }


def compare_with_clean(
    clean: Evaluator,
    corrupted: Mapping[tuple[str, int], Evaluator],
    *,
    measure: str,
    seed: int,
    intervals: bool,
) -> Robustness:
    """Return the robustness from the scores of the same images, clean and corrupted.

    Args:
        clean: scores of the clean images.
        corrupted: (corruption, severity) -> scores.
        measure: higher is better, and a mean over images.
        seed: of the corruptions.
        intervals: also bootstrap the mean retentions.
    """
    before = clean.results()
    scores = []
    for (name, severity), evaluator in corrupted.items():
        values = evaluator.results()
        kept = {k: values[k] / before[k] for k in values if HIGHER_IS_BETTER[k] and before[k] > 0}
        scores.append(CorruptedScore(name, severity, values, kept))
    names = list(dict.fromkeys(name for name, _ in corrupted))
    means: dict[str, float] = {}
    ends: dict[str, tuple[float, float]] = {}
    if before[measure] > 0:
        for name in names:
            own = [entry.retention[measure] for entry in scores if entry.corruption == name]
            means[name] = float(np.mean(own))
        means[OVERALL] = float(np.mean(list(means.values())))
        if intervals and clean.num_images > 1:
            ends = _intervals(clean, corrupted, measure)
    severities = tuple(sorted({severity for _, severity in corrupted}))
    return Robustness(measure, severities, seed, tuple(scores), means, ends)


def _intervals(
    clean: Evaluator, corrupted: Mapping[tuple[str, int], Evaluator], measure: str
) -> dict[str, tuple[float, float]]:
    """Return the intervals of the mean retentions; images are drawn with all their versions."""
    order = [row["name"] for row in clean.rows()]

    def values(evaluator: Evaluator) -> np.ndarray:
        table = {row["name"]: float(row[measure]) for row in evaluator.rows()}
        return np.array([table[name] for name in order])

    by_name: dict[str, list[np.ndarray]] = {}
    for (name, _), evaluator in corrupted.items():
        by_name.setdefault(name, []).append(values(evaluator))
    columns = {name: np.mean(several, 0) for name, several in by_name.items()}
    columns[OVERALL] = np.mean(list(columns.values()), 0)
    found = ratio_intervals(np.stack(list(columns.values()), 1), values(clean))
    return {key: (end.low, end.high) for key, end in zip(columns, found, strict=True)}
