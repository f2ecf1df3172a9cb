"""One self-contained HTML page about a run, from the files in its folder and nothing else.

Everything that comes from names, settings or the command line is escaped; pictures are inlined;
there is no script and nothing is loaded from elsewhere.
"""

from __future__ import annotations

import base64
import json
import shlex
from collections.abc import Callable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from camoxpert.config import changed_settings, config_from_dict, get_setting, leaves, read_yaml
from camoxpert.errors import ConfigError
from camoxpert.pages import plots
from camoxpert.pages.page import write_html
from camoxpert.pages.scored import run_results
from camoxpert.pages.tables import LOWER_IS_BETTER
from camoxpert.runs.log import read_jsonl

MEASURES = {
    "Smeasure": ("S", "structure"),
    "wFmeasure": ("wF", "weighted F"),
    "meanEm": ("E mean", "alignment"),
    "maxEm": ("E max", ""),
    "adpEm": ("E adp", ""),
    "meanFm": ("F mean", "beta2 0.3"),
    "maxFm": ("F max", ""),
    "adpFm": ("F adp", ""),
    "IoU": ("IoU", "at 0.5"),
    "Dice": ("Dice", "at 0.5"),
    "MAE": ("MAE", "mean error"),
}


def write_report(run_dir: Path) -> Path:
    """Write ``report.html`` into a run folder; parts that are missing become a sentence."""
    info = _json(run_dir / "run.json")
    records = read_jsonl(run_dir / "metrics.jsonl")
    results = run_results(run_dir)
    sections = [
        _header(run_dir, info, records, results),
        _scores(results, records),
        _gallery(run_dir, results),
        _curves(records, results),
        _experts(records),
        _time(info, records),
        _events(records),
        _settings(run_dir),
        _repeat(info),
    ]
    return write_html(run_dir / "report.html", f"{run_dir.name}: CamoXpert report", sections)


def _header(
    run_dir: Path,
    info: Mapping[str, Any],
    records: Sequence[Mapping[str, Any]],
    results: Sequence[Mapping[str, Any]],
) -> str:
    status = escape(str(info.get("status", "unknown")))
    facts = [f"status {status}", f"device {escape(str(info.get('device', '?')))}"]
    if info.get("precision"):
        facts.append(escape(str(info["precision"])))
    if info.get("parameters"):
        facts.append(f"{info['parameters'] / 1e6:.2f} M parameters, {info['gmacs']:.2f} GMACs")
    facts.append(f"started {escape(str(info.get('started', '?')))}")
    scores = results[0]["scores"] if results else {}
    where = f"on {escape(str(results[0]['dataset']))}" if results else ""
    if not scores:
        best = [r for r in records if r.get("kind") == "validation" and r.get("best")]
        scores, where = (best[-1]["scores"], "validation, best epoch") if best else ({}, "")
    tiles = "".join(
        f"<div class='tile'><b>{_number(scores.get(key))}</b><span>{label} "
        f"{'&darr;' if key in LOWER_IS_BETTER else '&uarr;'} {where}</span></div>"
        for key, label in (
            ("Smeasure", "S-measure"),
            ("wFmeasure", "weighted F"),
            ("meanEm", "mean E"),
            ("IoU", "IoU"),
            ("MAE", "MAE"),
        )
        if scores
    )
    return (
        f"<h1>{escape(run_dir.name)}</h1><p class='soft'>{' &middot; '.join(facts)}</p>"
        f"<div class='tiles'>{tiles}</div>"
    )


def _scores(results: Sequence[Mapping[str, Any]], records: Sequence[Mapping[str, Any]]) -> str:
    body = ""
    head = "".join(
        f"<th title='{escape(hint)}'>{label} "
        f"{'&darr;' if key in LOWER_IS_BETTER else '&uarr;'}</th>"
        for key, (label, hint) in MEASURES.items()
    )
    rows = []
    for result in results:
        rows.append(_score_row(f"{result['dataset']} ({result['num_images']})", result["scores"]))
        floor = result.get("baseline", {}).get("all_foreground")
        if floor:
            rows.append(_score_row("everything marked as object", floor, kind="floor"))
    best = [r for r in records if r.get("kind") == "validation" and r.get("best")]
    if best:
        label = f"validation, best: epoch {best[-1]['epoch']}"
        rows.append(_score_row(label, best[-1]["scores"], kind="floor"))
    if rows:
        body = f"<table><tr><th>data set (images)</th>{head}</tr>{''.join(rows)}</table>"
        body += (
            "<p class='soft'>S: structure; wF: weighted F; E: alignment; F: with beta&sup2; 0.3; "
            "mean, max and adaptive over thresholds; IoU and Dice at 0.5; MAE: mean absolute "
            "error. At the masks' own size. Test sets chose nothing.</p>"
        )
    if not results:
        body += (
            "<p class='soft'>No test set has been scored yet: <code>camoxpert evaluate</code>.</p>"
        )
    return f"<section><h2>Scores</h2>{body}</section>"


