"""Write docs/results.md from run folders; a run measured every number in it.

python tools/results_table.py RUN [RUN ...] --output docs/results.md
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import sys
from pathlib import Path
from typing import Any

import yaml

from camoxpert.metrics import RESULT_KEYS
from camoxpert.pages.scored import run_results

HEAD = """# Results

The program measured every number on this page; `tools/results_table.py` writes it from run folders.
Each run was scored once on its test set, with the weights that its own settings name. The test set
was not used to choose anything.
"""


def read_run(folder: Path) -> dict[str, Any]:
    """Return a run's information, settings and test scores by set."""
    return {
        "name": folder.name,
        "info": json.loads((folder / "run.json").read_text()),
        "config": yaml.safe_load((folder / "config.yaml").read_text()),
        "tests": {result["dataset"]: result for result in run_results(folder)},
    }


def table(runs: list[dict[str, Any]], dataset: str) -> list[str]:
    """Return the Markdown table of one data set, with a row per run."""
    keys = list(RESULT_KEYS)
    head = ["run", "experts", "top-k", "M parameters", "GMACs", *keys]
    lines = ["| " + " | ".join(head) + " |", "| " + " | ".join(["---"] * len(head)) + " |"]
    for run in runs:
        if dataset not in run["tests"]:
            continue
        model, info = run["config"]["model"], run["info"]
        kinds = f" ({', '.join(model['experts'])})" if model["experts"] else ""
        cells = [
            run["name"],
            f"{model['num_experts']}{kinds}",
            str(model["top_k"]),
            f"{info['parameters'] / 1e6:.2f}",
            f"{info['gmacs']:.3f}",
            *(f"{run['tests'][dataset]['scores'][key]:.3f}" for key in keys),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return lines + means(runs, dataset)


def means(runs: list[dict[str, Any]], dataset: str) -> list[str]:
    """Return a row of means for each group of runs whose names differ only in ``-seedN``."""
    groups: dict[str, list[dict[str, float]]] = {}
    for run in runs:
        stem, found, _ = run["name"].rpartition("-seed")
        if found and dataset in run["tests"]:
            groups.setdefault(stem, []).append(run["tests"][dataset]["scores"])
    lines = []
    for stem, scores in groups.items():
        cells = [f"{statistics.fmean(row[key] for row in scores):.3f}" for key in RESULT_KEYS]
        row = [f"**{stem}, mean of {len(scores)} seeds**", "", "", "", "", *cells]
        lines.append("| " + " | ".join(row) + " |")
    return lines


def page(runs: list[dict[str, Any]]) -> str:
    """Return the whole page."""
    lines = [HEAD]
    for dataset in sorted({name for run in runs for name in run["tests"]}):
        result = next(run["tests"][dataset] for run in runs if dataset in run["tests"])
        lines += [
            f"## {dataset}: {result['num_images']} test images",
            "",
            *table(runs, dataset),
            "",
        ]
        floor = result["baseline"]["all_foreground"]
        lines += [
            f"Marking every pixel as object scores S {floor['Smeasure']:.3f}, "
            f"IoU {floor['IoU']:.3f}, MAE {floor['MAE']:.3f}.",
            "",
        ]
    lines += ["## How each run was made", ""]
    for run in runs:
        info = run["info"]
        phases = info.get("phases", {})
        versions = info.get("versions", {})
        lines += [
            f"**{run['name']}**: device {info.get('device')}, {info.get('precision')}, torch "
            f"{versions.get('torch')}, timm {versions.get('timm')}, commit "
            f"{info.get('git_commit')}; "
            f"training {phases.get('training', 0):.0f} s, validation "
            f"{phases.get('validation', 0):.0f} s.",
            "",
            "```",
            shlex.join(info["argv"]),
            "```",
            "",
        ]
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    options.output.write_text(page([read_run(folder) for folder in options.runs]))
    sys.exit(0)
