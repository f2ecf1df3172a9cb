"""Decide which training images are set aside for validation, and keep that decision in a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from camoxpert import console
from camoxpert.config import Config, DataConfig
from camoxpert.data.files.folds import (
    Splits,
    fold_of,
    read_splits,
    require_fold,
    require_same_images,
)
from camoxpert.data.files.made import MADE, NO_MADE
from camoxpert.data.files.manifest import Manifest, TrainingData
from camoxpert.data.files.split import split_validation
from camoxpert.data.files.unlabeled import NO_IMAGES
from camoxpert.doctor.families import inseparable
from camoxpert.errors import ConfigError
from camoxpert.files import write_rows
from camoxpert.runs.samples import SAMPLES, read_samples
from camoxpert.text import count

UNLABELED = "unlabeled"
CALIBRATION = "calibration"
"""Word for the images that calibrate the presence head."""
LEFT_OUT = "left out"
"""Word for the images that a quick run does not use."""
MADE_CALIBRATION = f"{CALIBRATION} {MADE}"
BESIDE = (MADE, UNLABELED, MADE_CALIBRATION)
"""Words for made images and for those without masks in its column ``split``."""

Split = Mapping[tuple[str, str], str]
"""(data set, name) -> training, validation, calibration or left out."""


def asked_splits(data: DataConfig) -> Splits | None:
    """Return the splits of which a run trains one fold, or None.

    Raises:
        ConfigError: splits without a fold, or a fold without splits.
        DataError: the file cannot be used, or has no such fold.
    """
    if not data.splits:
        if data.fold is not None:
            raise ConfigError(
                f"--fold {data.fold} names a fold of --splits, and no splits are given. `camoxpert "
                f"crossval` makes them."
            )
        return None
    if data.fold is None:
        raise ConfigError(
            f"--splits {data.splits} holds several folds. Say with --fold which of them this run "
            f"holds out; `camoxpert crossval` trains all of them."
        )
    splits = read_splits(Path(data.splits))
    require_fold(splits, data.fold, Path(data.splits))
    return splits


def uses_given(data: DataConfig) -> bool:
    """Return whether a validation split that comes with the data is used: to validate on, or as
    part of what is divided into folds."""
    return data.val_fraction > 0 or bool(data.splits)


def _of_fold(whole: Manifest, splits: Splits, data: DataConfig) -> tuple[Manifest, Manifest, str]:
    assert data.fold is not None
    require_same_images(splits, whole, Path(data.splits))
    train, held_out = fold_of(splits, data.fold, whole)
    how = f"fold {splits.name_of(data.fold)} of {splits.total} in {data.splits}"
    apart = len(whole) - len(train) - len(held_out)
    if apart:
        how += f"; {count(apart, 'image')} on neither side, as copies or series of those held out"
    if data.val_fraction == 0:
        # Not even the best epoch is chosen by them.
        how += "; --val-fraction 0: what is held out is not looked at"
    return train, held_out, how


def decide_split(
    found: TrainingData,
    config: Config,
    kept: Split,
    *,
    splits: Splits | None = None,
    write: bool = True,
) -> tuple[Manifest, Manifest]:
    """Return the training and the validation part of TRAIN, printing the decision.

    Args:
        found: the training data; a validation split that comes with it is used as it is.
        config: settings.
        kept: the split of the run that is continued, or empty. It is used again if the data is the
            same, so that a run started by another version keeps its validation images.
        splits: of which one fold is held out, or None.
        write: keep the copies found in the cache folder.

    Raises:
        DataError: the splits were made for other images.
    """
    data, seed, whole = config.data, config.train.seed, found.whole
    keys = {(pair.dataset, pair.name) for pair in whole.pairs}
    families: list[list[int]] = []
    if splits is not None:
        train, validation, how = _of_fold(whole, splits, data)
    elif found.given is not None:
        given = set(found.given.pairs)
        train = replace(whole, pairs=tuple(pair for pair in whole.pairs if pair not in given))
        _, empty = split_validation(whole, 0.0, 0)
        validation = replace(empty, pairs=found.given.pairs)
        how = "the validation split that comes with the data"
    elif kept.keys() == keys:
        train, validation = _as_before(whole, kept)
        how = "as the stopped run carved it from TRAIN"
    else:
        if data.val_fraction and len(whole) > 1:
            families = inseparable(whole, data, write=write)
        train, validation = split_validation(whole, data.val_fraction, seed, families)
        how = "validation carved from TRAIN"
    console.decide(
        "data",
        f"{len(train)} training and {len(validation)} validation images ({whole.layout}), {how}",
    )
    if found.unused:
        console.decide("", f"--val-fraction 0: the {found.unused} images of val are not used")
    if families:
        _say_families(families, whole)
    if families and not len(validation):
        console.decide(
            "warning",
            "all training images belong together, so none can be set aside for validation",
        )
    return train, validation


def on_neither_side(whole: Manifest, train: Manifest, validation: Manifest) -> Manifest:
    """Return the images that are neither trained on nor held out: their group is divided by
    ``--leave-class-out``."""
    used = {*train.pairs, *validation.pairs}
    return replace(whole, pairs=tuple(pair for pair in whole.pairs if pair not in used))


def _say_families(families: Sequence[Sequence[int]], whole: Manifest) -> None:
    joined = sum(map(len, families))
    if any(pair.series for pair in whole.pairs):
        what = "belong to others, as copies or by the column group"
        how = ""
    else:
        what, how = "are copies of others", " (--no-group-copies splits it)"
    console.decide(
        "",
        f"{joined} images {what}, in {count(len(families), 'group')}; a group is never split{how}",
    )


def _as_before(whole: Manifest, kept: Split) -> tuple[Manifest, Manifest]:
    held_out = {p for p in whole.pairs if kept[p.dataset, p.name] == "validation"}
    train = tuple(pair for pair in whole.pairs if pair not in held_out)
    validation = tuple(pair for pair in whole.pairs if pair in held_out)
    _, empty = split_validation(whole, 0.0, 0)
    return replace(whole, pairs=train), replace(empty, pairs=validation)


def write_samples(
    run_dir: Path,
    train: Manifest,
    validation: Manifest,
    made: Manifest = NO_MADE,
    unlabeled: Manifest = NO_IMAGES,
    calibration: Manifest = NO_IMAGES,
    left_out: Manifest = NO_IMAGES,
) -> None:
    """Write ``samples.csv``: images of training, validation and calibration, made ones, those
    without masks, and those that a quick run leaves out, with the sizes of their files.

    Images are listed once: what a run learns by heart is validated as well, and trained on.
    """
    trained = set(train.pairs)
    held_out = replace(validation, pairs=tuple(p for p in validation.pairs if p not in trained))
    halves = {
        made_ones: tuple(pair for pair in calibration.pairs if pair.made is made_ones)
        for made_ones in (False, True)
    }
    rows = [
        {
            "split": split,
            "dataset": dataset,
            "name": name,
            "image_bytes": sizes[0],
            "mask_bytes": sizes[1],
        }
        for split, manifest in (
            ("training", train),
            ("validation", held_out),
            (LEFT_OUT, left_out),
            (CALIBRATION, replace(calibration, pairs=halves[False])),
            (MADE_CALIBRATION, replace(calibration, pairs=halves[True])),
            (MADE, made),
            (UNLABELED, unlabeled),
        )
        for (dataset, name), sizes in manifest.files().items()
    ]
    write_rows(run_dir / SAMPLES, rows, ("split", "dataset", "name", "image_bytes", "mask_bytes"))


def read_split(run_dir: Path | None) -> dict[tuple[str, str], str]:
    """Return the split that a run recorded in ``samples.csv``; {} if that cannot be read."""
    if run_dir is None:
        return {}
    rows = read_samples(run_dir)
    found = {key: split for key, split in rows.items() if split not in BESIDE}
    known = {"training", "validation", CALIBRATION, LEFT_OUT}
    return found if set(found.values()) <= known else {}
