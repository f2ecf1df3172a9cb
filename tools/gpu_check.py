"""Run the benchmarks and a short real training; write one JSON file.

Called by ``tools/gpu_check.sh``.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import signal
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from camoxpert.benchmark import data, moe, predict, quality, quality_report, relight, train
from camoxpert.benchmark.common import interleaved, milliseconds, paired_ratio
from camoxpert.cli import main
from camoxpert.config import build_config
from camoxpert.pages.scored import run_results
from camoxpert.runs.info import git_commit
from camoxpert.runtime.device import Precision, device_name, set_tf32
from camoxpert.runtime.host import usable_cores
from camoxpert.training.compiling import compile_model

LIMIT, LONGER = 60, {"options": 100, "training": 90, "compiled": 110}
"""Most seconds of a section, so that none takes the time of all that follow."""
SECTIONS = (
    *("profile", "options", "decoders", "compiled", "training", "data", "predict", "batch_sizes"),
    *("relight", "step", "moe"),
)


class Over(BaseException):
    """A section took longer than it may; no handler of errors on the way may keep it."""


def words_of_a_run(folder: Path, *, smoke: bool) -> list[str]:
    """Generate camouflage in ``folder``, unless it is there; return the flags of a short run."""
    size = 32 if smoke else 352
    data = folder / "data"
    if not data.is_dir():
        train, test = ("16", "4") if smoke else ("128", "16")
        main(["synthesize", "toy", str(data), "--train", train, "--test", test,
              "--size", str(size)])  # fmt: skip
    words = ["--dataset-path", str(data), "--backbone", "tiny_test" if smoke else "edgenext_base"]
    words += ["--no-pretrained", "--img-size", str(size), "--batch-size", "8" if smoke else "16"]
    # On a CPU without bf16 units the smoke test would take minutes.
    words += ["--precision", "fp32" if smoke else "bf16", "--num-experts", "2" if smoke else "7"]
    return words


def profiled_step(folder: Path, *, smoke: bool) -> dict[str, Any]:
    """Profile the step of a short run through the command line."""
    figures = folder / "profile.json"
    words = words_of_a_run(folder, smoke=smoke)
    code = main(["profile", *words, "--steps", "2" if smoke else "20", "-o", str(figures)])
    if code:
        raise RuntimeError(f"profile ended with {code}")
    return dict(json.loads(figures.read_text()))


def short_training(folder: Path, *, smoke: bool) -> dict[str, Any]:
    """Train on generated camouflage through the command line; return scores and speed."""
    words = ["train", *words_of_a_run(folder, smoke=smoke), "--checkpoint-dir", str(folder)]
    words += ["--run-name", "short", "--epochs", "1" if smoke else "8", "--lr", "1e-3"]
    words += ["--no-tensorboard"]
    started = time.perf_counter()
    code = main(words)
    seconds = time.perf_counter() - started
    run = folder / "short"
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [r for r in records if r["kind"] == "train"]
    info = json.loads((run / "run.json").read_text())
    found = {
        "command": " ".join(words),
        "exit_code": code,
        "seconds": seconds,
        "phases": info["phases"],
        "first_loss": steps[0]["loss"],
        "last_loss": steps[-1]["loss"],
        # The first ones are slow: libraries are loaded, and cuDNN makes its plans.
        "images_per_second": [r["images_per_second"] for r in steps],
        "data_wait": statistics.median(r["data_wait"] for r in steps),
        "memory": info["batch"],
    }
    return found if code else found | {"scores": run_results(run)[0]["scores"]}


def decoders(found: dict[str, Any], *, smoke: bool) -> dict[str, Any]:
    """Time the training step and the inference of our decoder, its dense twin and its peers.

    Args:
        found: receives what was measured, also if the time ends before all is.
        smoke: small sizes on a CPU.
    """
    settings = {
        "model.backbone": "tiny_test" if smoke else "edgenext_base",
        "data.img_size": 32 if smoke else 352,
        "train.batch_size": 2 if smoke else 16,
        "train.device": "cpu" if smoke else "cuda",
        "train.precision": "fp32" if smoke else "bf16",
    }
    names = ["moe", "dense-active", "unet", "fpn", "segformer"]
    for name in names[1 : 2 if smoke else None]:
        # In pairs, each with the mixture.
        arms = quality.build_arms(build_config(settings), [names[0], name], {})
        found[name] = quality_report.measure_costs(arms, rounds=1 if smoke else 7)
        print(name, found[name], flush=True)
    return found


def options(found: dict[str, Any], *, smoke: bool, compiled: bool) -> dict[str, Any]:
    """Time the training step with every number format and memory layout, or compiled.

    Args:
        found: receives each variant, in turns with bf16, also if the time ends before all are.
        smoke: small sizes on a CPU.
        compiled: the compiled variants instead of the others.
    """
    device = torch.device("cpu" if smoke else "cuda")
    settings = {"model.pretrained": False, "model.backbone": "tiny_test", "data.img_size": 32}
    if not smoke:
        settings |= {"model.backbone": "edgenext_base", "data.img_size": 352}
    half = torch.bfloat16
    variants: dict[str, tuple[str, torch.dtype | None, str]] = {
        # name: family of the experts, number format, what else differs
        "fp32 without TF32": ("specialist", None, "no TF32"),
        "fp32 with TF32": ("specialist", None, ""),
        "bf16": ("specialist", half, ""),
        "bf16, four times the images": ("specialist", half, "more"),
        "bf16, channels-last": ("specialist", half, "channels-last"),
        # No groups of images: shapes that never change, and no wait for the host.
        "bf16, every expert on every image": ("specialist", half, "dense"),
        "bf16, uniform experts": ("uniform", half, ""),
        "bf16, backbone compiled": ("specialist", half, "compiled"),
        "bf16, uniform experts, compiled": ("uniform", half, "compiled"),
        "bf16, every expert on every image, compiled": ("specialist", half, "dense compiled"),
    }
    if smoke:
        variants = {name: variants[name] for name in ("fp32 without TF32", "bf16")}
    else:
        variants["fp16"] = ("specialist", torch.float16, "")
        chosen = ("bf16", "bf16, uniform experts")
        variants = {
            name: variant
            for name, variant in variants.items()
            if name in chosen or ("compiled" in variant[2]) is compiled
        }
    # First, as the others are timed in turns with it.
    variants = {"bf16": variants.pop("bf16"), **variants}
    plain: Callable[[], None] | None = None
    for name, (family, dtype, other) in variants.items():
        dispatch = "dense" if "dense" in other else "auto"
        config = build_config(
            {**settings, "model.expert_family": family, "model.dispatch": dispatch}
        )
        precision = Precision(dtype, False, name)
        batch = (2 if smoke else 32) * (4 if other == "more" else 1)
        step = train.Step(train.Subject(config, device, precision, batch_size=batch))
        if other == "channels-last":
            step.model.to(memory_format=torch.channels_last)
        if "compiled" in other:
            compile_model(step.model)

        def call(step: train.Step = step, tf32: bool = other != "no TF32") -> None:
            set_tf32(tf32, device)
            step.full()

        started = time.perf_counter()
        call()
        first_call = time.perf_counter() - started
        if "compiled" in other and not any(m._compiled_call_impl for m in step.model.modules()):
            print(f"{name}: the compiler failed, nothing is timed")
            continue
        plain = plain or call
        calls = {"bf16": plain, name: call}
        seconds = interleaved(calls, rounds=1 if smoke else 7, warmup=0 if smoke else 2)
        found[name] = {
            "milliseconds": milliseconds(seconds[name]),
            "images_per_second": 1e3 * batch / milliseconds(seconds[name]),
            "bf16_over_this": paired_ratio(seconds["bf16"], seconds[name]),
            "first_call_seconds": first_call,
        }
        print(f"{name}: {found[name]['milliseconds']:.1f} ms", flush=True)
    set_tf32(True, device)
    return found


def contents(folder: Path, *, smoke: bool) -> dict[str, Callable[[dict[str, Any]], object]]:
    """Return the sections of the report in their order; each is given those before it.

    Args:
        folder: receives data and runs.
        smoke: small sizes on a CPU.
    """
    device = torch.device("cpu" if smoke else "cuda")
    settings = {"model.pretrained": False, "model.backbone": "tiny_test", "data.img_size": 32}
    if not smoke:
        settings |= {"model.backbone": "edgenext_base", "data.img_size": 352}
    config = build_config(settings)
    precision = Precision(None if smoke else torch.bfloat16, False, "fp32" if smoke else "bf16")
    rounds = 2 if smoke else 7
    sizes = data.Sizes(
        images=16 if smoke else 64,
        height=96 if smoke else 768,
        width=128 if smoke else 1024,
        img_size=32 if smoke else 352,
        batch_size=8 if smoke else 32,
        num_workers=2 if smoke else 8,
        rounds=1 if smoke else 3,
    )
    photos = predict.Sizes(
        # Pillow's writing alone takes half a second an image.
        images=4 if smoke else 32,
        sizes=((96, 128),) if smoke else ((768, 1024),),
        batch_size=2 if smoke else 16,
        rounds=1,
    )
    # The serial script needs a minute for a Retinex of 1024 pixels.
    pairs = relight.Sizes(
        images=1 if smoke else 4,
        size=64 if smoke else 352,
        retinex_size=64 if smoke else 256,
        rounds=1 if smoke else 2,
    )

    return {
        "profile": lambda _: profiled_step(folder, smoke=smoke),
        "options": lambda found: options(
            found.setdefault("options", {}), smoke=smoke, compiled=False
        ),
        "decoders": lambda found: decoders(found.setdefault("decoders", {}), smoke=smoke),
        "compiled": lambda found: options(
            found.setdefault("compiled", {}), smoke=smoke, compiled=True
        ),
        "training": lambda _: short_training(folder, smoke=smoke),
        "data": lambda found: data.run(
            sizes,
            device=device,
            needed=found.get("options", {}).get("bf16", {}).get("images_per_second"),
        ),
        "predict": lambda _: predict.run(
            config, photos, device=device, precision=precision, processes=False
        ),
        "batch_sizes": lambda _: predict.compare_batch_sizes(config, device, precision),
        "relight": lambda _: relight.run(pairs, device=device),
        "step": lambda _: train.run(
            train.Subject(config, device, precision, batch_size=2 if smoke else 32), rounds=rounds
        ),
        "moe": lambda _: moe.run(
            device=device, sizes=((2, 4),) if smoke else moe.SIZES, rounds=rounds
        ),
    }


def _over(number: int, frame: object) -> None:
    raise Over("the section took longer than it may")


def check(
    output: Path, *, smoke: bool, tests_exit_code: int | None, only: Sequence[str] | None
) -> int:
    """Measure everything, write the JSON file after each section, and return the exit code.

    A section that fails or takes too long is recorded with its error, and the others still run.
    """
    if not torch.cuda.is_available() and not smoke:
        print("No CUDA device: nothing measured. --smoke runs the same path on a CPU.")
        return 1
    name = "cpu-smoke" if smoke else device_name(torch.device("cuda"))
    commit = git_commit(Path(__file__).parents[1]) or "unknown"
    result: dict[str, Any] = {
        "machine": {
            "device": name,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "cores": usable_cores(),
        },
        "commit": commit,
        "tests_exit_code": tests_exit_code,
        "seconds": {},
        "failed": {},
    }
    if not smoke:
        signal.signal(signal.SIGALRM, _over)
    output.mkdir(parents=True, exist_ok=True)
    safe = re.sub(r"[^\w.-]+", "-", name).lower()
    path = output / f"{safe}-{commit}.json"
    work = tempfile.TemporaryDirectory()
    for section, measure in contents(Path(work.name), smoke=smoke).items():
        if only and section not in only:
            continue
        started = time.perf_counter()
        print(f"== {section}", flush=True)
        if not smoke:
            signal.alarm(LONGER.get(section, LIMIT))
        try:
            result[section] = measure(result)
        except (Exception, Over):
            result["failed"][section] = traceback.format_exc()
            print(result["failed"][section], flush=True)
        if not smoke:
            signal.alarm(0)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        result["seconds"][section] = round(time.perf_counter() - started, 1)
        print(f"== {section}: {result['seconds'][section]} s", flush=True)
        path.write_text(json.dumps(result, indent=1) + "\n")
    work.cleanup()
    print(f"written {path}")
    return 1 if result["failed"] or result.get("training", {}).get("exit_code") else 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--smoke", action="store_true", help="small sizes on a CPU")
    parser.add_argument("--tests-exit-code", type=int, default=None)
    parser.add_argument("--only", nargs="+", choices=SECTIONS, help="leave out the others")
    given = parser.parse_args()
    sys.exit(
        check(
            given.output, smoke=given.smoke, tests_exit_code=given.tests_exit_code, only=given.only
        )
    )
