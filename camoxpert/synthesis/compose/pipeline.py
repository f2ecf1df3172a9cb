"""Make the picture that a composition describes: a pure function of it and the pixels it names."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import cv2
import numpy as np

from camoxpert.data.files.image_io import read_image
from camoxpert.synthesis.compose.backgrounds import BackgroundIndex
from camoxpert.synthesis.compose.blending import Scene, blended, focus, scene_of, soft_edge
from camoxpert.synthesis.compose.camera import add_noise, compress
from camoxpert.synthesis.compose.difficulty import LEAST_RING, RING, difficulty
from camoxpert.synthesis.compose.library import ObjectLibrary, read_object
from camoxpert.synthesis.compose.reading import read_masked, resized_mask
from camoxpert.synthesis.compose.records import Composed, Composition, Look, Paste, Shape
from camoxpert.synthesis.compose.shapes import shape_alpha

LEAST_VISIBLE = 0.5
"""Share of an object that occluders leave visible."""
AROUND = 12
"""Pixels around the object that are computed with it."""


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
    other = composition.distractor_source
    return Material(
        object_RGBA=read_object(objects.entries[composition.paste.number]),
        background_RGB=background,
        background_mask=mask,
        texture_RGB=read_image(other, at_least=composition.height) if other else None,
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
        crop = _scaled_crop(composition, background_RGB.shape)
        scene = _shown(background_RGB, crop, size)
        own = np.zeros(size, np.uint8)
        if background_mask is not None:
            crop = _scaled_crop(composition, background_mask.shape)
            own = resized_mask(background_mask[crop[1] : crop[3], crop[0] : crop[2]], size).copy()
        if composition.distractor is not None:
            texture = background_RGB if texture_RGB is None else texture_RGB
            over = _put_distractor(scene, composition.distractor, texture)
            own[over > 0.5] = 0
    with _timed(seconds, "object"):
        region = _region(composition.paste, object_RGBA.shape[:2], size)
        view = scene[region].astype(np.float32) / 255
        pixels, alpha = _placed(composition.paste, object_RGBA, region)
        blur = focus(view, pixels, alpha)
        if blur:
            pixels = cv2.GaussianBlur(pixels, (0, 0), blur)
        alpha = soft_edge(alpha, math.hypot(composition.feather, blur))
        if composition.kind == "edit":
            pixels = _cloned(scene, composition, region, alpha)
    with _timed(seconds, "occluders"):
        fronts = _fronts(composition, region, scene, alpha)
        hidden = _hidden(fronts, alpha.shape)
        # Bytes, as they are stored: the mask must follow from them and nothing else.
        visible = np.rint(alpha * (1 - hidden) * 255).astype(np.uint8)
        label = visible > 127
        total = int((alpha > 0.5).sum())
    others = own[region]
    if composition.kind == "object":
        others = np.where(label, np.uint8(255), others)
    others[(hidden > 0.5) & ~label] = 0
    with _timed(seconds, "blend"):
        gradient = any(look.gradient for look in composition.looks)
        pasted = scene_of(view, pixels, alpha, gradient=gradient)
        candidates = [_painted(pasted, look, fronts) for look in composition.looks]
    with _timed(seconds, "choose"):
        foreign = (own[region] > 0) & ~label
        scored = composition.kind == "object" and bool(label.any())
        kept = 0
        if scored and composition.target is not None and len(candidates) > 1:
            scores = [difficulty(candidate, label, foreign) for candidate in candidates]
            kept = int(np.argmin(np.abs(np.array(scores) - composition.target)))
    mask = own.copy()
    mask[region] = others
    scene[region] = candidates[kept]
    encoded = b""
    with _timed(seconds, "camera"):
        if camera:
            rng = np.random.default_rng([composition.seed, composition.index, 8])
            scene, encoded = compress(add_noise(scene, composition.noise, rng), composition.jpeg)
    with _timed(seconds, "score"):
        score = difficulty(scene[region], label, foreign) if scored else None
    whole = np.zeros(size, np.uint8)
    if composition.kind == "object":
        whole[region] = visible
    return Composed(
        image=scene,
        mask=mask,
        alpha=whole,
        difficulty=score,
        look=kept,
        occluders=len(fronts),
        visible=float(label.sum() / max(total, 1)) if composition.kind == "object" else 0.0,
        others=int(np.count_nonzero((mask == 255) & (whole <= 127))),
        encoded=encoded,
        seconds=seconds,
    )


def _painted(pasted: Scene, look: Look, fronts: list[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    """Return a candidate, uint8 (H, W, 3): the object in its background, occluders in front."""
    painted = blended(pasted, look)
    for front, cover in fronts:
        painted += (front - painted) * cover[..., None]
    return np.rint(painted * 255).astype(np.uint8)


@contextmanager
def _timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds[stage] = time.perf_counter() - start


def _shown(image: np.ndarray, crop: tuple[int, int, int, int], size: tuple[int, int]) -> np.ndarray:
    """Return the shown part of a background at the picture's size; a copy."""
    left, top, right, bottom = crop
    part = image[top:bottom, left:right]
    if part.shape[:2] == size:
        return part.copy()
    return cv2.resize(part, size[::-1], interpolation=cv2.INTER_AREA)


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


