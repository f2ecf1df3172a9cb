"""Whole runs in other processes, which tests kill, stop and compare."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from camoxpert.files import read_jsonl
from camoxpert.runs.checkpoint import Checkpoint
from camoxpert.runs.log import RunLog
from camoxpert.runs.store import CheckpointFolder
from camoxpert.training.checkpoints import restore
from camoxpert.training.run import Run
from camoxpert.training.trainer import train

RUNNER = Path(__file__).parents[1] / "faults" / "runner.py"
KILLED = -signal.SIGKILL
TINY_SETTINGS = {
    "model.backbone": "tiny_test",
    "model.pretrained": False,
    "model.width": 16,
    "model.detail_width": 8,
    "model.num_experts": 3,
    "data.img_size": 32,
    "data.num_workers": 0,
    "data.augment.strength": 1.0,
    "optim.lr": 2.5e-4,
}
# Measured times, which differ between equal runs.
CLOCKS = ("images_per_second", "data_wait", "gpu", "memory", "time", "seconds")


class Runner:
    """Forks the program from a process that has already imported it; see ``faults/runner.py``."""

    def __init__(self, log: Path) -> None:
        self.log = log
        self.seconds = 0.0
        self._asked = False
        self._start()

    def _start(self) -> None:
        environment = os.environ | {"OMP_NUM_THREADS": "1", "NO_ALBUMENTATIONS_UPDATE": "1"}
        self.process = subprocess.Popen(
            [sys.executable, str(RUNNER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )

    def run(self, arguments: list[str], **options: Any) -> list[int]:
        """Run the program; return the exit codes of all ranks. ``seconds`` is how long it took to
        end."""
        if self._asked:
            # A test ran out of time: its answer is still to come, and not that of this request.
            self.process.kill()
            self.process.wait()
            self._start()
        self.log.unlink(missing_ok=True)
        request = {"arguments": arguments, "log": str(self.log)} | options
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        self._asked = True
        answer = json.loads(self.process.stdout.readline())
        self._asked = False
        self.seconds = answer["seconds"]
        return answer["codes"]

    def said(self) -> str:
        """Return what the last run printed, on one line."""
        return " ".join(self.log.read_text().split()) if self.log.exists() else ""


def command(data: Path, out: Path, *words: str, seed: int = 1, batch: int = 4) -> list[str]:
    """Return the arguments of a tiny two-stage training run.

    On the fault tests' images every epoch has steps of eight images, eight and one. Uniform
    experts cost half of the specialists' time, and no fault depends on what an expert computes.
    """
    base = ["train", "--dataset-path", str(data), "--checkpoint-dir", str(out), "--run-name", "r"]
    base += ["--backbone", "tiny_test", "--no-pretrained", "--img-size", "32"]
    base += ["--batch-size", str(batch), "--accumulation-steps", "2", "--num-experts", "3"]
    base += ["--expert-family", "uniform", "--val-fraction", "0.15"]
    base += ["--epochs", "3", "--stage1-epochs", "1", "--save-every", "1"]
    base += ["--num-workers", "0", "--no-tensorboard", "--no-report", "--no-test"]
    base += ["--seed", str(seed), "--cache-dir", str(out / "cache")]
    # A low rate keeps rounding small; augmentation must repeat after a stop like everything else.
    base += ["--lr", "2.5e-4", "data.augment.strength=1"]
    return [*base, "model.width=16", "model.detail_width=8", "run.log_every=1", *words]


def digest_of(value: Any) -> str:
    """Return a digest of nested containers, tensors and plain values, without measured times."""
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

    add(value)
    return digest.hexdigest()


def ending(run: Path) -> str:
    """Return a digest of everything that was learned and logged."""
    checkpoint, problems = CheckpointFolder(run / "checkpoints").newest()
    assert checkpoint is not None and not problems, (problems, sorted(run.parent.rglob("*")))
    parts = ("model", "ema", "optimizer", "scaler", "state", "rng", "other_rngs")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [record["step"] for record in lines if record["kind"] == "train"]
    assert steps == sorted(set(steps)), "no step twice, none out of order"
    kinds = ("train", "validation", "routing")
    kept = [record for record in lines if record["kind"] in kinds]
    return digest_of([{part: checkpoint.values[part] for part in parts}, kept])


def weights_of(run: Path) -> dict[str, torch.Tensor]:
    """Return the weights of a run's newest checkpoint."""
    checkpoint, _ = CheckpointFolder(run / "checkpoints").newest()
    assert checkpoint is not None
    return checkpoint.values["model"]


def events(run: Path) -> list[str]:
    """Return the texts of a run's events."""
    return [record["text"] for record in records(run, "event")]


def records(run: Path, kind: str) -> list[dict[str, Any]]:
    """Return a run's records of one kind."""
    return [r for r in read_jsonl(run / "metrics.jsonl") if r["kind"] == kind]


def train_in(run: Run, folder: Path, *, resume: Checkpoint | None = None, **options: Any) -> Run:
    """Train a prepared run in a folder, as a session does; return it."""
    folder.mkdir(exist_ok=True)
    run.path = folder
    if resume is not None:
        restore(run, resume)
    run.log = RunLog(folder, **{"tensorboard": False, **options})
    try:
        train(run)
    finally:
        run.log.close()
    return run
