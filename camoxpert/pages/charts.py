"""Charts of runs, evaluations and data sets as PNG.

They are made with matplotlib's figure objects, never its global state, on a transparent background
with mid-grey text, so that they are readable on light and dark pages.
"""

from __future__ import annotations

import io
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from camoxpert.runs.records import RoutingRecord, TrainRecord, ValidationRecord

GREY = "#808893"
COLOURS = ("#2f81f7", "#e5834b", "#3fa66b", "#b164c9", "#c9a227", "#d9536f", "#4bb3b8")

HALVES = {"photographs alone": "--", "with references": ":"}
"""What else a validation scores -> how its curve is drawn."""


def plot_training(records: Sequence[TrainRecord]) -> bytes:
    """Plot loss, its terms and the learning rate over steps; PNG."""
    train = [r for r in records if r.get("loss") is not None]
    figure, (left, right) = _figure(2, fixed=True)
    steps = [r["step"] for r in train]
    left.plot(steps, [r["loss"] for r in train], color=COLOURS[0], label="loss", linewidth=1.6)
    names = list(dict.fromkeys(name for r in train for name in r.get("terms", {})))
    for index, name in enumerate(names, start=1):
        values = [r.get("terms", {}).get(name) for r in train]
        left.plot(steps, values, **{**_line(index, name), "linewidth": 1})
    left.set(title="training loss", xlabel="optimizer step")
    right.plot(steps, [r["lr"] for r in train], color=COLOURS[0], linewidth=1.6)
    right.set(title="learning rate (decoder)", xlabel="optimizer step")
    _legend(left)
    return _png(figure)


def plot_scores(validation: Sequence[ValidationRecord]) -> bytes:
    """Plot the validation scores over epochs; PNG."""
    figure, (left, right) = _figure(2, fixed=True)
    epochs = [r["epoch"] for r in validation]
    for colour, key in zip(COLOURS, ("Smeasure", "wFmeasure", "meanEm", "IoU"), strict=False):
        values = [r["scores"].get(key) for r in validation]
        left.plot(epochs, values, color=colour, label=key, marker=".", linewidth=1.4)
    mae = [r["scores"].get("MAE") for r in validation]
    right.plot(epochs, mae, color=COLOURS[5], label="MAE", marker=".", linewidth=1.4)
    halves = half_curves(validation, ("Smeasure", "MAE"))
    for (words, key), (places, values) in halves.items():
        axis, colour = (right, COLOURS[5]) if key == "MAE" else (left, COLOURS[0])
        style = HALVES[words]
        axis.plot(places, values, color=colour, label=f"{key}, {words}", linestyle=style)
    if halves:
        _legend(right)
    left.set(title="validation, higher is better", xlabel="epoch")
    right.set(title="validation MAE, lower is better", xlabel="epoch")
    best = [r["epoch"] for r in validation if r.get("best")]
    if best:
        for axis in (left, right):
            axis.axvline(best[-1], color=GREY, linestyle=":", linewidth=1)
    _legend(left)
    return _png(figure)


def half_curves(
    validation: Sequence[ValidationRecord], keys: Sequence[str]
) -> dict[tuple[str, str], tuple[list[int], list[Any]]]:
    """Return (half, measure) -> (epochs, values) of what a validation scores beside ``scores``."""
    found = {}
    for words, half in (("photographs alone", "rgb"), ("with references", "guided")):
        scored: list[tuple[int, Any]] = [(r["epoch"], r.get(half)) for r in validation]
        known = [(epoch, scores) for epoch, scores in scored if scores]
        for key in keys if known else ():
            values = [scores.get(key) for _, scores in known]
            found[words, key] = ([epoch for epoch, _ in known], values)
    return found


