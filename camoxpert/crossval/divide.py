"""Divide images into folds: groups stay whole, classes and object sizes are spread evenly.

The result depends on the seed, the names, the groups, the classes and the masks: not on the order
of files or roots, nor on where the data lies.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from importlib import metadata

import numpy as np

from camoxpert import console
from camoxpert.config import Config, DataConfig
from camoxpert.data.files.classes import object_classes
from camoxpert.data.files.folds import NO_FOLD, Placed, Splits
from camoxpert.data.files.image_io import read_mask
from camoxpert.data.files.made import find_made
from camoxpert.data.files.manifest import Manifest, load_training_data, read_clean_list
from camoxpert.data.files.pairing import Pair
from camoxpert.doctor.families import inseparable
from camoxpert.doctor.inspect import mask_shape
from camoxpert.errors import ConfigError, DataError
from camoxpert.metrics.groups import SIZES, size_class
from camoxpert.runtime.host import usable_cores
from camoxpert.text import count, shorten
from camoxpert.training.data import search_of
from camoxpert.training.negatives import find_kinds, with_negatives

UNREADABLE = "unreadable"
SOLVER = "scikit-learn"


def find_pool(config: Config) -> Manifest:
    """Return every real image that runs of these settings may train on or hold out, ordered by data
    set and name; a validation split that comes with the data is part of it.

    Raises:
        DataError, ConfigError: as ``load_training_data``.
    """
    data = config.data
    search = search_of(data, read_clean_list(data.clean_list))
    found = load_training_data(data.roots, search, validate=True)
    kinds = find_kinds(with_negatives(found, config), find_made(data.synthetic, search), config)
    whole = kinds.found.whole
    return replace(whole, pairs=tuple(sorted(whole.pairs, key=_key)))


def divide(
    pool: Manifest,
    data: DataConfig,
    *,
    folds: int,
    repeats: int = 1,
    seed: int = 0,
    by_class: bool = False,
    write: bool = True,
) -> Splits:
    """Divide the images of a pool.

    Args:
        pool: as ``find_pool`` returns it.
        data: settings.
        folds: in a repeat; not used with ``by_class``.
        repeats: how often all images are divided, each time in another way.
        seed: of the first repeat.
        by_class: a fold for each class instead, which holds out all its images.
        write: keep the copies found in the cache folder.

    Raises:
        ConfigError: fewer groups than folds, or fewer than two classes.
        DataError: a mask cannot be read.
    """
    pairs = tuple(sorted(pool.pairs, key=_key))
    ordered = replace(pool, pairs=pairs)
    groups = group_numbers(ordered, data, write=write)
    labels, sizes = object_classes(pairs), object_sizes(pairs, data)
    files = ordered.files()
    if by_class:
        classes = tuple(sorted(set(labels) - {""}))
        places = [(place,) for place in _class_folds(labels, classes)]
        apart = _beside(groups, [place for (place,) in places])
        folds, repeats = len(classes), 1
    else:
        classes, apart = (), [()] * len(pairs)
        strata = strata_of(labels, sizes, folds)
        columns = [
            [
                1 + repeat * folds + place
                for place in _stratified(strata, groups, folds, seed + repeat)
            ]
            for repeat in range(repeats)
        ]
        places = list(zip(*columns, strict=True))
    images = tuple(
        Placed(*_key(pair), files[_key(pair)], label, size, pair.series, group, place, beside)
        for pair, label, size, group, place, beside in zip(
            pairs, labels, sizes, groups, places, apart, strict=True
        )
    )
    versions = {SOLVER: metadata.version(SOLVER)}
    return Splits(images, folds, repeats, seed, classes, versions)


def group_numbers(manifest: Manifest, data: DataConfig, *, write: bool = True) -> list[int]:
    """Return the number of each picture's group, in the order of their first pictures; one that
    belongs to no other is a group of its own."""
    family_of: dict[int, int] = {}
    for number, family in enumerate(inseparable(manifest, data, write=write)):
        family_of |= dict.fromkeys(family, number)
    numbers: dict[tuple[bool, int], int] = {}
    return [
        numbers.setdefault((i in family_of, family_of.get(i, i)), len(numbers))
        for i in range(len(manifest))
    ]


def object_sizes(pairs: Sequence[Pair], data: DataConfig) -> list[str]:
    """Return the size of the object in each image, by its mask.

    Raises:
        DataError: a mask cannot be read, unless unreadable images are skipped.
        Stopped: a stop was requested.
    """

    def size(pair: Pair) -> str:
        if pair.empty:
            return SIZES[0]
        try:
            mask = read_mask(pair.mask, max_pixels=data.max_pixels)
        except DataError:
            if data.unreadable != "skip":
                raise
            return UNREADABLE
        return SIZES[size_class(mask_shape(mask).share)]

    with ThreadPoolExecutor(usable_cores()) as pool:
        return list(console.track(pool.map(size, pairs), "reading masks", total=len(pairs)))


def strata_of(labels: Sequence[str], sizes: Sequence[str], folds: int) -> list[str]:
    """Return what is spread evenly over the folds: class and object size.

    A combination with fewer images than folds cannot be: its images count by their class alone, by
    their size alone where the class is as rare, or are left together.
    """
    found = [""] * len(labels)
    ways = (
        [f"{label}/{size}" for label, size in zip(labels, sizes, strict=True)],
        [f"{label}/" for label in labels],
        [f"/{size}" for size in sizes],
    )
    for names in ways:
        numbers = Counter(name for name, taken in zip(names, found, strict=True) if not taken)
        found = [
            taken or (name if numbers[name] >= folds else "")
            for name, taken in zip(names, found, strict=True)
        ]
    return found


def _stratified(strata: Sequence[str], groups: Sequence[int], folds: int, seed: int) -> list[int]:
    """Return the fold of each image, from 0."""
    number = len(set(groups))
    if number < folds:
        raise ConfigError(
            f"--folds {folds}: the {count(len(groups), 'image')} are {count(number, 'group')} of "
            f"copies or series, which are never divided. Give at most {number}."
        )
    from sklearn.model_selection import StratifiedGroupKFold

    names = sorted(set(strata))
    codes = np.array([names.index(name) for name in strata])
    if len(codes) < folds or max(Counter(strata).values()) < folds:
        # Too few of every kind: the groups alone are spread.
        codes = np.zeros(len(codes), int)
    solver = StratifiedGroupKFold(folds, shuffle=True, random_state=seed)
    place = np.zeros(len(codes), int)
    with warnings.catch_warnings():
        # Of kinds with fewer images than folds, which are together in one stratum.
        warnings.simplefilter("ignore", UserWarning)
        for fold, (_, held_out) in enumerate(solver.split(codes, codes, np.array(groups))):
            place[held_out] = fold
    empty = sorted(set(range(folds)) - set(place.tolist()))
    if empty:
        raise ConfigError(
            f"--folds {folds}: the groups of copies and series are too large for so many folds: "
            f"{count(len(empty), 'fold')} would hold out nothing. Give fewer."
        )
    return [int(fold) for fold in place]


def _class_folds(labels: Sequence[str], classes: Sequence[str]) -> list[int]:
    if len(classes) < 2:
        known = shorten(classes) or "none"
        raise ConfigError(
            f"--leave-class-out needs at least two classes; found: {known}. Classes are in names "
            f"as in COD10K, in sub-folders, or in the column class of a CSV."
        )
    fold = {name: number for number, name in enumerate(classes, 1)}
    return [fold.get(label, NO_FOLD) for label in labels]


def _beside(groups: Sequence[int], places: Sequence[int]) -> list[tuple[int, ...]]:
    """Return for each image the folds that may not train on it either: images of its group, of
    another class, are held out there."""
    held_out: dict[int, set[int]] = {}
    for group, place in zip(groups, places, strict=True):
        if place != NO_FOLD:
            held_out.setdefault(group, set()).add(place)
    return [
        tuple(sorted(held_out.get(group, set()) - {place}))
        for group, place in zip(groups, places, strict=True)
    ]


def _key(pair: Pair) -> tuple[str, str]:
    return pair.dataset, pair.name