def _score_row(label: str, scores: Mapping[str, Any], *, kind: str = "") -> str:
    cells = "".join(f"<td>{_number(scores.get(key))}</td>" for key in MEASURES)
    return f"<tr class='{kind}'><td>{escape(label)}</td>{cells}</tr>"


def _gallery(run_dir: Path, results: Sequence[Mapping[str, Any]]) -> str:
    parts = []
    for result in results:
        for kind in ("best", "worst"):
            figures = []
            for entry in result.get("gallery", {}).get(kind, ()):
                picture = run_dir / entry["panel"]
                # A path in someone else's JSON must not pull in files from elsewhere.
                if not picture.resolve().is_relative_to(run_dir.resolve()) or not picture.is_file():
                    continue
                data = base64.b64encode(picture.read_bytes()).decode()
                caption = (
                    f"{escape(str(entry['name']))}: wF {_number(entry.get('wFmeasure'))}, "
                    f"S {_number(entry.get('Smeasure'))}, MAE {_number(entry.get('MAE'))}"
                )
                figures.append(
                    f"<figure><img src='data:image/jpeg;base64,{data}' alt='{caption}'>"
                    f"<figcaption>{caption}</figcaption></figure>"
                )
            if figures:
                title = f"{escape(str(result['dataset']))}: {kind} predictions"
                parts.append(f"<h3>{title}</h3><div class='gallery'>{''.join(figures)}</div>")
    if not parts:
        return ""
    key = "".join(
        f"<i style='background:rgb{colour}'></i>{name}"
        for name, colour in (
            ("found", plots.TRUE_POSITIVE),
            ("invented", plots.FALSE_POSITIVE),
            ("missed", plots.FALSE_NEGATIVE),
        )
    )
    return (
        f"<section><h2>Predictions</h2><p class='key soft'>In the last picture:{key}</p>"
        f"{''.join(parts)}</section>"
    )


def _curves(records: Sequence[Mapping[str, Any]], results: Sequence[Mapping[str, Any]]) -> str:
    parts = []
    if any(r.get("kind") == "train" for r in records):
        parts.append(chart(lambda: plots.plot_training(records), "training loss"))
    if any(r.get("kind") == "validation" for r in records):
        parts.append(chart(lambda: plots.plot_scores(records), "validation scores"))
    curves = {r["dataset"]: r["curves"] for r in results if r.get("curves")}
    if curves:
        parts.append(chart(lambda: plots.plot_curves(curves), "PR, F and E curves"))
    return f"<section><h2>Curves</h2>{''.join(parts) or '<p>Nothing logged yet.</p>'}</section>"


def _experts(records: Sequence[Mapping[str, Any]]) -> str:
    routing = [r for r in records if r.get("kind") == "routing" and r.get("levels")]
    if not routing:
        return ""
    last = routing[-1]
    count = len(last["experts"])
    if count == 1:
        return "<section><h2>Experts</h2><p>One expert: every image uses it.</p></section>"
    warnings = []
    for name, level in last["levels"].items():
        pairs = zip(last["experts"], level["usage"], strict=True)
        idle = [escape(expert) for expert, usage in pairs if usage < 0.1 / count]
        if idle:
            warnings.append(
                f"<p class='warning'>{escape(name)}: {', '.join(idle)} under a tenth of the fair "
                f"share. If it stays so, raise loss.balance or lower --num-experts.</p>"
            )
    entropy = ", ".join(f"{escape(k)} {v['entropy']:.2f}" for k, v in last["levels"].items())
    excess = ", ".join(
        f"{escape(k)} {v['max_violation']:+.0%}"
        for k, v in last["levels"].items()
        if "max_violation" in v
    )
    busiest = f" Busiest expert against its fair share: {excess}." if excess else ""
    return (
        f"<section><h2>Experts</h2><p class='soft'>Which experts the images of epoch "
        f"{escape(str(last['epoch']))} used. Healthy is every expert near its fair share of "
        f"{1 / count:.0%}, with differences between levels: specialisation, not collapse. Entropy "
        f"(1 is even): "
        f"{entropy}.{busiest}</p>{chart(lambda: plots.plot_routing(last), 'expert usage')}"
        f"{''.join(warnings)}</section>"
    )


