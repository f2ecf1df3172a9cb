"""The page about a cross-validation, from tables that are ready to be shown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from camoxpert.pages.render import Picture, write_page

Rows = Sequence[Sequence[str]]
"""A table, its heading first."""


@dataclass(frozen=True)
class CrossvalReport:
    """The values of ``crossval.html.j2``.

    Attributes:
        folder: of the cross-validation.
        quick: what makes its runs quick ones; empty for whole ones.
        headline: the answer, a sentence.
        tiles: (value, what it is).
        scores, folds, suspects: tables.
        optimistic: what is to be said of the best epoch; "": nothing was chosen.
        breakdowns: (division, table).
        comparisons: (other method, table).
        wrong: a sentence about images that are never found.
        pictures: of the images to look at.
        remarks: sentences that belong to the numbers.
        presence: (measure, value); empty: all images have an object.
        command, settings, versions: to repeat it.
    """

    folder: str
    quick: Sequence[str]
    headline: str
    tiles: Sequence[tuple[str, str]]
    scores: Rows
    optimistic: str
    folds: Rows
    breakdowns: Sequence[tuple[str, Rows]]
    comparisons: Sequence[tuple[str, Rows]]
    suspects: Rows
    wrong: str
    pictures: Sequence[Picture]
    remarks: Sequence[str]
    presence: Sequence[tuple[str, str]]
    command: str
    settings: Sequence[tuple[str, str]]
    versions: Sequence[tuple[str, str]]


def write_crossval_page(path: Path, found: CrossvalReport) -> Path:
    """Write the page: one file, without scripts or external resources."""
    return write_page(path, "crossval.html.j2", found)
