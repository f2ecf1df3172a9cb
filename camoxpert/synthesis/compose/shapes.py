"""Draw outlines from noise: grass, leaves and stones."""

from __future__ import annotations

import math

import cv2
import numpy as np

from camoxpert.synthesis.compose.records import Shape

FINE = 16
"""OpenCV draws at sixteenths of a pixel."""


def shape_alpha(shape: Shape, height: int, width: int) -> np.ndarray:
    """Return the coverage of a shape in a picture, float32 (H, W), 0..1."""
    rng = np.random.default_rng(shape.seed)
    canvas = np.zeros((height, width), np.uint8)
    outlines = OUTLINES[shape.kind](rng)
    for outline in outlines:
        points = (outline * shape.radius + [shape.x, shape.y]) * FINE
        cv2.fillPoly(canvas, [np.rint(points).astype(np.int32)], 255, cv2.LINE_AA, 4)
    return cv2.GaussianBlur(canvas, (0, 0), 0.6).astype(np.float32) / 255


def _blades(rng: np.random.Generator) -> list[np.ndarray]:
    """Return blades of grass: long, bent and pointed, from a common foot."""
    lean, blades = rng.uniform(-0.5, 0.5), []
    for _ in range(int(rng.integers(2, 6))):
        foot = np.array([rng.uniform(-0.4, 0.4), rng.uniform(0.7, 1.1)])
        length, turn = rng.uniform(1.2, 2.2), lean + rng.normal(0, 0.25)
        along = np.linspace(0, 1, 14)
        angle = turn + rng.normal(0, 0.5) * along
        step = length / 13
        x = foot[0] + np.r_[0, np.cumsum(np.sin(angle[1:]) * step)]
        y = foot[1] - np.r_[0, np.cumsum(np.cos(angle[1:]) * step)]
        half = rng.uniform(0.025, 0.06) * (1 - along) ** 0.7
        across = np.stack([np.cos(angle), np.sin(angle)], 1) * half[:, None]
        middle = np.stack([x, y], 1)
        blades.append(np.r_[middle + across, (middle - across)[::-1]])
    return blades


def _leaf(rng: np.random.Generator) -> list[np.ndarray]:
    """Return a leaf: pointed at both ends, bent along its middle."""
    along = np.linspace(0, 1, 24)
    half = rng.uniform(0.3, 0.5) * np.sin(math.pi * along**0.8)
    half = half * (1 + 0.05 * np.sin(along * rng.uniform(20, 50)))
    bend = rng.uniform(-0.4, 0.4) * np.sin(math.pi * along)
    upper = np.stack([2 * along - 1, bend + half], 1)
    lower = np.stack([2 * along - 1, bend - half], 1)[::-1]
    return [np.r_[upper, lower] @ _rotation(rng).T]


def _blob(rng: np.random.Generator) -> list[np.ndarray]:
    """Return a stone: round, with waves of decreasing height in its outline."""
    angle = np.linspace(0, 2 * math.pi, 80, endpoint=False)
    radius = np.ones_like(angle)
    for wave in range(2, 9):
        radius += rng.normal(0, 0.25 / wave) * np.cos(wave * angle + rng.uniform(0, 2 * math.pi))
    outline = np.stack([np.cos(angle), np.sin(angle) * rng.uniform(0.6, 1)], 1)
    return [outline * np.clip(radius, 0.3, 1.6)[:, None] * 0.8 @ _rotation(rng).T]


def _rotation(rng: np.random.Generator) -> np.ndarray:
    turn = rng.uniform(0, 2 * math.pi)
    return np.array([[math.cos(turn), -math.sin(turn)], [math.sin(turn), math.cos(turn)]])


OUTLINES = {"blades": _blades, "leaf": _leaf, "blob": _blob}
