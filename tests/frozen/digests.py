"""Short training runs, and the numbers that they end at."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from camoxpert.cli import main

STARTER = Path(__file__).with_name("starter.py")
FAMILIES = ("specialist", "uniform")
# Name -> processes, and whether the run is stopped by SIGTERM and goes on.
VARIANTS = {
    "one process": (1, False),
    "one process, stopped": (1, True),
    "two processes": (2, False),
    "two processes, stopped": (2, True),
}
OTHER_SEED = "other seed"
STEPS = 6
# The runs of one group differ in nothing but the variant; each step sees 8 images.
SETTINGS = (
    *("--backbone", "tiny_test", "--no-pretrained", "--img-size", "32", "--num-experts", "3"),
    *("--num-workers", "0", "--device", "cpu", "--val-fraction", "0.1", "--cache", "none"),
    *("--epochs", "2", "--stage1-epochs", "1", "--router-warmup", "1"),
    *("--lr", "2.5e-4", "data.augment.strength=1"),
    *("--accumulation-steps", "2", "--no-tensorboard", "--no-report", "--no-test"),
    *("model.width=16", "model.detail_width=8", "optim.router_bias_rate=0.01", "run.log_every=1"),
)


def environment() -> str:
    """Name what the last bits of a result depend on."""
    others = ("numpy", "timm", "albumentations", "opencv-python-headless")
    versions = [f"{name} {metadata.version(name)}" for name in others]
    machine = [torch.backends.cpu.get_cpu_capability(), platform.machine(), processor()]
    return ", ".join([f"torch {torch.__version__}", *versions, *machine])


def processor() -> str:
    """Return the maker of the processor: the libraries of linear algebra look at it, too."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    makers = [line.partition(":")[2].strip() for line in lines if line.startswith("vendor_id")]
    return makers[0] if makers else "unknown"


def request(data: Path, out: Path, family: str, ranks: int, seed: int, stop: bool) -> dict:
    words = ["train", "--dataset-path", str(data), "--checkpoint-dir", str(out)]
    words += ["--run-name", "r", "--expert-family", family, "--seed", str(seed)]
    words += ["--batch-size", str(4 // ranks), *SETTINGS]
    return {
        "arguments": words,
        "ranks": ranks,
        "log": str(out.with_suffix(".log")),
        "stop_after": str(out / "r" / "metrics.jsonl") if stop else None,
    }


def measure(folder: Path) -> dict[str, dict[str, Any]]:
    """Train all variants of both families; return family -> variant -> numbers."""
    data = folder / "toy"
    words = f"synthesize toy {data} --train 27 --test 0 --size 32 --difficulty 0.1 --seed 0"
    assert main(words.split()) == 0
    places: dict[Path, tuple[str, str]] = {}
    requests, expected = [], []
    for family in FAMILIES:
        for variant, (ranks, stopped) in VARIANTS.items():
            out = folder / f"run{len(places)}"
            places[out] = family, variant
            for stop in (True, False) if stopped else (False,):
                requests.append(request(data, out, family, ranks, 1, stop))
                expected.append([143 if stop else 0] * ranks)
    control = folder / f"run{len(places)}"
    places[control] = FAMILIES[0], OTHER_SEED
    requests.append(request(data, control, FAMILIES[0], 1, 2, False))
    expected.append([0])
    done = subprocess.run(
        [sys.executable, str(STARTER)],
        input=json.dumps(requests),
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        timeout=240,
        env=os.environ | {"OMP_NUM_THREADS": "1", "NO_ALBUMENTATIONS_UPDATE": "1"},
    )
    codes = json.loads(done.stdout)
    logs = "\n".join(path.read_text()[-2000:] for path in sorted(folder.glob("run*.log")))
    assert codes == expected, f"{codes}\n{logs}"
    result: dict[str, dict[str, Any]] = {family: {} for family in FAMILIES}
    for out, (family, variant) in places.items():
        resumed = VARIANTS.get(variant, (1, False))[1]
        assert ("resumed" in out.with_suffix(".log").read_text()) is resumed
        result[family][variant] = numbers(out / "r")
    return result


def numbers(run: Path) -> dict[str, Any]:
    """Return what a run folder says was learned."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [record for record in records if record["kind"] == "train"]
    assert [record["step"] for record in steps] == list(range(1, STEPS + 1))
    scored = [record["scores"] for record in records if record["kind"] == "validation"]
    last = max((run / "checkpoints").glob("step_*.pt"))
    weights = {
        name: torch.load(path, map_location="cpu", weights_only=True)["model"]
        for name, path in (("best", run / "checkpoints" / "best.pt"), ("last", last))
    }
    return {
        "losses": [rounded(record["loss"]) for record in steps],
        "scores": [{name: rounded(v) for name, v in scores.items()} for scores in scored],
        "names": names_digest(weights["last"]),
        "best": weights_digest(weights["best"]),
        "last": weights_digest(weights["last"]),
    }


def rounded(value: float | None) -> float | None:
    """Return a number at eight digits."""
    return None if value is None else float(f"{value:.8g}")


def names_digest(state: dict[str, torch.Tensor]) -> str:
    """Return how many weights there are, and a digest of their names and shapes."""
    lines = "\n".join(f"{name} {tuple(state[name].shape)}" for name in sorted(state))
    return f"{len(state)} {hashlib.sha256(lines.encode()).hexdigest()}"


def weights_digest(state: dict[str, torch.Tensor]) -> str:
    """Return a digest of the weights' bytes, in the order of their names."""
    digest = hashlib.sha256()
    for name in sorted(state):
        digest.update(state[name].contiguous().numpy().tobytes())
    return digest.hexdigest()
