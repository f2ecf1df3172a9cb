"""Draw the light of one made image from (seed, index) alone.

Everything that relighting does to an image is in the numbers of a ``Light``; it goes to JSON and
back without loss, so the provenance of an image is enough to make it again.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from camoxpert import text
from camoxpert.errors import ConfigError

DAYLIGHT = 6504.0
"""Colour temperature that changes no colour, in kelvin: the white of sRGB."""
PATTERN_NAMES = ("blinds", "leaves", "window")
# Between the streams of other draws of the same seed and index.
STREAM = 0x52454C49


@dataclass(frozen=True)
class Light:
    """The light of one image. The defaults change nothing.

    Attributes:
        seed, index: what it was drawn from.
        azimuth: where the light comes from in the image plane, degrees: 0 right, 90 above.
        elevation: of the light above the image plane, degrees.
        key: share of the light that comes from that direction, 0..1; the rest comes from all
            around.
        temperature, sky: colour temperature of the directional and of the other light, kelvin.
        exposure: brightness of the object, stops.
        delight: how much of the shading in the image is removed from the object, 0..1.
        relief: how much of the object's form shows in the shading, 0..1.
        detail: how much of its texture counts as form.
        thickness: height of the object, as a multiple of that of a round body.
        softness: tangent of the light's angular radius: 0 hard, 0.3 a cloudy sky.
        shadow: strength of the cast shadow, 0..1.
        pattern: one of ``PATTERN_NAMES``: what stands before the light; "": nothing.
        pattern_strength: 0..1.
        pattern_scale: width of a stripe, leaf or pane, as a share of the longer side.
        pattern_angle: degrees.
        pattern_blur: width of its edges, as a share of ``pattern_scale``.
        pattern_x, pattern_y: where it lies, as shares of its scale.
        pattern_reach: how far beyond the object it is seen, as a multiple of the object's size.
        pattern_seed: of the leaves.
    """

    seed: int = 0
    index: int = 0
    azimuth: float = 90.0
    elevation: float = 45.0
    key: float = 0.0
    temperature: float = DAYLIGHT
    sky: float = DAYLIGHT
    exposure: float = 0.0
    delight: float = 0.0
    relief: float = 0.0
    detail: float = 0.0
    thickness: float = 1.0
    softness: float = 0.05
    shadow: float = 0.0
    pattern: str = ""
    pattern_strength: float = 0.0
    pattern_scale: float = 0.1
    pattern_angle: float = 0.0
    pattern_blur: float = 0.2
    pattern_x: float = 0.0
    pattern_y: float = 0.0
    pattern_reach: float = 1.0
    pattern_seed: int = 0

    def to_record(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return asdict(self)

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Light:
        """Return the light that ``to_record`` was called on.

        Raises:
            ConfigError: a field is unknown or its value has another type.
        """
        known: dict[str, type] = {name: type(value) for name, value in asdict(cls()).items()}
        for name, value in record.items():
            if name not in known:
                raise ConfigError(f"A light has no field {name!r}.{text.did_you_mean(name, known)}")
            kinds = (int, float) if known[name] is float else (known[name],)
            if not isinstance(value, kinds) or isinstance(value, bool):
                raise ConfigError(
                    f"The field {name} of a light must be of type {known[name].__name__}; "
                    f"got {value!r}."
                )
        _check_pattern(record.get("pattern") or PATTERN_NAMES[0])
        return cls(**{name: known[name](value) for name, value in record.items()})


NEUTRAL = Light()
"""Changes nothing."""

Range = tuple[float, float]


@dataclass(frozen=True)
class RelightSettings:
    """From where to where the numbers of a light are drawn, uniformly unless said otherwise.

    Attributes:
        strength: 0..1.5; scales how far the light departs from one that changes nothing.
        azimuth: the light mostly comes from above, as outdoors.
        temperature, sky: drawn uniformly in 1 / kelvin.
        softness: its logarithm is drawn uniformly.
        pattern_probability: of a pattern shadow.
        patterns: which ones.

    The other attributes are the ranges of the fields of ``Light``.

    Raises:
        ConfigError: a range is reversed, a number out of range, or a pattern unknown.
    """

    strength: float = 1.0
    azimuth: Range = (15.0, 165.0)
    elevation: Range = (25.0, 60.0)
    key: Range = (0.45, 0.8)
    temperature: Range = (4300.0, 8500.0)
    sky: Range = (6000.0, 9500.0)
    exposure: Range = (-0.35, 0.35)
    delight: Range = (0.2, 0.6)
    relief: Range = (0.6, 1.0)
    detail: Range = (0.2, 0.8)
    thickness: Range = (0.6, 1.2)
    softness: Range = (0.02, 0.3)
    shadow: Range = (0.65, 0.95)
    pattern_probability: float = 0.3
    patterns: tuple[str, ...] = PATTERN_NAMES
    pattern_strength: Range = (0.5, 0.85)
    pattern_scale: Range = (0.05, 0.14)
    pattern_angle: Range = (-35.0, 35.0)
    pattern_blur: Range = (0.15, 0.5)
    pattern_reach: Range = (0.4, 1.2)

    def __post_init__(self) -> None:
        if not 0 <= self.strength <= 1.5:
            raise ConfigError(
                f"The strength of relighting must be in 0..1.5; got {self.strength:g}."
            )
        if not 0 <= self.pattern_probability <= 1:
            raise ConfigError(
                "The probability of pattern shadows must be in 0..1; got "
                f"{self.pattern_probability:g}."
            )
        for name in self.patterns:
            _check_pattern(name)
        if self.pattern_probability > 0 and not self.patterns:
            raise ConfigError("Pattern shadows have a probability above 0, but none is named.")
        for name, (least, most) in LIMITS.items():
            value = getattr(self, name)
            low, high = value if len(value) == 2 else (math.nan, math.nan)
            if not least <= low <= high <= most:
                raise ConfigError(
                    f"The range of {name} must be two numbers in {least:g}..{most:g}, the smaller "
                    f"one first; got {' '.join(f'{bound:g}' for bound in value)}."
                )


def _check_pattern(name: str) -> None:
    if name not in PATTERN_NAMES:
        raise ConfigError(
            f"There is no pattern shadow {name!r}; the patterns are "
            f"{', '.join(PATTERN_NAMES)}.{text.did_you_mean(name, PATTERN_NAMES)}"
        )


LIMITS: dict[str, Range] = {
    "azimuth": (-360, 360),
    "elevation": (10, 90),
    "key": (0, 1),
    "temperature": (2000, 15000),
    "sky": (2000, 15000),
    "exposure": (-3, 3),
    "delight": (0, 1),
    "relief": (0, 1.5),
    "detail": (0, 3),
    "thickness": (0.1, 4),
    "softness": (0.005, 1),
    "shadow": (0, 1),
    "pattern_strength": (0, 1),
    "pattern_scale": (0.01, 1),
    "pattern_angle": (-360, 360),
    "pattern_blur": (0.05, 1),
    "pattern_reach": (0, 100),
}
"""Smallest and largest value of each range."""


def draw_light(seed: int, index: int, settings: RelightSettings | None = None) -> Light:
    """Return the light of one image, a pure function of its arguments.

    Every number has its own place in the random stream: changing one range changes no other
    number.
    """
    s = settings or RelightSettings()
    # A seed sequence takes no negative numbers.
    rng = np.random.default_rng([seed & 0xFFFFFFFF, index & 0xFFFFFFFFFFFFFFFF, STREAM])
    position = dict(zip(LIMITS, rng.random(len(LIMITS)).tolist(), strict=True))
    with_pattern, which, shift_x, shift_y = rng.random(4).tolist()
    pattern_seed = int(rng.integers(2**31))

    def between(name: str) -> float:
        low, high = getattr(s, name)
        return float(low + position[name] * (high - low))

    def kelvin(name: str) -> float:
        low, high = getattr(s, name)
        mired = 1 / high + position[name] * (1 / low - 1 / high)
        # Towards daylight, where the strength is small.
        return float(1 / (1 / DAYLIGHT + min(s.strength, 1.0) * (mired - 1 / DAYLIGHT)))

    def scaled(name: str, most: float = 1.0) -> float:
        return min(s.strength * between(name), most)

    low, high = (math.log(bound) for bound in s.softness)
    shadowed = with_pattern < s.pattern_probability
    return Light(
        seed=seed,
        index=index,
        azimuth=between("azimuth"),
        elevation=between("elevation"),
        key=scaled("key", 0.95),
        temperature=kelvin("temperature"),
        sky=kelvin("sky"),
        exposure=s.strength * between("exposure"),
        delight=scaled("delight"),
        relief=scaled("relief", 1.5),
        detail=scaled("detail", 3.0),
        thickness=between("thickness"),
        softness=math.exp(low + position["softness"] * (high - low)),
        shadow=scaled("shadow"),
        pattern=s.patterns[int(which * len(s.patterns))] if shadowed else "",
        pattern_strength=scaled("pattern_strength") if shadowed else 0.0,
        pattern_scale=between("pattern_scale"),
        pattern_angle=between("pattern_angle"),
        pattern_blur=between("pattern_blur"),
        pattern_x=shift_x,
        pattern_y=shift_y,
        pattern_reach=between("pattern_reach"),
        pattern_seed=pattern_seed,
    )
