"""Draw what else is in a picture: occluders, a distractor, the places that edits copy from."""

from __future__ import annotations

import math

import numpy as np

from camoxpert.synthesis.compose.backgrounds import SIDES, BackgroundIndex
from camoxpert.synthesis.compose.records import ComposeSettings, Shape

CLONES = 8
"""Places of which an edit takes its texture from the one that fits best."""


def draw_occluders(
    rng: np.random.Generator,
    settings: ComposeSettings,
    box: tuple[float, float, float, float],
    size: tuple[int, int],
) -> tuple[Shape, ...]:
    """Draw one to three things in front of the object, near its edge more often than its middle."""
    if rng.random() >= settings.occluders:
        return ()
    width, height = box[2] - box[0], box[3] - box[1]
    side = math.sqrt(width * height)
    shapes = []
    for _ in range(int(rng.integers(1, 4))):
        turn, other = rng.uniform(0, 2 * math.pi, 2)
        away = rng.uniform(0.15, 0.55)
        kind = ("blades", "leaf", "blob")[rng.choice(3, p=(0.5, 0.3, 0.2))]
        radius = side * (rng.uniform(0.4, 0.7) if kind == "blades" else rng.uniform(0.12, 0.3))
        shapes.append(
            Shape(
                kind=kind,
                seed=int(rng.integers(1 << 31)),
                x=round((box[0] + box[2]) / 2 + math.cos(turn) * away * width, 2),
                y=round((box[1] + box[3]) / 2 + math.sin(turn) * away * height, 2),
                radius=round(radius, 2),
                dx=round(math.cos(other) * width / size[1], 4),
                dy=round(math.sin(other) * height / size[0], 4),
                shade=round(rng.uniform(0.8, 1.2), 4),
            )
        )
    return tuple(shapes)


def draw_distractor(
    rng: np.random.Generator,
    settings: ComposeSettings,
    backgrounds: BackgroundIndex,
    box: tuple[float, float, float, float],
    height: int,
    width: int,
) -> tuple[Shape | None, int]:
    """Draw a salient thing away from the object, and the background that gives its texture."""
    if rng.random() >= settings.distractors:
        return None, -1
    window = backgrounds.windows[rng.integers(len(backgrounds.windows))]
    radius = min(height, width) * rng.uniform(0.06, 0.16)
    shape = Shape(
        kind=("blob", "leaf")[rng.integers(2)],
        seed=int(rng.integers(1 << 31)),
        **_apart(rng, box, radius, height, width),
        radius=round(radius, 2),
        # The middle of a window, which shows no object, as shares of that background.
        **_middle_of(backgrounds, window),
        shade=round(rng.uniform(0.75, 1.3), 4),
    )
    return shape, int(window[0])


def _apart(
    rng: np.random.Generator,
    box: tuple[float, float, float, float],
    radius: float,
    height: int,
    width: int,
) -> dict[str, float]:
    """Return the position of several drawn ones that is farthest outside of a box."""
    places = rng.random((12, 2)) * [width, height]
    left, top, right, bottom = box
    outside = np.maximum(
        np.maximum(left - places[:, 0], places[:, 0] - right),
        np.maximum(top - places[:, 1], places[:, 1] - bottom),
    )
    best = int(np.argmax(np.minimum(outside, 1.5 * radius)))
    return {"x": round(float(places[best, 0]), 2), "y": round(float(places[best, 1]), 2)}


def _middle_of(backgrounds: BackgroundIndex, window: np.ndarray) -> dict[str, float]:
    rows, columns = backgrounds.taken[window[0]].shape
    half = SIDES[window[1]] / 2
    return {
        "dx": round(float((window[3] + half) / columns), 4),
        "dy": round(float((window[2] + half) / rows), 4),
    }


def draw_clones(
    rng: np.random.Generator,
    box: tuple[float, float, float, float],
    height: int,
    width: int,
) -> tuple[tuple[float, float], ...]:
    """Draw from where an edit may take its texture.

    Half of the edits put the spot itself back, as one that removes an object from a picture whose
    background is known.
    """
    if rng.random() < 0.5:
        return ((0.0, 0.0),)
    ranges = ((box[0], box[2], width), (box[1], box[3], height))
    shifts = [
        rng.uniform(min(-low, 0.0), max(length - high, 0.0), CLONES) / length
        for low, high, length in ranges
    ]
    return tuple((round(float(x), 4), round(float(y), 4)) for x, y in zip(*shifts, strict=True))
