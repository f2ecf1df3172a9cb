"""kill -9 at any time: the same command continues, and ends bit for bit as an undisturbed run."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.runs import KILLED, Runner, command, ending, events

from camoxpert.runs.store import CheckpointFolder


@pytest.fixture(scope="module")
def undisturbed(runner: Runner, data: Path, tmp_path_factory: pytest.TempPathFactory):
    """Return the digest of an undisturbed run, and how long it took."""
    out = tmp_path_factory.mktemp("undisturbed")
    started = time.monotonic()
    assert runner.run(command(data, out)) == [0], runner.said()
    return ending(out / "r"), time.monotonic() - started


def disturbed(
    runner: Runner, words: list[str], kills: int, longest: float, *, seed: int = 7, **options: Any
) -> int:
    """Kill a run at random times, then let it finish; return how often it was really killed."""
    chance = random.Random(seed)
    done = 0
    while done < kills:
        # Early and late kills, up to the duration of a run after its start.
        kill = [chance.uniform(0.02, longest), signal.SIGKILL, None]
        codes = set(runner.run(words, signals=[kill], **options))
        assert codes <= {KILLED, 0}, runner.said()[-3000:]
        if codes == {0}:
            return done
        done += 1
    assert set(runner.run(words, **options)) == {0}, runner.said()[-3000:]
    return done


def test_twenty_kills_change_nothing(runner: Runner, data: Path, tmp_path: Path, undisturbed):
    """Needs several runs: a fast machine finishes one before it is killed often."""
    expected, seconds = undisturbed
    kills = runs = 0
    while kills < 20:
        assert runs < 10, f"{kills} kills in {runs} runs: they are over too soon"
        words = command(data, tmp_path / str(runs))
        kills += disturbed(runner, words, 20 - kills, 0.5 * seconds, seed=runs)
        run = tmp_path / str(runs) / "r"
        assert ending(run) == expected
        assert len(set(events(run))) == len(events(run)), "nothing is told twice"
        runs += 1


def test_kills_while_a_checkpoint_is_written(runner, data, tmp_path: Path, undisturbed) -> None:
    """Half of the time is spent between writing a checkpoint and giving it its name."""
    expected, seconds = undisturbed
    words = command(data, tmp_path)
    kills = disturbed(runner, words, 8, 0.9 * seconds, patches=["slow_saves"])
    assert kills >= 3 and ending(tmp_path / "r") == expected
    left = [*(tmp_path / "r" / "checkpoints").glob("*.tmp")]
    left += (tmp_path / "r" / "checkpoints").glob(".*.tmp")
    assert not left


def test_kills_with_data_workers(runner: Runner, data: Path, tmp_path: Path, undisturbed) -> None:
    expected, seconds = undisturbed
    words = command(data, tmp_path, "--num-workers", "2", "--cache", "none")
    kills = disturbed(runner, words, 6, seconds)
    assert kills >= 2 and ending(tmp_path / "r") == expected


def test_kills_of_two_processes_that_train_together(runner, data, tmp_path: Path) -> None:
    """Both are killed at once, as a machine that fails does; the pair continues.

    Stochastic depth draws from the random state of each process, which must be restored as well.
    """
    settings = ("model.drop_path=0.3", "--expert-family", "specialist")
    words = command(data, tmp_path / "whole", *settings, batch=2)
    started = time.monotonic()
    assert runner.run(words, ranks=2) == [0, 0], runner.said()
    seconds = time.monotonic() - started
    words = command(data, tmp_path / "killed", *settings, batch=2)
    assert disturbed(runner, words, 6, 0.7 * seconds, ranks=2) >= 3
    assert ending(tmp_path / "killed" / "r") == ending(tmp_path / "whole" / "r")


def test_another_seed_ends_elsewhere(runner: Runner, data, tmp_path: Path, undisturbed) -> None:
    """Control: the digest depends on what was learned."""
    assert runner.run(command(data, tmp_path, seed=2)) == [0]
    assert ending(tmp_path / "r") != undisturbed[0]


def test_a_hundred_saves_under_kill_9(tmp_path: Path) -> None:
    """A damaged checkpoint never passes as a good one, and a good one always exists."""
    folder = tmp_path / "checkpoints"
    saved = CheckpointFolder(folder)

    def values(step: int) -> dict[str, Any]:
        model = {"weight": torch.full((20_000,), float(step))}
        return {"format": 1, "config": {}, "model": model, "ema": None, "step": step}

    seconds = []
    for _ in range(5):
        started = time.monotonic()
        saved.save(values(0), step=0)
        seconds.append(time.monotonic() - started)
    # So that a child completes a few saves on a busy machine.
    longest = min(0.1, 0.01 + 4 * min(seconds))
    chance = random.Random(3)
    newest = kills = 0
    # On a busy machine a child may be killed before its first save is finished, time and again.
    while kills < 100 or newest <= 20:
        kills += 1
        pid = os.fork()
        if pid == 0:
            step = newest
            while True:
                step += 1
                CheckpointFolder(folder).save(values(step), step=step)
        time.sleep(chance.uniform(0.001, longest))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        found, problems = CheckpointFolder(folder).newest()
        assert found is not None and not problems
        step = found.values["step"]
        assert step >= newest and bool((found.values["model"]["weight"] == step).all())
        newest = step