def plot_learning(
    curves: Mapping[str, Sequence[tuple[Sequence[float], Sequence[float]]]],
    title: str,
    xlabel: str,
    *,
    smooth: bool,
) -> bytes:
    """Plot the curves of several runs on one axis; PNG.

    Args:
        curves: name -> (places, values) of each of its runs, which share a colour.
        title, xlabel: what they are, and over what.
        smooth: draw means over a twentieth of the values in place of points.
    """
    figure, (axis,) = _figure(1, width=6.4, height=3.6)
    for index, (name, lines) in enumerate(curves.items()):
        for number, (places, values) in enumerate(lines):
            style = _line(index, name) | {"linewidth": 1.2}
            if number:
                del style["label"]
            shown = _smooth(values) if smooth else values
            axis.plot(places, shown, marker="" if smooth else ".", markersize=4, **style)
    axis.set(title=title, xlabel=xlabel)
    axis.xaxis.get_major_locator().set_params(integer=True)
    if len(curves) <= 2 * len(COLOURS):
        _legend(axis)
    return _png(figure)


def _smooth(values: Sequence[float]) -> list[float]:
    """Return means over a twentieth of the values, fewer at the ends."""
    reach = len(values) // 40
    return [float(np.mean(values[max(0, i - reach) : i + reach + 1])) for i in range(len(values))]


def plot_routing(record: RoutingRecord) -> bytes:
    """Plot the share of each expert per level as a heat map with numbers; PNG."""
    levels, experts = record["levels"], record["experts"]
    usage = np.array([level["usage"] for level in levels.values()])
    figure, (axis,) = _figure(1, width=max(4.5, 1.05 * len(experts) + 1.6), height=2.7)
    fair = 1 / len(experts)
    axis.imshow(usage, cmap="Blues", vmin=0, vmax=max(2.5 * fair, usage.max()), aspect="auto")
    axis.set_xticks(range(len(experts)), experts, rotation=20, ha="right")
    axis.set_yticks(range(len(levels)), list(levels))
    for (row, column), value in np.ndenumerate(usage):
        dark = value > 0.6 * max(2.5 * fair, usage.max())
        colour = "white" if dark else "#1f2933"
        axis.text(column, row, f"{value:.0%}", ha="center", va="center", color=colour, fontsize=9)
    axis.set_title(f"share of choices per expert (fair: {fair:.0%})")
    axis.grid(False)
    return _png(figure)


def plot_curves(curves: Mapping[str, Mapping[str, Sequence[float]]]) -> bytes:
    """Plot precision-recall, F and E curves, one line per data set or method; PNG."""
    figure, axes = _figure(3, width=9.6, fixed=True)
    threshold = np.arange(255, -1, -1)
    for index, (name, curve) in enumerate(curves.items()):
        style = _line(index, name)
        axes[0].plot(curve["recall"], curve["precision"], **style)
        axes[1].plot(threshold, curve["F"], **style)
        axes[2].plot(threshold, curve["E"], **style)
    axes[0].set(title="precision over recall", xlabel="recall", xlim=(0, 1), ylim=(0, 1.02))
    axes[1].set(title="F-measure", xlabel="threshold, 0 to 255", ylim=(0, 1.02))
    axes[2].set(title="E-measure", xlabel="threshold, 0 to 255", ylim=(0, 1.02))
    _legend(axes[0])
    return _png(figure)


def plot_retention(curves: Mapping[str, Mapping[int, float]], measure: str) -> bytes:
    """Plot retention over severity, a line per corruption, and their mean; PNG.

    Args:
        curves: corruption -> severity -> share of the clean score; severity 0 is added as 1.
        measure: the score's name.
    """
    figure, (axis,) = _figure(1, width=6.4, height=3.6)
    whole = {name: {0: 1.0, **curve} for name, curve in curves.items()}
    for index, (name, curve) in enumerate(whole.items()):
        axis.plot(list(curve), list(curve.values()), marker=".", **_line(index, name))
    shared = [s for s in next(iter(whole.values()), {}) if all(s in c for c in whole.values())]
    if len(whole) > 1:
        means = [np.mean([curve[severity] for curve in whole.values()]) for severity in shared]
        axis.plot(shared, means, color=GREY, linewidth=2.6, label="mean")
    axis.set(title=f"{measure} kept", xlabel="severity", xticks=shared)
    axis.set_ylim(bottom=0)
    axis.legend(
        fontsize=8, frameon=False, labelcolor=GREY, loc="center left", bbox_to_anchor=(1, 0.5)
    )
    return _png(figure)


