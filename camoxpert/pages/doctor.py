"""The page about a data set: what was found in it, its copies, and pictures of every part."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

import cv2
import numpy as np

from camoxpert.pages import charts
from camoxpert.pages.pictures import fit
from camoxpert.pages.render import Chart, Picture, draw, inline_jpeg, write_page

LEVELS = ("error", "warning", "note")
"""Of findings, in the order of the page."""


class Finding(Protocol):
    """A finding of the doctor, as far as the page shows it."""

    @property
    def level(self) -> str: ...  # noqa: D102

    @property
    def check(self) -> str: ...  # noqa: D102

    @property
    def text(self) -> str: ...  # noqa: D102

    @property
    def files(self) -> Sequence[str]: ...  # noqa: D102


@dataclass(frozen=True)
class DataPart:
    """The sound pairs of one split of a data set.

    Attributes:
        title: of data set and split.
        pairs: how many there are.
        sizes, classes: pairs by size class of the object, and by class.
        sheet: contact sheet, uint8 RGB.
    """

    title: str
    pairs: int
    sizes: Mapping[str, int]
    classes: Mapping[str, int]
    sheet: np.ndarray


@dataclass(frozen=True)
class CopyPair:
    """Two images that show the same; ``pictures`` (uint8 RGB) is empty where none are shown."""

    caption: str
    pictures: Sequence[np.ndarray] = ()


@dataclass(frozen=True)
class DoctorReport:
    """What the page is made of."""

    roots: Sequence[str]
    layouts: Sequence[str]
    findings: Sequence[Finding]
    parts: Sequence[DataPart]
    copies: Sequence[CopyPair]


class _Part(NamedTuple):
    title: str
    pairs: int
    histograms: Chart
    sheet: Picture


@dataclass(frozen=True)
class DoctorPage:
    """The values of ``doctor.html.j2``."""

    verdict: str
    roots: str
    tiles: list[tuple[int, str]]
    layouts: Sequence[str]
    findings: list[Finding]
    num_copies: int
    copies: list[Picture]
    parts: list[_Part]


def write_doctor_page(path: Path, found: DoctorReport) -> Path:
    """Write the page."""
    number = {level: sum(f.level == level for f in found.findings) for level in LEVELS}
    page = DoctorPage(
        verdict="Training should not start" if number["error"] else "Ready to train",
        roots=", ".join(found.roots),
        tiles=[
            (sum(part.pairs for part in found.parts), "sound pairs"),
            (number["error"], "errors"),
            (number["warning"], "warnings"),
            (len(found.copies), "pairs of copies"),
        ],
        layouts=found.layouts,
        findings=sorted(found.findings, key=lambda f: LEVELS.index(f.level)),
        num_copies=len(found.copies),
        copies=[_side_by_side(pair) for pair in found.copies if pair.pictures],
        parts=[_part(part) for part in found.parts],
    )
    return write_page(path, "doctor.html.j2", page)


def _side_by_side(pair: CopyPair) -> Picture:
    pictures = [fit(picture, 220) for picture in pair.pictures]
    height = max(picture.shape[0] for picture in pictures)
    padded = [
        np.pad(p, ((0, height - p.shape[0]), (0, 6), (0, 0)), constant_values=128) for p in pictures
    ]
    return Picture(_jpeg(np.hstack(padded)), pair.caption)


def _part(part: DataPart) -> _Part:
    bars = {"object size (share of the image)": part.sizes, "class": part.classes}
    shown = {name: counts for name, counts in bars.items() if counts}
    return _Part(
        title=part.title,
        pairs=part.pairs,
        histograms=draw(lambda: charts.plot_counts(shown), f"histograms of {part.title}"),
        sheet=Picture(_jpeg(part.sheet), f"contact sheet of {part.title}"),
    )


def _jpeg(pixels_HWC: np.ndarray) -> str:
    _, data = cv2.imencode(".jpg", pixels_HWC[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 85])
    return inline_jpeg(data.tobytes())
