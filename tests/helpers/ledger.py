"""Comparing the rows of two ledgers."""

from __future__ import annotations

from typing import Any

TIMES = ("seconds", "worker")
"""Fields that differ between two runs that did the same."""


def same_work(row: dict[str, Any]) -> dict[str, Any]:
    """Return a row without the fields that differ between two runs that did the same."""
    return {key: value for key, value in row.items() if key not in TIMES}
