"""One process that starts all runs of the fault tests, and the images they train on."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.runs import Runner

from camoxpert.synthesis.toy import generate_toy


@pytest.fixture(scope="session")
def runner(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runner]:
    made = Runner(tmp_path_factory.mktemp("log") / "log.txt")
    assert made.run(["--help"]) == [0]
    yield made
    made.process.kill()


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a data set of 17 training and 3 validation images, 32 px."""
    root = tmp_path_factory.mktemp("faults")
    generate_toy(root, num_train=20, num_test=2, size=32, difficulty=0.1, seed=0)
    return root
