"""What a quick run learns from: a part of the data, fewer batches, or a few by heart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from camoxpert import console
from camoxpert.config import Config, build_config, changed_settings, quick_words
from camoxpert.data.files.made import NO_MADE
from camoxpert.data.files.manifest import Manifest
from camoxpert.data.files.pairing import Pair
from camoxpert.data.files.split import split_validation
from camoxpert.doctor.families import copy_families
from camoxpert.doctor.sizes import object_sizes
from camoxpert.text import count
from camoxpert.training.batching import effective_batch
from camoxpert.training.plan import OVERFIT_STEPS
from camoxpert.training.split import LEFT_OUT, Split

NOTHING = replace(NO_MADE, split=LEFT_OUT)
BY_HEART: dict[str, Any] = {
    # One set of real images with masks, every pixel as it is, and nothing set aside.
    **{f"data.augment.{name}": 0.0 for name in ("strength", "hflip", "vflip", "corrupt")},
    **{f"data.augment.{name}": 0.0 for name in ("relight", "compose")},
    "data.multi_scale": (),
    "data.val_fraction": 0.0,
    "model.presence": "off",
    "model.drop_path": 0.0,
    "train.expert_dropout": 0.0,
    "train.early_stopping": 0,
    # The end of a decay would say "learned" where the rate has become too low to learn.
    "optim.scheduler": "constant",
}
"""Settings of a run that learns batches by heart."""
UNUSED = (
    *("data.synthetic", "data.synthetic_share", "data.negatives", "data.negative_share"),
    *("data.unlabeled", "data.unlabeled_share", "data.teacher", "data.calibration_fraction"),
)
"""Settings of other images than real ones with masks."""


def as_trained(asked: Config) -> Config:
    """Return the settings that a run's data and training follow: those asked for, but for a run
    that learns batches by heart."""
    if asked.train.quick.overfit_batches is None:
        return asked
    kept = {path: v for path, v in changed_settings(asked).items() if path not in UNUSED}
    return build_config({**kept, **BY_HEART})


def say_quick(config: Config) -> None:
    """Print that this is a quick run, and what is quick about it."""
    for words in quick_words(config.train.quick).values():
        console.decide("quick run", f"{words}; its scores are not those of a whole run")


def images_by_heart(config: Config, processes: int) -> int:
    """Return how many images the batches that are learned by heart hold; 0: none are."""
    train = config.train
    own = train.batch_size or effective_batch(train, processes)
    return (train.quick.overfit_batches or 0) * own * processes


def images_per_epoch(config: Config, number: int, processes: int) -> int:
    """Return how many images an epoch sees where a whole run would see ``number``."""
    train = config.train
    own = train.batch_size or effective_batch(train, processes)
    if train.quick.overfit_batches is not None:
        steps = OVERFIT_STEPS * effective_batch(train, processes)
        return max(steps * processes, images_by_heart(config, processes))
    number = max(1, round(train.quick.data_fraction * number))
    return min(number, (train.quick.limit_batches or number) * own * processes)


def choose_part(
    train: Manifest,
    whole: Manifest,
    config: Config,
    kept: Split,
    processes: int,
    *,
    write: bool = True,
) -> tuple[Manifest, Manifest]:
    """Return the training images of a quick run and those it leaves out; of a whole run, all.

    Every class and every object size keeps its share, and copies of a picture stay together. The
    choice depends on the seed and the names alone.

    Args:
        train: training images; those set aside are no longer among them.
        whole: the same with those set aside.
        config: settings.
        kept: the split of the run that is continued, or empty.
        processes: that train together.
        write: keep what was found out about the data in the cache folder.
    """
    quick = config.train.quick
    heart = quick.overfit_batches is not None
    wanted = images_by_heart(config, processes) if heart else quick.data_fraction * len(train)
    if quick.data_fraction == 1 and not heart:
        return train, NOTHING
    if kept and kept.keys() == {(pair.dataset, pair.name) for pair in whole.pairs}:
        chosen = {p for p in train.pairs if kept[p.dataset, p.name] != LEFT_OUT}
        how = "as the stopped run had it"
    elif wanted >= len(train):
        chosen, how = set(train.pairs), "all there are"
    else:
        families: list[list[int]] = []
        if config.data.group_copies and not heart:
            families = _families(train, whole, config, write=write)
        sizes = object_sizes(train, config.data, write=write)
        chosen = stratified(train, wanted / len(train), config.train.seed, sizes, families)
        how = "each class and object size in its share"
    console.decide("part", f"{count(len(chosen), 'image')} of {len(train)} are trained on: {how}")
    rest = replace(train, pairs=tuple(p for p in train.pairs if p not in chosen), split=LEFT_OUT)
    return replace(train, pairs=tuple(p for p in train.pairs if p in chosen)), rest


def stratified(
    train: Manifest,
    fraction: float,
    seed: int,
    sizes: Sequence[int],
    families: Sequence[Sequence[int]] = (),
) -> set[Pair]:
    """Return a share of the pairs, of every class and object size alike, families whole.

    Args:
        train: the pairs.
        fraction: of them, between 0 and 1.
        seed: of the choice.
        sizes: size class of each pair's object.
        families: positions of pairs that are copies of each other.
    """
    places = {(pair.dataset, pair.name): pair for pair in train.pairs}
    labelled = tuple(
        replace(pair, group=f"{pair.group}\n{size}")
        for pair, size in zip(train.pairs, sizes, strict=True)
    )
    _, part = split_validation(replace(train, pairs=labelled), fraction, seed, families)
    # Families may be larger than the share: then all of them stay.
    chosen = part.pairs or train.pairs
    return {places[pair.dataset, pair.name] for pair in chosen}


def _families(train: Manifest, whole: Manifest, config: Config, *, write: bool) -> list[list[int]]:
    """Return the positions in ``train`` of pictures that are copies of each other."""
    place = {(pair.dataset, pair.name): index for index, pair in enumerate(train.pairs)}
    names = [(pair.dataset, pair.name) for pair in whole.pairs]
    found = copy_families(whole, config.data, write=write) if len(whole) > 1 else []
    own = [[place[names[i]] for i in family if names[i] in place] for family in found]
    return [family for family in own if len(family) > 1]
