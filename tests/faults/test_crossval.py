"""kill -9 in a fold: the same command continues there, and ends bit for bit as an unbroken one."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
from helpers.folds import result, words
from helpers.runs import KILLED, Runner

pytestmark = pytest.mark.slow


def test_killed_in_the_second_fold(runner: Runner, data: Path, tmp_path: Path) -> None:
    """Folds take four to six steps: killed in the second step of the second fold, and again while
    it is scored."""
    more = ("--folds", "3", "--cache-dir", str(tmp_path / "cache"), "--save-every", "1")
    unbroken, broken = tmp_path / "unbroken", tmp_path / "broken"
    assert runner.run(words(data, unbroken, *more)) == [0], runner.said()
    kill = [["fold 2 of 3: training", signal.SIGKILL, None]]
    assert runner.run(words(data, broken, *more), signals=kill, patches=["slow_steps"]) == [KILLED]
    kill = [["[step 2]", signal.SIGKILL, None]]
    codes = runner.run(words(data, broken, *more), signals=kill, patches=["slow_steps"])
    assert codes == [KILLED], runner.said()
    assert (broken / "fold-2").is_dir() and not (broken / "fold-3").exists()
    kill = [["done ", signal.SIGKILL, None]]
    codes = runner.run(words(data, broken, *more), signals=kill, patches=["slow_steps"])
    assert codes == [KILLED], runner.said()
    assert not (broken / "summary.json").exists()
    assert runner.run(words(data, broken, *more)) == [0], runner.said()
    assert "fold 1: done before" in runner.said()
    assert result(broken) == result(unbroken)
