"""Collect what the page about a folder of made images shows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from camoxpert import console
from camoxpert.data.files.image_io import read_image, read_mask, read_pair
from camoxpert.errors import DataError
from camoxpert.inference.job import BatchResult
from camoxpert.inference.ledger import OK, Ledger
from camoxpert.pages.synthesis import Example, SynthesisReport, write_synthesis_page
from camoxpert.runs.jobs import ItemRow, JobSummary, read_summary
from camoxpert.synthesis.erasing import REMOVED
from camoxpert.synthesis.reading import difficulty_of
from camoxpert.synthesis.records import PAGE, flat, shown
from camoxpert.synthesis.timetable import stage_rows
from camoxpert.text import count

TITLES = {
    "relight": "Relit images",
    "compose": "Composed images",
    "counterfactual": "Images without their objects, and controls",
}
EXAMPLES = 18
OBJECTS = 60
"""Pictures of pasted objects whose own difficulty is shown."""
SHOWN_ROLES = ("image", "object", "background")
AT_LEAST = 300
"""Pixels along the shorter side at which sources are decoded."""


def write_page(ledger: Ledger, result: BatchResult) -> None:
    """Write the page about a folder; a picture that cannot be read is left out."""
    made = ledger.made
    if not made:
        return
    step = max(1, -(-len(made) // EXAMPLES))
    rows = [ledger.row(name) for name in made[::step]]
    difficulty: dict[str, list[float]] = {"made images": [], "their sources": []}
    sources: set[str] = set()
    tests = 0
    failed = sum(ledger.index.status(name) != OK for name in ledger.index)
    for row in ledger.rows():
        if row["status"] != "ok":
            continue
        tests += "test_source" in row
        sources |= {source["path"] for source in row["sources"] if source["role"] in SHOWN_ROLES}
        for name, value in (
            ("made images", row.get("difficulty")),
            ("their sources", row.get("difficulty_source")),
        ):
            if value is not None:
                difficulty[name].append(value)
    if not difficulty["their sources"]:
        difficulty["their sources"] = _of_objects(ledger.row(name) for name in made)
    head = ledger.earlier or {}
    kind = str(head.get("made by", "synthesize")).rpartition(" ")[2]
    summary = result.summary or read_summary(ledger.folder / f"{kind}.json")
    warnings = []
    if tests:
        warnings.append(
            f"{count(tests, 'image')} of {len(made)} are made from test images "
            "(--allow-test-sources): a score on that test says nothing after training with them."
        )
    report = SynthesisReport(
        title=TITLES.get(kind, "Made images"),
        folder=str(ledger.folder),
        tiles=[
            (len(made), "images"),
            (len(sources), "source files"),
            (failed, "could not be made"),
            *_speed(summary),
        ],
        warnings=warnings,
        examples=_examples(ledger.folder, rows),
        difficulty=difficulty,
        provenance=_provenance(head, summary),
        stages=stage_rows(summary) if summary else (),
        timing=_timing(summary),
    )
    write_synthesis_page(ledger.folder / PAGE, report)


def _speed(summary: JobSummary) -> list[tuple[str, str]]:
    wall = summary.get("wall_seconds")
    if not wall:
        return []
    images = sum(worker.get("images", 0) for worker in summary["workers"])
    return [(f"{images / wall:.1f}", "images per second")]


def _timing(summary: JobSummary) -> list[str]:
    if not summary:
        return []
    images = sum(worker.get("images", 0) for worker in summary["workers"])
    names = ", ".join(worker["worker"] for worker in summary["workers"])
    seconds = summary["wall_seconds"]
    return [f"The last run made {count(images, 'image')} in {seconds:.1f} s ({names})."]


def _provenance(head: Mapping[str, Any], summary: JobSummary) -> list[tuple[str, str]]:
    rows = [(name, shown(value)) for name, value in flat(head)]
    guard = summary.get("leak_guard")
    if guard and guard.get("test_sets"):
        text = f"compared with {guard['test_images']} images of {', '.join(guard['test_sets'])}"
        rows.append(("leak guard", text))
    elif summary:
        rows.append(("leak guard", "no test images were known; folders were looked at"))
    for path, reason in summary.get("test_sources", {}).items():
        rows.append(("test image", f"{path}: {reason}"))
    return rows


def _examples(folder: Path, rows: list[ItemRow]) -> list[Example]:
    found = []
    for row in console.track(rows, "page", total=len(rows)):
        try:
            before = {
                source["role"]: read_image(source["path"], at_least=AT_LEAST)
                for source in row["sources"]
                if source["role"] in SHOWN_ROLES
            }
            made = read_image(folder / row["files"]["image"])
            mask = read_mask(folder / row["files"]["mask"])
        except DataError:
            continue
        if "image" in before:
            before = {"source": before["image"]}
        found.append(Example(_caption(row), before, made, mask))
    return found


def _of_objects(rows: Iterable[ItemRow]) -> list[float]:
    """Return the difficulties of some objects in the pictures that they were cut from."""
    found: dict[tuple[str, str], float] = {}
    for row in rows:
        files = {source["role"]: source["path"] for source in row["sources"]}
        key = files.get("object", ""), files.get("object mask", "")
        if len(found) >= OBJECTS:
            break
        if all(key) and key not in found:
            try:
                value = difficulty_of(*read_pair(*key, any_size=False))
            except DataError:
                continue
            if value is not None:
                found[key] = value
    return list(found.values())


def _caption(row: ItemRow) -> str:
    """Return the name of an image and what matters of its parameters."""
    drawn, words = row["parameters"], []
    if row["kind"] == "relight":
        words.append(
            f"light from {drawn['azimuth']:.0f}°, {drawn['elevation']:.0f}° high, "
            f"{drawn['temperature']:.0f} K"
        )
        if drawn["pattern"]:
            words.append(f"shadow of {drawn['pattern']}")
    elif row["kind"] == "counterfactual":
        what = "object" if row["made"] == REMOVED else "part of the background"
        words.append(f"{what} taken out, {drawn['erased_fraction']:.0%} of the picture")
    elif row["made"] == "edit":
        words.append("decoy: an edit without an object")
    else:
        words.append(f"object at {drawn['paste']['scale']:.2f} of its size")
        if drawn["occluders_drawn"]:
            words.append(f"{drawn['visible']:.0%} visible")
        if drawn["distractor"]:
            words.append("with a distractor")
    if row.get("difficulty") is not None:
        before = row.get("difficulty_source")
        change = f"{before:.2f} to " if before is not None else ""
        words.append(f"difficulty {change}{row['difficulty']:.2f}")
    if "test_source" in row:
        words.append("made from a test image")
    return f"{row['item']}: {', '.join(words)}"
