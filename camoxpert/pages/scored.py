"""The test scores that a run folder holds, for pages and tables."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from camoxpert.files import read_json


def run_results(run_dir: Path) -> list[dict[str, Any]]:
    """Return one result per data set, from ``evaluation/scores.json``.

    Releases up to 0.1 wrote a file for each data set, which is read as well. ``gallery`` holds the
    pictures by kind, with paths relative to the run folder.
    """
    results = []
    for path in sorted((run_dir / "evaluation").glob("*.json")):
        content = read_json(path)
        entries = content.get("results", [content])
        for entry in entries if isinstance(entries, list) else []:
            if isinstance(entry, dict) and entry.get("scores"):
                pictures = content.get("gallery")
                if isinstance(pictures, list):
                    entry = {**entry, "gallery": _by_kind(pictures, entry.get("dataset"))}
                results.append(entry)
    return results


def _by_kind(pictures: list[Any], dataset: Any) -> dict[str, list[dict[str, Any]]]:
    table: dict[str, list[dict[str, Any]]] = {}
    for picture in pictures:
        if isinstance(picture, dict) and picture.get("dataset") == dataset:
            panel = f"evaluation/{picture.get('panel')}"
            own = {**picture, **(picture.get("scores") or {}), "panel": panel}
            table.setdefault(str(picture.get("kind")), []).append(own)
    return table
