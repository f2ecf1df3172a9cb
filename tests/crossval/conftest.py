"""A finished cross-validation of a tiny model, and the command that makes one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from helpers.folds import words

from camoxpert.cli import main
from camoxpert.synthesis.toy import generate_toy


@pytest.fixture(scope="session")
def easy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a data set of 18 training images, 32 px."""
    root = tmp_path_factory.mktemp("easy")
    generate_toy(root, num_train=18, num_test=2, size=32, difficulty=0.1, seed=0)
    return root


@pytest.fixture(scope="session")
def finished(easy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a finished cross-validation of three folds."""
    out = tmp_path_factory.mktemp("cv") / "ours"
    assert main(words(easy, out, "--folds", "3")) == 0
    return out


@pytest.fixture
def crossval(easy: Path) -> Callable[..., int]:
    """Return a function that cross-validates a tiny model into a folder."""

    def call(out: Path, *more: str, data: Path = easy) -> int:
        return main(words(data, out, *more))

    return call
