"""Draw compositions: what goes where, decided from (seed, index) before any pixel is read."""

from __future__ import annotations

import numpy as np

from camoxpert.errors import DataError
from camoxpert.synthesis.compose.backgrounds import BackgroundIndex
from camoxpert.synthesis.compose.extras import draw_clones, draw_distractor, draw_occluders
from camoxpert.synthesis.compose.library import ObjectLibrary
from camoxpert.synthesis.compose.placement import draw_pose, place_object
from camoxpert.synthesis.compose.records import ComposeSettings, Composition, Look, Shape

EDITED = 0.2
"""Strongest colour transfer of an edit: more would show its outline as an object does."""
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
    kind = "edit" if stream[KIND].random() < settings.edits else "object"
    pose = draw_pose(stream[OBJECT], objects.entries[number], settings)
    target = None if kind == "edit" else _target(stream[TARGET], settings)
    placed = place_object(
        stream[PLACE], pose, settings, objects, backgrounds,
        number=number, background=background, target=target, strict=kind == "edit",
    )  # fmt: skip
    if not placed.free:
        # The picture shows an object of its own: it cannot be one without any.
        kind, target = "object", _target(stream[TARGET], settings) if kind == "edit" else target
    shown = backgrounds.entries[placed.place.background]
    box, size = placed.box, (placed.height, placed.width)
    occluders: tuple[Shape, ...] = ()
    if placed.free and kind == "object":
        occluders = draw_occluders(stream[OCCLUDER], settings, box, size)
    distractor, other = draw_distractor(stream[DISTRACTOR], settings, backgrounds, box, *size)
    clones: tuple[tuple[float, float], ...] = ()
    if kind == "edit":
        clones = draw_clones(stream[KIND], box, *size)
    camera = stream[CAMERA]
    return Composition(
        seed=seed,
        index=index,
        kind=kind,
        background=placed.place.background,
        background_source=shown.source,
        background_mask=shown.mask,
        background_size=(shown.height, shown.width),
        crop=placed.crop,
        height=placed.height,
        width=placed.width,
        paste=placed.paste,
        feather=round(stream[EDGE].uniform(*settings.feather), 4),
        looks=_looks(stream[LOOK], settings, kind),
        target=target,
        distance=round(placed.place.distance, 4),
        occluders=occluders,
        distractor=distractor,
        distractor_background=other,
        distractor_source=backgrounds.entries[other].source if other >= 0 else "",
        clones=clones,
        noise=round(camera.uniform(*settings.noise), 3),
        jpeg=int(camera.integers(settings.jpeg[0], settings.jpeg[1] + 1)),
    )


def _turn(seed: int, index: int, number: int) -> int:
    """Return whose turn it is: each of ``number`` once in a random order, then in another one."""
    round_, position = divmod(index, number)
    return int(np.random.default_rng([seed, round_, 1 << 20]).permutation(number)[position])


def _looks(rng: np.random.Generator, settings: ComposeSettings, kind: str) -> tuple[Look, ...]:
    """Draw candidates whose colour transfer is spread evenly over its range."""
    number = settings.candidates if settings.difficulty is not None and kind == "object" else 1
    # A target needs the whole range; an edit has the right colours already.
    low, high = settings.colour if settings.difficulty is None else (0.0, 1.0)
    if kind == "edit":
        low, high = 0.0, EDITED
    looks = []
    for position in rng.permutation(number):
        looks.append(
            Look(
                colour=round(low + (high - low) * (position + rng.random()) / number, 4),
                gradient=round(rng.uniform(0.4, 0.9), 4)
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


def _nothing(objects: ObjectLibrary, backgrounds: BackgroundIndex) -> str:
    if not len(objects):
        reasons = ", ".join(f"{number} {why}" for why, number in objects.left_out.items())
        return "There is no object to paste" + (f": {reasons}." if reasons else ".")
    return (
        f"None of the {len(backgrounds)} backgrounds has a part without an object that an object "
        "could be pasted into. Give other backgrounds."
    )