def _time(info: Mapping[str, Any], records: Sequence[Mapping[str, Any]]) -> str:
    phases = {k: v for k, v in (info.get("phases") or {}).items() if v}
    if not phases:
        return ""
    train = [r for r in records if r.get("kind") == "train"]
    text = ""
    if train:
        last = train[-1]
        wait = last.get("data_wait") or 0.0
        text = (
            f"<p>{last.get('images_per_second') or 0:.1f} images per second in the last logged "
            f"epoch; {wait:.1%} of the time was spent waiting for data.</p>"
        )
        if wait > 0.2:
            advice = "The device waits for data: raise --num-workers if cores are free."
            text += f"<p class='warning'>{advice}</p>"
    return (
        f"<section><h2>Time</h2>{text}{chart(lambda: plots.plot_phases(phases), 'time')}</section>"
    )


def _events(records: Sequence[Mapping[str, Any]]) -> str:
    events = [r for r in records if r.get("kind") == "event"]
    if not events:
        return ""
    shown = "".join(
        f"<li>{'epoch ' + escape(str(r['epoch'])) + ': ' if r.get('epoch') else ''}"
        f"{escape(str(r.get('text', '')))}</li>"
        for r in events[:50]
    )
    more = f"<p>... and {len(events) - 50} more in metrics.jsonl</p>" if len(events) > 50 else ""
    return f"<section><h2>Events</h2><ul>{shown}</ul>{more}</section>"


def _settings(run_dir: Path) -> str:
    try:
        config = config_from_dict(read_yaml(run_dir / "config.yaml"))
    except ConfigError as error:
        return f"<section><h2>Settings</h2><p>{escape(str(error))}</p></section>"
    changed = changed_settings(config)
    rows = "".join(_setting_row(path, value, "changed") for path, value in changed.items())
    rest = "".join(
        _setting_row(leaf.path, get_setting(config, leaf.path), "")
        for leaf in leaves()
        if leaf.path not in changed
    )
    return (
        f"<section><h2>Settings</h2><p class='soft'>Set for this run:</p><table "
        f"class='pairs'>{rows}</table>"
        f"<details><summary>All other settings (defaults)</summary><table "
        f"class='pairs'>{rest}</table>"
        "</details></section>"
    )


def _setting_row(path: str, value: Any, kind: str) -> str:
    shown = ", ".join(map(str, value)) if isinstance(value, (tuple, list)) else value
    return f"<tr class='{kind}'><td>{escape(path)}</td><td>{escape(str(shown))}</td></tr>"


def _repeat(info: Mapping[str, Any]) -> str:
    command = shlex.join(str(word) for word in info.get("argv", ()))
    found = info.get("versions") or {}
    facts = {
        "platform": info.get("platform"),
        "cores": info.get("cores"),
        "commit": info.get("git_commit"),
        "data hash": info.get("data_hash"),
        **found,
    }
    rows = "".join(
        f"<tr><td>{escape(str(k))}</td><td>{escape(str(v))}</td></tr>" for k, v in facts.items()
    )
    decided = "\n".join(str(line) for line in info.get("decisions", ()))
    return (
        f"<section><h2>Repeat it</h2><pre>{escape(command)}</pre><h3>What was decided, and why</h3>"
        f"<pre>{escape(decided)}</pre><details><summary>Environment</summary>"
        f"<table class='pairs'>{rows}</table></details></section>"
    )


def chart(draw: Callable[[], bytes], name: str) -> str:
    """Inline a chart; without matplotlib, or with records it cannot draw, say so instead."""
    try:
        data = base64.b64encode(draw()).decode()
    except Exception as error:
        return f"<p class='soft'>No chart of {escape(name)}: {escape(str(error))}</p>"
    return f"<img class='chart' src='data:image/png;base64,{data}' alt='{escape(name)}'>"


def _number(value: Any) -> str:
    return f"{value:.3f}" if isinstance(value, (int, float)) else "&ndash;"


def _json(path: Path) -> dict[str, Any]:
    try:
        value: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value
