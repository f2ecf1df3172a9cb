"""``benchmark relight``: the relighting of batches against a serial script with the same outputs.

Three comparisons: the multi-scale Retinex against OpenCV's Gaussians, cast shadows against a ray
march, and the whole pipeline against ``relight_serial``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TypedDict

import cv2
import numpy as np
import torch
from torch import Tensor

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
from camoxpert.benchmark.relight_serial import (
    MARCH_STEPS,
    march,
    serial_linear,
    serial_relight,
    serial_retinex,
)
from camoxpert.synthesis.relight.albedo import multi_scale_retinex
from camoxpert.synthesis.relight.colour import to_linear
from camoxpert.synthesis.relight.draw import RelightSettings, draw_light
from camoxpert.synthesis.relight.height import height_from_mask
from camoxpert.synthesis.relight.pipeline import STAGES, Seconds, relight
from camoxpert.synthesis.relight.shadows import cast_shadows
from camoxpert.synthesis.toy import toy_pair

RETINEX_SIZE = 1024
FEW_ROUNDS = 3
"""Rounds of the Retinex: its baseline takes many seconds."""


@dataclass(frozen=True)
class Sizes:
    """What is measured.

    Attributes:
        images: generated pairs.
        size: their side in pixels.
        retinex_size: side of the image of the Retinex alone.
        rounds: timed passes, in turns.
    """

    images: int = 8
    size: int = 512
    retinex_size: int = RETINEX_SIZE
    rounds: int = 7


class Pairs(TypedDict):
    """Generated images (N, 3, S, S) and masks (N, 1, S, S), uint8."""

    images: Tensor
    masks: Tensor


class Compared(TypedDict):
    """Milliseconds of an image, how many times as fast, and how far apart the results are."""

    milliseconds: dict[str, float]
    ratios: dict[str, Ratio]
    differences: dict[str, float]


class Whole(Compared):
    """The same with the milliseconds and the share of every stage, of both."""

    stages: dict[str, dict[str, float]]
    shares: dict[str, dict[str, float]]


def run(sizes: Sizes, *, device: torch.device) -> Report:
    """Measure, print, and return the content of the JSON file."""
    report = heading("relight", {**asdict(sizes), "device": device.type})
    report["threads"] = {"torch": torch.get_num_threads(), "opencv": cv2.getNumThreads()}
    report["retinex"] = _retinex(sizes, device)
    pairs = _pairs(sizes.images, sizes.size, device)
    report["shadows"] = _shadows(pairs, sizes.rounds)
    report["pipeline"] = _pipeline(pairs, sizes.rounds)
    return report


def _pairs(count: int, size: int, device: torch.device) -> Pairs:
    made = [toy_pair(0, index, size=size, difficulty=0.3) for index in range(count)]
    images = torch.from_numpy(np.stack([image for image, _ in made])).permute(0, 3, 1, 2)
    masks = torch.from_numpy(np.stack([mask for _, mask in made]))[:, None]
    return {"images": images.contiguous().to(device), "masks": masks.to(device)}


def _finished(call: Callable[[], object], device: torch.device) -> Callable[[], None]:
    """Return a call that waits for the device."""

    def wait() -> None:
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    return wait


def _retinex(sizes: Sizes, device: torch.device) -> Compared:
    """Compare on one image; OpenCV in double and in single precision."""
    image = _pairs(1, sizes.retinex_size, device)["images"]
    pixels = image[0].permute(1, 2, 0).cpu().numpy()
    double, single = serial_linear(pixels), serial_linear(pixels, tuned=True)
    ours = multi_scale_retinex(to_linear(image))[0].permute(1, 2, 0).cpu().numpy()
    exact = serial_retinex(double)
    differences = {
        "largest": float(np.abs(ours - exact).max()),
        "root mean square": float(np.sqrt(np.mean((ours - exact) ** 2))),
        "span": float(exact.max() - exact.min()),
    }
    seconds = interleaved(
        {
            "OpenCV, double": lambda: serial_retinex(double),
            "OpenCV, single": lambda: serial_retinex(single),
            "camoxpert": _finished(lambda: multi_scale_retinex(to_linear(image)), device),
        },
        rounds=min(sizes.rounds, FEW_ROUNDS),
        warmup=0,
        description="Retinex",
    )
    result = _compared(seconds, 1, differences)
    console.say(
        f"multi-scale Retinex of one image of {sizes.retinex_size} px, largest difference "
        f"{differences['largest']:.1g} of a span of {differences['span']:.1f} (natural logarithms)"
    )
    _show(result)
    return result


def _shadows(pairs: Pairs, rounds: int) -> Compared:
    """Compare cast shadows of a batch: those of a point light, and the time of both."""
    inside = (pairs["masks"] > 127).float()
    count, _, size, _ = inside.shape
    heights = height_from_mask(inside) * size
    azimuth = torch.arange(count, device=inside.device) * (2 * math.pi / count) + 0.2
    slope, radius = torch.full_like(azimuth, 0.7), torch.full_like(azimuth, 1e-3)
    maps = heights[:, 0].cpu().numpy()
    angles = azimuth.tolist()

    def ours() -> tuple[Tensor, Tensor]:
        return cast_shadows(heights, heights, azimuth, slope, radius)

    def theirs(dtype: type) -> list[np.ndarray]:
        return [
            march(one.astype(dtype), angle, 0.7, 1e-3)[0]
            for one, angle in zip(maps, angles, strict=True)
        ]

    dark = (ours()[0] < 0.5)[:, 0].cpu().numpy()
    reference = np.stack(theirs(np.float64)) < 0.5
    overlap = (dark & reference).sum((1, 2)) / np.maximum((dark | reference).sum((1, 2)), 1)
    differences = {
        "mean IoU": float(overlap.mean()),
        "lowest IoU": float(overlap.min()),
        "share of the image in shadow": float(dark.mean()),
    }
    seconds = interleaved(
        {
            "march, double": lambda: theirs(np.float64),
            "march, single": lambda: theirs(np.float32),
            "camoxpert": _finished(ours, inside.device),
        },
        rounds=rounds,
        description="shadows",
    )
    result = _compared(seconds, count, differences)
    console.say(
        f"cast shadows at {size} px against a ray march of {MARCH_STEPS} steps, milliseconds per "
        f"image; IoU {differences['mean IoU']:.3f}, lowest {differences['lowest IoU']:.3f}"
    )
    _show(result)
    return result


def _pipeline(pairs: Pairs, rounds: int) -> Whole:
    images, masks = pairs["images"], pairs["masks"]
    count, _, size, _ = images.shape
    lights = [draw_light(0, index, RelightSettings()) for index in range(count)]
    pixels = images.permute(0, 2, 3, 1).cpu().numpy()
    outlines = masks[:, 0].cpu().numpy()

    def ours(seconds: Seconds | None = None) -> Tensor:
        return relight(images, masks, lights, seconds=seconds).images_B3HW

    def theirs(tuned: bool = False, seconds: Seconds | None = None) -> np.ndarray:
        return np.stack(
            [
                serial_relight(*item, tuned=tuned, seconds=seconds)
                for item in zip(pixels, outlines, lights, strict=True)
            ]
        )

    apart = np.abs(ours().permute(0, 2, 3, 1).cpu().numpy().astype(int) - theirs())
    changed = np.abs(pixels.astype(int) - theirs(tuned=True)).max(-1) > 0
    differences = {
        "mean level": float(apart.mean()),
        "mean level where changed": float(apart[changed].mean()),
        "share of levels more than 2 apart": float((apart > 2).mean()),
        "99.9th percentile": float(np.quantile(apart, 0.999)),
        "largest": float(apart.max()),
    }
    parts: dict[str, Seconds] = {"script": {}, "camoxpert": {}}
    seconds = interleaved(
        {
            "script": lambda: theirs(seconds=parts["script"]),
            "tuned script": lambda: theirs(tuned=True),
            "camoxpert": _finished(ours, images.device),
            "camoxpert, timed": lambda: ours(parts["camoxpert"]),
        },
        rounds=rounds,
        warmup=0,
        description="pipeline",
    )
    compared = _compared(seconds, count, differences)
    # Of all rounds; what lies between the stages is a row of its own, so that shares add up.
    stages, shares = {}, {}
    for name, whole in (("script", "script"), ("camoxpert", "camoxpert, timed")):
        total = sum(seconds[whole])
        values = {stage: parts[name].get(stage, 0.0) for stage in STAGES}
        values["between"] = total - sum(values.values())
        stages[name] = {k: 1e3 * v / (rounds * count) for k, v in values.items()}
        shares[name] = {k: v / total for k, v in values.items()}
    console.say(
        f"the whole pipeline at {size} px, {count} images, milliseconds per image; "
        f"{differences['share of levels more than 2 apart']:.2%} of the levels are more than 2 "
        f"apart, on average {differences['mean level']:.3f}"
    )
    _show(compared)
    _show_stages(stages, shares)
    return {**compared, "stages": stages, "shares": shares}


def _compared(
    seconds: dict[str, list[float]], count: int, differences: dict[str, float]
) -> Compared:
    ours = seconds["camoxpert"]
    return {
        "milliseconds": {name: milliseconds(values) / count for name, values in seconds.items()},
        "ratios": {
            name: paired_ratio(values, ours)
            for name, values in seconds.items()
            if not name.startswith("camoxpert")
        },
        "differences": differences,
    }


def _show(result: Compared) -> None:
    rows = [[name, f"{value:.1f}"] for name, value in result["milliseconds"].items()]
    for row in rows:
        if row[0] in result["ratios"]:
            row.append(f"{quartiles(result['ratios'][row[0]], 1)} times ours")
    show_table(rows)


def _show_stages(stages: dict[str, dict[str, float]], shares: dict[str, dict[str, float]]) -> None:
    rows = [["stage", *(word for name in stages for word in (name, "share"))]]
    for stage in next(iter(stages.values())):
        row = [stage]
        for name in stages:
            row += [f"{stages[name][stage]:.1f}", f"{shares[name][stage]:.1%}"]
        rows.append(row)
    sums = (f"{sum(shares[name].values()):.1%}" for name in stages)
    totals = (f"{sum(stages[name].values()):.1f}" for name in stages)
    rows.append(["sum", *(word for pair in zip(totals, sums, strict=True) for word in pair)])
    show_table(rows)
