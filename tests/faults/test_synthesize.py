"""kill -9 of relight at any time: the same command ends as one that was not disturbed."""

from __future__ import annotations

import random
import signal
import time
from pathlib import Path

import pytest
from helpers.runs import KILLED, Runner
from synthesis.test_relight_command import everything

from camoxpert.synthesis.records import LEDGER, PAIRS
from camoxpert.synthesis.toy import generate_toy


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("sources") / "toys"
    generate_toy(root, num_train=8, num_test=1, size=64, difficulty=0.3, seed=6)
    image = min((root / "TrainDataset" / "Imgs").iterdir())
    image.write_bytes(b"not a picture")
    return root


def words(data: Path, out: Path) -> list[str]:
    base = ["synthesize", "relight", "--dataset-path", str(data), "-o", str(out), "--device", "cpu"]
    return [
        *base,
        "--per-image",
        "6",
        "--batch-size",
        "4",
        "--cache-dir",
        str(out.parent / "cache"),
    ]


def test_kills_change_nothing(runner: Runner, sources: Path, tmp_path: Path) -> None:
    whole = tmp_path / "whole" / "out"
    started = time.monotonic()
    assert runner.run(words(sources, whole)) == [3], runner.said()
    seconds = time.monotonic() - started
    expected = everything(whole)
    assert len(expected["table"]) == 1 + 6 * 7
    chance = random.Random(2)
    kills = runs = 0
    while kills < 4 and runs < 6:
        out = tmp_path / str(runs) / "out"
        runs += 1
        while True:
            kill = [chance.uniform(0.05, 0.9) * seconds, signal.SIGKILL, None]
            (code,) = runner.run(words(sources, out), signals=[kill])
            assert code in (KILLED, 3), runner.said()
            if code == 3:
                break
            kills += 1
        assert everything(out) == expected
    assert kills
    # Control: a lost row is noticed, and repaired by the next call.
    path = out / LEDGER
    lines = path.read_text().splitlines(keepends=True)
    lost = next(line for line in lines if '"status": "ok"' in line)
    path.write_text("".join(line for line in lines if line != lost))
    assert everything(out) != expected
    (out / PAIRS).unlink()
    assert runner.run(words(sources, out)) == [3]
    assert {k: v for k, v in everything(out).items() if k == "files"} == {
        "files": expected["files"]
    }
