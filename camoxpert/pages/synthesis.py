"""The page about made images: before and after, how hard they are to see, how they were made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from camoxpert.pages import charts
from camoxpert.pages.pictures import overlay, side_by_side
from camoxpert.pages.render import Chart, Picture, draw, inline_jpeg, write_page

HEIGHT = 170
"""Of the pictures, pixels."""
DARK = 30
"""Grey between them."""


@dataclass(frozen=True)
class Example:
    """One made image with what it was made from.

    Attributes:
        caption: its name and how it was made.
        before: name -> uint8 RGB of each source.
        made: uint8 RGB.
        mask: uint8, above 127 on the object.
    """

    caption: str
    before: Mapping[str, np.ndarray]
    made: np.ndarray
    mask: np.ndarray


@dataclass(frozen=True)
class SynthesisReport:
    """What the page is made of.

    Attributes:
        title: of the page.
        folder: of the images.
        tiles: (value, what it counts).
        warnings: sentences that a reader must not miss.
        examples: a few images.
        difficulty: name -> difficulties, 0..1, of the made images and of their sources.
        provenance: (key, value): settings and where images came from.
        stages: (stage, seconds, share) of the last run that made images.
        timing: sentences about that run.
    """

    title: str
    folder: str
    tiles: Sequence[tuple[object, str]]
    warnings: Sequence[str]
    examples: Sequence[Example]
    difficulty: Mapping[str, Sequence[float]]
    provenance: Sequence[tuple[str, str]]
    stages: Sequence[tuple[str, str, str]]
    timing: Sequence[str] = ()


@dataclass(frozen=True)
class SynthesisPage:
    """The values of ``synthesis.html.j2``."""

    report: SynthesisReport
    gallery: Sequence[Picture]
    histogram: Chart | None
    means: Sequence[tuple[str, int, str]]


def write_synthesis_page(path: Path, found: SynthesisReport) -> Path:
    """Write the page: one file, without scripts or external resources."""
    known = {name: values for name, values in found.difficulty.items() if values}
    rows = [_row(example) for example in found.examples]
    # Of one shape, so that tall pictures leave no gaps beside them.
    width = max((row.shape[1] for row in rows), default=0)
    gaps = [((0, 0), (0, width - row.shape[1]), (0, 0)) for row in rows]
    padded = [np.pad(row, gap, constant_values=DARK) for row, gap in zip(rows, gaps, strict=True)]
    page = SynthesisPage(
        report=found,
        gallery=[
            Picture(_jpeg(row), one.caption)
            for row, one in zip(padded, found.examples, strict=True)
        ],
        histogram=draw(lambda: charts.plot_shares(known, "difficulty"), "the difficulties")
        if known
        else None,
        means=[(name, len(values), f"{np.mean(values):.3f}") for name, values in known.items()],
    )
    return write_page(path, "synthesis.html.j2", page)


def _row(example: Example) -> np.ndarray:
    """Put sources, the made image, and its mask side by side, each in its own shape."""
    shown = {**example.before, "made": example.made, "mask": overlay(example.made, example.mask)}
    parts = [side_by_side({caption: picture}, HEIGHT) for caption, picture in shown.items()]
    gap = np.full((parts[0].shape[0], 4, 3), DARK, np.uint8)
    return np.hstack([piece for part in parts for piece in (part, gap)][:-1])


def _jpeg(pixels_HWC: np.ndarray) -> str:
    _, data = cv2.imencode(".jpg", pixels_HWC[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 85])
    return inline_jpeg(data.tobytes())
