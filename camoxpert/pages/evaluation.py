"""One self-contained HTML page about an evaluation of prediction maps, from plain values."""

from __future__ import annotations

import base64
import shlex
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from camoxpert.pages import plots
from camoxpert.pages.page import write_html
from camoxpert.pages.report import chart
from camoxpert.pages.tables import LOWER_IS_BETTER, best_values, format_value

EXPLAINED = {
    "best": "Best images, by the mean over the methods",
    "worst": "Worst images, by the mean over the methods",
    "disputed": "Disputed images: the methods differ most",
}
PAIRS_SHOWN = 12
SHORT = ("Smeasure", "wFmeasure", "meanEm", "IoU", "MAE")
"""Measures of the smaller tables, where they were computed."""


def write_page(path: Path, summary: Mapping[str, Any], keys: Sequence[str]) -> Path:
    """Write the page.

    Args:
        path: file; pictures named in the summary are relative to its folder.
        summary: content of scores.json.
        keys: measures, in order.
    """
    results = summary["results"]
    datasets = list(dict.fromkeys(result["dataset"] for result in results))
    sections = [
        _header(results, datasets),
        *(_dataset(name, summary, keys) for name in datasets),
        *(_gallery(path.parent, name, summary) for name in datasets),
        _repeat(summary),
    ]
    return write_html(path, "CamoXpert evaluation", sections)


def _header(results: Sequence[Mapping[str, Any]], datasets: Sequence[str]) -> str:
    methods = list(dict.fromkeys(result["method"] for result in results))
    first = results[0]
    facts = [
        f"{_count(len(methods), 'method')} on {_count(len(datasets), 'data set')}",
        f"protocol {escape(first['protocol'])}",
        f"images without an object: {escape(first['empty_gt'])}",
    ]
    if first.get("resize") == "bilinear":
        facts.append("maps resized to their masks (bilinear)")
    return f"<h1>Evaluation</h1><p class='soft'>{' &middot; '.join(facts)}</p>"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' if number != 1 else ''}"


def _dataset(name: str, summary: Mapping[str, Any], keys: Sequence[str]) -> str:
    results = [result for result in summary["results"] if result["dataset"] == name]
    best = best_values(results, keys)
    arrows = {key: "&darr;" if key in LOWER_IS_BETTER else "&uarr;" for key in keys}
    head = "".join(f"<th>{escape(key)} {arrows[key]}</th>" for key in keys)
    lines = []
    for result in results:
        cells = []
        for key in keys:
            shown = format_value(key, result["scores"].get(key))
            ends = result["intervals"].get(key)
            title = f" title='95 % interval {ends[0]:.3f} to {ends[1]:.3f}'" if ends else ""
            bold = f"<b>{shown}</b>" if best.get((name, key)) == shown else shown
            cells.append(f"<td{title}>{bold}</td>")
        lines.append(f"<tr><td>{escape(result['method'])}</td>{''.join(cells)}</tr>")
    first = results[0]
    counts = [_count(first["num_images"], "image")]
    for field, text in (
        ("num_skipped", "without an object skipped"),
        ("num_missing", "masks without a map left out"),
        ("num_extra", "maps without a mask left out"),
    ):
        numbers = {result["method"]: result.get(field) or 0 for result in results}
        if len(set(numbers.values())) > 1:
            each = ", ".join(f"{escape(method)} {number}" for method, number in numbers.items())
            counts.append(f"{text}: {each}")
        elif first.get(field):
            counts.append(f"{first[field]} {text}")
    hint = (
        " Point at a number to see its 95 % bootstrap interval over images."
        if first["intervals"]
        else ""
    )
    curves = {result["method"]: result["curves"] for result in results}
    return (
        f"<section><h2>{escape(name)}</h2><p class='soft'>{', '.join(counts)}; data hash "
        f"{escape(first['data_hash'][:12])}.{hint}</p><table><tr><th>method</th>{head}</tr>{''.join(lines)}</table>"
        f"{_comparisons(name, summary)}"
        f"<h3>Curves</h3>{chart(lambda: plots.plot_curves(curves), 'PR, F and E curves')}"
        f"{_breakdowns(results, keys)}</section>"
    )


