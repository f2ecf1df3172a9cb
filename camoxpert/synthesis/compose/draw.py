"""Draw compositions: what goes where, decided from (seed, index) before any pixel is read."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from camoxpert.errors import DataError
from camoxpert.synthesis.compose.backgrounds import (
    SIDES,
    BackgroundIndex,
    Place,
    free_box,
    nearest_places,
)
from camoxpert.synthesis.compose.cutting import MARGIN
from camoxpert.synthesis.compose.describe import CELLS
from camoxpert.synthesis.compose.library import ObjectEntry, ObjectLibrary
from camoxpert.synthesis.compose.records import ComposeSettings, Composition, Look, Paste, Shape

Box = tuple[int, int, int, int]
Sides = tuple[bool, bool, bool, bool]
LEAST_PART = 0.7
"""Share of a background's shorter side that a part without objects must have to be used alone."""
LARGEST_PART = 0.92
"""Share of the picture's sides that an object's box may take."""
SMALLEST_SIDE = 12
"""Fewest pixels along the longer side of a pasted object."""
NEAREST = 0.75
"""Difficulty from which the most similar backgrounds are searched; for easier targets, this less
the target is the share of the backgrounds that are too similar."""
CLONES = 8
"""Places of which an edit takes its texture from the one that fits best."""
# A stream of random numbers for each question: a change to one leaves the others as they are.
OBJECT, PLACE, LOOK, KIND, OCCLUDER, DISTRACTOR, CAMERA, TARGET, EDGE = range(9)


def draw_composition(
    seed: int,
    index: int,
    settings: ComposeSettings,
    objects: ObjectLibrary,
    backgrounds: BackgroundIndex,
    *,
    number: int | None = None,
    background: int | None = None,
) -> Composition:
    """Return composition ``index``; equal arguments give equal compositions.

    Every object is used once before any is used again.

    Args:
        seed, index: which composition.
        settings: what it is drawn from.
        objects, backgrounds: what there is.
        number: row of the object; None draws it.
        background: number of the background; None searches for one that resembles the object.

    Raises:
        DataError: there are no objects or no places for them.
    """
    if not len(objects) or not len(backgrounds.windows):
        raise DataError(_nothing(objects, backgrounds))
    stream = [np.random.default_rng([seed, index, purpose]) for purpose in range(9)]
    if number is None:
        number = _turn(seed, index, len(objects))
    entry = objects.entries[number]
    kind = "edit" if stream[KIND].random() < settings.edits else "object"
    flip = bool(stream[OBJECT].random() < 0.5)
    angle = stream[OBJECT].uniform(-1, 1) * settings.angle
    share = math.exp(stream[OBJECT].uniform(*np.log(settings.object_size)))
    sides = _mirrored(entry.sides) if flip else entry.sides
    if any(sides):
        angle = 0.0
    target = _target(stream[TARGET], settings) if kind == "object" else None
    places = _places(backgrounds, objects, number, share, sides, settings, background, target)
    place, crop, free = _choose(
        stream[PLACE], places, backgrounds, sides, settings, strict=kind == "edit"
    )
    shown = backgrounds.entries[place.background]
    height, width = _picture_size(crop, settings.size)
    paste = _paste(
        stream[PLACE], entry, number, share, angle, flip, sides,
        window=_window(place, shown.height, shown.width, backgrounds.taken[place.background].shape),
        crop=crop, size=(height, width),
    )  # fmt: skip
    box = _pasted_box(entry, paste)
    distractor, other = _distractor(stream[DISTRACTOR], settings, backgrounds, box, height, width)
    camera = stream[CAMERA]
    return Composition(
        seed=seed,
        index=index,
        kind=kind,
        background=place.background,
        background_source=shown.source,
        background_mask=shown.mask,
        background_size=(shown.height, shown.width),
        crop=crop,
        height=height,
        width=width,
        paste=paste,
        feather=round(stream[EDGE].uniform(*settings.feather), 4),
        looks=_looks(stream[LOOK], settings),
        target=target,
        distance=round(place.distance, 4),
        occluders=_occluders(stream[OCCLUDER], settings, box, (height, width))
        if free and kind == "object"
        else (),
        distractor=distractor,
        distractor_background=other,
        distractor_source=backgrounds.entries[other].source if other >= 0 else "",
        clones=_clones(stream[KIND], box, height, width, free=free) if kind == "edit" else (),
        noise=round(camera.uniform(*settings.noise), 3),
        jpeg=int(camera.integers(settings.jpeg[0], settings.jpeg[1] + 1)),
    )


