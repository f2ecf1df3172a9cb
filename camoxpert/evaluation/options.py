"""Options of scoring, and the names of measures on the command line."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from camoxpert.data.samples.corruptions import CORRUPTIONS, SEVERITIES
from camoxpert.errors import ConfigError
from camoxpert.metrics import FAST_KEYS, KNOWN_KEYS, RESULT_KEYS, Evaluator
from camoxpert.text import closest, did_you_mean

SETS = {"default": RESULT_KEYS, "fast": FAST_KEYS, "all": KNOWN_KEYS}
"""Names of groups of measures."""


@dataclass(frozen=True)
class ScoringOptions:
    """How images are scored and what is reported of them.

    Attributes:
        protocol, empty_gt, keys: options of the Evaluator.
        intervals: also compute confidence intervals, and compare methods with each other.
        gallery: number of best and of worst images to write as pictures.
    """

    protocol: str = "pysod"
    empty_gt: str = "pysod"
    keys: tuple[str, ...] = RESULT_KEYS
    intervals: bool = True
    gallery: int = 6

    def evaluator(self) -> Evaluator:
        """Return an empty evaluator with these options."""
        return Evaluator(protocol=self.protocol, empty_gt=self.empty_gt, keys=self.keys)


@dataclass(frozen=True)
class CorruptionOptions:
    """Which corruptions images are scored under.

    Attributes:
        names: corruptions, in the order of ``CORRUPTIONS``.
        severities: ascending, 1 to 5.
        seed: of their noise, fog and direction.
    """

    names: tuple[str, ...]
    severities: tuple[int, ...]
    seed: int = 0


@dataclass(frozen=True)
class ShotOptions:
    """With how many references a guided model is scored.

    Attributes:
        numbers: of references, ascending.
        roots: data whose training images are drawn; empty: that of the run.
        weights: file of the support encoder's weights, where the one of the training is not.
        allow_outside: a table of that data may name files outside its folder.
        seed: of the draws.
    """

    numbers: tuple[int, ...]
    roots: tuple[str, ...] = ()
    weights: str = ""
    allow_outside: bool = False
    seed: int = 0


def choose_shots(
    numbers: Iterable[int],
    roots: Iterable[str] = (),
    weights: str = "",
    *,
    allow_outside: bool = False,
) -> ShotOptions | None:
    """Return the numbers of references to score with; None if none is named.

    Args:
        numbers: of references; 0, which is always scored, may be named.
        roots, weights, allow_outside: see ``ShotOptions``.

    Raises:
        ConfigError: a negative number, no other than 0, or data without numbers.
    """
    asked, places = sorted(set(numbers)), tuple(roots)
    if not asked:
        if places or weights:
            flag = "--reference-data" if places else "--support-weights"
            raise ConfigError(f"{flag} belongs to --shots. Name numbers of references.")
        return None
    if asked[0] < 0 or asked[-1] < 1:
        raise ConfigError(
            f"--shots are numbers of references, at least 1; got {', '.join(map(str, asked))}. No "
            "reference is always scored beside them."
        )
    kept = tuple(number for number in asked if number)
    return ShotOptions(kept, places, weights, allow_outside)


def choose_corruptions(
    asked: Iterable[str], severities: Iterable[int] = ()
) -> CorruptionOptions | None:
    """Return the corruptions and severities to score; None if no corruption is named.

    Args:
        asked: names, or ``all``; each text may hold several, separated by commas.
        severities: of 1 to 5; none: all five.

    Raises:
        ConfigError: an unknown name, with the nearest one; a wrong severity, or one without a name.
    """
    names = [part for text in asked for part in text.split(",") if part]
    chosen = sorted(set(severities))
    for name in names:
        if name not in ("all", *CORRUPTIONS):
            raise ConfigError(
                f"--corruptions: unknown corruption {name!r}.{did_you_mean(name, CORRUPTIONS)} "
                f"Known: all, {', '.join(CORRUPTIONS)}."
            )
    for severity in chosen:
        if severity not in SEVERITIES:
            raise ConfigError(f"--severity must be in 1..5; got {severity}.")
    if not names:
        if chosen:
            raise ConfigError("--severity belongs to --corruptions. Name some, or all.")
        return None
    return CorruptionOptions(
        tuple(name for name in CORRUPTIONS if name in names or "all" in names),
        tuple(chosen) or SEVERITIES,
    )


def choose_measures(asked: Iterable[str]) -> tuple[str, ...]:
    """Return the measures that names stand for, in the order of KNOWN_KEYS.

    Args:
        asked: measures in upper or lower case, ``default``, ``fast`` or ``all``; each text may hold
            several, separated by commas.

    Raises:
        ConfigError: an unknown name, with the nearest one, or no name.
    """
    wanted: list[str] = []
    known = {name.lower(): name for name in KNOWN_KEYS}
    for name in (part for text in asked for part in text.split(",") if part):
        if name in SETS:
            wanted += SETS[name]
        elif name.lower() in known:
            wanted.append(known[name.lower()])
        else:
            near = closest(name.lower(), [*SETS, *known])
            hint = f" Did you mean {known.get(near, near)}?" if near else ""
            raise ConfigError(
                f"--measures: unknown measure {name!r}.{hint} Known: default, fast, all, "
                f"{', '.join(KNOWN_KEYS)}."
            )
    if not wanted:
        raise ConfigError("--measures names no measure. Leave it out for the default ones.")
    return tuple(key for key in KNOWN_KEYS if key in wanted)
