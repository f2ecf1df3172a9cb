"""Choose where an object goes: a place that resembles it, the part of the background around it, and
its position, size and edges in the finished picture.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from camoxpert.errors import DataError
from camoxpert.synthesis.compose.backgrounds import (
    LEAST_PART,
    SIDES,
    BackgroundEntry,
    BackgroundIndex,
    Place,
    free_box,
    is_large,
    nearest_places,
)
from camoxpert.synthesis.compose.cutting import MARGIN
from camoxpert.synthesis.compose.describe import CELLS
from camoxpert.synthesis.compose.library import ObjectEntry, ObjectLibrary
from camoxpert.synthesis.compose.records import ComposeSettings, Paste

Box = tuple[int, int, int, int]
Sides = tuple[bool, bool, bool, bool]
NO_SIDES = (False, False, False, False)
LARGEST_PART = 0.92
"""Share of the picture's sides that an object's box may take."""
OF_OWN_SIZE = (0.5, 1.2)
"""Share of a picture that an object covers, by the share of its own picture, where none is set."""
OWN_SIZE = (0.01, 0.2)
"""The same for objects that come without a picture."""
LARGEST_SHARE = 0.5
SMALLEST_SIDE = 12
"""Fewest pixels along the longer side of a pasted object."""
SMALLEST_AREA = 36
"""Fewest pixels of a pasted object."""
NEAREST = 0.75
"""Difficulty from which the most similar backgrounds are searched; for easier targets, this less
the target is the share of the backgrounds that are too similar."""


@dataclass(frozen=True)
class Pose:
    """How an object is turned and how large it is to be.

    Attributes:
        share: of the picture that it covers.
        angle: degrees counter-clockwise; 0 where an edge of the picture cuts it.
        flip: mirrored left-right.
        sides: edges of the new picture that cut it: left, top, right, bottom.
    """

    share: float
    angle: float
    flip: bool
    sides: Sides


@dataclass(frozen=True)
class Placement:
    """Where an object goes.

    Attributes:
        place: the window of a background.
        crop: left, top, right, bottom of the shown part, in pixels of the background.
        free: the shown part shows no object of the background.
        height, width: of the finished picture.
        paste: the object in it.
        box: left, top, right, bottom of the object in it.
    """

    place: Place
    crop: Box
    free: bool
    height: int
    width: int
    paste: Paste
    box: tuple[float, float, float, float]


def draw_pose(rng: np.random.Generator, entry: ObjectEntry, settings: ComposeSettings) -> Pose:
    """Draw a pose; objects that their own picture cut off are mirrored but not rotated."""
    flip = bool(rng.random() < 0.5)
    angle = rng.uniform(-1, 1) * settings.angle
    low, high = settings.object_size or OWN_SIZE
    if settings.object_size is None and entry.share:
        low, high = (min(factor * entry.share, LARGEST_SHARE) for factor in OF_OWN_SIZE)
    share = math.exp(rng.uniform(math.log(low), math.log(high)))
    left, top, right, bottom = entry.sides
    sides = (right, top, left, bottom) if flip else entry.sides
    return Pose(share, 0.0 if any(sides) else angle, flip, sides)


def place_object(
    rng: np.random.Generator,
    pose: Pose,
    settings: ComposeSettings,
    objects: ObjectLibrary,
    backgrounds: BackgroundIndex,
    *,
    number: int,
    background: int | None,
    target: float | None,
    strict: bool,
) -> Placement:
    """Draw where an object goes.

    Args:
        rng: source of everything drawn.
        pose: of the object.
        settings, objects, backgrounds: see ``draw_composition``.
        number: row of the object.
        background: number of the background; None searches all.
        target: difficulty to come near to, or None.
        strict: show no object of the background if there is a large part without one.

    Raises:
        DataError: every part of the backgrounds shows an object.
    """
    places = _places(backgrounds, objects, number, pose, settings, background, target)
    place, crop, free = _choose(rng, places, backgrounds, pose.sides, settings, strict=strict)
    height, width = _picture_size(crop, settings.size)
    window = _window(place, backgrounds)
    entry = objects.entries[number]
    paste = _paste(rng, entry, number, pose, window=window, crop=crop, size=(height, width))
    return Placement(place, crop, free, height, width, paste, _pasted_box(entry, paste))


def _places(
    backgrounds: BackgroundIndex,
    objects: ObjectLibrary,
    number: int,
    pose: Pose,
    settings: ComposeSettings,
    background: int | None,
    target: float | None,
) -> list[Place]:
    """Return places for an object, of the window size that it needs or the nearest there is.

    An object that is to be seen easily is not put where it resembles the background most.
    """
    skip = 0 if target is None else round(max(NEAREST - target, 0) * len(backgrounds))
    entry = objects.entries[number]
    reach = max(entry.height, entry.width) * math.sqrt(pose.share / entry.area) * CELLS
    wanted = int(np.searchsorted(np.array(SIDES[:-1]) * 1.2, reach))
    sizes = sorted(range(len(SIDES)), key=lambda size: (abs(size - wanted), size))
    # Without its preferred side the object still lies at the picture's edge, which is then where
    # the window begins.
    ways = itertools.product(
        (True, False)[settings.others != "avoid" :], sizes, (pose.sides, NO_SIDES)
    )
    for room, size, cut in ways:
        places = nearest_places(
            backgrounds, objects.features[number], size=size, choices=settings.choices, skip=skip,
            sides=cut, trim=settings.crop != (1, 1), background=background, room=room,
        )  # fmt: skip
        if places:
            return places
    raise DataError(
        f"No place for the object {entry.name}: every part of the backgrounds shows an object."
    )


def _choose(
    rng: np.random.Generator,
    places: Sequence[Place],
    backgrounds: BackgroundIndex,
    sides: Sides,
    settings: ComposeSettings,
    *,
    strict: bool,
) -> tuple[Place, Box, bool]:
    """Return a place, the part of its background to show, and whether that shows no object.

    Of the places in random order the first is taken that has a large part without objects around
    it; if none has, the whole background of the first one is shown.
    """
    order = rng.permutation(len(places))
    zoom, corner = rng.uniform(*settings.crop, 2), rng.random(2)
    # The picture ends where an object is cut off, unless all of the background is to be shown.
    trimmed = NO_SIDES if settings.crop == (1, 1) else sides
    found = []
    for position in order if settings.others == "avoid" or strict else order[:1]:
        place = places[position]
        entry, taken = backgrounds.entries[place.background], backgrounds.taken[place.background]
        everything = np.zeros_like(taken)
        for shown in (taken, everything):
            cells = free_box(shown, place, sides=trimmed)
            crop = _crop(place, cells, taken.shape, entry, sides, zoom, corner)
            free = shown is taken and (is_large(cells) or not taken.any())
            if free and (settings.others == "avoid" or strict or not taken.any()):
                return place, crop, True
        found.append((place, crop, False))
    return found[0]


def _crop(
    place: Place,
    cells: Box,
    grid: tuple[int, ...],
    entry: BackgroundEntry,
    sides: Sides,
    zoom: np.ndarray,
    corner: np.ndarray,
) -> Box:
    """Draw a part within ``cells`` that holds the window: left, top, right, bottom in pixels.

    At the sides that cut the object it ends where the cells end.
    """
    ends = []
    for axis in range(2):
        low, high = cells[axis], cells[axis + 2]
        first = place.left if axis == 0 else place.top
        length = max(place.side * 1.25, zoom[axis] * (high - low), LEAST_PART * CELLS)
        length = min(length, high - low)
        earliest, latest = max(low, first + place.side - length), min(first, high - length)
        start = earliest + corner[axis] * (latest - earliest)
        if sides[axis]:
            start = low
        elif sides[axis + 2]:
            start = high - length
        pixels = (entry.width, entry.height)[axis] / grid[1 - axis]
        # Rounded inwards: a pixel more could show a part of an object.
        ends.append(
            (math.ceil(start * pixels - 1e-6), math.floor((start + length) * pixels + 1e-6))
        )
    (left, right), (top, bottom) = ends
    return left, top, right, bottom


def _picture_size(crop: Box, size: int) -> tuple[int, int]:
    width, height = crop[2] - crop[0], crop[3] - crop[1]
    factor = min(1.0, size / max(width, height))
    return max(1, round(height * factor)), max(1, round(width * factor))


def _window(place: Place, backgrounds: BackgroundIndex) -> tuple[float, float, float, float]:
    """Return left, top, right and bottom of a window in pixels of its background."""
    entry = backgrounds.entries[place.background]
    rows, columns = backgrounds.grids[place.background]
    across, down = entry.width / columns, entry.height / rows
    return (
        place.left * across,
        place.top * down,
        (place.left + place.side) * across,
        (place.top + place.side) * down,
    )


def _paste(
    rng: np.random.Generator,
    entry: ObjectEntry,
    number: int,
    pose: Pose,
    *,
    window: tuple[float, float, float, float],
    crop: Box,
    size: tuple[int, int],
) -> Paste:
    """Place an object in its window, or at the edge of the picture that cuts it off."""
    factor = size[1] / (crop[2] - crop[0])
    scale = min(math.sqrt(pose.share * size[0] * size[1] / entry.area), 1.0)
    reach = _turned(entry, pose.angle)
    fits = min(LARGEST_PART * size[1 - axis] / reach[axis] for axis in range(2))
    least = max(
        SMALLEST_SIDE / max(entry.height, entry.width), math.sqrt(SMALLEST_AREA / entry.area)
    )
    scale = min(max(scale, least), fits, 1.0)
    centre = []
    for axis in range(2):
        length = size[1 - axis]
        half = reach[axis] * scale / 2
        low = (window[axis] - crop[axis]) * factor
        high = (window[axis + 2] - crop[axis]) * factor
        spare = max((high - low) / 2 - half, 0)
        middle = (low + high) / 2 + rng.uniform(-1, 1) * spare - 0.5
        middle = min(max(middle, half - 0.5), length - half - 0.5)
        # The outermost line of the object's box lies on the outermost line of the picture.
        edge = (entry.width, entry.height)[axis] / 2 - MARGIN
        if pose.sides[axis]:
            middle = edge * scale - 0.5 - 0.25
        elif pose.sides[axis + 2]:
            middle = length - edge * scale - 0.5 + 0.25
        centre.append(round(float(middle), 3))
    return Paste(
        number=number,
        name=entry.name,
        source=entry.source,
        mask=entry.mask,
        part=entry.part,
        scale=scale,
        angle=round(pose.angle, 3),
        flip=pose.flip,
        x=centre[0],
        y=centre[1],
    )


def _turned(entry: ObjectEntry, angle: float) -> tuple[float, float]:
    """Return width and height of the box around a rotated object, at its own scale."""
    cosine, sine = abs(math.cos(math.radians(angle))), abs(math.sin(math.radians(angle)))
    height, width = entry.height - 2 * MARGIN, entry.width - 2 * MARGIN
    return width * cosine + height * sine, width * sine + height * cosine


def _pasted_box(entry: ObjectEntry, paste: Paste) -> tuple[float, float, float, float]:
    """Return left, top, right and bottom of a pasted object in the picture."""
    width, height = (length * paste.scale for length in _turned(entry, paste.angle))
    return (
        paste.x - width / 2,
        paste.y - height / 2,
        paste.x + width / 2,
        paste.y + height / 2,
    )
