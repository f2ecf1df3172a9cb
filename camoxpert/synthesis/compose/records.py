"""Hold what is drawn for a composition and what comes out of it; all of it can be written as JSON.

Sizes are in pixels of the finished picture unless a field says otherwise. Positions are of pixel
centres at whole numbers, x to the right and y down.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from camoxpert.errors import ConfigError

OTHERS = ("avoid", "keep")
"""What can happen with objects that a background shows."""


@dataclass(frozen=True)
class ComposeSettings:
    """Say what compositions are drawn from. Pairs are the lower and the upper end of a range.

    Attributes:
        size: longest side of the finished picture; smaller backgrounds are not enlarged.
        object_size: share of the picture that the object covers; its logarithm is uniform. None:
            half to 1.2 times what it covers in its own picture, so that made objects are as large
            as real ones; without such a picture 0.01 to 0.2. Objects are never enlarged, so that
            small ones can stay below it.
        angle: largest rotation of an object, degrees.
        colour: strength of the colour transfer, 0 (the object's own) to 1 (the background's); with
            a target candidates have all strengths.
        gradient: probability of gradient-domain blending; the others are feathered.
        feather: width (sigma) of the object's soft edge.
        choices: backgrounds that resemble the object most, of which one is drawn.
        occluders: probability that something stands in front of the object.
        distractors: probability of a salient thing that is labelled background.
        edits: share of pictures without an object: the traces of an edit remain, the mask is empty.
        noise: standard deviation of the sensor noise, in grey levels.
        jpeg: quality of the compression, 1..100.
        difficulty: target distribution, as equally spaced quantiles from the lowest to the highest
            value: (0.7,) is 0.7 always, (0.4, 0.9) is uniform. None: no target.
        candidates: variants of a picture of which the one nearest to the target is kept.
        crop: share of the background's height and of its width that is shown; (1, 1): all of it.
        others: what happens with objects that the background shows: "avoid" cuts a part without
            them where that is possible, "keep" shows the whole picture. Whatever of them remains
            visible is labelled as object in both cases.
    """

    size: int = 352
    object_size: tuple[float, float] | None = None
    angle: float = 15.0
    colour: tuple[float, float] = (0.2, 1.0)
    gradient: float = 0.5
    feather: tuple[float, float] = (0.5, 1.0)
    choices: int = 12
    occluders: float = 0.3
    distractors: float = 0.1
    edits: float = 0.1
    noise: tuple[float, float] = (0.0, 4.0)
    jpeg: tuple[int, int] = (75, 96)
    difficulty: tuple[float, ...] | None = None
    candidates: int = 5
    crop: tuple[float, float] = (0.8, 1.0)
    others: str = "avoid"

    def __post_init__(self) -> None:
        """Raise ConfigError that names a value out of its range."""
        limits = {
            "object_size": (self.object_size or (0.01, 0.2), 0.0, 1.0),
            "colour": (self.colour, 0.0, 1.0),
            "crop": (self.crop, 0.0, 1.0),
            "feather": (self.feather, 0.0, 10.0),
            "noise": (self.noise, 0.0, 100.0),
            "jpeg": (self.jpeg, 1, 100),
            "difficulty": (self.difficulty or (0.0,), 0.0, 1.0),
        }
        for name, (values, low, high) in limits.items():
            inside = all(low <= value <= high for value in values)
            if not inside or list(values) != sorted(values):
                raise ConfigError(
                    f"The {name.replace('_', ' ')} of compositions must lie between {low:g} and "
                    f"{high:g}, the lower value first; got {' '.join(f'{v:g}' for v in values)}."
                )
        for name in ("gradient", "occluders", "distractors", "edits"):
            value = getattr(self, name)
            if not 0 <= value <= 1:
                raise ConfigError(
                    f"The share of {name} in compositions must lie between 0 and 1; got {value:g}."
                )
        if self.size < 16 or self.choices < 1 or self.candidates < 1:
            raise ConfigError(
                "Compositions need a size of at least 16 pixels, one choice and one candidate; got "
                f"{self.size}, {self.choices} and {self.candidates}."
            )
        if min(self.object_size or (1.0,)) <= 0 or min(self.crop) <= 0:
            raise ConfigError("Objects and the shown part of a background must be larger than 0.")
        if self.others not in OTHERS:
            raise ConfigError(
                f"Other objects in backgrounds are either {OTHERS[0]} or {OTHERS[1]}; got "
                f"{self.others}."
            )


@dataclass(frozen=True)
class Paste:
    """Say which object goes where.

    Attributes:
        number: row of the object in its library.
        name, source, mask, part: of that object, see ``library.ObjectEntry``.
        scale: factor of the object's size.
        angle: rotation, degrees counter-clockwise.
        flip: mirrored left-right before it is rotated.
        x, y: position of the centre of its box.
    """

    number: int
    name: str
    source: str
    mask: str
    part: int
    scale: float
    angle: float
    flip: bool
    x: float
    y: float


@dataclass(frozen=True)
class Look:
    """Say how an object is fitted into the picture: one candidate.

    Attributes:
        colour: strength of the colour transfer, 0..1.
        gradient: strength of the gradient-domain correction, 0 (feathered only) to 1.
    """

    colour: float
    gradient: float

    def weakened(self, times: int) -> Look:
        """Return the look at half the strength, so many times."""
        return Look(self.colour / 2**times, self.gradient / 2**times)


@dataclass(frozen=True)
class Shape:
    """Say how something that is drawn from noise looks: an occluder or a distractor.

    Attributes:
        kind: "blades", "leaf" or "blob".
        seed: of its outline.
        x, y: its centre.
        radius: its reach.
        dx, dy: where its texture is taken from, as shares of a picture: an occluder's shift in the
            picture itself, the place of a distractor's texture in another background.
        shade: factor of its brightness.
    """

    kind: str
    seed: int
    x: float
    y: float
    radius: float
    dx: float
    dy: float
    shade: float


@dataclass(frozen=True)
class Composition:
    """Everything about one made picture but its pixels; a pure function of (seed, index).

    Attributes:
        seed, index: what it was drawn from.
        kind: "object", or "edit" for a picture whose edit left no object.
        background, background_source, background_mask: number, file and mask file ("": none known)
            of the background.
        background_size: its height and width, pixels.
        crop: left, top, right, bottom of the part of it that is shown, in those pixels.
        height, width: of the finished picture.
        paste: the object; for an edit the object whose outline was edited.
        feather: sigma of the object's soft edge.
        looks: candidates; without a target there is one.
        target: difficulty to come near to, 0..1, or None.
        distance: how far the background's features are from the object's, in standard deviations.
        occluders: in front of the object.
        distractor: a salient thing, labelled background, or None.
        distractor_background, distractor_source: the picture that gives its texture; -1 and "".
        clones: shifts of an edit's texture as shares of the picture (right, down), of which the one
            is taken that fits its surroundings best; () for objects.
        noise: standard deviation in grey levels.
        jpeg: quality.
    """

    seed: int
    index: int
    kind: str
    background: int
    background_source: str
    background_mask: str
    background_size: tuple[int, int]
    crop: tuple[int, int, int, int]
    height: int
    width: int
    paste: Paste
    feather: float
    looks: tuple[Look, ...]
    target: float | None
    distance: float
    occluders: tuple[Shape, ...]
    distractor: Shape | None
    distractor_background: int
    distractor_source: str
    clones: tuple[tuple[float, float], ...]
    noise: float
    jpeg: int

    def row(self) -> dict[str, Any]:
        """Return the composition as a value that JSON can hold."""
        return asdict(self)

    @property
    def sources(self) -> tuple[str, ...]:
        """Files whose pixels are in the picture, each once; masks are not among them."""
        files = (self.paste.source, self.background_source, self.distractor_source)
        return tuple(dict.fromkeys(file for file in files if file))


@dataclass(frozen=True)
class Composed:
    """A made picture.

    Attributes:
        image: uint8 (H, W, 3) RGB, as it is after JPEG.
        mask: uint8 (H, W), 0 and 255.
        alpha: uint8 (H, W), visible share of the pasted object; the mask of a picture without other
            objects is ``alpha > 127``, which is more than half.
        difficulty: 0 (easy) to 1 (object and surroundings alike), see ``difficulty.py``; None
            without an object.
        look: number of the candidate that was kept.
        weakened: how often its strengths were halved, since nobody could have seen the object.
        occluders: how many of the occluders were drawn; the others would have hidden too much.
        visible: share of the object that is not hidden, 0..1; 0 for an edit.
        others: pixels of the background's own objects in the mask.
        encoded: the picture as a JPEG file, whose decoding is ``image``.
        seconds: wall time by stage.
    """

    image: np.ndarray
    mask: np.ndarray
    alpha: np.ndarray
    difficulty: float | None
    look: int
    weakened: int
    occluders: int
    visible: float
    others: int
    encoded: bytes = b""
    seconds: dict[str, float] = field(default_factory=dict)

    def row(self) -> dict[str, Any]:
        """Return what was measured, as a value that JSON can hold."""
        return {
            "difficulty": None if self.difficulty is None else round(self.difficulty, 4),
            "look": self.look,
            "weakened": self.weakened,
            "occluders_drawn": self.occluders,
            "visible": round(self.visible, 4),
            "object_pixels": int(np.count_nonzero(self.mask)),
            "object_share": round(float(np.count_nonzero(self.mask)) / self.mask.size, 5),
            "pixels_of_other_objects": self.others,
        }
