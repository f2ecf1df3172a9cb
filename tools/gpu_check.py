"""Times the training step and runs a short real training; writes one JSON file.

Called by ``tools/gpu_check.sh``. All ratios are taken between variants that take turns in one
process, so that a drifting clock or a neighbour meets all of them alike.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from camoxpert.cli import main
from camoxpert.config import Config, build_config
from camoxpert.losses import total_loss
from camoxpert.models.build import build_model
from camoxpert.training.optim import build_optimizer


def interleaved(
    variants: dict[str, Callable[[], None]], *, repeats: int, device: torch.device
) -> dict[str, float]:
    """Return the median milliseconds of each variant; the variants take turns."""
    times: dict[str, list[float]] = {name: [] for name in variants}
    for step in range(repeats + 3):
        for name, function in variants.items():
            synchronize(device)
            started = time.perf_counter()
            function()
            synchronize(device)
            if step >= 3:
                times[name].append((time.perf_counter() - started) * 1e3)
    return {name: statistics.median(values) for name, values in times.items()}


def synchronize(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def step_functions(
    config: Config, batch_size: int, device: torch.device
) -> dict[str, Callable[[], None]]:
    """Return whole training steps: ours per dispatch back end, and the bare backbone's."""
    model = build_model(config.model).to(device).train()
    optimizer = build_optimizer(model, config.optim)
    size = config.data.img_size
    images = torch.randint(0, 256, (batch_size, 3, size, size), dtype=torch.uint8, device=device)
    masks = (torch.rand(batch_size, 1, size, size, device=device) > 0.7).float()
    normalised = images.float() / 255

    def full(dispatch: str) -> None:
        for moe in model.moe_levels:
            moe.dispatch = dispatch
        with torch.autocast(device.type, dtype=torch.bfloat16):
            output = model(images)
        loss, _ = total_loss(output, masks, config.loss)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def backbone() -> None:
        with torch.autocast(device.type, dtype=torch.bfloat16):
            maps = model.backbone(normalised)
            loss = sum((m.float().mean() for m in maps), start=torch.zeros((), device=device))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return {
        "sorted": lambda: full("sorted"),
        "loop": lambda: full("loop"),
        "backbone": backbone,
    }


def short_training(folder: Path, *, smoke: bool) -> dict[str, Any]:
    """Train on generated camouflage through the command line; return scores and speed."""
    size, train, epochs = (64, 32, 1) if smoke else (352, 768, 4)
    backbone = "tiny_test" if smoke else "edgenext_base"
    data = folder / "data"
    main(
        ["synthesize", "toy", str(data), "--train", str(train), "--test", "32", "--size", str(size)]
    )
    started = time.perf_counter()
    words = [
        *(
            "train",
            "--dataset-path",
            str(data),
            "--checkpoint-dir",
            str(folder),
            "--run-name",
            "short",
        ),
        *("--backbone", backbone, "--no-pretrained", "--img-size", str(size), "--batch-size", "16"),
        *("--epochs", str(epochs), "--lr", "1e-3", "--precision", "bf16", "--no-tensorboard"),
    ]
    code = main(words)
    seconds = time.perf_counter() - started
    run = folder / "short"
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [r for r in records if r["kind"] == "train"]
    return {
        "command": " ".join(words),
        "exit_code": code,
        "seconds": seconds,
        "phases": json.loads((run / "run.json").read_text())["phases"],
        "first_loss": steps[0]["loss"],
        "last_loss": steps[-1]["loss"],
        "images_per_second": statistics.median(r["images_per_second"] for r in steps),
        "data_wait": statistics.median(r["data_wait"] for r in steps),
        "scores": json.loads((run / "evaluation" / "toy.json").read_text())["scores"],
    }


def commit() -> str:
    """Return the short commit of this checkout, or ``unknown``."""
    try:
        done = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.strip()


def check(output: Path, *, smoke: bool, tests_exit_code: int | None) -> int:
    """Measure everything and write the JSON file."""
    if not torch.cuda.is_available() and not smoke:
        print("No CUDA device: nothing measured. --smoke runs the same path on a CPU.")
        return 1
    device = torch.device("cuda" if torch.cuda.is_available() and not smoke else "cpu")
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu-smoke"
    settings = {"model.pretrained": False, "model.backbone": "tiny_test", "data.img_size": 64}
    if not smoke:
        settings |= {"model.backbone": "edgenext_base", "data.img_size": 352}
    config = build_config(settings)
    batch_size = 2 if smoke else 32
    torch.manual_seed(0)
    functions = step_functions(config, batch_size, device)
    times = interleaved(functions, repeats=2 if smoke else 15, device=device)
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    result = {
        "machine": {
            "device": name,
            "python": platform.python_version(),
            "torch": torch.__version__,
        },
        "commit": commit(),
        "tests_exit_code": tests_exit_code,
        "step": {
            "backbone": config.model.backbone,
            "img_size": config.data.img_size,
            "batch_size": batch_size,
            "precision": "bf16",
            "milliseconds": times,
            "full_over_backbone": times["sorted"] / times["backbone"],
            "loop_over_sorted": times["loop"] / times["sorted"],
            "images_per_second": batch_size / times["sorted"] * 1e3,
            "peak_memory_bytes": peak,
        },
    }
    with tempfile.TemporaryDirectory() as folder:
        result["training"] = short_training(Path(folder), smoke=smoke)
    output.mkdir(parents=True, exist_ok=True)
    safe = re.sub(r"[^\w.-]+", "-", name).lower()
    path = output / f"{safe}-{result['commit']}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result["step"], indent=1))
    print(f"written {path}")
    return 0 if result["training"]["exit_code"] == 0 else 1


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--smoke", action="store_true", help="small sizes on a CPU")
    parser.add_argument("--tests-exit-code", type=int, default=None)
    options = parser.parse_args()
    sys.exit(check(options.output, smoke=options.smoke, tests_exit_code=options.tests_exit_code))
