"""Make the picture that a composition describes: a pure function of it and the pixels it names."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import cv2
import numpy as np

from camoxpert.data.files.image_io import UNLIMITED, read_image
from camoxpert.synthesis.compose.backgrounds import BackgroundIndex
from camoxpert.synthesis.compose.blending import (
    AROUND,
    Scene,
    blended,
    focus,
    sample,
    scene_of,
    soft_edge,
    surroundings,
)
from camoxpert.synthesis.compose.camera import add_noise, compress
from camoxpert.synthesis.compose.difficulty import RING, difficulty
from camoxpert.synthesis.compose.library import ObjectLibrary, read_object
from camoxpert.synthesis.compose.painting import (
    Front,
    as_bytes,
    as_floats,
    cloned,
    front_of,
    half_extent,
    placed,
    put_distractor,
    region_of,
    resized,
)
from camoxpert.synthesis.compose.reading import read_masked, resized_mask
from camoxpert.synthesis.compose.records import Composed, Composition, Look
from camoxpert.synthesis.compose.shapes import Region

HARDEST = 0.88
"""Difficulty above which an object can hardly be told from its background by anyone, so that its
label would be wrong: of real animals, 95 in 100 are below 0.73. A target may lie above it."""
WEAKENED = 2
"""How often an object that is too hard to see is fitted in at half the strength."""
MARGIN = 12
"""Pixels around the object that are painted with it: its edge may be out of focus."""


@dataclass(frozen=True)
class Material:
    """The pixels of a composition.

    Attributes:
        object_RGBA: uint8 (h, w, 4), as ``cutting.Cutout.pixels``.
        background_RGB: uint8 (H, W, 3), the whole background.
        background_mask: uint8 (H, W), 0, VOID and 255, or None: it shows no object.
        texture_RGB: uint8 (H, W, 3), the whole picture that gives a distractor's texture, or None.
    """

    object_RGBA: np.ndarray
    background_RGB: np.ndarray
    background_mask: np.ndarray | None = None
    texture_RGB: np.ndarray | None = None


def read_material(
    composition: Composition, objects: ObjectLibrary, backgrounds: BackgroundIndex
) -> Material:
    """Read the pixels of a composition from its files.

    Raises:
        DataError: a file is missing or damaged.
    """
    least = needed_side(composition)
    background, mask = read_masked(
        composition.background_source, composition.background_mask, at_least=least
    )
    other, texture = composition.distractor_source, None
    if other:
        texture = read_image(other, at_least=composition.height, max_pixels=UNLIMITED)
    return Material(
        object_RGBA=read_object(objects.entries[composition.paste.number]),
        background_RGB=background,
        background_mask=mask,
        texture_RGB=texture,
    )


def needed_side(composition: Composition) -> int:
    """Return how many pixels the shorter side of the background needs at least."""
    left, top, right, bottom = composition.crop
    factor = max(composition.width / (right - left), composition.height / (bottom - top))
    return math.ceil(min(composition.background_size) * min(factor, 1.0))


def compose_one(
    composition: Composition,
    object_RGBA: np.ndarray,
    background_RGB: np.ndarray,
    *,
    background_mask: np.ndarray | None = None,
    texture_RGB: np.ndarray | None = None,
    camera: bool = True,
) -> Composed:
    """Make a picture; equal arguments give equal pixels.

    Args:
        composition: what to do.
        object_RGBA, background_RGB, background_mask, texture_RGB: see ``Material``.
        camera: add noise and compress; False leaves both out.

    Returns:
        The picture with its mask: the visible pasted object where its alpha is above one half, and
        what remains visible of the background's own objects.
    """
    seconds: dict[str, float] = {}
    size = composition.height, composition.width
    with _timed(seconds, "background"):
        scene, own = _background(composition, background_RGB, background_mask, texture_RGB)
    with _timed(seconds, "object"):
        layer = _layer(composition, object_RGBA, scene)
    with _timed(seconds, "occluders"):
        front = front_of(scene, composition.occluders, layer.region, layer.scene.coverage)
        label, visible = _labels(layer, front)
    with _timed(seconds, "blend"):
        candidates = [_painted(layer, look, front) for look in composition.looks]
        if front is not None:
            everything = as_floats(scene)
            front.over(everything, (slice(None), slice(None)))
            scene = as_bytes(everything)
    mask, alpha = own.copy(), np.zeros(size, np.uint8)
    if front is not None:
        mask[front.coverage > 0.5] = 0
    foreign = own > 0
    if composition.kind == "object":
        mask[layer.region][label] = 255
        alpha[layer.region] = visible
    shown = alpha > 127
    wide = _surroundings(composition, object_RGBA, size)
    score = None
    if shown.any() and not shown[wide].all():
        score = _Score(shown[wide], (foreign & ~shown)[wide])
    with _timed(seconds, "choose"):
        kept = 0
        if score is not None and composition.target is not None and len(candidates) > 1:
            misses = []
            for candidate in candidates:
                scene[layer.region] = candidate
                misses.append(abs(score.of(scene[wide]) - composition.target))
            kept = int(np.argmin(misses))
    limit = max(HARDEST, composition.target or 0.0)
    for weakened in range(WEAKENED + 1):
        with _timed(seconds, "blend"):
            if weakened:
                look = composition.looks[kept].weakened(weakened)
                candidates[kept] = _painted(layer, look, front)
            scene[layer.region] = candidates[kept]
        with _timed(seconds, "camera"):
            image, encoded = _taken(composition, scene) if camera else (scene, b"")
        with _timed(seconds, "score"):
            final = None if score is None else score.of(image[wide])
        if final is None or final <= limit:
            break
    whole = int((layer.scene.coverage > 0.5).sum())
    return Composed(
        image=image,
        mask=mask,
        alpha=alpha,
        difficulty=final,
        look=kept,
        weakened=weakened,
        occluders=0 if front is None else front.number,
        visible=int(shown.sum()) / max(whole, 1),
        others=int(np.count_nonzero((mask == 255) & ~shown)),
        encoded=encoded,
        seconds=seconds,
    )


@dataclass(frozen=True)
class _Layer:
    """The object in the region of the picture that it can reach."""

    region: Region
    scene: Scene


@dataclass(frozen=True)
class _Score:
    """Scores variants of a picture around one object."""

    inside: np.ndarray
    foreign: np.ndarray

    def of(self, image: np.ndarray) -> float:
        return difficulty(image, self.inside, self.foreign)


def _background(
    composition: Composition,
    background_RGB: np.ndarray,
    background_mask: np.ndarray | None,
    texture_RGB: np.ndarray | None,
) -> tuple[np.ndarray, np.ndarray]:
    """Return the picture behind the object, and the mask of what it shows itself."""
    size = composition.height, composition.width
    scene = _shown(background_RGB, _scaled_crop(composition, background_RGB.shape), size)
    own = np.zeros(size, np.uint8)
    if background_mask is not None:
        left, top, right, bottom = _scaled_crop(composition, background_mask.shape)
        own = resized_mask(background_mask[top:bottom, left:right], size).copy()
    if composition.distractor is not None:
        texture = background_RGB if texture_RGB is None else texture_RGB
        own[put_distractor(scene, composition.distractor, texture)] = 0
    return scene, own


def _layer(composition: Composition, object_RGBA: np.ndarray, scene: np.ndarray) -> _Layer:
    """Place the object, put it out of focus like its surroundings, and soften its edge."""
    paste, size = composition.paste, scene.shape[:2]
    region = region_of(paste, object_RGBA.shape, size, margin=MARGIN)
    pixels, coverage = placed(paste, object_RGBA, region)
    wide = _surroundings(composition, object_RGBA, size)
    around = np.zeros(size, bool)
    around[region] = coverage > 0.5
    ring = surroundings(around[wide])
    blur = focus(scene[wide], ring, pixels, coverage)
    if blur:
        pixels = cv2.GaussianBlur(pixels, (0, 0), blur)
    coverage = _softened(coverage, math.hypot(composition.feather, blur))
    if composition.kind == "edit":
        pixels = cloned(scene, composition.clones, region, coverage)
    gradient = any(look.gradient for look in composition.looks)
    colours = as_floats(scene[wide].reshape(-1, 3)[sample(ring)])
    return _Layer(
        region, scene_of(as_floats(scene[region]), pixels, coverage, colours, gradient=gradient)
    )


def _softened(coverage: np.ndarray, sigma: float) -> np.ndarray:
    """Soften the edge, unless the object is so thin that nothing of it would be labelled."""
    soft = soft_edge(coverage, sigma)
    if (soft > 0.5).any():
        return soft
    return coverage / max(float(coverage.max()), 1e-6)


def _labels(layer: _Layer, front: Front | None) -> tuple[np.ndarray, np.ndarray]:
    """Return where the object is labelled, bool, and its visible share in bytes."""
    visible = layer.scene.coverage
    if front is not None:
        visible = visible * (1 - front.coverage[layer.region])
    # Bytes, as they are stored: the mask must follow from them and nothing else.
    stored = as_bytes(visible)
    return stored > 127, stored


def _painted(layer: _Layer, look: Look, front: Front | None) -> np.ndarray:
    """Return a candidate, uint8 (h, w, 3): the object in its background, occluders in front."""
    painted = blended(layer.scene, look)
    if front is not None:
        front.over(painted, layer.region)
    return as_bytes(painted)


def _surroundings(
    composition: Composition, object_RGBA: np.ndarray, size: tuple[int, ...]
) -> Region:
    """Return rows and columns that hold the object and the ring that it is compared with."""
    down, across = half_extent(composition.paste, object_RGBA.shape)
    ring = max(RING, AROUND) * 2 * math.sqrt(down * across) + MARGIN
    height, width = size
    return region_of(composition.paste, object_RGBA.shape, (height, width), margin=ring)


def _taken(composition: Composition, scene: np.ndarray) -> tuple[np.ndarray, bytes]:
    """Return the picture as the camera takes it, and its file."""
    rng = np.random.default_rng([composition.seed, composition.index, 9])
    return compress(add_noise(scene, composition.noise, rng), composition.jpeg)


@contextmanager
def _timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds[stage] = seconds.get(stage, 0.0) + time.perf_counter() - start


def _shown(image: np.ndarray, crop: tuple[int, int, int, int], size: tuple[int, int]) -> np.ndarray:
    """Return the shown part of a background at the picture's size; a copy."""
    left, top, right, bottom = crop
    part = image[top:bottom, left:right]
    if part.shape[:2] == size:
        return part.copy()
    return resized(part, size)


def _scaled_crop(composition: Composition, shape: tuple[int, ...]) -> tuple[int, int, int, int]:
    """Return the shown part in pixels of a background that may have been decoded smaller."""
    height, width = composition.background_size
    left, top, right, bottom = composition.crop
    down, across = shape[0] / height, shape[1] / width
    if (down, across) == (1, 1):
        return composition.crop
    # Rounded inwards: a pixel more could show a part of an object.
    first = math.ceil(left * across), math.ceil(top * down)
    return *first, max(int(right * across), first[0] + 1), max(int(bottom * down), first[1] + 1)
