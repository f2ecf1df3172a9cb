"""``benchmark metrics``: the metric engine against pysodmetrics, in one run on the same pairs."""

from __future__ import annotations

import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypedDict

import cv2
import numpy as np
import numpy.typing as npt

from camoxpert import console
from camoxpert.benchmark.common import (
    Ratio,
    Report,
    heading,
    interleaved,
    milliseconds,
    paired_ratio,
    show_table,
)
from camoxpert.data.files.image_io import write_png
from camoxpert.errors import ConfigError
from camoxpert.evaluation.maps.find import MapJob, MapTask
from camoxpert.evaluation.maps.score import MapOptions, score_chunks
from camoxpert.metrics import FAST_KEYS, RESULT_KEYS
from camoxpert.metrics.histogram import joint_histogram
from camoxpert.metrics.inputs import checked_mask, checked_prediction
from camoxpert.metrics.scoring import count_objects, digest_mask, score_image
from camoxpert.metrics.weighted import weighted_fmeasure

Grey = npt.NDArray[np.uint8]
Mask = npt.NDArray[np.bool_]
Pair = tuple[Grey, Grey]


class OneProcess(TypedDict):
    """Both engines on pairs in memory, one core each."""

    milliseconds_per_pair: dict[str, float]
    ratios: dict[str, Ratio]


class Workers(TypedDict):
    """Our engine on PNG files, by number of worker processes."""

    images_per_second: dict[str, float]
    two_over_one: float


def make_pair(seed: int, height: int, width: int) -> Pair:
    """Return a prediction map like a trained model's, and its mask.

    One to three objects of 1 to 20 % of the image, soft outlines, a false blob, a missed part, and
    zeros elsewhere.
    """
    rng = np.random.default_rng(seed)
    mask = np.zeros((height, width), np.uint8)
    for _ in range(1 + seed % 3):
        _blob(rng, mask, rng.uniform(0.06, 0.22))
    claimed = mask.copy()
    _blob(rng, claimed, rng.uniform(0.02, 0.06))
    missed = np.zeros_like(mask)
    _blob(rng, missed, 0.05)
    claimed[missed > 0] = 0
    coarse = cv2.GaussianBlur(claimed.astype(np.float32) / 255, (0, 0), rng.uniform(3, 9))
    grain = cv2.GaussianBlur(rng.standard_normal((height, width)).astype(np.float32), (0, 0), 6)
    logits = 16 * (coarse - 0.5) + 1.5 * grain / grain.std()
    return (255 / (1 + np.exp(-logits))).astype(np.uint8), mask


def _blob(rng: np.random.Generator, mask: Grey, radius: float) -> None:
    """Draw a wavy disc; its radius is a share of the image's shorter side."""
    height, width = mask.shape
    angle = np.linspace(0, 2 * np.pi, 90, endpoint=False)
    waves = sum(
        rng.uniform(0, 0.25 / k) * np.cos(k * angle + rng.uniform(0, 6.3)) for k in (2, 3, 5)
    )
    reach = radius * min(height, width) * (1 + waves)
    centre = rng.uniform(0.2, 0.8, 2) * (width, height)
    points = centre + reach[:, None] * np.stack([np.cos(angle), np.sin(angle)], 1)
    cv2.fillPoly(mask, [points.round().astype(np.int32)], 255)


def run(
    *,
    pairs: int = 12,
    rounds: int = 5,
    height: int = 768,
    width: int = 1024,
    files: int = 160,
) -> Report:
    """Measure, print, and return the content of the JSON file.

    Args:
        pairs: generated pairs in memory, timed one by one.
        rounds: timed passes over them.
        height, width: of the pairs.
        files: PNG pairs scored by one and by two worker processes; 0 omits that.

    Raises:
        ConfigError: pysodmetrics is not installed.
    """
    try:
        import py_sod_metrics as oracle
    except ImportError as error:
        raise ConfigError(
            "The baseline of `benchmark metrics` is not installed: pip install pysodmetrics==1.6.2"
        ) from error
    warnings.filterwarnings("ignore", message="This class will be removed")
    settings = {"pairs": pairs, "rounds": rounds, "size": [height, width], "files": files}
    report = heading("metrics", settings)
    made = [make_pair(seed, height, width) for seed in range(pairs)]
    threads = cv2.getNumThreads()
    cv2.setNumThreads(1)  # one core against one core
    try:
        report["one_process"] = _one_process(oracle, made, rounds)
        parts = _parts(made, rounds)
    finally:
        cv2.setNumThreads(threads)
    report["parts"] = parts
    console.say(bound_by(parts))
    if files:
        report["workers"] = _workers(files, height, width, rounds)
    return report


