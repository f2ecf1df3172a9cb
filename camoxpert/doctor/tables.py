"""The tables that ``doctor`` writes: their names and columns."""

from __future__ import annotations

CLEAN = ("dataset", "split", "name", "reason")
"""Columns of the images to leave out."""
PAIRS = "pairs.csv"
COLUMNS = (
    *("dataset", "split", "name", "class", "width", "height", "image", "mask"),
    *("object_share", "objects", "faults", "oddities"),
)
"""Columns of the table of all pairs."""
