"""``benchmark predict``: the engine of `predict` against scripts that do one thing after the other.

The baselines are the script that every repository has (Pillow, one image at a time), the same with
our readers and writers, batches without overlap, and the forward pass alone, which no loop around
it can beat.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from camoxpert import console
from camoxpert.benchmark.common import (
    Ratio,
    Report,
    heading,
    interleaved,
    milliseconds,
    paired_ratio,
    quartiles,
    show_table,
)
from camoxpert.benchmark.data import write_images
from camoxpert.config import Config, to_dict
from camoxpert.inference.devices import DeviceEngine
from camoxpert.inference.local import LocalEngine, find_batch_size
from camoxpert.inference.photos import PhotoSpec, PhotoStages
from camoxpert.inference.plan import model_digest
from camoxpert.inference.prediction import PICTURES, Prediction
from camoxpert.inference.predictor import Predictor, load_predictor
from camoxpert.inference.score import enlarged
from camoxpert.inference.sources import Photo, find_photos
from camoxpert.models.camoxpert import build_model
from camoxpert.runs.checkpoint import FORMAT, Checkpoint, CheckpointValues
from camoxpert.runs.jobs import JobSummary
from camoxpert.runs.share import write_shared
from camoxpert.runtime.device import Precision, device_name, wait_for
from camoxpert.text import count as counted

FORWARD = "the forward pass alone"
SCRIPT = "one image at a time, Pillow"
SINGLE = "one image at a time, our files"
BATCHED = "batches, no overlap"
ENGINE = "the engine"
WRITTEN: dict[str, tuple[str, ...]] = {"all four outputs": PICTURES, "masks only": ("mask",)}
PROCESSES_NOTE = "two processes, one thread each, over one with one thread"


@dataclass(frozen=True)
class Sizes:
    """What is generated and how it is predicted.

    Attributes:
        images: JPEGs of each size.
        sizes: (height, width) of the JPEGs.
        batch_size: images per forward pass.
        rounds: timed runs of each variant, in turns.
    """

    images: int = 48
    sizes: tuple[tuple[int, int], ...] = ((768, 1024),)
    batch_size: int = 8
    rounds: int = 3


@dataclass(frozen=True)
class Case:
    """One measurement: photos, and what is written for each.

    Attributes:
        predictor: the model.
        photos: JPEGs.
        kinds: outputs.
        batch_size: images per forward pass.
        scratch: folder for results.
    """

    predictor: Predictor
    photos: Sequence[Photo]
    kinds: tuple[str, ...]
    batch_size: int
    scratch: Path


def run(
    config: Config, sizes: Sizes, *, device: torch.device, precision: Precision, processes: bool
) -> Report:
    """Measure, print, and return the JSON file's content.

    Args:
        config: of the network; its weights are random, which changes no time.
        sizes: of the generated photos and batches.
        device: of the model.
        precision: number format of the forward pass.
        processes: also measure two processes, on a CPU.
    """
    report = heading(
        "predict",
        {
            "backbone": config.model.backbone,
            "img_size": config.data.img_size,
            "images": sizes.images,
            "batch_size": sizes.batch_size,
            "rounds": sizes.rounds,
            "precision": precision.name,
            "device": device_name(device),
        },
    )
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        predictor = load_predictor(
            _write_model(root / "model", config), device=str(device), precision=precision.name
        )
        figures = {}
        for height, width in sizes.sizes:
            place = root / f"{width}x{height}"
            write_images(place, sizes.images, height, width)
            photos = find_photos([str(place / "Imgs")])
            for name, kinds in WRITTEN.items():
                title = f"{width}x{height}, {name}"
                case = Case(predictor, photos, kinds, sizes.batch_size, root / "out")
                figures[title] = measure(case, sizes.rounds, title)
        report["cases"] = figures
        if processes:
            last = Case(predictor, photos, ("mask",), sizes.batch_size, root / "out")
            report["processes"] = measure_processes(last, root / "model", sizes.rounds)
    return report


def measure(case: Case, rounds: int, title: str) -> dict[str, Any]:
    """Time all variants in turns; print and return images per second, ratios and shares."""
    engine_runs: list[JobSummary] = []
    fresh = (case.scratch / f"{number}" for number in count())
    inputs = _prepared(case)

    def engine() -> None:
        stages = PhotoStages(case.predictor, next(fresh), case.kinds, 0.5)
        local = LocalEngine(stages, batch_size=case.batch_size)
        for _ in local.results(case.photos):
            pass
        engine_runs.append(local.summary())

    variants: dict[str, Callable[[], object]] = {
        FORWARD: lambda: forward_alone(case, inputs),
        SCRIPT: lambda: one_by_one(case, next(fresh), pillow=True),
        SINGLE: lambda: one_by_one(case, next(fresh), pillow=False),
        BATCHED: lambda: in_batches(case, next(fresh)),
        ENGINE: engine,
    }
    seconds = interleaved(variants, rounds=rounds, description=title)
    number = len(case.photos)
    rates = {name: 1e3 * number / milliseconds(taken) for name, taken in seconds.items()}
    ratios: dict[str, Ratio] = {
        name: paired_ratio(taken, seconds[ENGINE]) for name, taken in seconds.items()
    }
    shares = engine_runs[-1]["workers"][0]["loop_shares"]
    console.say(f"{title}:")
    show_table(
        [
            ["variant", "images/s", "the engine is faster by (quartiles)"],
            *([name, f"{rate:.1f}", quartiles(ratios[name])] for name, rate in rates.items()),
        ]
    )
    where = ", ".join(f"{place} {share:.0%}" for place, share in shares.items())
    console.say(f"  the engine's loop: {where}")
    return {
        "images_per_second": rates,
        "engine_over": ratios,
        "engine_of_forward_alone": paired_ratio(seconds[FORWARD], seconds[ENGINE]),
        "engine_loop_shares": shares,
        "engine_thread_seconds": engine_runs[-1]["workers"][0]["thread_seconds"],
    }


def measure_processes(case: Case, model: Path, rounds: int) -> dict[str, Any]:
    """Return how two CPU processes compare with one; the loading of the model is left out."""
    spec = PhotoSpec(
        checkpoint=str(model),
        model=model_digest(case.predictor.checkpoint),
        precision=case.predictor.precision.name,
        max_pixels=case.predictor.max_pixels,
        output=str(case.scratch / "processes"),
        kinds=case.kinds,
        threshold=0.5,
    )
    rates: dict[str, list[float]] = {"one": [], "two": []}
    for _ in console.track(range(rounds), "processes"):
        for name, devices in (("one", ("cpu",)), ("two", ("cpu", "cpu"))):
            engine = DeviceEngine(spec, devices, batch_size=case.batch_size, threads=1)
            for _ in engine.results(case.photos):
                pass
            workers = engine.summary()["workers"]
            longest = max(worker["wall_seconds"] for worker in workers)
            rates[name].append(len(case.photos) / longest)
    ratio = paired_ratio(rates["two"], rates["one"])
    console.say(f"{PROCESSES_NOTE}, {counted(len(case.photos), 'image')}: {quartiles(ratio)}")
    return {"images_per_second": rates, "two_over_one": ratio}


@torch.inference_mode()
def compare_batch_sizes(
    config: Config,
    device: torch.device,
    precision: Precision,
    sizes: Sequence[int] = (8, 16, 32, 64),
) -> dict[str, Any]:
    """Return the images per second of fixed batch sizes beside those of the chosen one."""
    with tempfile.TemporaryDirectory() as folder:
        model = _write_model(Path(folder), config)
        predictor = load_predictor(model, device=str(device), precision=precision.name)
    stages = PhotoStages(predictor, Path(), (), 0.5)
    chosen, reason = find_batch_size(stages, None)
    one = stages.example()

    def forward(size: int) -> Callable[[], None]:
        batch = one.expand(size, *one.shape[1:]).contiguous()

        def call() -> None:
            predictor.logits(batch)
            wait_for(device)

        return call

    variants = {str(size): forward(size) for size in sorted({*sizes, chosen})}
    seconds = interleaved(variants, rounds=5, description="batch sizes")
    rates = {name: 1e3 * int(name) / milliseconds(taken) for name, taken in seconds.items()}
    best = max(rates[str(size)] for size in sizes)
    console.say(
        f"batch size {chosen} ({reason}): {rates[str(chosen)] / best:.2f} of the best fixed one"
    )
    return {"chosen": chosen, "reason": reason, "images_per_second": rates}


@torch.inference_mode()
def forward_alone(case: Case, inputs: Sequence[torch.Tensor]) -> None:
    """Run the model on images that are in memory, and drop the result."""
    for batch in inputs:
        case.predictor.logits(batch.to(case.predictor.device))
    wait_for(case.predictor.device)


@torch.inference_mode()
def one_by_one(case: Case, output: Path, *, pillow: bool) -> None:
    """Read, predict and write one image after the other."""
    predictor = case.predictor
    stages = PhotoStages(predictor, output, case.kinds, 0.5)
    for photo in case.photos:
        if not pillow:
            sample = stages.read(photo)
            logits = predictor.logits(torch.stack(sample.inputs).to(predictor.device)).cpu()
            stages.finish(photo, sample, list(logits))
            continue
        with Image.open(photo.path) as opened:
            image = opened.convert("RGB")
        small = np.asarray(image.resize((predictor.img_size, predictor.img_size)))
        batch = torch.from_numpy(small.transpose(2, 0, 1).copy())[None].to(predictor.device)
        logits = predictor.logits(batch)
        found = Prediction(
            photo.name,
            np.asarray(image),
            enlarged(logits[0], (image.height, image.width)).cpu().numpy(),
            0.0,
        )
        _save_with_pillow(found, output, case.kinds)


def _save_with_pillow(found: Prediction, output: Path, kinds: Sequence[str]) -> None:
    level = (found.probability_HW * 255).astype(np.uint8)
    pictures: Mapping[str, Callable[[], np.ndarray]] = {
        "map": lambda: level,
        "mask": lambda: np.where(found.mask_HW, np.uint8(255), np.uint8(0)),
        "cutout": found.cutout,
        "overlay": found.overlay,
    }
    for kind in kinds:
        folder = output / kind
        folder.mkdir(parents=True, exist_ok=True)
        suffix = "jpg" if kind == "overlay" else "png"
        Image.fromarray(pictures[kind]()).save(folder / f"{found.name}.{suffix}")


@torch.inference_mode()
def in_batches(case: Case, output: Path) -> None:
    """Read a batch, predict it, write it; one after the other."""
    stages = PhotoStages(case.predictor, output, case.kinds, 0.5)
    for start in range(0, len(case.photos), case.batch_size):
        photos = case.photos[start : start + case.batch_size]
        samples = [stages.read(photo) for photo in photos]
        batch = torch.stack([sample.inputs[0] for sample in samples])
        logits = case.predictor.logits(batch.to(case.predictor.device)).cpu()
        for photo, sample, output_1HW in zip(photos, samples, logits, strict=True):
            stages.finish(photo, sample, [output_1HW])


def _prepared(case: Case) -> list[torch.Tensor]:
    """Return all photos as batches in memory."""

    def batches() -> Iterator[torch.Tensor]:
        stages = PhotoStages(case.predictor, case.scratch, (), 0.5)
        for start in range(0, len(case.photos), case.batch_size):
            photos = case.photos[start : start + case.batch_size]
            yield torch.stack([stages.read(photo).inputs[0] for photo in photos])

    return list(batches())


def _write_model(folder: Path, config: Config) -> Path:
    """Write a model with random weights as one that can be loaded."""
    started = time.monotonic()
    model = build_model(config.model, sides=(config.data.img_size,))
    values: CheckpointValues = {
        "format": FORMAT,
        "config": to_dict(config),
        "model": model.state_dict(),
    }
    write_shared(folder, Checkpoint(folder, config, values))
    console.note(f"a model with random weights in {time.monotonic() - started:.1f} s")
    return folder
