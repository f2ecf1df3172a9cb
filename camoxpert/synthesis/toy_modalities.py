"""Generate camouflage that several sensors saw, of which none alone tells what is hidden.

Each scene has one hidden object and, for every sensor, a decoy that this sensor alone shows just
like an object: a patch of another texture without relief or heat, a stone of the ground's colour
and temperature, a warm spot of the ground. Besides, depth and heat each lose the object towards one
side, so that its outline needs more than one of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np

from camoxpert import console
from camoxpert.data.files.image_io import encode, write_encoded, write_jpeg, write_png
from camoxpert.synthesis.toy import (
    PALETTES,
    TEXTURES,
    coverage,
    drawn_shape,
    equalise,
    noise,
    paint,
    pose_parts,
    relief,
    toy_name,
)

SENSORS = ("depth", "thermal")
"""Modalities that can be generated beside the photograph."""
RADIUS = (0.14, 0.19)
"""Smallest and largest radius of object and decoys, as a share of the side."""
TRIES = 200
DISTANCE = (1500, 1900)
"""Of the ground from the depth camera, millimetres, near and far end."""
HEIGHT = 160
"""Of object and stone, millimetres."""
HOLES = 0.02
"""Share of the pixels that the depth camera does not measure."""


def toy_views(
    seed: int,
    index: int,
    sensors: Sequence[str],
    *,
    size: int = 96,
    difficulty: float = 0.5,
) -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]:
    """Generate one scene; equal arguments give equal pixels, and the photograph does not depend on
    the order of the sensors.

    Args:
        seed, index: which scene.
        sensors: of ``SENSORS``.
        size: side in pixels, at least 32.
        difficulty: of the photograph, 0 (easy) to 1 (nearly invisible).

    Returns:
        image uint8 (S, S, 3) RGB; mask uint8 (S, S), 0 or 255, never empty; sensor -> uint16
        (S, S) millimetres with 0 where nothing was measured (depth), uint8 (S, S) (thermal).

    Raises:
        ValueError: size or difficulty out of range.
    """
    if size < 32 or not 0 <= difficulty <= 1:
        raise ValueError(f"size {size} must be at least 32, difficulty {difficulty:g} in 0..1.")
    # Streams of their own, apart from those of the other toy scenes.
    scene, outline, grain, ground, heat = (
        np.random.default_rng([seed, index, 20 + k]) for k in range(5)
    )
    hidden, patch, *decoys = placed(outline, size, 2 + len(SENSORS))
    image = _photograph(scene, grain, [hidden, patch], index, size, difficulty)
    mask = np.where(hidden > 0.5, np.uint8(255), np.uint8(0))
    # Every decoy has its place whether or not its sensor is asked for.
    shown = dict(zip(SENSORS, decoys, strict=True))
    made = {
        "depth": _depth(ground, hidden, shown["depth"], size),
        "thermal": _thermal(heat, hidden, shown["thermal"], size),
    }
    return image, mask, {sensor: made[sensor] for sensor in sensors}


def generate_views(
    root: str | Path,
    sensors: Sequence[str],
    *,
    num_train: int,
    num_test: int,
    size: int = 96,
    difficulty: float = 0.5,
    seed: int = 0,
) -> None:
    """Write ``TrainDataset/{Imgs,GT,Depth,Thermal}`` and the same in ``TestDataset/toy``.

    Args:
        root: of the data set.
        sensors: of ``SENSORS``; each has a folder.
        num_train, num_test: scenes.
        size, difficulty, seed: as ``toy_views`` takes them.
    """
    root = Path(root)
    folders = [root / "TrainDataset"] * num_train + [root / "TestDataset" / "toy"] * num_test
    for index, folder in console.track(enumerate(folders), "generating", total=len(folders)):
        image, mask, seen = toy_views(seed, index, sensors, size=size, difficulty=difficulty)
        name = toy_name(index)
        write_jpeg(folder / "Imgs" / f"{name}.jpg", image, quality=95)
        write_png(folder / "GT" / f"{name}.png", mask)
        for sensor, values in seen.items():
            path = folder / sensor.capitalize() / f"{name}.png"
            write_encoded(path, encode(values, ".png"))


def placed(rng: np.random.Generator, size: int, number: int) -> list[np.ndarray]:
    """Draw outlines that do not touch; returns the coverage of each in 0..1, (S, S)."""
    radii = size * rng.uniform(*RADIUS, number)
    shapes = [pose_parts(drawn_shape(rng), rng) for _ in range(number)]
    extents = [
        radius * max(float(np.hypot(*part.T).max()) for part in parts)
        for radius, parts in zip(radii, shapes, strict=True)
    ]
    shrink, centres = 1.0, np.zeros((number, 2))
    for attempt in range(TRIES):
        if attempt:
            shrink *= 0.99
        reach = np.minimum(np.array(extents) * shrink, size / 2 - 1)
        centres = rng.uniform(reach[:, None], size - reach[:, None], (number, 2))
        apart = np.hypot(*(centres[:, None] - centres[None]).transpose(2, 0, 1))
        needed = reach[:, None] + reach[None] + 1
        if (apart + size * np.eye(number) > needed).all():
            break
    return [
        coverage([part * (shrink * radius) + centre for part in parts], size)
        for parts, radius, centre in zip(shapes, radii, centres, strict=True)
    ]


def _photograph(
    scene: np.random.Generator,
    grain: np.random.Generator,
    shapes: Sequence[np.ndarray],
    index: int,
    size: int,
    difficulty: float,
) -> np.ndarray:
    """Paint object and patch alike: nothing in the photograph tells which is which."""
    make = list(TEXTURES.values())[index % len(TEXTURES)]
    ease = 1.0 - difficulty
    palette, other = PALETTES[scene.permutation(len(PALETTES))[:2]]
    angle, scale = scene.uniform(0, np.pi), size * scene.uniform(0.05, 0.09)
    light = scene.uniform(0, 2 * np.pi)
    turn = scene.choice([-1, 1]) * ease * scene.uniform(0.3, 0.5) * np.pi
    own = palette + ease**2 * 0.7 * (other - palette)
    image = paint(equalise(make(grain, size, angle, scale)), palette)
    for alpha in shapes:
        coat = equalise(make(grain, size, angle + turn, scale), alpha > 0.5)
        shaded = relief(alpha, light, strength=0.05 + 0.15 * ease)
        painted = paint(coat, own) * shaded[..., None]
        image = image * (1 - alpha[..., None]) + painted * alpha[..., None]
    shade = 1 + 0.12 * equalise(noise(grain, size, size * 0.5))[..., None] - 0.06
    image = image * shade + grain.normal(0, 3, image.shape)
    return np.clip(image, 0, 255).astype(np.uint8)


def _depth(
    rng: np.random.Generator, hidden: np.ndarray, stone: np.ndarray, size: int
) -> np.ndarray:
    """Return distances in millimetres: a tilted, uneven ground with object and stone on it."""
    near, far = DISTANCE
    tilt = _ramp(rng.uniform(0, 2 * np.pi), size)
    ground = near + (far - near) * tilt + 15 * noise(rng, size, size * 0.5)
    raised = HEIGHT * (hidden * fading(hidden, rng) + stone)
    distance = ground - cv2.GaussianBlur(raised, (0, 0), max(size / 96, 0.6))
    distance = distance + rng.normal(0, 6, distance.shape)
    values = np.clip(distance, 1, 65535).astype(np.uint16)
    values[rng.random(values.shape) < HOLES] = 0
    return values


def _thermal(
    rng: np.random.Generator, hidden: np.ndarray, warm: np.ndarray, size: int
) -> np.ndarray:
    """Return levels of heat: an uneven ground with a warm object and a warm spot."""
    ground = 90 + 9 * noise(rng, size, size * 0.5)
    heat = 60 * (hidden * fading(hidden, rng) + warm)
    blurred = cv2.GaussianBlur(ground + heat, (0, 0), max(size / 64, 0.8))
    levels = blurred + rng.normal(0, 4, blurred.shape)
    return np.clip(levels, 0, 255).astype(np.uint8)


def fading(alpha: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return a factor 0..1 that loses about a third of an outline towards a drawn side, (S, S)."""
    ramp = _ramp(rng.uniform(0, 2 * np.pi), alpha.shape[0])
    inside = ramp[alpha > 0.5]
    low, high = (np.quantile(inside, q) for q in (0.2, 0.5)) if inside.size else (0.0, 1.0)
    factor: np.ndarray = np.clip((ramp - low) / max(high - low, 1e-6), 0, 1)
    return factor


def _ramp(angle: float, size: int) -> np.ndarray:
    """Return a plane that rises from 0 to 1 in one direction, (S, S)."""
    y, x = np.mgrid[:size, :size] / (size - 1) - 0.5
    along: np.ndarray = x * np.cos(angle) + y * np.sin(angle)
    return (along - along.min()) / (along.max() - along.min())
