"""Data sets with maps of two methods, and the command that scores them."""

from __future__ import annotations

import json
from pathlib import Path

import cv2
import numpy as np

from camoxpert.cli import main

CLASSES = ("1-Aquatic-3-Crab", "1-Aquatic-9-Frog", "2-Terrestrial-23-Cat")


def pair(index: int, noise: float) -> tuple[np.ndarray, np.ndarray]:
    """Return a map and its mask, 36 x 48; the mask depends on the index only."""
    shapes, errors = np.random.default_rng(index), np.random.default_rng([index, int(noise * 100)])
    mask = np.zeros((36, 48), np.uint8)
    top, left = shapes.integers(2, 12), shapes.integers(2, 20)
    mask[top : top + shapes.integers(6, 18), left : left + shapes.integers(6, 20)] = 255
    field = cv2.GaussianBlur(mask / 255 + noise * errors.standard_normal(mask.shape), (0, 0), 1.5)
    return (np.clip(field, 0, 1) * 255).astype(np.uint8), mask


def write(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(path), pixels)


def listing(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def evaluate(*words: str) -> int:
    return main(["evaluate", "--num-workers", "0", *words])


def summary(folder: str = "evaluation") -> dict:
    return json.loads(Path(folder, "scores.json").read_text())


CAMO = ("--predictions", "maps/good/CAMO", "--gt", "data/CAMO/GT")
