"""Put the layers of a picture in their places: the object, what edits copy, distractors, occluders.

Pictures are uint8 (H, W, 3) RGB; layers are float32, RGB and coverage in 0..1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np

from camoxpert.synthesis.compose.records import Paste, Shape
from camoxpert.synthesis.compose.shapes import Region, shape_coverage

AVERAGED = 0.75
"""Scale below which areas are averaged: interpolating would alias, and look too sharp."""
REPEATED = 8
"""Pixels by which a cut-out is continued before it is turned and moved."""
LEAST_VISIBLE = 0.5
"""Share of an object that occluders leave visible."""


@dataclass(frozen=True)
class Front:
    """What stands in front of everything else.

    Attributes:
        colours: float32 (H, W, 3), multiplied by the coverage.
        coverage: float32 (H, W).
        number: of occluders.
    """

    colours: np.ndarray
    coverage: np.ndarray
    number: int

    def over(self, behind: np.ndarray, region: Region) -> None:
        """Lay it over a region of a picture, float32 (h, w, 3), in place."""
        behind *= 1 - self.coverage[region][..., None]
        behind += self.colours[region]


def region_of(
    paste: Paste, shape: tuple[int, ...], size: tuple[int, int], *, margin: float
) -> Region:
    """Return rows and columns of the picture that hold the object and a margin around it.

    Args:
        paste: where the object is.
        shape: of its cut-out.
        size: height and width of the picture.
        margin: pixels.
    """
    down, across = half_extent(paste, shape)
    ends = []
    for middle, half, length in ((paste.y, down, size[0]), (paste.x, across, size[1])):
        start = min(max(0, math.floor(middle - half - margin)), length - 1)
        end = min(max(math.ceil(middle + half + margin) + 1, start + 1), length)
        ends.append(slice(start, end))
    return ends[0], ends[1]


def half_extent(paste: Paste, shape: tuple[int, ...]) -> tuple[float, float]:
    """Return half the height and half the width of the box around a pasted cut-out."""
    height, width = shape[:2]
    turn = math.radians(paste.angle)
    cosine, sine = abs(math.cos(turn)), abs(math.sin(turn))
    return (
        (width * sine + height * cosine) * paste.scale / 2,
        (width * cosine + height * sine) * paste.scale / 2,
    )


def placed(paste: Paste, object_RGBA: np.ndarray, region: Region) -> tuple[np.ndarray, np.ndarray]:
    """Return the object in a region of the picture: RGB (h, w, 3) and coverage (h, w)."""
    pixels, scale = object_RGBA, paste.scale
    if paste.flip:
        pixels = np.ascontiguousarray(pixels[:, ::-1])
    height, width = pixels.shape[:2]
    down = across = scale
    if scale < AVERAGED:
        size = max(1, round(width * scale)), max(1, round(height * scale))
        pixels = cv2.resize(pixels, size, interpolation=cv2.INTER_AREA)
        across, down = scale * width / size[0], scale * height / size[1]
    # Beyond a cut-out its margin is repeated: transparent, or the object where it is cut off.
    pixels = cv2.copyMakeBorder(pixels, *(REPEATED,) * 4, cv2.BORDER_REPLICATE)
    height, width = pixels.shape[:2]
    turn = math.radians(paste.angle)
    cosine, sine = math.cos(turn), math.sin(turn)
    linear = np.array([[cosine * across, sine * down], [-sine * across, cosine * down]])
    corner = np.array([paste.x - region[1].start, paste.y - region[0].start])
    offset = corner - linear @ [(width - 1) / 2, (height - 1) / 2]
    target = region[1].stop - region[1].start, region[0].stop - region[0].start
    matrix = np.column_stack([linear, offset])
    warped = cv2.warpAffine(pixels, matrix, target, flags=cv2.INTER_CUBIC)
    return as_floats(warped[..., :3]), as_floats(warped[..., 3])


def cloned(
    scene: np.ndarray,
    shifts: Sequence[tuple[float, float]],
    region: Region,
    coverage: np.ndarray,
) -> np.ndarray:
    """Return what an edit puts over a region: the picture from elsewhere, resampled.

    Of several places the one is taken whose colours differ least at the outline of the edit.

    Args:
        scene: the picture.
        shifts: to the right and down, as shares of its sides.
        region: rows and columns.
        coverage: of the edit.
    """
    height, width = scene.shape[:2]
    view = as_floats(scene[region])
    edge = (coverage > 0.1) & (coverage < 0.9)
    best, least = view, math.inf
    for right, down in shifts:
        # Half a pixel more: a copy of whole pixels would leave none of the traces of resampling.
        x, y = right * width + 0.5, down * height + 0.5
        matrix = np.array([[1, 0, region[1].start + x], [0, 1, region[0].start + y]])
        moved = as_floats(
            cv2.warpAffine(
                scene, matrix, view.shape[1::-1],
                flags=cv2.INTER_CUBIC | cv2.WARP_INVERSE_MAP, borderMode=cv2.BORDER_REFLECT_101,
            )
        )  # fmt: skip
        difference = float(np.abs(moved - view)[edge].mean()) if edge.any() else 0.0
        if difference < least:
            best, least = moved, difference
    return best


def put_distractor(scene: np.ndarray, shape: Shape, texture: np.ndarray) -> np.ndarray:
    """Draw a salient thing into the picture, in place; return where it covers more than half.

    Args:
        scene: the picture.
        shape: the thing; ``dx`` and ``dy`` are the place of its texture in ``texture``.
        texture: uint8 (H, W, 3), the picture that it is taken from.
    """
    region, coverage = shape_coverage(shape, *scene.shape[:2])
    over = np.zeros(scene.shape[:2], bool)
    if not coverage.size:
        return over
    side = max(2, round(2.4 * shape.radius))
    centre = shape.dx * texture.shape[1], shape.dy * texture.shape[0]
    patch = cv2.getRectSubPix(texture, (side, side), centre)
    corner = side / 2 + region[1].start - shape.x, side / 2 + region[0].start - shape.y
    filled = cv2.warpAffine(
        patch, np.array([[1, 0, corner[0]], [0, 1, corner[1]]]), coverage.shape[::-1],
        flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP, borderMode=cv2.BORDER_REFLECT_101,
    )  # fmt: skip
    lit = np.clip(filled * _relief(coverage, shape)[..., None], 0, 255)
    behind = scene[region]
    scene[region] = np.rint(behind + (lit - behind) * coverage[..., None]).astype(np.uint8)
    over[region] = coverage > 0.5
    return over


def front_of(
    scene: np.ndarray, shapes: Sequence[Shape], region: Region, coverage: np.ndarray
) -> Front | None:
    """Return the occluders of a picture, as many as leave half of the object visible.

    Args:
        scene: the picture behind them, whose colours they take from nearby.
        shapes: the occluders, the rearmost first.
        region, coverage: of the object.

    Returns:
        None if there is none.
    """
    size = scene.shape[:2]
    area = float((coverage > 0.5).sum())
    colours, hidden, number = np.zeros((*size, 3), np.float32), np.zeros(size, np.float32), 0
    for shape in shapes:
        box, cover = shape_coverage(shape, *size)
        together = hidden.copy()
        together[box] = 1 - (1 - hidden[box]) * (1 - cover)
        if (coverage * (1 - together[region]) > 0.5).sum() < LEAST_VISIBLE * area:
            break
        hidden, number = together, number + 1
        front = _nearby(scene, shape, box)
        colours[box] += (front - colours[box]) * cover[..., None]
    return Front(colours, hidden, number) if number else None


def resized(image: np.ndarray, size: tuple[int, ...]) -> np.ndarray:
    """Return a picture at another height and width, as sharp as ``placed`` leaves objects."""
    scale = min(size[0] / image.shape[0], size[1] / image.shape[1])
    method = cv2.INTER_AREA if scale < AVERAGED else cv2.INTER_CUBIC
    return cv2.resize(image, (size[1], size[0]), interpolation=method)


def as_floats(values: np.ndarray) -> np.ndarray:
    """Return bytes as float32 in 0..1, contiguous."""
    return np.multiply(values, np.float32(1 / 255), dtype=np.float32)


def as_bytes(values: np.ndarray) -> np.ndarray:
    """Return float32 in 0..1 as bytes, rounded."""
    return cv2.convertScaleAbs(values, alpha=255)


def _relief(coverage: np.ndarray, shape: Shape) -> np.ndarray:
    """Return a factor that lights one side of a shape and shades the other."""
    soft = cv2.GaussianBlur(coverage, (0, 0), max(shape.radius / 3, 1.0))
    slope = cv2.Sobel(soft, cv2.CV_32F, 1, 0) + cv2.Sobel(soft, cv2.CV_32F, 0, 1)
    strongest = float(np.abs(slope).max())
    return np.float32(shape.shade) * (1 + np.float32(0.3) * slope / (strongest + 1e-6))


def _nearby(scene: np.ndarray, shape: Shape, region: Region) -> np.ndarray:
    """Return the picture from a shifted region, brighter or darker; reflected at its edges."""
    rows, columns = (
        _reflected(np.arange(part.start, part.stop) + round(shift * length), length)
        for part, shift, length in zip(region, (shape.dy, shape.dx), scene.shape[:2], strict=True)
    )
    return np.minimum(as_floats(scene[rows[:, None], columns[None]]) * np.float32(shape.shade), 1)


def _reflected(positions: np.ndarray, length: int) -> np.ndarray:
    """Reflect positions beyond the ends of a line into it."""
    positions = np.abs(positions) % max(2 * length - 2, 1)
    return np.where(positions >= length, 2 * length - 2 - positions, positions)
