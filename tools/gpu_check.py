"""Run the benchmarks and a short real training; write one JSON file.

Called by ``tools/gpu_check.sh``.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from camoxpert.benchmark import data, moe, predict, quality, quality_report, relight, train
from camoxpert.cli import main
from camoxpert.config import build_config
from camoxpert.pages.scored import run_results
from camoxpert.runs.info import git_commit
from camoxpert.runtime.device import Precision, device_name


def short_training(folder: Path, *, smoke: bool) -> dict[str, Any]:
    """Train on generated camouflage through the command line, then profile the same step.

    Returns:
        scores, speed and the profile.
    """
    size, images, epochs = (32, 16, 1) if smoke else (352, 768, 4)
    backbone = "tiny_test" if smoke else "edgenext_base"
    data = folder / "data"
    main(["synthesize", "toy", str(data), "--train", str(images), "--test", "4" if smoke else "32",
          "--size", str(size)])  # fmt: skip
    started = time.perf_counter()
    common = ["--dataset-path", str(data), "--backbone", backbone, "--no-pretrained"]
    common += ["--img-size", str(size), "--batch-size", "8" if smoke else "16"]
    # On a CPU without bf16 units the smoke test would take minutes.
    common += ["--precision", "fp32" if smoke else "bf16", "--num-experts", "2" if smoke else "7"]
    words = ["train", *common, "--checkpoint-dir", str(folder), "--run-name", "short"]
    words += ["--epochs", str(epochs), "--lr", "1e-3", "--no-tensorboard"]
    code = main(words)
    seconds = time.perf_counter() - started
    figures = folder / "profile.json"
    profiled = main(["profile", *common, "--steps", "2" if smoke else "20", "-o", str(figures)])
    run = folder / "short"
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [r for r in records if r["kind"] == "train"]
    return {
        "command": " ".join(words),
        "exit_code": code or profiled,
        "seconds": seconds,
        "phases": json.loads((run / "run.json").read_text())["phases"],
        "first_loss": steps[0]["loss"],
        "last_loss": steps[-1]["loss"],
        "images_per_second": statistics.median(r["images_per_second"] for r in steps),
        "data_wait": statistics.median(r["data_wait"] for r in steps),
        "scores": run_results(run)[0]["scores"],
        "profile": json.loads(figures.read_text()),
        "memory": json.loads((run / "run.json").read_text())["batch"],
    }


def decoders(*, smoke: bool) -> dict[str, Any]:
    """Time the training step and the inference of our decoder, its dense twins and its peers."""
    settings = {
        "model.backbone": "tiny_test" if smoke else "edgenext_base",
        "data.img_size": 32 if smoke else 352,
        "train.batch_size": 2 if smoke else 16,
        "train.device": "cpu" if smoke else "cuda",
        "train.precision": "fp32" if smoke else "bf16",
    }
    arms = quality.build_arms(build_config(settings), ["moe"] if smoke else None, {})
    return dict(quality_report.measure_costs(arms, rounds=1 if smoke else 10))


def check(output: Path, *, smoke: bool, tests_exit_code: int | None) -> int:
    """Measure everything, write the JSON file, and return the exit code."""
    if not torch.cuda.is_available() and not smoke:
        print("No CUDA device: nothing measured. --smoke runs the same path on a CPU.")
        return 1
    device = torch.device("cuda" if torch.cuda.is_available() and not smoke else "cpu")
    name = "cpu-smoke" if smoke else device_name(device)
    settings = {"model.pretrained": False, "model.backbone": "tiny_test", "data.img_size": 32}
    if not smoke:
        settings |= {"model.backbone": "edgenext_base", "data.img_size": 352}
    config = build_config(settings)
    precision = Precision(None if smoke else torch.bfloat16, False, "fp32" if smoke else "bf16")
    rounds = 2 if smoke else 15
    maps = ((2, 4),) if smoke else moe.SIZES
    result: dict[str, Any] = {
        "machine": {
            "device": name,
            "python": platform.python_version(),
            "torch": torch.__version__,
        },
        "commit": git_commit(Path(__file__).parents[1]) or "unknown",
        "tests_exit_code": tests_exit_code,
        "moe": moe.run(device=device, sizes=maps, rounds=rounds),
        "step": train.run(
            train.Subject(config, device, precision, batch_size=2 if smoke else 32),
            rounds=rounds,
        ),
    }
    sizes = data.Sizes(
        images=16 if smoke else 64,
        height=96 if smoke else 768,
        width=128 if smoke else 1024,
        img_size=32 if smoke else 352,
        batch_size=8 if smoke else 32,
        num_workers=2 if smoke else 8,
        rounds=1 if smoke else 5,
    )
    result["data"] = data.run(sizes, device=device, needed=result["step"]["images_per_second"])
    result["decoders"] = decoders(smoke=smoke)
    photos = predict.Sizes(
        # Pillow's writing alone takes half a second an image.
        images=4 if smoke else 32,
        sizes=((96, 128),) if smoke else ((768, 1024),),
        batch_size=2 if smoke else 16,
        rounds=1,
    )
    result["predict"] = predict.run(
        config, photos, device=device, precision=precision, processes=False
    )
    result["batch_sizes"] = predict.compare_batch_sizes(config, device, precision)
    # The serial script needs a minute for a Retinex of 1024 pixels.
    pairs = relight.Sizes(
        images=1 if smoke else 4,
        size=64 if smoke else 352,
        retinex_size=64 if smoke else 256,
        rounds=1 if smoke else 2,
    )
    result["relight"] = relight.run(pairs, device=device)
    with tempfile.TemporaryDirectory() as folder:
        result["training"] = short_training(Path(folder), smoke=smoke)
    output.mkdir(parents=True, exist_ok=True)
    safe = re.sub(r"[^\w.-]+", "-", name).lower()
    path = output / f"{safe}-{result['commit']}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(f"written {path}")
    return 0 if result["training"]["exit_code"] == 0 else 1


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--smoke", action="store_true", help="small sizes on a CPU")
    parser.add_argument("--tests-exit-code", type=int, default=None)
    options = parser.parse_args()
    sys.exit(check(options.output, smoke=options.smoke, tests_exit_code=options.tests_exit_code))