def plot_reliability(curves: Mapping[str, Sequence[Mapping[str, float]]]) -> bytes:
    """Plot the share of images with an object over the predicted probability; PNG.

    Args:
        curves: name -> bins, see ``metrics.presence.ReliabilityBin``.
    """
    figure, (axis,) = _figure(1, width=4.6, height=3.8)
    axis.plot([0, 1], [0, 1], color=GREY, linewidth=1, linestyle="--")
    for index, (name, bins) in enumerate(curves.items()):
        predicted, observed = ([part[key] for part in bins] for key in ("predicted", "observed"))
        # Of a share of 0 or 1 rounding may put an end on the wrong side.
        below = [max(0.0, part["observed"] - part["low"]) for part in bins]
        above = [max(0.0, part["high"] - part["observed"]) for part in bins]
        style = _line(index, name)
        axis.errorbar(predicted, observed, [below, above], marker=".", elinewidth=0.6, **style)
    axis.set(
        title="images with an object, by predicted presence",
        xlabel="mean presence of a bin",
        ylabel="share with an object",
        xlim=(-0.02, 1.02),
        ylim=(-0.02, 1.02),
    )
    axis.yaxis.label.set(color=GREY, fontsize=8)
    _legend(axis)
    return _png(figure)


def _line(index: int, name: str) -> dict[str, Any]:
    """Return the style of the line with a number and a name."""
    return {
        # After the last colour the first returns, with another dash pattern.
        "color": COLOURS[index % len(COLOURS)],
        "linestyle": ("-", "--", ":", "-.")[index // len(COLOURS) % 4],
        # "$" starts a formula, and labels that begin with "_" are left out.
        "label": f"{' ' if name.startswith('_') else ''}{name}".replace("$", r"\$"),
        "linewidth": 1.4,
    }


def plot_phases(phases: Mapping[str, float]) -> bytes:
    """Plot the wall time of each phase as bars; PNG."""
    ordered = sorted(phases.items(), key=lambda item: item[1])
    figure, (axis,) = _figure(1, width=6.4, height=0.42 * len(ordered) + 0.9)
    seconds = [value for _, value in ordered]
    axis.barh([name for name, _ in ordered], seconds, color=COLOURS[0], height=0.6)
    total = sum(seconds) or 1.0
    for row, value in enumerate(seconds):
        axis.text(value, row, f" {value:.1f} s, {value / total:.0%}", va="center", color=GREY)
    axis.set_xlim(0, max(seconds, default=1) * 1.25 + 1e-9)
    axis.set(xlabel="seconds")
    return _png(figure)


def plot_counts(histograms: Mapping[str, Mapping[str, int]]) -> bytes:
    """Draw counts by name as bars, one axis per histogram; the 16 largest of each."""
    figure, axes = _figure(len(histograms))
    for axis, (title, counts) in zip(axes, histograms.items(), strict=True):
        names = list(counts)
        if len(names) > 16:
            title = f"{title} (the largest 16 of {len(names)})"
            names = sorted(names, key=lambda name: -counts[name])[:16]
        axis.barh(names[::-1], [counts[name] for name in names][::-1], color=COLOURS[0])
        axis.set_title(title)
    return _png(figure)


def plot_shares(values: Mapping[str, Sequence[float]], xlabel: str) -> bytes:
    """Plot histograms of values in 0..1 as outlines, each scaled to its own number; PNG.

    Args:
        values: name -> values.
        xlabel: what they are.
    """
    figure, (axis,) = _figure(1, width=6.4, height=2.9)
    edges = np.linspace(0, 1, 26)
    for index, (name, known) in enumerate(values.items()):
        counts, _ = np.histogram(np.clip(known, 0, 1), edges)
        style = _line(index, name)
        axis.stairs(
            counts / max(1, counts.sum()),
            edges,
            fill=index == 0,
            alpha=0.3 if index == 0 else 1,
            **style,
        )
    axis.set(xlabel=xlabel, title="share of the images", xlim=(0, 1))
    _legend(axis)
    return _png(figure)


def plot_pareto(points: Mapping[str, tuple[float, float, float, float]], xlabel: str) -> bytes:
    """Plot scores over costs, a point with its error bar and name per method; PNG.

    The line joins the methods that no other method beats in both.

    Args:
        points: name -> (cost, score, lower end, upper end).
        xlabel: what the cost is.
    """
    figure, (axis,) = _figure(1, width=6.4, height=3.8)
    best, front = -np.inf, []
    for cost, score, _, _ in sorted(points.values()):
        if score > best:
            best = score
            front.append((cost, score))
    axis.plot(*zip(*front, strict=True), color=GREY, linewidth=1, linestyle="--", zorder=1)
    for index, (name, (cost, score, low, high)) in enumerate(points.items()):
        colour = COLOURS[index % len(COLOURS)]
        axis.errorbar(
            cost, score, [[score - low], [high - score]], color=colour, fmt="o", capsize=3
        )
        axis.annotate(
            name, (cost, score), xytext=(6, 4), textcoords="offset points", color=GREY, fontsize=8
        )
    axis.margins(x=0.15)
    axis.set(xlabel=xlabel, ylabel="weighted F")
    axis.yaxis.label.set(color=GREY, fontsize=8)
    return _png(figure)


def _empty_figure(width: float, height: float) -> Any:
    """Return a figure that is drawn by Agg, whatever backend the user's environment names.

    Notebooks export theirs, such as ``module://matplotlib_inline.backend_inline``, to every program
    they start; where it is not installed, importing matplotlib fails.
    """
    backend = os.environ.pop("MPLBACKEND", None)
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    finally:
        if backend is not None:
            os.environ["MPLBACKEND"] = backend
    figure = Figure(figsize=(width, height), dpi=130)
    FigureCanvasAgg(figure)
    figure.patch.set_visible(False)
    return figure


def _figure(
    columns: int, *, width: float = 8.4, height: float = 2.9, fixed: bool = False
) -> tuple[Any, Any]:
    """Return a figure and its axes, side by side.

    Args:
        columns: number of axes.
        width, height: inches.
        fixed: the margins have room for a title, a label below, and the numbers of a scale. Else
            matplotlib measures every text to find them, which takes longer than drawing.
    """
    figure = _empty_figure(width, height)
    if fixed:
        axes = figure.subplots(
            1, columns, squeeze=False, gridspec_kw=_margins(columns, width, height)
        )[0]
    else:
        figure.set_layout_engine("constrained")
        axes = figure.subplots(1, columns, squeeze=False)[0]
    for axis in axes:
        axis.set_facecolor("none")
        axis.grid(True, color=GREY, alpha=0.2, linewidth=0.6)
        axis.tick_params(colors=GREY, labelsize=8)
        axis.title.set(color=GREY, fontsize=10)
        axis.xaxis.label.set(color=GREY, fontsize=8)
        for name, spine in axis.spines.items():
            spine.set_visible(name in ("left", "bottom"))
            spine.set_color(GREY)
    return figure, axes


def _margins(columns: int, width: float, height: float) -> dict[str, float]:
    """Return the margins of ``fixed``, .62 inches for each scale, as shares of the figure."""
    left, right, below, above = 0.62, 0.15, 0.45, 0.3
    axis = (width - columns * left - right) / columns
    return {
        "left": left / width,
        "right": 1 - right / width,
        "bottom": below / height,
        "top": 1 - above / height,
        "wspace": left / axis,
    }


def _legend(axis: Any) -> None:
    if axis.get_legend_handles_labels()[0]:
        axis.legend(fontsize=8, frameon=False, labelcolor=GREY)


def _png(figure: Any) -> bytes:
    buffer = io.BytesIO()
    # `savefig` draws twice: once to find out where everything is.
    figure.canvas.print_png(buffer)
    return buffer.getvalue()
