"""Draw outlines from noise: grass, leaves and stones."""

from __future__ import annotations

import math

import cv2
import numpy as np

from camoxpert.synthesis.compose.records import Shape

SIXTEENTHS = 4
"""Bits after the binary point in which OpenCV takes coordinates."""
EDGE = 3
"""Pixels around an outline that its soft edge needs."""
Region = tuple[slice, slice]


def shape_coverage(shape: Shape, height: int, width: int) -> tuple[Region, np.ndarray]:
    """Return rows and columns of a picture that hold a shape, and its coverage there.

    Returns:
        The region, empty where the shape lies outside of the picture; float32 (h, w), 0..1.
    """
    rng = np.random.default_rng(shape.seed)
    outlines = [
        outline * shape.radius + [shape.x, shape.y] for outline in OUTLINES[shape.kind](rng)
    ]
    points = np.concatenate(outlines)
    low = np.clip(np.floor(points.min(0)).astype(int) - EDGE, 0, (width, height))
    high = np.clip(np.ceil(points.max(0)).astype(int) + EDGE + 1, low, (width, height))
    canvas = np.zeros((high[1] - low[1], high[0] - low[0]), np.uint8)
    region = slice(int(low[1]), int(high[1])), slice(int(low[0]), int(high[0]))
    if not canvas.size:
        return region, canvas.astype(np.float32)
    for outline in outlines:
        fixed = np.rint((outline - low) * (1 << SIXTEENTHS)).astype(np.int32)
        cv2.fillPoly(canvas, [fixed], 255, cv2.LINE_AA, SIXTEENTHS)
    return region, cv2.GaussianBlur(canvas, (0, 0), 0.6).astype(np.float32) / 255


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
