"""Generate camouflage: an object whose texture has the statistics of its background.

Background and object are textures of one family, painted with one palette after both are
histogram-equalised, so that their colours and contrasts agree; they differ in orientation, scale
and phase. ``difficulty`` removes these cues: 0 is easy to see, 1 leaves only a phase break and a
faint contour.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np

from camoxpert import console
from camoxpert.data.files.image_io import write_jpeg, write_png

Field = np.ndarray
LARGEST_SHARE = 0.3
"""Largest share of the image that an object of a chosen size may cover."""
SMALLEST_AREA = 12
"""Fewest pixels of an object of a chosen size."""
# Natural colours, dark to light, RGB.
PALETTES = np.array(
    [
        [[38, 34, 22], [92, 84, 48], [146, 132, 84], [206, 190, 142]],  # dry grass
        [[18, 30, 16], [44, 74, 30], [88, 118, 54], [156, 170, 98]],  # leaves
        [[52, 44, 38], [104, 92, 80], [150, 138, 124], [204, 196, 184]],  # stones
        [[40, 24, 16], [88, 58, 38], [134, 98, 68], [188, 156, 120]],  # bark
        [[96, 74, 48], [152, 122, 82], [196, 168, 122], [230, 210, 174]],  # sand
        [[14, 28, 38], [34, 66, 78], [78, 112, 108], [152, 172, 148]],  # reef
    ],
    dtype=np.float64,
)


def toy_pair(
    seed: int,
    index: int,
    *,
    size: int = 96,
    difficulty: float = 0.5,
    object_size: tuple[float, float] | None = None,
    empty: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
    """Generate one pair; equal arguments give equal pixels.

    Args:
        seed, index: which pair.
        size: side in pixels, at least 16.
        difficulty: 0 (easy) to 1 (nearly invisible).
        object_size: smallest and largest share of the image that the object covers, 0..0.3; its
            logarithm is drawn uniformly. None: one or two objects of 3 to 20 % of the image.
        empty: the same scene without its object.

    Returns:
        image uint8 (S, S, 3) RGB; mask uint8 (S, S), 0 or 255, empty only where that is asked for.

    Raises:
        ValueError: size, difficulty or object size out of range.
    """
    if size < 16 or not 0 <= difficulty <= 1:
        raise ValueError(f"size {size} must be at least 16, difficulty {difficulty:g} in 0..1.")
    if object_size is not None:
        check_object_size(object_size, size)
    # Separate streams, so that changing the difficulty changes neither outline nor colours.
    scene, outline, grain = (np.random.default_rng([seed, index, k]) for k in range(3))
    make = list(TEXTURES.values())[index % len(TEXTURES)]
    ease = 1.0 - difficulty
    palette, other = PALETTES[scene.permutation(len(PALETTES))[:2]]
    angle, scale = scene.uniform(0, np.pi), size * scene.uniform(0.05, 0.09)
    turn = scene.choice([-1, 1]) * ease * scene.uniform(0.3, 0.5) * np.pi
    zoom = (1 + 0.9 * ease) ** scene.choice([-1, 1])
    brightness, direction = scene.choice([-0.3, 0.3]), scene.uniform(0, 2 * np.pi)

    alpha = (
        object_alpha(outline, size)
        if object_size is None
        else sized_alpha(outline, size, object_size)
    )
    if empty:
        alpha = np.zeros_like(alpha)
    mask = alpha > 0.5
    background = equalise(make(grain, size, angle, scale))
    # Equalised over the object only, so its grey levels are spread like the background's.
    hidden = equalise(make(grain, size, angle + turn, scale * zoom), mask)
    own = (palette + ease**2 * 0.7 * (other - palette)) * (1 + ease**2 * brightness)
    light = relief(alpha, direction, strength=0.05 + 0.15 * ease)
    painted = paint(hidden, own) * light[..., None]
    image = paint(background, palette) * (1 - alpha[..., None]) + painted * alpha[..., None]
    # One sensor saw the whole scene: the same lighting and grain inside and outside.
    shade = 1 + 0.12 * equalise(noise(grain, size, size * 0.5))[..., None] - 0.06
    image = image * shade + grain.normal(0, 3, image.shape)
    return np.clip(image, 0, 255).astype(np.uint8), np.where(mask, np.uint8(255), np.uint8(0))


def toy_name(index: int) -> str:
    """Return a name with the texture family in it, so that splits can be stratified."""
    return f"{list(TEXTURES)[index % len(TEXTURES)]}_{index:05d}"


def generate_toy(
    root: str | Path,
    *,
    num_train: int,
    num_test: int,
    size: int = 96,
    difficulty: float = 0.5,
    object_size: tuple[float, float] | None = None,
    num_negatives: int = 0,
    seed: int = 0,
) -> None:
    """Write ``TrainDataset/{Imgs,GT}`` and ``TestDataset/toy/{Imgs,GT}`` under ``root``, and scenes
    without an object, other ones, to ``Negatives/``.

    The other arguments are those of ``toy_pair``.
    """
    root = Path(root)
    folders = [root / "TrainDataset"] * num_train + [root / "TestDataset" / "toy"] * num_test
    for index, folder in console.track(enumerate(folders), "generating", total=len(folders)):
        image, mask = toy_pair(
            seed, index, size=size, difficulty=difficulty, object_size=object_size
        )
        write_jpeg(folder / "Imgs" / f"{toy_name(index)}.jpg", image, quality=95)
        write_png(folder / "GT" / f"{toy_name(index)}.png", mask)
    for index in range(len(folders), len(folders) + num_negatives):
        image, _ = toy_pair(seed, index, size=size, difficulty=difficulty, empty=True)
        write_jpeg(root / "Negatives" / f"{toy_name(index)}.jpg", image, quality=95)


def noise(
    rng: np.random.Generator, size: int, scale: float, *, angle: float = 0.0, stretch: float = 1.0
) -> Field:
    """Return band-passed Gaussian noise, mean 0 and deviation 1.

    Args:
        rng: source of the phases.
        size: side in pixels.
        scale: wavelength at the middle of the band, in pixels.
        angle: direction of the streaks, radians.
        stretch: how much longer the streaks are than wide; 1 is isotropic.
    """
    fy, fx = np.fft.fftfreq(size)[:, None], np.fft.rfftfreq(size)[None]
    along = fx * np.cos(angle) + fy * np.sin(angle)
    across = -fx * np.sin(angle) + fy * np.cos(angle)
    radius = np.sqrt((along * stretch) ** 2 + across**2) * scale
    band = np.exp(-0.5 * (np.log2(np.maximum(radius, 1e-6)) / 0.6) ** 2)
    field: Field = np.fft.irfft2(
        np.fft.rfft2(rng.standard_normal((size, size))) * band, s=(size, size)
    )
    unit: Field = (field - field.mean()) / (field.std() + 1e-12)
    return unit


def streaks(rng: np.random.Generator, size: int, angle: float, scale: float) -> Field:
    """Return grass or fur: long thin streaks in one direction."""
    long = noise(rng, size, scale * 0.9, angle=angle, stretch=6)
    return long + 0.35 * noise(rng, size, scale * 0.45, angle=angle + 0.3, stretch=5)


def stripes(rng: np.random.Generator, size: int, angle: float, scale: float) -> Field:
    """Return bark or ripples: parallel bands bent by slow noise."""
    y, x = np.mgrid[:size, :size].astype(np.float64)
    bend = noise(rng, size, scale * 6) * scale * 0.8
    phase = 2 * np.pi * (x * np.cos(angle) + y * np.sin(angle) + bend) / (scale * 1.8)
    bands: Field = np.sin(phase + rng.uniform(0, 2 * np.pi))
    return bands + 0.5 * noise(rng, size, scale * 0.5)


def blotches(rng: np.random.Generator, size: int, angle: float, scale: float) -> Field:
    """Return foliage: soft blobs of several sizes."""
    coarse = np.tanh(1.5 * noise(rng, size, scale * 2.4, angle=angle, stretch=1.8))
    return coarse + 0.5 * noise(rng, size, scale, angle=angle, stretch=1.5)


def pebbles(rng: np.random.Generator, size: int, angle: float, scale: float) -> Field:
    """Return gravel: cells around random points, bright in the middle, dark in the gaps."""
    count = max(8, int((size / (scale * 1.7)) ** 2))
    points = rng.uniform(0, size, (count, 2))
    grey = rng.normal(0, 0.7, count)
    y, x = np.mgrid[:size, :size].astype(np.float32)
    squeeze = np.float32(1.5)
    cos, sin = np.float32(np.cos(angle)), np.float32(np.sin(angle))
    first = np.full((size, size), np.inf, np.float32)
    second, nearest = first.copy(), np.zeros((size, size), np.intp)
    # Point by point: all distances at once need 100 MB at 352 pixels, and ten times as long.
    for number, (px, py) in enumerate(points.astype(np.float32)):
        dx, dy = x - px, y - py
        distance = (dx * cos + dy * sin) ** 2 + squeeze * (dy * cos - dx * sin) ** 2
        closer = distance < first
        np.minimum(second, np.where(closer, first, distance), out=second)
        nearest[closer] = number
        np.minimum(first, distance, out=first)
    gap = np.clip((np.sqrt(second) - np.sqrt(first)) / scale, 0, 1)
    cells: Field = grey[nearest] + 1.4 * gap
    return cells + 0.3 * noise(rng, size, scale * 0.5)


def spots(rng: np.random.Generator, size: int, angle: float, scale: float) -> Field:
    """Return fawn or lichen: roundish spots on a mottled ground."""
    peaks = noise(rng, size, scale * 1.6, angle=angle, stretch=1.4)
    return 1.6 / (1 + np.exp(-6 * (peaks - 0.7))) + 0.5 * noise(rng, size, scale * 0.7)


TEXTURES: dict[str, Callable[[np.random.Generator, int, float, float], Field]] = {
    "streaks": streaks,
    "stripes": stripes,
    "blotches": blotches,
    "pebbles": pebbles,
    "spots": spots,
}


def equalise(field: Field, where: np.ndarray | None = None) -> Field:
    """Return the values' ranks in 0..1, counted over ``where`` (default: everywhere)."""
    chosen = np.sort(field[where] if where is not None and where.any() else field.ravel())
    return np.searchsorted(chosen, field).astype(np.float64) / len(chosen)


