"""``samples.csv``: which image a run trained on, validated with or set aside."""

from __future__ import annotations

import csv
from pathlib import Path

SAMPLES = "samples.csv"


def read_samples(run_dir: Path) -> dict[tuple[str, str], str]:
    """Return (data set, name) -> split of every row; {} if the file cannot be read."""
    try:
        with (run_dir / SAMPLES).open(encoding="utf-8", errors="surrogateescape") as file:
            rows = csv.DictReader(file)
            return {(row["dataset"], row["name"]): row["split"] for row in rows}
    except (OSError, KeyError, csv.Error):
        return {}
