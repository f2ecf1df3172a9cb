"""Generate camouflage with two different hidden objects, of which a reference asks for one.

Each kind of object has a shape and a coat of its own; the palette is that of the background, so
that neither is easier to see than the other. Every scene gives two pairs of the same image: the
mask of one object, and the mask of the other. Without a reference nobody can know which one is
asked for.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import numpy as np

from camoxpert import console
from camoxpert.data.files.image_io import write_jpeg, write_png
from camoxpert.synthesis.toy import (
    PALETTES,
    SHAPES,
    TEXTURES,
    coverage,
    equalise,
    noise,
    paint,
    pose_parts,
    relief,
)

RADIUS = (0.13, 0.2)
"""Smallest and largest radius of an object, as a share of the side."""
TRIES = 200
"""Places that are tried for two objects which do not touch."""


@dataclass(frozen=True)
class Kind:
    """A kind of object.

    Attributes:
        shape: key of ``SHAPES``.
        coat: key of ``TEXTURES``.
        palette: row of ``PALETTES`` towards which its colours lean.
    """

    shape: str
    coat: str
    palette: int


KINDS = {
    "leaf": Kind("leaf", "blotches", 1),
    "fish": Kind("fish", "stripes", 5),
    "deer": Kind("quadruped", "streaks", 0),
    "beetle": Kind("insect", "spots", 3),
    "star": Kind("star", "pebbles", 4),
}
PAIRS = tuple(combinations(KINDS, 2))
"""The kinds that scenes show, in turns."""


def toy_scene(
    seed: int, index: int, *, size: int = 96, difficulty: float = 0.5
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Generate one scene; equal arguments give equal pixels.

    Args:
        seed, index: which scene.
        size: side in pixels, at least 32.
        difficulty: 0 (easy) to 1 (nearly invisible).

    Returns:
        image uint8 (S, S, 3) RGB; kind -> mask uint8 (S, S), 0 or 255, of two kinds. The masks are
        never empty and do not touch.

    Raises:
        ValueError: size or difficulty out of range.
    """
    if size < 32 or not 0 <= difficulty <= 1:
        raise ValueError(f"size {size} must be at least 32, difficulty {difficulty:g} in 0..1.")
    # Streams of their own, apart from those of toy_pair.
    scene, outline, grain = (np.random.default_rng([seed, index, 10 + k]) for k in range(3))
    kinds = PAIRS[index % len(PAIRS)]
    ease = 1.0 - difficulty
    palette = PALETTES[scene.integers(len(PALETTES))]
    ground = list(TEXTURES.values())[scene.integers(len(TEXTURES))]
    angle, scale = scene.uniform(0, np.pi), size * scene.uniform(0.05, 0.09)
    light = scene.uniform(0, 2 * np.pi)
    image = paint(equalise(ground(grain, size, angle, scale)), palette)
    masks = {}
    for kind, alpha in zip(kinds, _placed(kinds, outline, size), strict=True):
        made = KINDS[kind]
        mask = alpha > 0.5
        turn = scene.choice([-1, 1]) * ease * scene.uniform(0.3, 0.5) * np.pi
        # Equalised over the object only, so its grey levels are spread like the background's.
        coat = equalise(TEXTURES[made.coat](grain, size, angle + turn, scale), mask)
        own = palette + ease**2 * 0.7 * (PALETTES[made.palette] - palette)
        shaded = relief(alpha, light, strength=0.05 + 0.15 * ease)
        painted = paint(coat, own) * shaded[..., None]
        image = image * (1 - alpha[..., None]) + painted * alpha[..., None]
        masks[kind] = np.where(mask, np.uint8(255), np.uint8(0))
    # One sensor saw the whole scene: the same lighting and grain everywhere.
    shade = 1 + 0.12 * equalise(noise(grain, size, size * 0.5))[..., None] - 0.06
    image = image * shade + grain.normal(0, 3, image.shape)
    return np.clip(image, 0, 255).astype(np.uint8), masks


def generate_scenes(
    root: str | Path,
    *,
    num_train: int,
    num_test: int,
    size: int = 96,
    difficulty: float = 0.5,
    seed: int = 0,
) -> None:
    """Write ``TrainDataset/{Imgs,GT}`` and ``TestDataset/toy/{Imgs,GT}`` under ``root``.

    A scene becomes two pairs, ``fish_00012`` and ``beetle_00012``: the same image with the mask of
    the one and of the other. Numbers of scenes are not shared between the splits.

    Args:
        root: of the data set.
        num_train, num_test: pairs; of an odd number the last scene gives one.
        size, difficulty, seed: as ``toy_scene`` takes them.
    """
    root = Path(root)
    train_scenes = -(-num_train // 2)
    todo = [(root / "TrainDataset", index, num_train - 2 * index) for index in range(train_scenes)]
    todo += [
        (root / "TestDataset" / "toy", train_scenes + index, num_test - 2 * index)
        for index in range(-(-num_test // 2))
    ]
    for folder, index, left in console.track(todo, "generating"):
        image, masks = toy_scene(seed, index, size=size, difficulty=difficulty)
        for kind, mask in list(masks.items())[:left]:
            write_jpeg(folder / "Imgs" / f"{kind}_{index:05d}.jpg", image, quality=95)
            write_png(folder / "GT" / f"{kind}_{index:05d}.png", mask)


def _placed(kinds: tuple[str, ...], rng: np.random.Generator, size: int) -> list[np.ndarray]:
    """Draw objects that do not touch; returns the coverage of each in 0..1, (S, S)."""
    radii = size * rng.uniform(*RADIUS, len(kinds))
    shapes = [pose_parts(SHAPES[KINDS[kind].shape], rng) for kind in kinds]
    # Radii of the circles around the outlines.
    extents = [
        radius * max(np.hypot(*part.T).max() for part in parts)
        for radius, parts in zip(radii, shapes, strict=True)
    ]
    shrink = 1.0
    for attempt in range(TRIES):
        if attempt:
            shrink *= 0.99
        reach = [min(shrink * extent, size / 2) for extent in extents]
        centres = [rng.uniform(edge, max(size - edge, edge + 1e-9), 2) for edge in reach]
        if np.hypot(*(centres[0] - centres[1])) > sum(reach) + 2:
            break
    return [
        coverage([part * (shrink * radius) + centre for part in parts], size)
        for parts, radius, centre in zip(shapes, radii, centres, strict=True)
    ]
