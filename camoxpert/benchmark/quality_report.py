"""What ``benchmark quality`` found: scores, costs and times of every arm, with intervals."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import torch
from numpy.typing import NDArray

from camoxpert import console, text
from camoxpert.benchmark.common import Report, heading, interleaved, milliseconds
from camoxpert.benchmark.quality import Arm, ArmResult
from camoxpert.benchmark.train import Step, Subject
from camoxpert.errors import DataError
from camoxpert.files import write_bytes, write_json
from camoxpert.metrics.statistics import compare_seeds
from camoxpert.pages import charts
from camoxpert.runs.per_image import read_image_scores
from camoxpert.runtime.device import Precision, choose_device, choose_precision, wait_for

MEASURES = ("wFmeasure", "Smeasure", "IoU", "MAE")
"""Those that are a mean over images, so that seeds and images can be resampled."""


class Costs(TypedDict):
    """What an arm costs: parameters, multiply-adds and milliseconds."""

    parameters: int
    gmacs: float
    total_gmacs: float
    step_ms: float
    inference_ms: float


class SetResult(TypedDict):
    """An arm on a test set."""

    seeds: dict[str, list[float]]  # measure -> score of each seed
    mean: dict[str, float]
    difference: dict[str, dict[str, float]]  # measure -> value, low, high; of the first arm


class ArmEntry(TypedDict):
    """An arm in ``quality.json``."""

    arm: str
    rate: float
    search: dict[str, float | None]
    at_the_edge: bool
    close_rate: float | None
    costs: Costs
    sets: dict[str, SetResult]


def measure_costs(arms: Sequence[Arm], *, rounds: int) -> dict[str, Costs]:
    """Time the training step and the forward pass of every arm in turns with the others."""
    device = choose_device(arms[0].config.train.device)
    steps: dict[str, Step] = {}
    costs: dict[str, Costs] = {}
    for arm in arms:
        config = arm.config
        model = replace(config.model, pretrained=False, weights="", init_from="")
        config = replace(config, model=model)
        precision = choose_precision(config.train, device)
        batch = config.train.batch_size or 8
        steps[arm.name] = Step(Subject(config, device, precision, batch))
        costs[arm.name] = {
            "parameters": arm.parameters,
            "gmacs": arm.cost.active / 1e9,
            "total_gmacs": arm.cost.total / 1e9,
            "step_ms": 0.0,
            "inference_ms": 0.0,
        }
    training = interleaved(
        {name: step.full for name, step in steps.items()}, rounds=rounds, description="steps"
    )
    inference = interleaved(
        {name: _forward(step, device, step.precision) for name, step in steps.items()},
        rounds=rounds,
        description="inference",
    )
    for name, cost_of_arm in costs.items():
        cost_of_arm["step_ms"] = milliseconds(training[name])
        cost_of_arm["inference_ms"] = milliseconds(inference[name])
    return costs


def _forward(step: Step, device: torch.device, precision: Precision) -> Any:
    def call() -> None:
        step.model.eval()
        with torch.inference_mode(), precision.autocast(device):
            step.model(step.images)
        wait_for(device)
        step.model.train()

    return call


def summarise(results: Sequence[ArmResult], costs: dict[str, Costs]) -> list[ArmEntry]:
    """Return an entry for each arm; differences are those of the first arm to this one.

    Raises:
        DataError: a run was not scored, or on other images.
    """
    tables = {result.arm.name: _scores(result) for result in results}
    first = tables[results[0].arm.name]
    entries: list[ArmEntry] = []
    for result in results:
        sets: dict[str, SetResult] = {}
        for dataset, table in tables[result.arm.name].items():
            reference = first[dataset]
            if table.keys() != reference.keys():
                raise DataError(f"{result.arm.name} was scored on other measures of {dataset}.")
            sets[dataset] = {
                "seeds": {key: [float(v) for v in table[key].mean(1)] for key in MEASURES},
                "mean": {key: float(table[key].mean()) for key in MEASURES},
                "difference": {}
                if result is results[0]
                else {key: _difference(reference[key], table[key]) for key in MEASURES},
            }
        entries.append(
            {
                "arm": result.arm.name,
                "rate": result.rate,
                "search": {f"{rate:g}": score for rate, score in result.search.items()},
                "at_the_edge": result.at_the_edge,
                "close_rate": result.close_rate,
                "costs": costs[result.arm.name],
                "sets": sets,
            }
        )
    return entries


def _difference(a_SN: NDArray[np.float64], b_SN: NDArray[np.float64]) -> dict[str, float]:
    low, high = compare_seeds(a_SN, b_SN)
    return {"value": float(a_SN.mean() - b_SN.mean()), "low": low, "high": high}


def _scores(result: ArmResult) -> dict[str, dict[str, NDArray[np.float64]]]:
    """Return test set -> measure -> scores (seeds, images), the images in the order of names."""
    runs = [_scores_of_run(run) for run in result.runs]
    for run, path in zip(runs, result.runs, strict=True):
        for dataset, rows in runs[0].items():
            if run.get(dataset, {}).keys() != rows.keys():
                raise DataError(
                    f"{path}: {dataset} was scored on other images than with other seeds."
                )
    return {
        dataset: {
            key: np.array([[run[dataset][name][key] for name in sorted(rows)] for run in runs])
            for key in MEASURES
        }
        for dataset, rows in runs[0].items()
    }


def _scores_of_run(run: Path) -> dict[str, dict[str, dict[str, float]]]:
    """Return test set -> image -> measure -> score of a run."""
    files = sorted((run / "evaluation" / "per_image").glob("*/*.csv"))
    if not files:
        raise DataError(
            f"{run} has no scores: the data has no test set. Give data with a TestDataset, or a "
            "test split."
        )
    tables = {file.stem: read_image_scores(file) for file in files}
    return {
        dataset: {name: {key: scores[key] for key in MEASURES} for name, scores in rows.items()}
        for dataset, rows in tables.items()
    }


def write_quality(folder: Path, entries: Sequence[ArmEntry], settings: dict[str, Any]) -> Report:
    """Write ``quality.json``, ``quality.md`` and a Pareto picture for each test set; print the
    tables."""
    report = heading("quality", settings) | {"arms": list(entries)}
    write_json(folder / "quality.json", report)
    pages = []
    for dataset in entries[0]["sets"]:
        rows = table_rows(entries, dataset)
        console.say(f"\n{dataset}:")
        console.say(text.table(rows))
        pages.append(f"## {dataset}\n\n{_markdown(rows)}\n")
        points = {entry["arm"]: _point(entry, dataset) for entry in entries}
        picture = charts.plot_pareto(points, "GMACs of a forward pass")
        write_bytes(folder / f"pareto-{dataset}.png", picture)
    for note in notes(entries):
        console.say(note)
        pages.append(f"{note}\n")
    write_bytes(folder / "quality.md", "\n".join(["# Which decoder?\n", *pages]).encode())
    return report


def table_rows(entries: Sequence[ArmEntry], dataset: str) -> list[list[str]]:
    """Return the table of a test set, with its heading."""
    head = ["decoder", "rate", *MEASURES, "seeds", f"{entries[0]['arm']} better by", "M param"]
    rows = [[*head, "GMACs", "step ms", "infer ms"]]
    for entry in entries:
        result, costs = entry["sets"][dataset], entry["costs"]
        values = result["seeds"]["wFmeasure"]
        spread = f"{min(values):.3f} to {max(values):.3f}" if len(values) > 1 else "1"
        gap = result["difference"].get("wFmeasure")
        better = f"{gap['value']:+.3f} ({gap['low']:+.3f} to {gap['high']:+.3f})" if gap else ""
        rows.append(
            [
                entry["arm"],
                f"{entry['rate']:g}{'!' if entry['at_the_edge'] else ''}",
                *(f"{result['mean'][key]:.3f}" for key in MEASURES),
                spread,
                better,
                f"{costs['parameters'] / 1e6:.2f}",
                f"{costs['gmacs']:.3f}",
                f"{costs['step_ms']:.0f}",
                f"{costs['inference_ms']:.0f}",
            ]
        )
    return rows


def notes(entries: Sequence[ArmEntry]) -> list[str]:
    """Return what a reader of the tables must know."""
    number = len(next(iter(entries[0]["sets"].values()))["seeds"]["wFmeasure"])
    lines = [
        f"Means over {text.count(number, 'seed')}; in brackets the 95 % interval of the difference "
        "in weighted F over seeds and images. Steps and inference: a batch, medians of rounds in "
        "turns on this machine."
    ]
    edge = [entry["arm"] for entry in entries if entry["at_the_edge"]]
    if edge:
        lines.append(
            f"! The best rate of {text.shorten(edge, 8)} is the smallest or largest that was "
            "tried; a better one may lie beyond: give more --rates."
        )
    close = [
        f"{entry['arm']} ({entry['close_rate']:g})" for entry in entries if entry["close_rate"]
    ]
    if close:
        lines.append(
            f"Nearly as good in validation as the rate that was taken: {text.shorten(close, 8)}. "
            "Which of the two is better is not known; more --search-seeds would tell."
        )
    if number < 3:
        lines.append("Fewer than three seeds say little about other seeds.")
    return lines


def _point(entry: ArmEntry, dataset: str) -> tuple[float, float, float, float]:
    values = entry["sets"][dataset]["seeds"]["wFmeasure"]
    return entry["costs"]["gmacs"], statistics.mean(values), min(values), max(values)


def _markdown(rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + " --- |" * len(rows[0]), *lines[1:]])
