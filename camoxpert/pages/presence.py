"""Is anything hidden at all: tables and chart of the results in ``scores.json``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from camoxpert.metrics.presence import PresenceEntry
from camoxpert.pages import charts
from camoxpert.pages.render import Chart, draw
from camoxpert.pages.tables import FORMATS, format_value
from camoxpert.runs.scores import ResultEntry, TableEntry, WithPresence

TITLE = "Is anything hidden? images: with an object + without"
HINTS = {
    "AUROC": "probability that an image with an object gets the higher presence",
    "AveragePrecision": "area under precision over recall",
    "FPR95": "share of the images without an object that pass where 95 % of the others do",
    "Brier": "mean squared error of the probability",
    "ECE": "expected calibration error, 15 bins of equal mass",
    "FalseMasks": "share of the images without an object that get a mask at 0.5",
    "FalseArea": "share of their pixels",
    "Missed": "share of the images with an object that get no mask at 0.5",
}


@dataclass(frozen=True)
class PresencePart:
    """The table of a page: (what, (value, hint) of each column), its chart and remarks."""

    columns: list[tuple[str, str]]
    rows: list[tuple[str, list[tuple[str, str]]]]
    chart: Chart | None
    remarks: list[str]


def presence_rows(results: Sequence[ResultEntry]) -> list[TableEntry]:
    """Return the results of data sets with images without an object, as rows of a score table."""
    return [
        {
            "dataset": result["dataset"],
            "method": result["method"],
            "num_images": f"{found['num_present']} + {found['num_empty']}",
            "scores": found["scores"],
            "intervals": found["intervals"],
        }
        for result in results
        if (found := result.get("presence"))
    ]


def presence_table(results: Sequence[ResultEntry], form: str) -> str:
    """Return the table of presence in one of ``tables.FORMATS``; "" if there is nothing to say."""
    rows = presence_rows(results)
    keys = presence_keys(results)
    if not keys:
        return ""
    text = FORMATS[form](rows, keys)
    return f"{TITLE}\n{text}" if form == "text" else text


def presence_keys(results: Sequence[WithPresence]) -> list[str]:
    """Return the measures that any result has, in their order."""
    found = [part["scores"] for result in results if (part := result.get("presence"))]
    return [key for key in HINTS if any(key in scores for scores in found)]


def with_presence(result: ResultEntry) -> ResultEntry:
    """Return a result whose scores and intervals include those of presence and its counts."""
    found = result.get("presence")
    if not found:
        return result
    counts = {"Present": found["num_present"], "Empty": found["num_empty"]}
    scores = {**result["scores"], **counts, **found["scores"]}
    return {**result, "scores": scores, "intervals": {**result["intervals"], **found["intervals"]}}


def presence_part(results: Sequence[WithPresence], names: Sequence[str]) -> PresencePart | None:
    """Return what a page shows; None if every image has an object.

    Args:
        results: entries of ``scores.json``.
        names: what to call each of them.
    """
    found = [
        (name, part)
        for name, result in zip(names, results, strict=True)
        if (part := result.get("presence"))
    ]
    if not found:
        return None
    keys = presence_keys(results)
    rows = []
    for name, part in found:
        cells = [(f"{part['num_present']}", ""), (f"{part['num_empty']}", "")]
        cells += [_cell(part, key) for key in keys]
        rows.append((name, cells))
    curves = {name: part["bins"] for name, part in found if part["bins"]}
    return PresencePart(
        columns=[("with an object", ""), ("without", ""), *((key, HINTS[key]) for key in keys)],
        rows=rows,
        chart=draw(lambda: charts.plot_reliability(curves), "reliability") if curves else None,
        remarks=[
            f"{name}: of so few images a perfectly calibrated presence shows an ECE of about "
            f"{part['calibrated_ece']:.3f}."
            for name, part in found
            if part["calibrated_ece"] is not None
        ]
        + [
            f"{name}: the maps were stretched to their full range before they were saved, so every "
            "image without an object has a mask; that says nothing and is not counted."
            for name, part in found
            if part["stretched"]
        ],
    )


def _cell(part: PresenceEntry, key: str) -> tuple[str, str]:
    ends = part["intervals"].get(key)
    hint = f"95 % interval {ends[0]:.3f} to {ends[1]:.3f}" if ends else ""
    return format_value(key, part["scores"].get(key)), hint