def _region(paste: Paste, shape: tuple[int, ...], size: tuple[int, int]) -> tuple[slice, slice]:
    """Return rows and columns of the picture that hold the object and its surroundings."""
    height, width = shape
    turn = math.radians(paste.angle)
    cosine, sine = abs(math.cos(turn)), abs(math.sin(turn))
    down = (width * sine + height * cosine) * paste.scale / 2
    across = (width * cosine + height * sine) * paste.scale / 2
    ring = max(LEAST_RING, RING * 2 * math.sqrt(across * down)) + AROUND
    rows = max(0, math.floor(paste.y - down - ring)), math.ceil(paste.y + down + ring) + 1
    columns = max(0, math.floor(paste.x - across - ring)), math.ceil(paste.x + across + ring) + 1
    return slice(rows[0], min(rows[1], size[0])), slice(columns[0], min(columns[1], size[1]))


def _placed(
    paste: Paste, object_RGBA: np.ndarray, region: tuple[slice, slice]
) -> tuple[np.ndarray, np.ndarray]:
    """Return the object in a region of the picture: RGB in 0..1 and alpha, float32."""
    pixels, scale = object_RGBA, paste.scale
    if paste.flip:
        pixels = np.ascontiguousarray(pixels[:, ::-1])
    height, width = pixels.shape[:2]
    down = across = scale
    if scale < 1:
        # Averages areas: sampling would alias, and look sharper than the background.
        size = max(1, round(width * scale)), max(1, round(height * scale))
        pixels = cv2.resize(pixels, size, interpolation=cv2.INTER_AREA)
        across, down = scale * width / size[0], scale * height / size[1]
    height, width = pixels.shape[:2]
    turn = math.radians(paste.angle)
    cosine, sine = math.cos(turn), math.sin(turn)
    linear = np.array([[cosine * across, sine * down], [-sine * across, cosine * down]])
    corner = np.array([paste.x - region[1].start, paste.y - region[0].start])
    offset = corner - linear @ [(width - 1) / 2, (height - 1) / 2]
    target = region[1].stop - region[1].start, region[0].stop - region[0].start
    matrix = np.column_stack([linear, offset])
    # Beyond a cut-out its margin is repeated: transparent, or the object where it is cut off.
    placed = cv2.warpAffine(
        pixels, matrix, target, flags=cv2.INTER_CUBIC, borderMode=cv2.BORDER_REPLICATE
    ).astype(np.float32)
    placed /= 255
    return np.ascontiguousarray(placed[..., :3]), np.ascontiguousarray(placed[..., 3])


def _cloned(
    scene: np.ndarray, composition: Composition, region: tuple[slice, slice], alpha: np.ndarray
) -> np.ndarray:
    """Return what an edit puts over the background: the background from elsewhere, resampled.

    Of several places the one is taken whose colours differ least at the outline of the edit.
    """
    height, width = scene.shape[:2]
    view = scene[region].astype(np.float32) / 255
    edge = (alpha > 0.1) & (alpha < 0.9)
    best, least = view, math.inf
    for right, down in composition.clones:
        # Half a pixel more: a copy of whole pixels would leave none of the traces of resampling.
        x, y = right * width + 0.5, down * height + 0.5
        matrix = np.array([[1, 0, region[1].start + x], [0, 1, region[0].start + y]])
        moved = cv2.warpAffine(
            scene, matrix, view.shape[1::-1],
            flags=cv2.INTER_CUBIC | cv2.WARP_INVERSE_MAP, borderMode=cv2.BORDER_REFLECT_101,
        ).astype(np.float32) / 255  # fmt: skip
        difference = float(np.abs(moved - view)[edge].mean()) if edge.any() else 0.0
        if difference < least:
            best, least = moved, difference
    return best


