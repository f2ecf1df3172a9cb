"""kill -9 at any instant: the same command goes on, and the end is that of an undisturbed run, bit
for bit."""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from camoxpert.data.toy import generate_toy
from camoxpert.training.checkpoint import CheckpointFolder

KILLED = -signal.SIGKILL
# What a clock says, not what was learned.
CLOCKS = ("images_per_second", "data_wait", "gpu", "memory", "time", "seconds")


class Runner:
    """Forks the program from a process that has imported it already."""

    def __init__(self, log: Path) -> None:
        self.log = log
        environment = os.environ | {"OMP_NUM_THREADS": "1", "NO_ALBUMENTATIONS_UPDATE": "1"}
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("runner.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )

    def run(self, arguments: list[str], seconds: float | None = None, **options: Any) -> int:
        request = {"arguments": arguments, "seconds": seconds, "log": str(self.log)} | options
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return int(json.loads(self.process.stdout.readline()))


@pytest.fixture(scope="module")
def runner(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runner]:
    made = Runner(tmp_path_factory.mktemp("log") / "log.txt")
    assert made.run(["--help"]) == 0
    yield made
    made.process.kill()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("killed")
    generate_toy(root, num_train=28, num_test=0, size=32, difficulty=0.1, seed=0)
    return root


def command(data: Path, out: Path, *words: str, seed: int = 1) -> list[str]:
    base = ["train", "--dataset-path", str(data), "--checkpoint-dir", str(out), "--run-name", "r"]
    base += ["--backbone", "tiny_test", "--no-pretrained", "--img-size", "32", "--batch-size", "4"]
    base += [
        "--accumulation-steps",
        "2",
        "--num-experts",
        "3",
        "--epochs",
        "4",
        "--save-every",
        "1",
    ]
    base += ["--stage1-epochs", "1", "--num-workers", "0", "--no-tensorboard", "--no-report"]
    base += ["--no-test", "--seed", str(seed), "--cache-dir", str(out / "cache")]
    return [*base, "model.width=16", "model.detail_width=8", "run.log_every=1", *words]


def ending(run: Path) -> str:
    """Return a digest of everything that was learned and logged."""
    checkpoint, problems = CheckpointFolder(run / "checkpoints").newest()
    assert checkpoint is not None and not problems
    digest = hashlib.sha256()

    def add(value: Any) -> None:
        if isinstance(value, torch.Tensor):
            digest.update(value.contiguous().numpy().tobytes())
        elif isinstance(value, dict):
            for key in sorted(value, key=str):
                if key not in CLOCKS:
                    digest.update(str(key).encode())
                    add(value[key])
        elif isinstance(value, (list, tuple)):
            for item in value:
                add(item)
        else:
            digest.update(repr(value).encode())

    for part in ("model", "ema", "optimizer", "scaler", "state", "rng"):
        add(checkpoint.values[part])
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [record["step"] for record in lines if record["kind"] == "train"]
    assert steps == sorted(set(steps)), "no step twice, none out of order"
    add([record for record in lines if record["kind"] in ("train", "validation", "routing")])
    return digest.hexdigest()


@pytest.fixture(scope="module")
def undisturbed(runner: Runner, data: Path, tmp_path_factory: pytest.TempPathFactory):
    """The ending of a run that nobody disturbed, and how long it took."""
    out = tmp_path_factory.mktemp("undisturbed")
    started = time.monotonic()
    assert runner.run(command(data, out)) == 0, runner.log.read_text()
    return ending(out / "r"), time.monotonic() - started


def disturbed(runner: Runner, words: list[str], kills: int, longest: float, **options: Any) -> int:
    """Kill a run at random instants, then let it finish; return how often it was really killed."""
    random.seed(7)
    done = 0
    while done < kills:
        # Early and late ones: the whole way is a run's length from its start.
        status = runner.run(words, random.uniform(0.02, longest), **options)
        assert status in (KILLED, 0), runner.log.read_text()[-3000:]
        if status == 0:
            return done
        done += 1
    assert runner.run(words, **options) == 0, runner.log.read_text()[-3000:]
    return done


def test_twenty_kills_change_nothing(runner: Runner, data: Path, tmp_path: Path, undisturbed):
    expected, seconds = undisturbed
    kills = disturbed(runner, command(data, tmp_path), 20, 0.45 * seconds)
    assert kills == 20, "the run was over too soon to be killed often"
    assert ending(tmp_path / "r") == expected


def test_kills_while_a_checkpoint_is_written(runner, data, tmp_path: Path, undisturbed) -> None:
    """Half of the time is spent between writing a checkpoint and giving it its name."""
    expected, seconds = undisturbed
    kills = disturbed(runner, command(data, tmp_path), 8, 0.9 * seconds, slow_saves=0.03)
    assert kills >= 3 and ending(tmp_path / "r") == expected
    assert not list((tmp_path / "r" / "checkpoints").glob("*.tmp"))


def test_kills_with_data_workers(runner: Runner, data: Path, tmp_path: Path, undisturbed) -> None:
    expected, seconds = undisturbed
    words = command(data, tmp_path, "--num-workers", "2", "--cache", "none")
    kills = disturbed(runner, words, 6, seconds)
    assert kills >= 2 and ending(tmp_path / "r") == expected


def test_another_seed_ends_elsewhere(runner: Runner, data, tmp_path: Path, undisturbed) -> None:
    """The control: the digest sees what was learned."""
    assert runner.run(command(data, tmp_path, seed=2)) == 0
    assert ending(tmp_path / "r") != undisturbed[0]


def test_a_hundred_saves_under_kill_9(tmp_path: Path) -> None:
    """No damaged checkpoint is ever taken for a good one, and one good one is always there."""
    folder = tmp_path / "checkpoints"
    saved = CheckpointFolder(folder)

    def values(step: int) -> dict[str, Any]:
        model = {"weight": torch.full((20_000,), float(step))}
        return {"format": 1, "config": {}, "model": model, "ema": None, "step": step}

    saved.save(values(0), step=0)
    random.seed(3)
    newest = 0
    for _ in range(100):
        pid = os.fork()
        if pid == 0:
            step = newest
            while True:
                step += 1
                CheckpointFolder(folder).save(values(step), step=step)
        time.sleep(random.uniform(0.001, 0.02))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        found, problems = CheckpointFolder(folder).newest()
        assert found is not None and not problems
        step = found.values["step"]
        assert step >= newest and bool((found.values["model"]["weight"] == step).all())
        newest = step
    assert newest > 20, "some saves were finished"
