"""The page about a folder of made images."""

from __future__ import annotations

from pathlib import Path

from camoxpert.inference.job import BatchResult


def write_page(output: Path, result: BatchResult) -> None:
    """Write it."""