def _comparisons(name: str, summary: Mapping[str, Any]) -> str:
    pairs = [entry for entry in summary["comparisons"] if entry["dataset"] == name]
    if not pairs:
        return ""
    measured = pairs[0]["measures"]
    keys = [key for key in SHORT if key in measured] or list(measured)[:5]
    head = "".join(f"<th>{key}</th><th>p</th>" for key in keys)
    lines = []
    for entry in pairs[:PAIRS_SHOWN]:
        cells = ""
        for key in keys:
            value = entry["measures"][key]
            title = f"95 % interval {value['low']:+.3f} to {value['high']:+.3f}"
            p_value = "&lt; 0.001" if value["p_value"] < 0.001 else f"{value['p_value']:.3f}"
            cells += f"<td title='{title}'>{value['difference']:+.3f}</td><td>{p_value}</td>"
        pair = f"{escape(entry['a'])} &minus; {escape(entry['b'])}"
        lines.append(f"<tr><td>{pair}</td>{cells}</tr>")
    rest = len(pairs) - PAIRS_SHOWN
    more = f"<p class='soft'>{rest} more pairs in scores.json.</p>" if rest > 0 else ""
    return (
        f"<h3>Paired differences</h3><table><tr><th>methods</th>{head}</tr>{''.join(lines)}"
        "</table><p class='soft'>p: permutation test over the same images, two-sided, not "
        "corrected for the number of comparisons. It says nothing about other training seeds.</p>"
        f"{more}"
    )


def _breakdowns(results: Sequence[Mapping[str, Any]], keys: Sequence[str]) -> str:
    shown = [key for key in SHORT if key in keys] or list(keys)[:5]
    head = "".join(f"<th>{key}</th>" for key in shown)
    parts = []
    for division, labels in results[0]["breakdown"].items():
        lines = []
        for label, first in labels.items():
            text = label[2:] if division == "object size" else label
            for number, result in enumerate(results):
                part = _part(result, division, label)
                cells = "".join(f"<td>{format_value(key, part.get(key))}</td>" for key in shown)
                lead = f"{escape(text)} ({_count(int(first['images']), 'image')})"
                method = f"<td>{escape(result['method'])}</td>" if len(results) > 1 else ""
                lines.append(f"<tr><td>{lead if number == 0 else ''}</td>{method}{cells}</tr>")
        column = "<th>method</th>" if len(results) > 1 else ""
        parts.append(
            f"<details{' open' if division == 'object size' else ''}><summary>By "
            f"{escape(division)}</summary><table><tr><th>{escape(division)}</th>{column}{head}"
            f"</tr>{''.join(lines)}</table></details>"
        )
    return "".join(parts)


def _part(result: Mapping[str, Any], division: str, label: str) -> Mapping[str, float]:
    part: Mapping[str, float] = result["breakdown"].get(division, {}).get(label, {})
    return part


def _gallery(folder: Path, name: str, summary: Mapping[str, Any]) -> str:
    parts = []
    for kind, title in EXPLAINED.items():
        figures = []
        for entry in summary["gallery"]:
            if entry["dataset"] != name or entry["kind"] != kind:
                continue
            data = base64.b64encode((folder / entry["panel"]).read_bytes()).decode()
            values = ", ".join(f"{m} {v:.3f}" for m, v in entry["values"].items())
            caption = f"{escape(entry['name'])}: {escape(entry['measure'])} {escape(values)}"
            figures.append(
                f"<figure><img src='data:image/jpeg;base64,{data}' alt='{caption}'>"
                f"<figcaption>{caption}</figcaption></figure>"
            )
        if figures:
            parts.append(f"<h3>{title}</h3><div class='gallery'>{''.join(figures)}</div>")
    if not parts:
        return ""
    key = "".join(
        f"<i style='background:rgb{colour}'></i>{text}"
        for text, colour in (
            ("found", plots.TRUE_POSITIVE),
            ("invented", plots.FALSE_POSITIVE),
            ("missed", plots.FALSE_NEGATIVE),
        )
    )
    return (
        f"<section><h2>{escape(name)}: pictures</h2><p class='key soft'>{key}</p>"
        f"{''.join(parts)}</section>"
    )


def _repeat(summary: Mapping[str, Any]) -> str:
    command = shlex.join(["camoxpert", *map(str, summary["command"])])
    rows = "".join(
        f"<tr><td>{escape(str(k))}</td><td>{escape(str(v))}</td></tr>"
        for k, v in summary["versions"].items()
    )
    return (
        f"<section><h2>Repeat it</h2><pre>{escape(command)}</pre><details><summary>Versions"
        f"</summary><table class='pairs'>{rows}</table></details></section>"
    )
