"""Take a region out of a picture: texture from elsewhere in it, fitted to what surrounds the hole.

Diffusion (``cv2.inpaint``) leaves a smooth patch that a network recognises at once. Here every
pixel is copied: a piece of the background whose rim looks like the rim of the hole is laid into it,
and the remaining difference at the outline is spread smoothly over the inside. Where no piece of
that shape fits, the hole is filled part by part.

Three things are assumed: the mask holds the whole object but for a narrow margin (shadows beyond it
stay), the picture has background of the same kind elsewhere, and texture that fits at the rim fits
inside as well.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import cv2
import numpy as np

from camoxpert.synthesis.compose.blending import ring_around, soft_edge
from camoxpert.synthesis.compose.cutting import box_of, split_objects
from camoxpert.synthesis.compose.pyramid import spread

RIM = 0.2
"""Width of the rim that must look alike, as a share of the root of the hole's area."""
NARROWEST, WIDEST = 4, 24
"""Pixels of the rim."""
MARGIN = 0.02
"""What is taken out beyond the outline, as a share of the image's shorter side: the object's own
light and shadow, and the pixels that blend into it."""
EVEN_RIM = 6.0
"""Pixels around a piece over which its colours are made even with its surroundings."""
STRONGEST = 0.08
"""Largest change of a piece's colours, in 0..1; its texture must not become a stain."""
EDGE = 1.0
"""Sigma of the soft edge of a piece, pixels."""
SEARCHED = 192
"""Longer side of the picture in which pieces are looked for."""
SMALLEST = 8
"""A part of at most this many pixels along its longer side is not divided further."""
AROUND = 24
"""Pixels around a part that is diffused: what lies further away has no influence on it."""
MOST_PARTS = 500
"""A hole in more parts than this has hardly any pieces to be filled with: a net, a fence."""
LARGEST_HOLE = 0.6
"""Share of a picture that may be taken out."""
ALIKE = 1.1
"""Places whose difference is at most this many times the least are alike: one of them is drawn."""
SHRUNK = (1.0, 0.85, 0.7, 0.55, 0.4)
"""Scales at which a shape is tried, in turn, until there is room for it."""


@dataclass(frozen=True)
class Erased:
    """A picture without a region.

    Attributes:
        image: uint8 (H, W, 3).
        hole: bool (H, W), what was taken out.
        parts: pieces it was filled with.
        smooth: share of the hole that had to be filled by diffusion, because nothing fitted.
    """

    image: np.ndarray
    hole: np.ndarray
    parts: int
    smooth: float


def erase(
    image: np.ndarray, region: np.ndarray, forbidden: np.ndarray, rng: np.random.Generator
) -> Erased:
    """Return a picture without a region.

    Args:
        image: uint8 (H, W, 3), RGB.
        region: bool (H, W), to be taken out, with a margin around it.
        forbidden: bool (H, W), what nothing is copied from besides.
        rng: draws among pieces that fit equally well.

    Raises:
        ValueError: the region covers too much of the picture, or leaves no pieces to fill it with.
    """
    hole = widened(region)
    if hole.mean() > LARGEST_HOLE:
        raise ValueError(
            f"{hole.mean():.0%} of the picture would be taken out, and at most "
            f"{LARGEST_HOLE:.0%} can be filled from the rest"
        )
    filler = _Filler(image, hole, widened(forbidden) | hole, rng)
    for part in split_objects(hole):
        filler.fill(part)
    made = np.clip(np.rint(filler.pixels * 255), 0, 255).astype(np.uint8)
    return Erased(made, hole, filler.parts, filler.smooth / max(int(hole.sum()), 1))


def widened(region: np.ndarray) -> np.ndarray:
    """Return a region with the margin around it."""
    reach = max(2, round(MARGIN * min(region.shape)))
    disc = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * reach + 1,) * 2)
    return cv2.dilate(region.astype(np.uint8), disc) > 0


def moved_away(
    region: np.ndarray, taken: np.ndarray, rng: np.random.Generator
) -> np.ndarray | None:
    """Return regions of the same shapes elsewhere, or None where the picture has no room.

    Each object's shape is moved by itself, mirrored or not, and is made smaller where it does not
    fit; neither it nor its margin touches what is taken.

    Args:
        region: bool (H, W), with at least one pixel.
        taken: bool (H, W), where none may lie.
        rng: draws the places.
    """
    free = widened(taken)
    found = np.zeros_like(region)
    for part in split_objects(region):
        top, left, bottom, right = box_of(part)
        shape = part[top:bottom, left:right].astype(np.uint8)
        if rng.random() < 0.5:
            shape = np.ascontiguousarray(shape[:, ::-1])
        place = None
        for scale in SHRUNK:
            size = [max(1, round(scale * side)) for side in shape.shape[::-1]]
            smaller = cv2.resize(shape, size, interpolation=cv2.INTER_NEAREST)
            if smaller.any():
                place = _room(smaller, free, rng)
            if place is not None:
                window = found[place[0] : place[0] + size[1], place[1] : place[1] + size[0]]
                window |= smaller > 0
                break
        if place is None:
            return None
        free = free | widened(found)
    return found


