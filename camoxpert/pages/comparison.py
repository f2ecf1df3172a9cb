"""The page and the tables that compare runs, from the files in their folders and nothing else."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

import numpy as np

from camoxpert import text
from camoxpert.metrics.statistics import compare_seeds
from camoxpert.pages import charts
from camoxpert.pages.compared import (
    ComparedRun,
    Setting,
    datasets_of,
    environment_columns,
    group_runs,
    read_runs,
    setting_columns,
    warnings_of,
)
from camoxpert.pages.render import Chart, draw, write_page
from camoxpert.pages.report import MEASURES
from camoxpert.pages.tables import LOWER_IS_BETTER, best_values, format_value
from camoxpert.runs.scores import DatasetScores

PAIRED = ("wFmeasure", "Smeasure", "IoU", "MAE")
"""Measures that are means over images, so that images and seeds can be resampled."""
TEXT_KEYS = ("Smeasure", "wFmeasure", "meanEm", "IoU", "MAE")
"""Measures of the tables on a terminal."""
VALIDATION = "validation, best epoch"


class Score(NamedTuple):
    """A cell of a score table: the mean over the runs, and their spread where there are several."""

    text: str
    hint: str = ""
    best: bool = False


class Gap(NamedTuple):
    """How much a setting differs from the first one; ``verdict``: better, worse or ""."""

    value: str
    interval: str
    verdict: str

    @property
    def text(self) -> str:
        """The gap on one line; a star where 0 lies outside of the interval."""
        return f"{self.value} ({self.interval}){'*' if self.verdict else ' '}"


@dataclass(frozen=True)
class SetPart:
    """All settings on one data set.

    Attributes:
        name: of the data set.
        images: how many were scored.
        measures: keys of the columns.
        rows: (label, number of runs with scores, cells).
        gaps: (label, gaps by ``gap_measures``) of the settings that can be compared with the first.
        gap_measures: keys of the gaps.
        note: what the intervals are over, or why there are none.
    """

    name: str
    images: str
    measures: list[str]
    rows: list[tuple[str, str, list[Score]]]
    gaps: list[tuple[str, list[Gap]]]
    gap_measures: list[str]
    note: str


class Table(NamedTuple):
    """A heading and its lines; the first cell of each is the label."""

    head: list[str]
    lines: list[list[str]]


@dataclass(frozen=True)
class ComparisonPage:
    """The values of ``comparison.html.j2``."""

    title: str
    lead: Sequence[str]
    warnings: list[str]
    reference: str
    sets: list[SetPart]
    speed: Table
    settings: Table
    environment: Table
    curves: list[Chart]
    labels: Mapping[str, str]
    paths: list[tuple[str, str]]


def compare_runs(
    paths: Sequence[Path], *, title: str = "Runs compared", lead: Sequence[str] = ()
) -> ComparisonPage:
    """Return what a comparison of runs says.

    Runs that differ in their seed alone are one setting. Settings are compared with the first on
    the test images that both were scored on: over images for single runs, over seeds and images
    where there are several (see ``metrics.statistics.compare_seeds``).

    Args:
        paths: run folders.
        title: of the page.
        lead: sentences below it.
    """
    runs = read_runs(paths)
    settings = group_runs(runs)
    parts = [_set_part(dataset, settings) for dataset in datasets_of(runs)]
    if any(run.validation for run in runs):
        parts.append(_validation_part(settings))
    labels = [setting.label for setting in settings]
    return ComparisonPage(
        title=title,
        lead=lead,
        warnings=warnings_of(runs, settings),
        reference=labels[0],
        sets=parts,
        speed=_speed(settings),
        settings=_turned(labels, setting_columns(settings)),
        environment=_turned([run.name for run in runs], environment_columns(runs)),
        curves=_curves(settings),
        labels={key: measure.label for key, measure in MEASURES.items()},
        paths=[(run.name, str(run.path)) for run in runs],
    )


def write_comparison(page: ComparisonPage, file: Path) -> Path:
    """Write the page: one file without scripts or external resources."""
    return write_page(file, "comparison.html.j2", page)


def comparison_text(page: ComparisonPage) -> str:
    """Return the comparison as tables for a terminal."""
    blocks = []
    for part in page.sets:
        keys = [key for key in TEXT_KEYS if key in part.measures]
        places = [part.measures.index(key) for key in keys]
        rows = [[part.name, "runs", *keys]]
        for label, number, cells in part.rows:
            marked = [f"{cells[i].text}{'*' if cells[i].best else ' '}" for i in places]
            rows.append([label, number, *marked])
        blocks.append(text.table(rows))
        if part.gaps:
            gaps = [[f"against {page.reference}", *part.gap_measures]]
            gaps += [[label, *(gap.text for gap in line)] for label, line in part.gaps]
            blocks.append(f"{text.table(gaps)}\n{part.note}")
    for table in (page.speed, page.settings):
        rows = [table.head, *table.lines]
        if len(table.head) > len(rows):
            rows = [list(row) for row in zip(*rows, strict=True)]
        if table.lines:
            blocks.append(text.table(rows))
    return "\n\n".join(blocks)


def _turned(labels: Sequence[str], columns: Sequence[tuple[str, Sequence[str]]]) -> Table:
    """Return a table with a line for each label from its columns."""
    lines = [[label, *(values[i] for _, values in columns)] for i, label in enumerate(labels)]
    return Table(["", *(name for name, _ in columns)], lines if columns else [])


def _set_part(dataset: str, settings: Sequence[Setting]) -> SetPart:
    scores = [
        _scores([run.tests[dataset]["scores"] for run in setting.runs if dataset in run.tests])
        for setting in settings
    ]
    numbers = {
        run.tests[dataset].get("num_images")
        for setting in settings
        for run in setting.runs
        if dataset in run.tests
    }
    gaps, note = _gaps(dataset, settings)
    images = " or ".join(str(number) for number in sorted(numbers, key=str))
    return _part(dataset, images, settings, scores, gaps, note)


def _validation_part(settings: Sequence[Setting]) -> SetPart:
    scores = [_scores([run.validation for run in setting.runs]) for setting in settings]
    numbers = {len(run.validated) for setting in settings for run in setting.runs} - {0}
    images = " or ".join(map(str, sorted(numbers)))
    note = "These images chose the epoch, and settings were perhaps chosen by them: no test."
    return _part(VALIDATION, images, settings, scores, [], note)


def _part(
    name: str,
    images: str,
    settings: Sequence[Setting],
    scores: Sequence[Mapping[str, Sequence[float]]],
    gaps: list[tuple[str, list[Gap]]],
    note: str,
) -> SetPart:
    measures = [key for key in MEASURES if any(key in own for own in scores)]
    rows: list[DatasetScores] = [
        {"dataset": name, "scores": {key: fmean(values) for key, values in own.items()}}
        for own in scores
    ]
    best = best_values(rows, measures)
    lines = []
    for setting, own in zip(settings, scores, strict=True):
        number = max((len(values) for values in own.values()), default=0)
        runs = f"{number} of {len(setting.runs)}" if number < len(setting.runs) else f"{number}"
        cells = []
        for key in measures:
            values = own.get(key, [])
            shown = format_value(key, fmean(values) if values else None)
            hint = f"{min(values):.3f} to {max(values):.3f}" if len(values) > 1 else ""
            cells.append(Score(shown, hint, bool(values) and best.get((name, key)) == shown))
        lines.append((setting.label, runs, cells))
    return SetPart(name, images, measures, lines, gaps, list(PAIRED) if gaps else [], note)


def _scores(scores: Sequence[Mapping[str, float]]) -> dict[str, list[float]]:
    """Return measure -> the scores of those runs that have it."""
    found = {key: [own[key] for own in scores if own.get(key) is not None] for key in MEASURES}
    return {key: values for key, values in found.items() if values}


def _gaps(dataset: str, settings: Sequence[Setting]) -> tuple[list[tuple[str, list[Gap]]], str]:
    """Return the differences of all settings to the first on a data set, and what they hold for."""
    first = settings[0]
    gaps = []
    for setting in settings[1:]:
        if _comparable(dataset, [*first.runs, *setting.runs]):
            line = [
                _gap(key, _table(setting, dataset, key), _table(first, dataset, key))
                for key in PAIRED
            ]
            gaps.append((setting.label, line))
    if not gaps:
        return [], "" if len(settings) < 2 else (
            f"No setting has scores of the same images as {first.label}: no differences."
        )
    shown = {first.label, *(label for label, _ in gaps)}
    several = any(len(setting.runs) > 1 for setting in settings if setting.label in shown)
    over = "seeds and images (hierarchical bootstrap)" if several else "images (paired bootstrap)"
    return gaps, (
        f"Differences with their 95 % intervals over {over}; * where 0 lies outside. Of twenty "
        "such intervals one misses by chance."
    )


def _comparable(dataset: str, runs: Sequence[ComparedRun]) -> bool:
    """Return whether runs have scores of the same images, masks and protocol."""
    if any(dataset not in run.tests for run in runs):
        return False
    first = runs[0]
    same = all(
        run.tests[dataset].get(key) == first.tests[dataset].get(key)
        for run in runs
        for key in ("data_hash", "protocol", "empty_gt")
    )
    images = [run.images.get(dataset, {}) for run in runs]
    complete = all(set(PAIRED) <= scores.keys() for own in images for scores in own.values())
    return (
        same and complete and bool(images[0]) and all(o.keys() == images[0].keys() for o in images)
    )


def _table(setting: Setting, dataset: str, key: str) -> np.ndarray:
    """Return the scores (runs, images) of a setting, the images in the order of their names."""
    names = sorted(setting.runs[0].images[dataset])
    return np.array([[run.images[dataset][name][key] for name in names] for run in setting.runs])


def _gap(key: str, own_SN: np.ndarray, first_SN: np.ndarray) -> Gap:
    low, high = compare_seeds(own_SN, first_SN)
    value = float(own_SN.mean() - first_SN.mean())
    verdict = ""
    if low > 0 or high < 0:
        verdict = "better" if (value > 0) != (key in LOWER_IS_BETTER) else "worse"
    return Gap(f"{value:+.3f}", f"{low:+.3f} to {high:+.3f}", verdict)


def _speed(settings: Sequence[Setting]) -> Table:
    head = [
        "",
        "images/s",
        "training min",
        "validation min",
        "epochs",
        "data wait",
        "M param",
        "GMACs",
    ]
    lines = []
    for setting in settings:
        runs = setting.runs

        def shown(values: Sequence[float | None], form: str, setting: Setting = setting) -> str:
            mean = setting.mean(values)
            return "-" if mean is None else format(mean, form)

        waits = [
            run.records.train[-1].get("data_wait") if run.records.train else None for run in runs
        ]
        epochs = [
            run.records.validation[-1]["epoch"]
            if run.records.validation
            else (run.records.train[-1].get("epoch") if run.records.train else None)
            for run in runs
        ]
        lines.append(
            [
                setting.label,
                shown([run.images_per_second for run in runs], ".1f"),
                *(
                    shown([_minutes(run, phase) for run in runs], ".1f")
                    for phase in ("training", "validation")
                ),
                shown(epochs, "g"),
                shown(waits, ".0%"),
                shown([_scaled(run.info.get("parameters"), 1e6) for run in runs], ".2f"),
                shown([_scaled(run.info.get("gmacs"), 1) for run in runs], ".2f"),
            ]
        )
    return Table(head, lines)


def _minutes(run: ComparedRun, phase: str) -> float | None:
    seconds = (run.info.get("phases") or {}).get(phase)
    return _scaled(seconds, 60)


def _scaled(value: object, unit: float) -> float | None:
    return value / unit if isinstance(value, (int, float)) else None


def _curves(settings: Sequence[Setting]) -> list[Chart]:
    measure = settings[0].runs[0].select
    scores = {setting.label: list(_score_lines(setting, measure)) for setting in settings}
    losses = {setting.label: list(_loss_lines(setting)) for setting in settings}
    found = []
    for title, xlabel, curves, smooth in (
        (f"validation, {measure}", "epoch", scores, False),
        ("training loss, smoothed", "optimizer step", losses, True),
    ):
        if any(curves.values()):
            plot = partial(charts.plot_learning, curves, title, xlabel, smooth=smooth)
            found.append(draw(plot, title))
    return found


def _score_lines(
    setting: Setting, measure: str
) -> Iterator[tuple[Sequence[float], Sequence[float]]]:
    for run in setting.runs:
        points = [(r["epoch"], r["scores"].get(measure)) for r in run.records.validation]
        known = [(epoch, value) for epoch, value in points if value is not None]
        if known:
            yield [epoch for epoch, _ in known], [value for _, value in known]


def _loss_lines(setting: Setting) -> Iterator[tuple[Sequence[float], Sequence[float]]]:
    for run in setting.runs:
        known = [r for r in run.records.train if r.get("loss") is not None]
        if known:
            yield [r["step"] for r in known], [r["loss"] for r in known]