def _put_distractor(scene: np.ndarray, shape: Shape, texture: np.ndarray) -> np.ndarray:
    """Draw a salient thing into the picture, in place; return its coverage (H, W)."""
    height, width = scene.shape[:2]
    alpha = shape_alpha(shape, height, width)
    side = max(2, round(2.4 * shape.radius))
    centre = shape.dx * texture.shape[1], shape.dy * texture.shape[0]
    patch = cv2.getRectSubPix(texture, (side, side), centre)
    matrix = np.array([[1, 0, side / 2 - shape.x], [0, 1, side / 2 - shape.y]])
    filled = cv2.warpAffine(
        patch, matrix, (width, height),
        flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP, borderMode=cv2.BORDER_REFLECT_101,
    ).astype(np.float32)  # fmt: skip
    light = _relief(alpha, shape)
    painted = scene + (np.clip(filled * light[..., None], 0, 255) - scene) * alpha[..., None]
    scene[...] = np.rint(painted).astype(np.uint8)
    return alpha


def _relief(alpha: np.ndarray, shape: Shape) -> np.ndarray:
    """Return a factor that lights one side of a shape and shades the other."""
    soft = cv2.GaussianBlur(alpha, (0, 0), max(shape.radius / 3, 1.0))
    slope = cv2.Sobel(soft, cv2.CV_32F, 1, 1, ksize=3) - cv2.Sobel(soft, cv2.CV_32F, 0, 1, ksize=3)
    strongest = float(np.abs(slope).max())
    return shape.shade * (1 - 0.3 * slope / (strongest + 1e-6))


def _fronts(
    composition: Composition,
    region: tuple[slice, slice],
    scene: np.ndarray,
    alpha: np.ndarray,
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return colours and coverage of the occluders, as many as leave half of the object visible."""
    rows, columns = region
    area = float((alpha > 0.5).sum())
    hidden = np.zeros_like(alpha)
    fronts = []
    for shape in composition.occluders:
        cover = shape_alpha(_shifted(shape, columns.start, rows.start), *alpha.shape)
        together = 1 - (1 - hidden) * (1 - cover)
        if ((alpha * (1 - together)) > 0.5).sum() < LEAST_VISIBLE * area:
            break
        hidden = together
        fronts.append((_front_pixels(scene, shape, region), cover))
    return fronts


def _shifted(shape: Shape, x: int, y: int) -> Shape:
    return Shape(**{**shape.__dict__, "x": shape.x - x, "y": shape.y - y})


def _front_pixels(scene: np.ndarray, shape: Shape, region: tuple[slice, slice]) -> np.ndarray:
    """Return the texture of an occluder: the picture from nearby, brighter or darker."""
    rows, columns = (
        _reflected(np.arange(part.start, part.stop) + round(shift * length), length)
        for part, shift, length in zip(region, (shape.dy, shape.dx), scene.shape[:2], strict=True)
    )
    moved = scene[rows[:, None], columns[None]].astype(np.float32) / 255
    return np.clip(moved * np.float32(shape.shade), 0, 1)


def _reflected(positions: np.ndarray, length: int) -> np.ndarray:
    """Reflect positions beyond the ends of a line into it."""
    positions = np.abs(positions) % max(2 * length - 2, 1)
    return np.where(positions >= length, 2 * length - 2 - positions, positions)


def _hidden(fronts: list[tuple[np.ndarray, np.ndarray]], shape: tuple[int, ...]) -> np.ndarray:
    hidden = np.zeros(shape, np.float32)
    for _, cover in fronts:
        hidden = 1 - (1 - hidden) * (1 - cover)
    return hidden