def paint(field: Field, palette: np.ndarray) -> np.ndarray:
    """Colour a field in 0..1 by linear interpolation in a palette (K, 3); returns (S, S, 3)."""
    position = np.linspace(0, 1, len(palette))
    return np.stack([np.interp(field, position, palette[:, c]) for c in range(3)], axis=-1)


def relief(alpha: np.ndarray, direction: float, *, strength: float) -> np.ndarray:
    """Return a factor that lights one side of the outline and shades the other."""
    soft = cv2.GaussianBlur(alpha, (0, 0), max(alpha.shape[0] / 60, 0.8))
    dy, dx = np.gradient(soft)
    slope = dx * np.cos(direction) + dy * np.sin(direction)
    factor: np.ndarray = 1 + strength * slope / (np.abs(slope).max() + 1e-12)
    return factor


def object_alpha(rng: np.random.Generator, size: int) -> np.ndarray:
    """Draw the outline of one creature, sometimes two; returns coverage in 0..1, (S, S)."""
    outlines = []
    for _ in range(2 if rng.random() < 0.2 else 1):
        shape = drawn_shape(rng)
        radius = size * rng.uniform(0.14, 0.26)
        centre = rng.uniform(radius * 1.1, size - radius * 1.1, 2)
        outlines += [part * radius + centre for part in pose_parts(shape, rng)]
    return coverage(outlines, size)