def _turn(seed: int, index: int, number: int) -> int:
    """Return whose turn it is: each of ``number`` once in a random order, then in another one."""
    round_, position = divmod(index, number)
    return int(np.random.default_rng([seed, round_, 1 << 20]).permutation(number)[position])


def _mirrored(sides: Sides) -> Sides:
    return sides[2], sides[1], sides[0], sides[3]


def _places(
    backgrounds: BackgroundIndex,
    objects: ObjectLibrary,
    number: int,
    share: float,
    sides: Sides,
    settings: ComposeSettings,
    background: int | None,
    target: float | None,
) -> list[Place]:
    """Return places for an object, of the window size that it needs or the nearest there is.

    An object that is to be seen easily is not put where it resembles the background most.
    """
    skip = 0 if target is None else round(max(NEAREST - target, 0) * len(backgrounds))
    entry = objects.entries[number]
    reach = max(entry.height, entry.width) * math.sqrt(share / entry.area) * CELLS
    wanted = int(np.searchsorted(np.array(SIDES[:-1]) * 1.2, reach))
    for size in sorted(range(len(SIDES)), key=lambda size: (abs(size - wanted), size)):
        for cut in (sides, (False,) * 4):
            # Without its preferred side the object still lies at the picture's edge, which is
            # then where the window begins.
            places = nearest_places(
                backgrounds, objects.features[number], size=size, choices=settings.choices, skip=skip,
                sides=cut, trim=settings.crop != (1, 1), background=background,
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
    """Return a place, the part of its background to show, and whether that shows no object."""
    order = rng.permutation(len(places))
    zoom, corner = rng.uniform(*settings.crop, 2), rng.random(2)
    # The picture ends where an object is cut off, unless all of the background is to be shown.
    trimmed = (False,) * 4 if settings.crop == (1, 1) else sides
    whole: tuple[Place, Box, bool] | None = None
    for position in order:
        place = places[position]
        taken = backgrounds.taken[place.background]
        entry = backgrounds.entries[place.background]
        avoid = settings.others == "avoid" or strict
        cells = free_box(taken if avoid else np.zeros_like(taken), place, sides=trimmed)
        found = (
            place,
            _crop(place, cells, taken.shape, entry.height, entry.width, sides, zoom, corner),
        )
        if not taken.any():
            return *found, True
        if min(cells[2] - cells[0], cells[3] - cells[1]) >= LEAST_PART * CELLS and avoid:
            return *found, True
        if whole is None and not strict:
            everything = free_box(np.zeros_like(taken), place, sides=trimmed)
            whole = place, _crop(
                place, everything, taken.shape, entry.height, entry.width, sides, zoom, corner
            ), False  # fmt: skip
            if not avoid:
                return whole
    if whole is not None:
        return whole
    place = places[order[0]]
    entry, taken = backgrounds.entries[place.background], backgrounds.taken[place.background]
    cells = free_box(taken, place, sides=trimmed)
    crop = _crop(place, cells, taken.shape, entry.height, entry.width, sides, zoom, corner)
    return place, crop, True


def _crop(
    place: Place,
    cells: Box,
    grid: tuple[int, ...],
    height: int,
    width: int,
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
        length = max(place.side * 1.25, zoom[axis] * (high - low))
        length = min(length, high - low)
        earliest, latest = max(low, first + place.side - length), min(first, high - length)
        start = earliest + corner[axis] * (latest - earliest)
        if sides[axis]:
            start = low
        elif sides[axis + 2]:
            start = high - length
        pixels = (width, height)[axis] / grid[1 - axis]
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


def _window(
    place: Place, height: int, width: int, grid: tuple[int, ...]
) -> tuple[float, float, float, float]:
    """Return left, top, right and bottom of a window in pixels of its background."""
    across, down = width / grid[1], height / grid[0]
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
    share: float,
    angle: float,
    flip: bool,
    sides: Sides,
    *,
    window: tuple[float, float, float, float],
    crop: Box,
    size: tuple[int, int],
) -> Paste:
    """Place an object in its window, or at the edge of the picture that cuts it off."""
    factor = size[1] / (crop[2] - crop[0])
    scale = min(math.sqrt(share * size[0] * size[1] / entry.area), 1.0)
    reach = _turned(entry, angle)
    fits = min(LARGEST_PART * size[1 - axis] / reach[axis] for axis in range(2))
    least = SMALLEST_SIDE / max(entry.height, entry.width)
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
        if sides[axis]:
            middle = edge * scale - 0.5 - 0.25
        elif sides[axis + 2]:
            middle = length - edge * scale - 0.5 + 0.25
        centre.append(round(middle, 3))
    return Paste(
        number=number,
        name=entry.name,
        source=entry.source,
        mask=entry.mask,
        part=entry.part,
        scale=scale,
        angle=round(angle, 3),
        flip=flip,
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


def _looks(rng: np.random.Generator, settings: ComposeSettings) -> tuple[Look, ...]:
    """Draw candidates whose colour transfer is spread evenly over its range."""
    number = settings.candidates if settings.difficulty is not None else 1
    # A target needs the whole range.
    low, high = settings.colour if settings.difficulty is None else (0.0, 1.0)
    looks = []
    for position in rng.permutation(number):
        looks.append(
            Look(
                colour=round(low + (high - low) * (position + rng.random()) / number, 4),
                gradient=round(rng.uniform(0.4, 1.0), 4)
                if rng.random() < settings.gradient
                else 0.0,
            )
        )
    return tuple(looks)


def _target(rng: np.random.Generator, settings: ComposeSettings) -> float | None:
    if settings.difficulty is None:
        return None
    quantiles = np.linspace(0, 1, len(settings.difficulty))
    return round(float(np.interp(rng.random(), quantiles, settings.difficulty)), 4)


def _occluders(
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


def _distractor(
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


def _clones(
    rng: np.random.Generator,
    box: tuple[float, float, float, float],
    height: int,
    width: int,
    *,
    free: bool,
) -> tuple[tuple[float, float], ...]:
    """Draw from where an edit may take its texture.

    Half of the edits put the spot itself back, as one that removes an object from a picture whose
    background is known. So do all where the picture shows another object: a copy from elsewhere
    could show it a second time, without a label.
    """
    itself = rng.random() < 0.5
    if itself or not free:
        return ((0.0, 0.0),)
    ranges = ((box[0], box[2], width), (box[1], box[3], height))
    shifts = [
        rng.uniform(min(-low, 0.0), max(length - high, 0.0), CLONES) / length
        for low, high, length in ranges
    ]
    return tuple((round(float(x), 4), round(float(y), 4)) for x, y in zip(*shifts, strict=True))


def _nothing(objects: ObjectLibrary, backgrounds: BackgroundIndex) -> str:
    if not len(objects):
        reasons = ", ".join(f"{number} {why}" for why, number in objects.left_out.items())
        return "There is no object to paste" + (f": {reasons}." if reasons else ".")
    return (
        f"None of the {len(backgrounds)} backgrounds has a part without an object that an object "
        "could be pasted into. Give other backgrounds."
    )
