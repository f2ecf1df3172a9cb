"""``samples.csv``: which image a run trained on, validated with or set aside."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import NamedTuple

SAMPLES = "samples.csv"


class Sample(NamedTuple):
    """An image of a run."""

    dataset: str
    name: str
    split: str
    image_bytes: int
    mask_bytes: int


def read_samples(run_dir: Path) -> dict[tuple[str, str], str]:
    """Return (data set, name) -> split of every row; {} if the file cannot be read."""
    try:
        with (run_dir / SAMPLES).open(encoding="utf-8", errors="surrogateescape") as file:
            rows = csv.DictReader(file)
            return {(row["dataset"], row["name"]): row["split"] for row in rows}
    except (OSError, KeyError, csv.Error):
        return {}


def read_sample_rows(file: Path) -> list[Sample]:
    """Return every row of a ``samples.csv`` with the sizes of its files; [] if it cannot be read or
    has none, as those of the first versions."""
    try:
        with file.open(encoding="utf-8", errors="surrogateescape") as text:
            return [
                Sample(
                    row["dataset"],
                    row["name"],
                    row["split"],
                    int(row["image_bytes"]),
                    int(row["mask_bytes"]),
                )
                for row in csv.DictReader(text)
            ]
    except (OSError, KeyError, TypeError, ValueError, csv.Error):
        return []