def check_object_size(object_size: tuple[float, float], size: int) -> None:
    """Raise ValueError unless objects of these shares of the image can be drawn at this size."""
    low, high = object_size
    if not 0 < low <= high <= LARGEST_SHARE:
        raise ValueError(
            f"The object size {low:g} to {high:g} must be two shares of the image, the smaller one "
            f"first, above 0 and at most {LARGEST_SHARE:g}."
        )
    if low * size**2 < SMALLEST_AREA:
        raise ValueError(
            f"Objects of {low:g} of an image of {size}x{size} pixels have "
            f"{low * size**2:.1f} pixels; an outline needs {SMALLEST_AREA}: draw larger images or "
            "larger objects."
        )


def sized_alpha(
    rng: np.random.Generator, size: int, object_size: tuple[float, float]
) -> np.ndarray:
    """Draw the outline of one creature that covers a share of the image from ``object_size``.

    The radius is corrected until the mask, after smoothing and rounding to pixels, has the share
    that was drawn, or the nearest within the limits that its outline can have.

    Returns:
        Coverage in 0..1, (S, S).
    """
    low, high = object_size
    share = float(np.exp(rng.uniform(np.log(low), np.log(high))))
    parts = pose_parts(drawn_shape(rng), rng)
    place = rng.random(2)
    extent = float(max(np.abs(part).max() for part in parts))
    radius, best, error = size * (share / 2) ** 0.5, np.zeros((size, size)), np.inf
    for _ in range(12):
        reach = min(radius * extent, size / 2)
        centre = reach + place * (size - 2 * reach)
        alpha = coverage([part * radius + centre for part in parts], size)
        drawn = float((alpha > 0.5).mean())
        # Outside of the limits is worse than anything within.
        missed = abs(drawn - share) + (not low <= drawn <= high)
        if missed < error:
            best, error = alpha, missed
        radius *= min(max((share / max(drawn, 1e-9)) ** 0.5, 0.6), 1.6)
    return best


