"""Tiny cross-validations, and what is left of one."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from typing import Any

from conftest import TINY

from camoxpert.files import read_json
from camoxpert.runs.checkpoint import load_checkpoint
from helpers.runs import digest_of

SHORT = ("--epochs", "2", "--stage1-epochs", "1", "--no-report")
CLOCKS = ("seconds", "hours", "run", "command", "folder", "verdict", "data.cache_dir")


def words(data: Path, out: Path, *more: str) -> list[str]:
    """Return the command of a tiny cross-validation."""
    return ["crossval", "--dataset-path", str(data), "-o", str(out), *TINY, *SHORT, *more]


def rows(folder: Path, fold: int) -> dict[str, dict[str, Any]]:
    """Return the per-image table of a fold."""
    with (folder / f"fold-{fold}" / "out_of_fold" / "scores.csv").open() as file:
        return {row["name"]: row for row in csv.DictReader(file)}


def result(folder: Path) -> str:
    """Return a digest of all that a cross-validation found: weights, scores, maps and summary."""
    parts: list[Any] = [(folder / "splits.json").read_text()]
    for run in sorted(folder.glob("fold-*")):
        own = run / "out_of_fold"
        parts.append(load_checkpoint(own / "final.pt").values["model"])
        parts.append((own / "scores.csv").read_text())
        parts.append((own / "scores.json.gz").read_bytes())
        parts.append({p.name: p.read_bytes() for p in sorted((own / "maps").rglob("*.png"))})
    summary = read_json(folder / "summary.json")
    parts.append(json.loads(json.dumps(without_clocks(summary))))
    return digest_of(parts)


def without_clocks(value: Any) -> Any:
    """Return nested values without times, places and what a cache said."""
    if isinstance(value, dict):
        return {k: without_clocks(v) for k, v in value.items() if k not in CLOCKS}
    return [without_clocks(item) for item in value] if isinstance(value, list) else value


def copy(folder: Path, to: Path) -> Path:
    """Copy a folder; return the copy."""
    shutil.copytree(folder, to)
    return to
