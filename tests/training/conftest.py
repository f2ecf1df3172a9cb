"""Fixtures of the tests of training."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from helpers.sweep import SPACE


@pytest.fixture
def space(tmp_path: Path) -> Callable[[str], Path]:
    """Return a function that writes a file of a space for `sweep`."""

    def write(text: str = SPACE) -> Path:
        path = tmp_path / "space.yaml"
        path.write_text(text)
        return path

    return write
