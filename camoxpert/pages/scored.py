"""The test scores that a run folder holds, for pages and tables."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from camoxpert.files import read_json
from camoxpert.runs.scores import RunPicture, RunResult, is_picture, is_run_result

CAPTIONED: tuple[Literal["wFmeasure"], Literal["Smeasure"], Literal["MAE"]] = (
    *("wFmeasure", "Smeasure", "MAE"),
)
"""The scores below a picture."""


def run_results(run_dir: Path) -> list[RunResult]:
    """Return one result per data set, from ``evaluation/scores.json``.

    Releases up to 0.1 wrote a file for each data set, which is read as well. ``gallery`` holds the
    pictures by kind, with paths relative to the run folder.
    """
    results: list[RunResult] = []
    for path in sorted((run_dir / "evaluation").glob("*.json")):
        content = read_json(path)
        entries = content.get("results", [content])
        for entry in entries if isinstance(entries, list) else []:
            if is_run_result(entry):
                pictures = content.get("gallery")
                if isinstance(pictures, list):
                    entry = {**entry, "gallery": _by_kind(pictures, entry.get("dataset"))}
                results.append(entry)
    return results


def _by_kind(pictures: list[Any], dataset: Any) -> dict[str, list[RunPicture]]:
    table: dict[str, list[RunPicture]] = {}
    for picture in pictures:
        if is_picture(picture) and picture.get("dataset") == dataset:
            own: RunPicture = {
                "name": picture["name"],
                "panel": f"evaluation/{picture['panel']}",
                "measure": picture["measure"],
                "values": picture["values"],
            }
            scores = picture.get("scores") or {}
            for key in CAPTIONED:
                if key in scores:
                    own[key] = scores[key]
            table.setdefault(str(picture.get("kind")), []).append(own)
    return table
