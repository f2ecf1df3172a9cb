"""Pages show real charts."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def real_charts(drawn_charts: None) -> None:
    """Draw the charts."""