def _one_process(oracle: Any, made: list[Pair], rounds: int) -> OneProcess:
    def theirs(with_weighted: bool) -> None:
        kinds = [oracle.MAE, oracle.Smeasure, oracle.Emeasure, oracle.Fmeasure]
        kinds += [oracle.WeightedFmeasure] if with_weighted else []
        for prediction, mask in made:
            for kind in kinds:
                kind().step(prediction, mask)

    def ours(keys: tuple[str, ...]) -> None:
        for prediction, mask in made:
            score_image(
                "pair",
                checked_prediction("pair", prediction),
                checked_mask("pair", mask),
                keys=keys,
            )

    seconds = interleaved(
        {
            "pysodmetrics": lambda: theirs(True),
            "camoxpert": lambda: ours(RESULT_KEYS),
            "pysodmetrics without weighted F": lambda: theirs(False),
            "camoxpert without weighted F": lambda: ours(FAST_KEYS),
        },
        rounds=rounds,
    )
    times = {name: milliseconds(values) / len(made) for name, values in seconds.items()}
    ratios = {
        "with weighted F": paired_ratio(seconds["pysodmetrics"], seconds["camoxpert"]),
        "without weighted F": paired_ratio(
            seconds["pysodmetrics without weighted F"], seconds["camoxpert without weighted F"]
        ),
    }
    console.say("one process, S + MAE + E + F (+ weighted F), milliseconds per pair:")
    show_table([[name, f"{value:.2f}"] for name, value in times.items()])
    for name, ratio in ratios.items():
        console.say(
            f"  {name}: {ratio['ratio']:.1f} times as fast (quartiles {ratio['low']:.1f} to "
            f"{ratio['high']:.1f})"
        )
    return {"milliseconds_per_pair": times, "ratios": ratios}


def _parts(made: list[Pair], rounds: int) -> dict[str, float]:
    """Return the milliseconds per pair of every part of scoring."""
    masks = [checked_mask("pair", mask) for _, mask in made]
    values = np.arange(256) / 255

    def over(call: Callable[[Grey, Mask], object]) -> Callable[[], None]:
        def every() -> None:
            for (prediction, _), mask in zip(made, masks, strict=True):
                call(prediction, mask)

        return every

    seconds = interleaved(
        {
            "count levels": over(joint_histogram),
            "check and describe the mask": over(
                lambda p, m: (checked_mask("pair", m), digest_mask(m), count_objects(m))
            ),
            "distance transform": over(
                lambda p, m: cv2.distanceTransform(
                    (~m).view(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE
                )
            ),
            "weighted F in all": over(lambda p, m: weighted_fmeasure(p, values, m)),
            "everything": over(lambda p, m: score_image("pair", p, m)),
        },
        rounds=rounds,
    )
    return {name: milliseconds(value) / len(made) for name, value in seconds.items()}


def bound_by(parts: dict[str, float]) -> str:
    """Return one sentence on where the time goes."""
    whole, weighted = parts["everything"], parts["weighted F in all"]
    distance = parts["distance transform"]
    rest = whole - weighted
    return (
        f"bound by: weighted F takes {weighted / whole:.0%} of an image's {whole:.1f} ms, its "
        f"exact distance transform alone {distance / whole:.0%}; without it counting grey levels "
        f"takes {parts['count levels'] / rest:.0%} of the remaining {rest:.1f} ms"
    )


def _workers(files: int, height: int, width: int, rounds: int) -> Workers:
    """Time the scoring of PNG files by one and by two processes, without their start."""
    with tempfile.TemporaryDirectory(prefix="camoxpert-") as folder:
        jobs = []
        for index in range(files):
            paths = [Path(folder, kind, f"{index}.png") for kind in ("maps", "masks")]
            for path, pixels in zip(paths, make_pair(index, height, width), strict=True):
                write_png(path, pixels)
            jobs.append(MapJob(str(index), paths[0], paths[1], None, ""))
        task = MapTask("generated", "generated", tuple(jobs))

        def rate(workers: int) -> float:
            times: list[float] = []
            counts: list[int] = []
            for scores in score_chunks(task, MapOptions(keys=RESULT_KEYS), workers):
                times.append(time.perf_counter())
                counts.append(len(scores))
            # By then both processes have returned results.
            skip = 2
            return sum(counts[skip:]) / (times[-1] - times[skip - 1])

        rates: dict[int, list[float]] = {1: [], 2: []}
        for _ in range(max(3, rounds // 2)):
            for workers, values in rates.items():
                values.append(rate(workers))
    ratio = statistics.median(b / a for a, b in zip(rates[1], rates[2], strict=True))
    medians = {str(workers): statistics.median(values) for workers, values in rates.items()}
    console.say(
        f"PNG files: {medians['1']:.1f} images/s with one worker process, {medians['2']:.1f} with "
        f"two: {ratio:.2f} times"
    )
    return {"images_per_second": medians, "two_over_one": ratio}