def _room(shape: np.ndarray, taken: np.ndarray, rng: np.random.Generator) -> tuple[int, int] | None:
    """Return a place at which the margin of a shape touches nothing that is taken."""
    reach = max(2, round(MARGIN * min(taken.shape)))
    disc = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * reach + 1,) * 2)
    wide = cv2.dilate(np.pad(shape, reach), disc)
    if wide.shape[0] > taken.shape[0] or wide.shape[1] > taken.shape[1]:
        return None
    overlap = cv2.matchTemplate(
        taken.astype(np.float32), (wide > 0).astype(np.float32), cv2.TM_CCORR
    )
    places = np.argwhere(overlap < 0.5)
    if not len(places):
        return None
    top, left = places[int(rng.integers(len(places)))]
    return int(top) + reach, int(left) + reach


class _Filler:
    """A picture whose hole is being filled.

    Args:
        image, hole: see ``erase``.
        barred: bool (H, W), what nothing is copied from; it holds the hole.
        rng: see ``erase``.
    """

    def __init__(
        self, image: np.ndarray, hole: np.ndarray, barred: np.ndarray, rng: np.random.Generator
    ) -> None:
        self.pixels = np.multiply(image, np.float32(1 / 255), dtype=np.float32)
        self.known = ~hole
        self.barred = barred
        self.rng = rng
        self.parts = self.smooth = 0
        self.scale = min(1.0, SEARCHED / max(hole.shape))
        self._usable = self._shrunk(barred.astype(np.float32)) < 0.01
        # Only known pixels are compared with: those of the hole are whatever they were.
        self._source = self._shrunk(self.pixels)

    def fill(self, part: np.ndarray) -> None:
        """Fill a part of the hole, bool (H, W).

        Raises:
            ValueError: hardly any piece of the background can be copied.
        """
        if self.parts >= MOST_PARTS:
            raise ValueError("the background is in pieces too small to be copied from")
        top, left, bottom, right = box_of(part)
        shift = self._find(part)
        if shift is not None:
            self._copy(part, shift)
        elif max(bottom - top, right - left) <= SMALLEST:
            self._diffuse(part)
        else:
            first, second = part.copy(), part.copy()
            if bottom - top >= right - left:
                middle = (top + bottom) // 2
                first[middle:], second[:middle] = False, False
            else:
                middle = (left + right) // 2
                first[:, middle:], second[:, :middle] = False, False
            # The half with more known pixels around it first: the other one then continues it.
            halves = [half for half in (first, second) if half.any()]
            for half in sorted(halves, key=lambda half: -self._support(half)):
                self.fill(half)

    def _support(self, part: np.ndarray) -> float:
        return float((ring_around(part, NARROWEST) & self.known).sum()) / float(part.sum())

    def _shrunk(self, plane: np.ndarray) -> np.ndarray:
        size = [max(1, round(self.scale * side)) for side in plane.shape[1::-1]]
        return np.asarray(cv2.resize(plane, size, interpolation=cv2.INTER_AREA))

    def _find(self, part: np.ndarray) -> tuple[int, int] | None:
        """Return the shift (y, x) to the piece whose rim looks most like that of a part, or None
        where no piece of the background has its shape."""
        small = self._shrunk(part.astype(np.float32)) > 0
        width = float(np.clip(RIM * math.sqrt(float(small.sum())), NARROWEST, WIDEST))
        known = self._shrunk(self.known.astype(np.float32)) > 0.99
        rim = ring_around(small, width) & known
        if not rim.any():
            return None
        top, left, bottom, right = box_of(small | rim)
        window = (slice(top, bottom), slice(left, right))
        view = self._shrunk(self.pixels)[window]
        compared = np.ascontiguousarray(rim[window], np.float32)
        needed = np.ascontiguousarray((small | rim)[window], np.float32)
        difference = cv2.matchTemplate(
            self._source, view, cv2.TM_SQDIFF, mask=cv2.merge([compared] * 3)
        )
        lacking = cv2.matchTemplate((~self._usable).astype(np.float32), needed, cv2.TM_CCORR)
        difference = np.where(lacking < 0.5, np.maximum(difference, 0), np.inf)
        least = float(difference.min())
        if not math.isfinite(least):
            return None
        # Noise alone must not decide: a little more than nothing is nothing.
        limit = ALIKE * least + 1e-4 * float(compared.sum())
        places = np.argwhere(difference <= limit)
        row, column = places[int(self.rng.integers(len(places)))]
        coarse = (int(row) - top) / self.scale, (int(column) - left) / self.scale
        return self._refined(part, coarse)

    def _refined(self, part: np.ndarray, coarse: tuple[float, float]) -> tuple[int, int] | None:
        """Return the best of the shifts near one that was found in the small picture: the rim's
        mean squared difference is least, and the part's pixels come from where they may."""
        reach = math.ceil(1 / self.scale) if self.scale < 1 else 0
        height, width = part.shape
        rim = ring_around(part, NARROWEST) & self.known
        if not rim.any():
            return None
        # Positions in a flat picture: a shift adds one number to all of them.
        rim_N, part_N = np.flatnonzero(rim), np.flatnonzero(part)
        pixels, barred = self.pixels.reshape(-1, 3), self.barred.ravel()
        own_N3 = pixels[rim_N]
        part_box, rim_box = box_of(part), box_of(rim)
        row, column = round(coarse[0]), round(coarse[1])
        best, least = None, math.inf
        for dy in range(row - reach, row + reach + 1):
            for dx in range(column - reach, column + reach + 1):
                if not _inside(part_box, dy, dx, part.shape):
                    continue
                shift, seen_N, seen_N3 = dy * width + dx, rim_N, own_N3
                if not _inside(rim_box, dy, dx, part.shape):
                    y, x = rim_N // width + dy, rim_N % width + dx
                    inside = (y >= 0) & (x >= 0) & (y < height) & (x < width)
                    if not inside.any():
                        continue
                    seen_N, seen_N3 = rim_N[inside], own_N3[inside]
                error = float(np.square(pixels.take(seen_N + shift, axis=0) - seen_N3).mean())
                # Looked at last: few shifts are better than all before, and a part has more pixels
                # than its rim.
                if error < least and not barred[part_N + shift].any():
                    best, least = (dy, dx), error
        return best

    def _copy(self, part: np.ndarray, shift: tuple[int, int]) -> None:
        height, width = part.shape
        matrix = np.array([[1, 0, -shift[1]], [0, 1, -shift[0]]], np.float32)
        piece = cv2.warpAffine(
            self.pixels,
            matrix,
            (width, height),
            flags=cv2.INTER_NEAREST,
            borderMode=cv2.BORDER_REFLECT_101,
        )
        # Averaged over a rim: along a line of pixels the texture's own differences would be spread
        # over the inside, as smudges.
        rim = ring_around(part, EVEN_RIM) & self.known
        if rim.any():
            piece = piece + np.clip(spread(self.pixels - piece, rim), -STRONGEST, STRONGEST)
        coverage = part.astype(np.float32)
        alpha = np.maximum(soft_edge(coverage, EDGE), coverage)[..., None]
        # Beyond the part only what is known blends into it.
        alpha = np.where((part | self.known)[..., None], alpha, 0)
        self.pixels = self.pixels * (1 - alpha) + piece * alpha
        self.known = self.known | part
        self.parts += 1

    def _diffuse(self, part: np.ndarray) -> None:
        # The whole picture would take as long for each of hundreds of small parts.
        top, left, bottom, right = box_of(part)
        near = (
            slice(max(0, top - AROUND), bottom + AROUND),
            slice(max(0, left - AROUND), right + AROUND),
        )
        image = np.clip(np.rint(self.pixels[near] * 255), 0, 255).astype(np.uint8)
        unknown = (~self.known[near] | part[near]).astype(np.uint8)
        filled = cv2.inpaint(image, unknown, 3, cv2.INPAINT_TELEA)
        self.pixels[part] = filled[part[near]].astype(np.float32) / 255
        self.known = self.known | part
        self.parts += 1
        self.smooth += int(part.sum())


def _inside(box: tuple[int, int, int, int], dy: int, dx: int, shape: tuple[int, ...]) -> bool:
    """Return whether a shifted box lies in a picture."""
    top, left, bottom, right = box
    return top + dy >= 0 and left + dx >= 0 and bottom + dy <= shape[0] and right + dx <= shape[1]
