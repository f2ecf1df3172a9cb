"""What a sweep found: a table, the best settings as a file for ``train``, and a page."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from camoxpert import text
from camoxpert.config import changed_settings, get_setting, leaves
from camoxpert.files import write_bytes, write_rows
from camoxpert.metrics import HIGHER_IS_BETTER
from camoxpert.training.sweep.search import Sweep, words_of
from camoxpert.training.sweep.space import values_of

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial

BEST, TABLE, PAGE = "best.yaml", "trials.csv", "comparison.html"
MOST_COMPARED = 24
"""Trials on the page, the best ones."""
OF_A_TRIAL = ("run.name", "train.resume", "train.max_hours")
"""Settings of the sweep's command that are not those of the best run."""


def ranked(sweep: Sweep) -> list[FrozenTrial]:
    """Return the trials that were trained to their end, the best first, then the pruned ones."""
    sign = -1 if HIGHER_IS_BETTER[sweep.base.train.select] else 1

    def rank(trial: FrozenTrial) -> tuple[bool, bool, float, int]:
        score = trial.user_attrs.get("score")
        pruned = trial.state.name == "PRUNED"
        return pruned, score is None, sign * (score or 0.0), trial.number

    return sorted(sweep.book.trials("COMPLETE", "PRUNED"), key=rank)


def write_results(sweep: Sweep) -> None:
    """Write ``trials.csv`` and, once a trial is complete, ``best.yaml``."""
    trials = ranked(sweep)
    rows = [
        {
            "trial": trial.number,
            "state": trial.state.name.lower(),
            "score": trial.user_attrs.get("score", ""),
            "epoch": trial.user_attrs.get("epoch", ""),
            "seconds": trial.user_attrs.get("seconds", ""),
            **values_of(sweep.space, trial.params),
            "reason": trial.user_attrs.get("reason", ""),
        }
        for trial in trials
    ]
    with sweep.book.alone():
        if rows:
            write_rows(sweep.folder / TABLE, rows)
        if trials and trials[0].state.name == "COMPLETE":
            write_bytes(sweep.folder / BEST, best_settings(sweep, trials[0]).encode())


def best_settings(sweep: Sweep, trial: FrozenTrial) -> str:
    """Return the settings of a trial as a file for ``train --config``.

    A quick sweep finds settings for whole runs: what made its trials quick is left out.
    """
    import yaml

    values = {**changed_settings(sweep.base), **values_of(sweep.space, trial.params)}
    quick = [path for path in values if path.startswith("train.quick.")]
    for path in (*OF_A_TRIAL, *quick):
        values.pop(path, None)
    # In the order of the settings, nested as a settings file is.
    tree: dict[str, Any] = {}
    for leaf in leaves():
        if leaf.path in values:
            *groups, name = leaf.path.split(".")
            holder = tree
            for group in groups:
                holder = holder.setdefault(group, {})
            value = values[leaf.path]
            holder[name] = list(value) if isinstance(value, tuple) else value
    measure, number = sweep.base.train.select, len(sweep.book.trials("COMPLETE", "PRUNED"))
    lines = [
        f"# The best of {text.count(number, 'trial')}: trial {trial.number}, {measure} "
        f"{trial.user_attrs['score']:.4f} on the validation images",
        f"# ({words_of(values_of(sweep.space, trial.params))}).",
        "# No test set was scored. A run with these settings:",
        f"#   camoxpert train --config {sweep.folder / BEST}",
    ]
    if quick:
        lines.append("# The trials were quick runs; this is a whole one.")
    return "\n".join(lines) + "\n" + yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)


def table_text(sweep: Sweep) -> str:
    """Return the trials as a table, the best first."""
    head = ["trial", sweep.base.train.select, "epoch", *(dim.path for dim in sweep.space), ""]
    rows = [head]
    for trial in ranked(sweep):
        score = trial.user_attrs.get("score")
        values = values_of(sweep.space, trial.params)
        rows.append(
            [
                str(trial.number),
                "-" if score is None else f"{score:.4f}",
                str(trial.user_attrs.get("epoch", "-")),
                *(_cell(value) for value in values.values()),
                _outcome(trial),
            ]
        )
    return text.table(rows)


def _outcome(trial: FrozenTrial) -> str:
    if trial.state.name == "COMPLETE":
        return ""
    return "pruned" if "score" in trial.user_attrs else "failed"


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def write_page(sweep: Sweep) -> Path | None:
    """Write the page that compares the best trials; None while there is none."""
    from camoxpert.pages.comparison import compare_runs, write_comparison

    trials = [trial for trial in ranked(sweep) if "score" in trial.user_attrs]
    paths = [sweep.path_of(trial.number) for trial in trials[:MOST_COMPARED]]
    paths = [path for path in paths if (path / "config.yaml").is_file()]
    if not paths:
        return None
    pruned = [t.number for t in trials if t.state.name == "PRUNED"]
    failed = [t.number for t in ranked(sweep) if "score" not in t.user_attrs]
    lead = [
        f"{text.count(len(trials), 'trial')} by {sweep.base.train.select} on the validation "
        "images, the best first; no test set was scored. The best of many is partly luck: expect "
        "a lower score on other images.",
        f"Searched: {', '.join(dim.path for dim in sweep.space)}.",
    ]
    if not outside_of(sweep):
        lead.append("Trial 0 has the settings as they were given.")
    lead += [f"Pruned: {text.shorten(pruned, 30)}."] if pruned else []
    lead += [f"Failed: {text.shorten(failed, 30)}."] if failed else []
    if len(trials) > MOST_COMPARED:
        lead.append(f"Shown are the best {MOST_COMPARED}; {TABLE} has all.")
    page = compare_runs(paths, title=f"Sweep {sweep.folder.name}", lead=lead)
    return write_comparison(page, sweep.folder / PAGE)


def outside_of(sweep: Sweep) -> list[str]:
    """Return the searched settings whose own value is outside of the space, so that the first
    trial does not try it."""
    return [dim.path for dim in sweep.space if dim.drawn(get_setting(sweep.base, dim.path)) is None]
