"""The tables and charts of an evaluation, as files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from camoxpert import console
from camoxpert.files import write_bytes
from camoxpert.pages import charts, retention, tables
from camoxpert.pages.presence import presence_table
from camoxpert.pages.render import Chart, inline_png
from camoxpert.runs.scores import ResultEntry
from camoxpert.text import safe_name

SUFFIXES = (("csv", "csv"), ("md", "markdown"), ("tex", "latex"))
"""Endings of table files, and the formats in them."""
CURVES = "PR, F and E curves"


def write_tables(folder: Path, rows: Sequence[tables.Row], keys: Sequence[str]) -> None:
    """Write the score table as CSV, Markdown and LaTeX."""
    for suffix, form in SUFFIXES:
        text = tables.FORMATS[form](rows, keys)
        write_bytes(folder / f"scores.{suffix}", text.encode("utf-8", "surrogateescape"))


def write_robustness(
    folder: Path, entries: Sequence[ResultEntry], keys: Sequence[str], files: Mapping[str, str]
) -> None:
    """Write retention under corruptions as tables and a picture for each data set, if any has it.

    Args:
        folder: receives the files.
        entries: results as in ``scores.json``.
        keys: measures, in the order of the columns.
        files: data set -> file name without ending.
    """
    found = [entry for entry in entries if entry.get("robustness")]
    if not found:
        return
    for suffix, form in SUFFIXES:
        text = retention.RETENTION_FORMATS[form](found, keys)
        write_bytes(folder / f"robustness.{suffix}", text.encode("utf-8", "surrogateescape"))
    for entry in found:
        curves = retention.retention_curves(entry)
        try:
            picture = charts.plot_retention(curves, entry["robustness"]["measure"])
        except Exception as error:
            console.warn(f"no retention is drawn: {error}")
            return
        name = files[entry["dataset"]]
        if sum(other["dataset"] == entry["dataset"] for other in found) > 1:
            name += f"_{safe_name(entry['method'])}"
        write_bytes(folder / "robustness" / f"{name}.png", picture)


def write_presence(folder: Path, entries: Sequence[ResultEntry], files: Mapping[str, str]) -> None:
    """Write how images with and without an object are told apart, if there are any without: tables,
    and a reliability curve for each data set where a method gives probabilities."""
    for suffix, form in SUFFIXES:
        text = presence_table(entries, form)
        if text:
            write_bytes(folder / f"presence.{suffix}", text.encode("utf-8", "surrogateescape"))
    found = [e for e in entries if (part := e.get("presence")) and part.get("bins")]
    for dataset in dict.fromkeys(entry["dataset"] for entry in found):
        own = [entry for entry in found if entry["dataset"] == dataset]
        curves = {entry["method"]: entry["presence"]["bins"] for entry in own}
        try:
            picture = charts.plot_reliability(curves)
        except Exception as error:
            console.warn(f"no reliability curve is drawn: {error}")
            return
        write_bytes(folder / "presence" / f"{files[dataset]}.png", picture)


def write_curves(
    folder: Path, results: Sequence[ResultEntry], files: Mapping[str, str]
) -> dict[str, Chart]:
    """Write the precision-recall, F and E curves of each data set as PNG, a line per method.

    Args:
        folder: receives the files.
        results: entries of ``scores.json``, of any methods and data sets.
        files: data set -> file name without ending.

    Returns:
        data set -> the same chart for a page.
    """
    drawn: dict[str, Chart] = {}
    for dataset in dict.fromkeys(result["dataset"] for result in results):
        curves = {r["method"]: r["curves"] for r in results if r["dataset"] == dataset}
        try:
            picture = charts.plot_curves(curves)
        except Exception as error:
            # Matplotlib is missing, or cannot draw a name: the scores must not be lost.
            drawn[dataset] = Chart(CURVES, fault=str(error))
            continue
        drawn[dataset] = inline_png(CURVES, picture)
        write_bytes(folder / f"{files[dataset]}.png", picture)
    faults = [chart.fault for chart in drawn.values() if chart.fault]
    if faults:
        console.warn(f"no curves are drawn: {faults[0]}")
    return drawn