def pose_parts(
    shape: Callable[[np.random.Generator], list[np.ndarray]], rng: np.random.Generator
) -> list[np.ndarray]:
    """Return the polygons of a shape, turned and squeezed, of radius about 1."""
    turn, stretch = rng.uniform(0, 2 * np.pi), rng.uniform(0.7, 1.0)
    rotation = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
    return [(part * [1, stretch]) @ rotation.T for part in shape(rng)]


def coverage(outlines: list[np.ndarray], size: int) -> np.ndarray:
    """Fill polygons in pixel coordinates; returns coverage in 0..1, (S, S), slightly smoothed."""
    fine = 4
    canvas = np.zeros((size * fine, size * fine), np.uint8)
    for points in outlines:
        cv2.fillPoly(canvas, [np.round(points * fine).astype(np.int32)], 255)
    alpha = cv2.resize(canvas, (size, size), interpolation=cv2.INTER_AREA).astype(np.float64)
    return cv2.GaussianBlur(alpha / 255, (0, 0), 0.6)


def _ring(radius: np.ndarray) -> np.ndarray:
    angle = np.linspace(0, 2 * np.pi, len(radius), endpoint=False)
    points: np.ndarray = np.stack([np.cos(angle), np.sin(angle)], axis=1) * radius[:, None]
    return points


def _wobble(rng: np.random.Generator, strength: float, *, points: int = 90) -> np.ndarray:
    angle = np.linspace(0, 2 * np.pi, points, endpoint=False)
    waves = [
        rng.normal(0, strength / k) * np.cos(k * angle + rng.uniform(0, 2 * np.pi))
        for k in range(2, 7)
    ]
    return np.clip(1 + sum(waves), 0.45, 1.5)


def _ellipse(x: float, y: float, a: float, b: float, turn: float = 0.0) -> np.ndarray:
    ring = _ring(np.ones(40)) * [a, b]
    rotation = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
    moved: np.ndarray = ring @ rotation.T + [x, y]
    return moved


def _blob(rng: np.random.Generator) -> list[np.ndarray]:
    return [_ring(_wobble(rng, 0.28))]


def _leaf(rng: np.random.Generator) -> list[np.ndarray]:
    x = np.linspace(-1, 1, 50)
    half = 0.5 * (1 - x**2) * (1 + 0.3 * x) + 0.04 * np.sin(9 * x + rng.uniform(0, 6))
    return [np.stack([np.r_[x, x[::-1]], np.r_[half, -half[::-1]]], axis=1) * 1.25]


def _fish(rng: np.random.Generator) -> list[np.ndarray]:
    tail = np.array([[-0.75, 0.0], [-1.35, 0.45], [-1.2, 0.0], [-1.35, -0.45]])
    fin = np.array([[-0.25, 0.3], [0.3, 0.35], [-0.1, 0.3 + rng.uniform(0.2, 0.45)]])
    return [_ellipse(0, 0, 1.0, 0.48), tail, fin]


def _quadruped(rng: np.random.Generator) -> list[np.ndarray]:
    parts = [_ellipse(0, 0, 0.85, 0.45), _ellipse(0.95, 0.25, 0.33, 0.26)]
    for x in (-0.6, -0.35, 0.35, 0.6):
        lean = rng.uniform(-0.25, 0.25)
        parts.append(_ellipse(x + lean / 2, -0.6, 0.11, 0.42, lean))
    parts.append(_ellipse(-1.0, 0.2, 0.4, 0.08, rng.uniform(-0.9, 0.9)))
    return parts


def _insect(rng: np.random.Generator) -> list[np.ndarray]:
    parts = [_ellipse(0, 0, 0.9, 0.3), _ellipse(0.85, 0, 0.25, 0.22)]
    spread = rng.uniform(0.5, 1.0)
    for side in (-1, 1):
        parts += [
            _ellipse(x, side * 0.5, 0.08, 0.5, side * (x - 0.1) * spread) for x in (-0.4, 0.05, 0.5)
        ]
    return parts


def _star(rng: np.random.Generator) -> list[np.ndarray]:
    arms = rng.integers(4, 7)
    angle = np.linspace(0, 2 * np.pi, 120, endpoint=False)
    return [_ring(0.72 + 0.42 * np.cos(arms * angle)) * 1.05]


SHAPES: dict[str, Callable[[np.random.Generator], list[np.ndarray]]] = {
    "blob": _blob,
    "leaf": _leaf,
    "fish": _fish,
    "quadruped": _quadruped,
    "insect": _insect,
    "star": _star,
}


def drawn_shape(rng: np.random.Generator) -> Callable[[np.random.Generator], list[np.ndarray]]:
    """Draw one of the shapes."""
    return list(SHAPES.values())[rng.integers(len(SHAPES))]
