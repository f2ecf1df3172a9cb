"""Charts are files: no screen, no notebook and no global state of matplotlib is needed."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

DRAW = """
import os
from camoxpert.pages.charts import plot_phases
assert plot_phases({"a": 1.0})[:4] == b"\\x89PNG"
import sys
assert "matplotlib.pyplot" not in sys.modules
print(os.environ["MPLBACKEND"])
"""


@pytest.mark.parametrize("backend", ["module://not_installed.backend_inline", "notebook-of-old"])
def test_a_notebooks_backend_is_left_aside(backend: str) -> None:
    """Notebooks export their backend to the processes they start, which may not have it."""
    environment = {**os.environ, "MPLBACKEND": backend}
    result = subprocess.run(
        [sys.executable, "-c", DRAW], env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == backend
