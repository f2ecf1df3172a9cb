"""Tables of retention under corruptions, from the results in ``scores.json``."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterator, Mapping, Sequence

from camoxpert.pages.tables import escape_latex
from camoxpert.runs.scores import ResultEntry, RobustnessEntry
from camoxpert.text import table

OVERALL = "mean"


def retention_cells(result: ResultEntry) -> tuple[list[str], list[list[str]]]:
    """Return head and lines of one data set: corruption, a cell per severity, mean, interval.

    The last line is the mean over the corruptions.
    """
    found = result["robustness"]
    measure, severities = found["measure"], found["severities"]
    values = retention_curves(result)
    lines = []
    for name, by_severity in values.items():
        cells = [_cell(by_severity.get(severity)) for severity in severities]
        lines.append([name, *cells, *_mean(found, name)])
    columns = [
        [curve[severity] for curve in values.values() if severity in curve]
        for severity in severities
    ]
    means = [_cell(sum(column) / len(column) if column else None) for column in columns]
    lines.append([OVERALL, *means, *_mean(found, OVERALL)])
    head = [f"{measure} kept", *(f"severity {s}" for s in severities), "mean"]
    if found["intervals"]:
        head.append("95 % interval")
    return head, lines


def retention_curves(result: ResultEntry) -> dict[str, dict[int, float]]:
    """Return corruption -> severity -> retention in the measure of the table."""
    found = result["robustness"]
    curves: dict[str, dict[int, float]] = {}
    for entry in found["scores"]:
        curve = curves.setdefault(entry["corruption"], {})
        value = entry["retention"].get(found["measure"])
        if value is not None:
            curve[entry["severity"]] = value
    return curves


def retention_text(results: Sequence[ResultEntry], keys: Sequence[str] = ()) -> str:
    """Lay the retention of every data set out in aligned columns."""
    parts = []
    for result in results:
        head, lines = retention_cells(result)
        first, *rest = table([head, *lines]).splitlines()
        parts.append("\n".join([_title(result), first, "-" * len(first), *rest]))
    return "\n\n".join(parts)


def retention_markdown(results: Sequence[ResultEntry], keys: Sequence[str] = ()) -> str:
    """Lay the retention of every data set out as Markdown tables."""
    parts = []
    for result in results:
        head, lines = retention_cells(result)
        rule = ["---", *["---:"] * (len(head) - 1)]
        rows = "\n".join(f"| {' | '.join(line)} |" for line in [head, rule, *lines])
        parts.append(f"{_title(result)}\n\n{rows}\n")
    return "\n".join(parts)


def retention_latex(results: Sequence[ResultEntry], keys: Sequence[str] = ()) -> str:
    """Lay the retention of every data set out as LaTeX tabulars (need booktabs)."""
    parts = []
    for result in results:
        head, lines = ([[escape_latex(c) for c in line] for line in part] for part in _both(result))
        rows = [" & ".join(line) + r" \\" for line in [*head, *lines]]
        parts.append(
            "\n".join(
                [
                    f"% {_title(result)}",
                    rf"\begin{{tabular}}{{l{'c' * (len(head[0]) - 1)}}}",
                    r"\toprule",
                    rows[0],
                    r"\midrule",
                    *rows[1:],
                    r"\bottomrule",
                    r"\end{tabular}",
                    "",
                ]
            )
        )
    return "\n".join(parts)


def retention_csv(results: Sequence[ResultEntry], keys: Sequence[str]) -> str:
    """Return a line per data set, corruption and severity, with full precision.

    The first lines of a data set are its clean scores, as severity 0 of ``clean``.
    """
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    kept = [key for key in keys if any(key in row for result in results for row in _kept(result))]
    writer.writerow(
        ["dataset", "method", "corruption", "severity", *keys, *(f"{key}_kept" for key in kept)]
    )
    for result in results:
        start = [result["dataset"], result["method"]]
        clean = [result["scores"].get(key) for key in keys]
        writer.writerow([*start, "clean", 0, *clean, *[1.0] * len(kept)])
        for entry in result["robustness"]["scores"]:
            values = [entry["scores"].get(key) for key in keys]
            ratios = [entry["retention"].get(key) for key in kept]
            writer.writerow([*start, entry["corruption"], entry["severity"], *values, *ratios])
    return out.getvalue()


def _kept(result: ResultEntry) -> Iterator[Mapping[str, float]]:
    return (entry["retention"] for entry in result["robustness"]["scores"])


def _both(result: ResultEntry) -> tuple[list[list[str]], list[list[str]]]:
    head, lines = retention_cells(result)
    return [head], lines


def _title(result: ResultEntry) -> str:
    measure = result["robustness"]["measure"]
    clean = result["scores"][measure]
    return f"{result['method']} on {result['dataset']}, {measure} {clean:.3f} on clean images"


def _cell(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _mean(found: RobustnessEntry, name: str) -> list[str]:
    cells = [_cell(found["means"].get(name))]
    if found["intervals"]:
        low, high = found["intervals"][name]
        cells.append(f"{low:.3f} to {high:.3f}")
    return cells


RETENTION_FORMATS: Mapping[str, Callable[[Sequence[ResultEntry], Sequence[str]], str]] = {
    "text": retention_text,
    "markdown": retention_markdown,
    "latex": retention_latex,
    "csv": retention_csv,
}
