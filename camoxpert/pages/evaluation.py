"""The page about an evaluation, from the content of ``scores.json``."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from camoxpert.pages import charts
from camoxpert.pages.experts import expert_cells
from camoxpert.pages.presence import PresencePart, presence_part
from camoxpert.pages.render import Chart, Picture, draw, inline_jpeg, p_value, write_page
from camoxpert.pages.retention import retention_cells, retention_curves
from camoxpert.pages.shots import shot_cells, shot_title
from camoxpert.pages.subsets import subset_cells, subset_title
from camoxpert.pages.tables import best_values, format_value
from camoxpert.runs.scores import ComparisonEntry, GalleryEntry, ResultEntry, ScoresFile
from camoxpert.text import count

KINDS = {
    "best": "Best images, by the mean over the methods",
    "worst": "Worst images, by the mean over the methods",
    "disputed": "Disputed images: the methods differ most",
    "false_alarm": "Images without an object that look most as if they had one",
    "missed": "Images with an object that look least as if they had one",
}
LEFT_OUT: dict[
    Literal["num_skipped", "num_missing", "num_extra", "num_unreadable"],
    str,
] = {
    "num_skipped": "without an object skipped",
    "num_missing": "masks without a map left out",
    "num_extra": "maps without a mask left out",
    "num_unreadable": "unreadable left out",
}
PAIRS_SHOWN = 12
SHORT = ("Smeasure", "wFmeasure", "meanEm", "IoU", "MAE")
"""Measures of the smaller tables, where they were computed."""


class Cell(NamedTuple):
    """A number of the score table."""

    text: str
    hint: str = ""
    best: bool = False


class Difference(NamedTuple):
    """How much two methods differ in one measure."""

    text: str
    hint: str
    p_value: str


@dataclass(frozen=True)
class Comparisons:
    """Paired differences: (pair of methods, its differences by measure); rest: pairs not shown."""

    measures: list[str]
    pairs: list[tuple[str, list[Difference]]]
    rest: int


class Part(NamedTuple):
    """A line of a breakdown; the label is empty where it is that of the line above."""

    label: str
    method: str
    values: list[str]


@dataclass(frozen=True)
class Breakdown:
    """Scores by part of the images, such as the size of the object."""

    division: str
    measures: list[str]
    parts: list[Part]


@dataclass(frozen=True)
class RetentionPart:
    """Retention under corruptions: a table, its chart and examples of the corruptions."""

    measure: str
    head: list[str]
    lines: list[list[str]]
    chart: Chart
    examples: str


class ShotPart(NamedTuple):
    """Scores by the number of references, or by the modalities that are shown."""

    title: str
    head: list[str]
    lines: list[list[str]]


class ExpertPart(NamedTuple):
    """What each expert was chosen for."""

    head: list[str]
    lines: list[list[str]]


@dataclass(frozen=True)
class DatasetPart:
    """What the page shows of one data set."""

    name: str
    facts: str
    data_hash: str
    with_intervals: bool
    rows: list[tuple[str, list[Cell]]]
    comparisons: Comparisons | None
    curves: Chart
    breakdowns: list[Breakdown]
    galleries: list[tuple[str, list[Picture]]]
    presence: PresencePart | None
    experts: list[tuple[str, ExpertPart]]
    retention: list[tuple[str, RetentionPart]]
    shots: list[ShotPart]
    subsets: list[ShotPart]


@dataclass(frozen=True)
class EvaluationPage:
    """The values of ``evaluation.html.j2``."""

    facts: list[str]
    measures: Sequence[str]
    several_methods: bool
    datasets: list[DatasetPart]
    command: str
    versions: list[tuple[str, str]]


def write_evaluation_page(
    path: Path, summary: ScoresFile, measures: Sequence[str], curves: Mapping[str, Chart]
) -> Path:
    """Write the page.

    Args:
        path: file; pictures named in the summary are relative to its folder.
        summary: content of scores.json.
        measures: their keys, in the order of the columns.
        curves: data set -> its chart of curves.
    """
    results = summary["results"]
    names = list(dict.fromkeys(result["dataset"] for result in results))
    methods = {result["method"] for result in results}
    page = EvaluationPage(
        facts=_facts(results[0], len(methods), len(names)),
        measures=measures,
        several_methods=len(methods) > 1,
        datasets=[_dataset(path.parent, name, summary, measures, curves[name]) for name in names],
        command=shlex.join(["camoxpert", *map(str, summary["command"])]),
        versions=list(summary["versions"].items()),
    )
    return write_page(path, "evaluation.html.j2", page)


def _facts(first: ResultEntry, num_methods: int, num_datasets: int) -> list[str]:
    facts = [
        f"{count(num_methods, 'method')} on {count(num_datasets, 'data set')}",
        f"protocol {first['protocol']}",
        f"images without an object: {first['empty_gt']}",
    ]
    if first.get("resize") == "bilinear":
        facts.append("maps resized to their masks (bilinear)")
    return facts


def _dataset(
    folder: Path, name: str, summary: ScoresFile, measures: Sequence[str], curves: Chart
) -> DatasetPart:
    results = [result for result in summary["results"] if result["dataset"] == name]
    pairs = [entry for entry in summary["comparisons"] if entry["dataset"] == name]
    pictures = [entry for entry in summary["gallery"] if entry["dataset"] == name]
    best = best_values(results, measures)
    return DatasetPart(
        name=name,
        facts=", ".join(_counts(results)),
        data_hash=results[0]["data_hash"][:12],
        with_intervals=bool(results[0]["intervals"]),
        rows=[
            (result["method"], [_cell(result, key, best.get((name, key))) for key in measures])
            for result in results
        ],
        comparisons=_comparisons(pairs) if pairs else None,
        curves=curves,
        breakdowns=[
            _breakdown(results, division, measures) for division in results[0]["breakdown"]
        ],
        galleries=list(_galleries(folder, pictures)),
        presence=presence_part(results, [result["method"] for result in results]),
        experts=[
            (result["method"], ExpertPart(*expert_cells(result)))
            for result in results
            if result.get("experts")
        ],
        retention=[
            (result["method"], _retention(folder, result))
            for result in results
            if result.get("robustness")
        ],
        shots=[
            ShotPart(shot_title(result), *shot_cells(result))
            for result in results
            if result.get("shots")
        ],
        subsets=[
            ShotPart(subset_title(result), *subset_cells(result))
            for result in results
            if result.get("modalities")
        ],
    )


def _retention(folder: Path, result: ResultEntry) -> RetentionPart:
    head, lines = retention_cells(result)
    measure = result["robustness"]["measure"]
    curves = retention_curves(result)
    picture = result["robustness"]["picture"]
    return RetentionPart(
        measure=measure,
        head=head,
        lines=lines,
        chart=draw(lambda: charts.plot_retention(curves, measure), "retention over severity"),
        examples=inline_jpeg((folder / picture).read_bytes()) if picture else "",
    )


def _counts(results: Sequence[ResultEntry]) -> Iterator[str]:
    yield count(results[0]["num_images"], "image")
    for field, text in LEFT_OUT.items():
        numbers = {result["method"]: result.get(field) or 0 for result in results}
        if len(set(numbers.values())) > 1:
            each = ", ".join(f"{method} {number}" for method, number in numbers.items())
            yield f"{text}: {each}"
        elif results[0].get(field):
            yield f"{results[0][field]} {text}"


def _cell(result: ResultEntry, key: str, best: str | None) -> Cell:
    shown = format_value(key, result["scores"].get(key))
    ends = result["intervals"].get(key)
    hint = f"95 % interval {ends[0]:.3f} to {ends[1]:.3f}" if ends else ""
    return Cell(shown, hint, shown == best)


def _comparisons(pairs: Sequence[ComparisonEntry]) -> Comparisons:
    # Pairs of an earlier evaluation may have other measures.
    measures = _short(list(dict.fromkeys(key for pair in pairs for key in pair["measures"])))
    shown = [
        (
            f"{pair['a']} − {pair['b']}",
            [_difference(pair["measures"].get(key)) for key in measures],
        )
        for pair in pairs[:PAIRS_SHOWN]
    ]
    return Comparisons(measures, shown, max(0, len(pairs) - PAIRS_SHOWN))


def _difference(value: Mapping[str, float] | None) -> Difference:
    if value is None:
        return Difference(text="-", hint="", p_value="")
    return Difference(
        text=f"{value['difference']:+.3f}",
        hint=f"95 % interval {value['low']:+.3f} to {value['high']:+.3f}",
        p_value=p_value(value["p_value"]),
    )


def _breakdown(results: Sequence[ResultEntry], division: str, measures: Sequence[str]) -> Breakdown:
    shown = _short(measures)
    parts = []
    for label, first in results[0]["breakdown"][division].items():
        # Size classes start with the digit that sorts them.
        text = label[2:] if division == "object size" else label
        lead = f"{text} ({count(int(first['images']), 'image')})"
        for number, result in enumerate(results):
            scores = result["breakdown"].get(division, {}).get(label, {})
            values = [format_value(key, scores.get(key)) for key in shown]
            parts.append(Part("" if number else lead, result["method"], values))
    return Breakdown(division, shown, parts)


def _galleries(
    folder: Path, entries: Sequence[GalleryEntry]
) -> Iterator[tuple[str, list[Picture]]]:
    for kind, title in KINDS.items():
        pictures = []
        for entry in entries:
            if entry["kind"] == kind:
                values = ", ".join(f"{m} {v:.3f}" for m, v in entry["values"].items())
                source = inline_jpeg((folder / entry["panel"]).read_bytes())
                pictures.append(Picture(source, f"{entry['name']}: {entry['measure']} {values}"))
        if pictures:
            yield title, pictures


def _short(measures: Sequence[str] | Mapping[str, object]) -> list[str]:
    return [key for key in SHORT if key in measures] or list(measures)[:5]
