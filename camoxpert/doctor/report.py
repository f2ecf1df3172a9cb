"""The results of an examination: printed, and written as a page, a table and JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from camoxpert import console
from camoxpert.data.files.image_io import write_jpeg
from camoxpert.doctor.dataset import Examination
from camoxpert.doctor.finding import Finding
from camoxpert.doctor.inspect import PairFacts, small_picture
from camoxpert.doctor.tables import COLUMNS, PAIRS
from camoxpert.files import write_json, write_rows
from camoxpert.metrics.groups import SIZES
from camoxpert.pages.doctor import CopyPair, DataPart, DoctorReport, write_doctor_page
from camoxpert.pages.pictures import contact_sheet

COPIES_SHOWN = 24
FILES_PRINTED = 3


def print_findings(findings: Sequence[Finding]) -> None:
    """Print findings, with the first files of those that are not notes."""
    for finding in findings:
        console.say(f"  {finding.level:<8}{finding.check:<10}{finding.text}")
        if finding.level == "note":
            continue
        for file in finding.files[:FILES_PRINTED]:
            console.say(f"{'':20}{file}")
        if len(finding.files) > FILES_PRINTED:
            console.say(f"{'':20}... and {len(finding.files) - FILES_PRINTED} more")


def write_report(
    folder: Path,
    roots: Sequence[str],
    environment: Sequence[Finding],
    found: Examination,
    max_pixels: int,
) -> Path:
    """Write the page, contact sheets, the findings and a table of all pairs; return the page."""
    findings = [*environment, *found.findings]
    parts = _parts(found)
    folder.mkdir(parents=True, exist_ok=True)
    for number, part in enumerate(parts, start=1):
        write_jpeg(folder / f"contact_sheet_{number}.jpg", part.sheet)
    entries = [asdict(finding) for finding in findings]
    write_json(folder / "findings.json", {"roots": list(roots), "findings": entries})
    write_rows(folder / PAIRS, [_row(facts) for facts in found.facts], COLUMNS)
    report = DoctorReport(roots, found.layouts, findings, parts, _copies(found, max_pixels))
    return write_doctor_page(folder / "doctor.html", report)


def _parts(found: Examination) -> list[DataPart]:
    """Return title, counts and contact sheet of every data set and split with sound pairs."""
    groups: dict[str, list[PairFacts]] = {}
    for facts in found.facts:
        if not facts.faults:
            groups.setdefault(f"{facts.pair.dataset} {facts.split}", []).append(facts)
    parts = []
    for title, sound in groups.items():
        shown = [(f.thumb, f.thumb_mask) for f in sound]
        sizes = [f.size_class for f in sound if f.share > 0]
        classes = [f.pair.group for f in sound if f.pair.group]
        parts.append(
            DataPart(
                title=title,
                pairs=len(sound),
                sizes={name: sizes.count(name) for name in SIZES[1:]},
                classes={name: classes.count(name) for name in sorted(set(classes))},
                sheet=contact_sheet([(a, b) for a, b in shown if a is not None and b is not None]),
            )
        )
    return parts


def _copies(found: Examination, max_pixels: int) -> list[CopyPair]:
    """Return a caption for every pair of copies, and the pictures of the first ones."""
    return [
        CopyPair(
            caption=f"{a.pair.name} ({a.split}) and {b.pair.name} ({b.split}): {m.how}, "
            f"similarity {m.similarity:.2f}",
            pictures=[
                small_picture(f.pair.image, max_pixels=max_pixels)
                for f in (a, b)
                if number < COPIES_SHOWN
            ],
        )
        for number, (m, a, b) in enumerate(found.matches)
    ]


def _row(facts: PairFacts) -> Mapping[str, object]:
    """Return a pair's row of the table."""
    pair = facts.pair
    return {
        "dataset": pair.dataset,
        "split": facts.split,
        "name": pair.name,
        "class": pair.group,
        "width": facts.size[1],
        "height": facts.size[0],
        "image": facts.image_format,
        "mask": facts.encoding,
        "object_share": f"{facts.share:.5f}",
        "objects": facts.objects,
        "faults": " ".join(facts.faults),
        "oddities": "; ".join(facts.oddities),
    }
