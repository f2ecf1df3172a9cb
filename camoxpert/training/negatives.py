"""Images without an object in a run: whether the presence head learns from them, and how they are
kept apart from the others."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from camoxpert import console
from camoxpert.config import Config, DataConfig
from camoxpert.data.files.manifest import Manifest, TrainingData
from camoxpert.data.files.mixing import Mix
from camoxpert.data.files.negatives import (
    NEGATIVES,
    NO_NEGATIVES,
    divided,
    empty_pairs,
    find_negatives,
    marked,
)
from camoxpert.data.files.pairing import Pair
from camoxpert.data.files.split import split_validation
from camoxpert.doctor.families import inseparable
from camoxpert.doctor.inspect import identical_files
from camoxpert.errors import DataError
from camoxpert.text import count, shorten
from camoxpert.training.leaks import made_from
from camoxpert.training.split import CALIBRATION, Split

ENOUGH, ENOUGH_SHARE = 8, 0.05
"""Fewest images without an object, and their least share, for which ``auto`` builds the head."""
FEWEST_TO_CALIBRATE = 60
"""Images of each kind that are set aside where there are enough: with 120 in all the calibration
error is near what chance shows, see docs/presence.md."""
LARGEST_CALIBRATION = 0.25
"""Share of the images of a kind that may be set aside."""


@dataclass(frozen=True)
class Kinds:
    """The training data with its images without an object.

    Attributes:
        found: the real data, those of ``--negatives`` included.
        made: the made data.
        head: whether the model has the presence head.
        apart: whether images without an object are marked as such and mixed in as a kind of their
            own, with the head or without it.
        reason: of ``head``, in words; empty where there is nothing to say.
    """

    found: TrainingData
    made: Manifest
    head: bool
    apart: bool
    reason: str


def with_negatives(found: TrainingData, config: Config, *, write: bool = True) -> TrainingData:
    """Return the real data with the images of ``--negatives`` after the others.

    Where the data comes with a validation split, the same share of them as would be carved joins
    it; copies stay together.

    Args:
        found: the real data.
        config: settings.
        write: keep the copies found in the cache folder.

    Raises:
        DataError: as ``find_negatives``.
    """
    negatives = find_negatives(config.data.negatives)
    if not len(negatives):
        return found
    whole, given = found.whole, found.given
    if given is not None:
        share = config.data.val_fraction
        families: list[list[int]] = []
        if share and len(negatives) > 1:
            families = inseparable(negatives, config.data, write=write)
        _, validation = split_validation(negatives, share, config.train.seed, families)
        given = replace(given, pairs=given.pairs + validation.pairs)
    whole = replace(
        whole, pairs=whole.pairs + negatives.pairs, notes=(*whole.notes, *negatives.notes)
    )
    return replace(found, whole=whole, given=given)


def find_kinds(
    found: TrainingData, made: Manifest, config: Config, kept: str | None = None
) -> Kinds:
    """Decide on the presence head, and tell the images without an object from the others.

    Those of ``--negatives`` and those with black masks are the same from here on. With ``--presence
    off`` and no ``--negatives`` none are told apart.

    Args:
        found: the real data, those of ``--negatives`` included.
        made: the made data.
        config: the user's settings.
        kept: ``on`` or ``off`` as the run has it that is continued.

    Raises:
        DataError: the head was asked for, and there is no image without an object.
    """
    # What its weights have: whoever changes the setting is refused later, with all other changes.
    asked = kept or config.model.presence
    own = bool(config.data.negatives)
    if config.model.presence == "off" and kept != "on" and not own:
        return Kinds(found, made, False, False, "")
    pairs = (*found.whole.pairs, *made.pairs)
    empty = empty_pairs(pairs, max_pixels=config.data.max_pixels)
    share = len(empty) / max(len(pairs), 1)
    words = f"{len(empty)} of {count(len(pairs), 'training image')} have no object"
    head, reason = asked == "on", f"{words}{', as asked' if asked != 'auto' else ''}"
    if asked == "auto":
        head = len(empty) >= ENOUGH and ENOUGH_SHARE <= share < 1
        if not head:
            needs = f"--presence auto needs {ENOUGH}, and {ENOUGH_SHARE:.0%} of all"
            reason = f"{words}; {needs}" if empty else ""
    elif asked == "on" and not empty:
        raise DataError(
            "--presence on: the training data has no image without an object, and the head learns "
            "from both. Name a folder of such images with --negatives, make some with `camoxpert "
            "synthesize counterfactual`, or use --noncam include with COD10K."
        )
    if kept is not None:
        reason = "as the stopped run had it"
    none = len(empty) == len(pairs)
    if none and (head or own):
        raise DataError(
            f"None of {count(len(pairs), 'training image')} has an object: there is nothing to "
            f"learn to find."
        )
    if none or not empty:
        return Kinds(found, made, False, False, reason)
    given = None if found.given is None else marked(found.given, empty)
    found = replace(found, whole=marked(found.whole, empty), given=given)
    return Kinds(found, marked(made, empty), head, True, reason)


def set_calibration_aside(
    train: Manifest,
    whole: Manifest,
    made: Manifest,
    config: Config,
    kept: Split,
    *,
    write: bool = True,
) -> tuple[Manifest, Manifest]:
    """Return the rest of the training images, and those that calibrate the presence head.

    They are of both kinds, and copies of a picture stay on one side. Where there is no real image
    without an object, those that were made from the images set aside take their place, with their
    controls; none of them is trained on. Without any of them nothing is set aside.

    Args:
        train: the training images, of both kinds.
        whole: the same with those of validation.
        made: the made images.
        config: settings.
        kept: the split of the run that is continued, or empty.
        write: keep the copies found in the cache folder.
    """
    nothing = replace(NO_NEGATIVES, split=CALIBRATION)
    if kept and kept.keys() == {(pair.dataset, pair.name) for pair in whole.pairs}:
        chosen = {p for p in train.pairs if kept[p.dataset, p.name] == CALIBRATION}
    else:
        chosen = _chosen(train, whole, config, write=write)
    calibration = replace(nothing, pairs=_those(train, chosen))
    if not any(pair.empty for pair in calibration.pairs):
        beside = made_from(made, config.data.synthetic, calibration)
        if not any(pair.empty for pair in beside):
            return train, nothing
        calibration = replace(calibration, pairs=calibration.pairs + beside)
    return _without(train, chosen), calibration


def _chosen(train: Manifest, whole: Manifest, config: Config, *, write: bool) -> set[Pair]:
    """Return the real images of either kind that are set aside."""
    fraction, chosen = config.data.calibration_fraction, set[Pair]()
    if not fraction:
        return chosen
    families: list[list[Pair]] = []
    if len(whole) > 1:
        found = inseparable(whole, config.data, write=write)
        families = [[whole.pairs[index] for index in family] for family in found]
    for kind in divided(train):
        most = int(max(fraction, LARGEST_CALIBRATION) * len(kind))
        wanted = min(max(round(fraction * len(kind)), FEWEST_TO_CALIBRATE), most)
        if not wanted:
            continue
        place = {pair: index for index, pair in enumerate(kind.pairs)}
        # A family of both kinds stays in training.
        own = [[place[p] for p in f] for f in families if all(p in place for p in f)]
        mixed = {p for f in families if not all(p in place for p in f) for p in f}
        _, part = split_validation(kind, wanted / len(kind), config.train.seed, own)
        chosen |= {pair for pair in part.pairs if pair not in mixed}
    return chosen


def without_made(manifest: Manifest) -> Manifest:
    """Return the pairs of a manifest that were not made."""
    return replace(manifest, pairs=tuple(pair for pair in manifest.pairs if not pair.made))


def _those(manifest: Manifest, chosen: set[Pair]) -> tuple[Pair, ...]:
    return tuple(pair for pair in manifest.pairs if pair in chosen)


def _without(manifest: Manifest, chosen: set[Pair]) -> Manifest:
    return replace(manifest, pairs=tuple(p for p in manifest.pairs if p not in chosen))


def require_no_leaks(whole: Manifest, tests: Mapping[str, Manifest]) -> None:
    """Check the images without an object against the others, file by file.

    One that is a training image with an object contradicts it: of ``--negatives`` that is an error,
    of a data set with black masks, which may be others' work, a warning. The same holds for one of
    ``--negatives`` that is a test image; those of a data set are compared with the test images like
    all its others.

    Raises:
        DataError: an image of ``--negatives`` is a test image, or a training image that is not
            known to be without an object.
    """
    empty = [pair for pair in whole.pairs if pair.empty]
    if not empty:
        return
    trained = "a training image with an object"
    others = [(pair, trained) for pair in whole.pairs if not pair.empty]
    tested = [(p, f"an image of the test set {n}") for n, test in tests.items() for p in test.pairs]
    items = [(pair, "") for pair in empty] + others + tested
    found: dict[str, list[str]] = {}
    black: list[str] = []
    for group in identical_files([pair.image for pair, _ in items]):
        ours = [items[index][0] for index in group if index < len(empty)]
        theirs = [items[index][1] for index in group if index >= len(empty)]
        named = [pair.image.name for pair in ours if pair.mask == pair.image]
        if named and theirs:
            # A test set last: it is the graver fault.
            found.setdefault(max(theirs, key=lambda text: "test" in text), []).extend(named)
        if trained in theirs:
            black += [pair.name for pair in ours if pair.mask != pair.image]
    if found:
        what, names = max(found.items(), key=lambda item: "test" in item[0])
        raise DataError(
            f"--negatives: {shorten(names)}: the same file is {what}. Images without an object "
            f"must be others than those that are trained on with a mask or tested with; remove "
            f"{'it' if len(names) == 1 else 'them'} from the folder."
        )
    if black:
        console.decide(
            "warning",
            f"{count(len(black), 'image')} with a black mask {'is' if len(black) == 1 else 'are'} "
            f"in the training data with an object as well, so one of the two masks is wrong: "
            f"{shorten(black)}; `camoxpert doctor` writes a --clean-list",
        )


def say_presence(kinds: Kinds, mix: Mix, data: DataConfig, calibration: Manifest) -> None:
    """Print whether there is a presence head, from what it learns, and what calibrates it."""
    if not kinds.apart:
        if kinds.reason:
            console.decide("presence", f"off: {kinds.reason}")
        return
    console.decide("presence", f"{'on' if kinds.head else 'off'}: {kinds.reason}")
    few = ""
    if mix.negatives_seen == mix.negatives and mix.negative_share < data.negative_share:
        few = f", all there are (--negative-share {data.negative_share:g})"
    console.decide(
        NEGATIVES,
        f"{count(mix.negatives, 'image')} without an object to train on; an epoch sees "
        f"{mix.negatives_seen} of them, {mix.negative_share:.0%} of the labelled images in a "
        f"batch{few}; their masks learn by cross entropy alone",
    )
    if not kinds.head:
        return
    empty = sum(pair.empty for pair in calibration.pairs)
    objects = len(calibration) - empty
    if objects and empty:
        console.decide(
            "calibration",
            f"{objects} images with an object and {empty} without are set aside: they neither "
            f"train nor choose, and calibrate the presence head at the end",
        )
        if min(objects, empty) < FEWEST_TO_CALIBRATE:
            console.decide(
                "warning",
                f"fewer than {FEWEST_TO_CALIBRATE} images of a kind calibrate the presence head, "
                f"so its probabilities are coarse; more images "
                f"{'without an object' if empty <= objects else 'with an object'}, or a larger "
                f"data.calibration_fraction, would help",
            )
    else:
        why = "data.calibration_fraction 0" if not data.calibration_fraction else "too few images"
        console.decide("calibration", f"none ({why}): presence is not calibrated")
