"""Score tables as text, Markdown, LaTeX and CSV, from plain values.

The best value of each data set and measure is marked where the format can.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable, Mapping, Sequence

from camoxpert.runs.scores import DatasetScores, TableEntry
from camoxpert.text import table

LOWER_IS_BETTER = (
    *("MAE", "BER", "HCE"),
    *("FPR95", "Brier", "ECE", "FalseMasks", "FalseArea", "Missed"),
)
LATEX_NAMES = {
    "Smeasure": r"$S_\alpha$",
    "MAE": r"$\mathcal{M}$",
    "wFmeasure": r"$F_\beta^w$",
    "meanEm": r"$E_\phi^{mn}$",
    "maxEm": r"$E_\phi^{mx}$",
    "adpEm": r"$E_\phi^{ad}$",
    "meanFm": r"$F_\beta^{mn}$",
    "maxFm": r"$F_\beta^{mx}$",
    "adpFm": r"$F_\beta^{ad}$",
    "BoundaryIoU": "B-IoU",
}
SPECIAL = {c: f"\\{c}" for c in "&%$#_{}"} | {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
}

Row = TableEntry


def format_value(key: str, value: float | None) -> str:
    """Return three decimals, or one for a count of clicks; a dash for nothing."""
    if value is None or math.isnan(value):
        return "-"
    return f"{value:.1f}" if key == "HCE" else f"{value:.3f}"


def best_values(rows: Sequence[DatasetScores], keys: Sequence[str]) -> dict[tuple[str, str], str]:
    """Return (data set, measure) -> the best value as it is shown; ties at that precision share it.

    Data sets with a single method have no best.
    """
    best = {}
    for dataset in {row["dataset"] for row in rows}:
        group = [row for row in rows if row["dataset"] == dataset]
        for key in keys:
            values = [row["scores"].get(key) for row in group]
            known = [v for v in values if v is not None and not math.isnan(v)]
            if len(group) > 1 and known:
                value = min(known) if key in LOWER_IS_BETTER else max(known)
                best[dataset, key] = format_value(key, value)
    return best


def text_table(rows: Sequence[Row], keys: Sequence[str]) -> str:
    """Lay rows out in aligned columns; * marks the best."""
    cells = _cells(rows, keys, lambda text: f"{text}*")
    # One character for the star everywhere, so that the digits stay in line.
    starred = any(cell.endswith("*") for line in cells for cell in line)
    if starred:
        cells = [
            [*line[:3], *(cell if cell.endswith("*") else f"{cell} " for cell in line[3:])]
            for line in cells
        ]
    head = ["data set", "method", "images", *(f"{key} " if starred else key for key in keys)]
    first, *rest = table([head, *cells], left=2).splitlines()
    return "\n".join([first, "-" * len(first), *rest])


def markdown_table(rows: Sequence[Row], keys: Sequence[str]) -> str:
    """Lay rows out as a Markdown table; the best is bold."""
    lines = _cells(rows, keys, lambda text: f"**{text}**", escape=_escape_markdown)
    arrows = [f"{key} {'↓' if key in LOWER_IS_BETTER else '↑'}" for key in keys]
    head = ["data set", "method", "images", *arrows]
    rule = ["---", "---", *["---:"] * (len(head) - 2)]
    return "\n".join(f"| {' | '.join(line)} |" for line in [head, rule, *lines]) + "\n"


def latex_table(rows: Sequence[Row], keys: Sequence[str]) -> str:
    """Lay rows out as a LaTeX tabular (needs booktabs); the best is bold."""
    names = [
        LATEX_NAMES.get(key, escape_latex(key))
        + (r"$\downarrow$" if key in LOWER_IS_BETTER else r"$\uparrow$")
        for key in keys
    ]
    lines = [
        r"% \usepackage{booktabs}",
        rf"\begin{{tabular}}{{ll{'c' * len(keys)}}}",
        r"\toprule",
        " & ".join(["Data set", "Method", *names]) + r" \\",
    ]
    previous = None
    cells = _cells(rows, keys, lambda text: rf"\textbf{{{text}}}", escape=escape_latex)
    for row, (dataset, method, _, *values) in zip(rows, cells, strict=True):
        if row["dataset"] != previous:
            lines.append(r"\midrule")
        shown = dataset if row["dataset"] != previous else ""
        lines.append(" & ".join([shown, method, *values]) + r" \\")
        previous = row["dataset"]
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", ""])


def csv_table(rows: Sequence[Row], keys: Sequence[str]) -> str:
    """Lay rows out as CSV with full precision and the ends of the intervals where there are any."""
    with_intervals = any(row.get("intervals") for row in rows)
    head = ["dataset", "method", "images", *keys]
    if with_intervals:
        head += [f"{key}_{end}" for key in keys for end in ("low", "high")]
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(head)
    for row in rows:
        line: list[object] = [row["dataset"], row["method"], row["num_images"]]
        line += [row["scores"].get(key) for key in keys]
        if with_intervals:
            ends = row.get("intervals") or {}
            line += [ends.get(key, (None, None))[i] for key in keys for i in (0, 1)]
        writer.writerow(line)
    return out.getvalue()


def escape_latex(text: str) -> str:
    """Return text that LaTeX prints as it is."""
    return "".join(SPECIAL.get(character, character) for character in text)


def _cells(
    rows: Sequence[Row],
    keys: Sequence[str],
    mark: Callable[[str], str],
    *,
    escape: Callable[[str], str] = str,
) -> list[list[str]]:
    best = best_values(rows, keys)
    lines = []
    for row in rows:
        line = [escape(str(row["dataset"])), escape(str(row["method"])), str(row["num_images"])]
        for key in keys:
            shown = format_value(key, row["scores"].get(key))
            line.append(mark(shown) if best.get((row["dataset"], key)) == shown else shown)
        lines.append(line)
    return lines


def _escape_markdown(text: str) -> str:
    return text.replace("\\", "\\\\").replace("|", "\\|").replace("*", "\\*").replace("_", "\\_")


FORMATS: Mapping[str, Callable[[Sequence[Row], Sequence[str]], str]] = {
    "text": text_table,
    "markdown": markdown_table,
    "latex": latex_table,
    "csv": csv_table,
}
