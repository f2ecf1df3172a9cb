"""How many made images, without objects and without masks an epoch sees beside the others."""

from __future__ import annotations

from dataclasses import dataclass

from camoxpert.config import DataConfig
from camoxpert.data.files.manifest import Manifest


@dataclass(frozen=True)
class Mix:
    """The kinds of training images, in the order in which a run lists them.

    An epoch sees every real image once, and each of the others at most once.

    Attributes:
        real: number of images with masks that were not made.
        made, made_seen: number of made images, and how many of them an epoch sees.
        unlabeled, unlabeled_seen: the same of images without masks.
        negatives, negatives_seen: the same of images that are known to have no object.
    """

    real: int
    made: int = 0
    made_seen: int = 0
    unlabeled: int = 0
    unlabeled_seen: int = 0
    negatives: int = 0
    negatives_seen: int = 0

    @property
    def labeled_seen(self) -> int:
        """How many images an epoch sees of whose pixels it is known what they are."""
        return self.real + self.made_seen + self.negatives_seen

    @property
    def extra(self) -> int:
        """How many images an epoch sees beside the real ones."""
        return self.made_seen + self.negatives_seen + self.unlabeled_seen

    @property
    def made_share(self) -> float:
        """Share of made images among those with masks, 0..1."""
        return self.made_seen / max(self.labeled_seen, 1)

    @property
    def negative_share(self) -> float:
        """Share of images without an object among the labelled ones, 0..1."""
        return self.negatives_seen / max(self.labeled_seen, 1)

    def per_process(self, processes: int) -> int:
        """Return how many images one of several processes takes in an epoch."""
        parts = (self.real, self.made_seen, self.negatives_seen, self.unlabeled_seen)
        return sum(-(-number // processes) for number in parts)


def mix(data: DataConfig, *, real: int, made: int, unlabeled: int, negatives: int = 0) -> Mix:
    """Return what an epoch sees of so many images of each kind."""
    made_seen = mixed_in(real, made, data.synthetic_share)
    negatives_seen = mixed_in(real + made_seen, negatives, data.negative_share)
    seen = mixed_in(real + made_seen + negatives_seen, unlabeled, data.unlabeled_share)
    return Mix(real, made, made_seen, unlabeled, seen, negatives, negatives_seen)


def mix_of(manifest: Manifest, data: DataConfig) -> Mix:
    """Return what an epoch sees of a manifest's images."""
    real, negatives = real_pairs(manifest), sum(pair.empty for pair in manifest.pairs)
    made = sum(pair.made and not pair.empty for pair in manifest.pairs)
    rest = len(manifest) - real - made - negatives
    return mix(data, real=real, made=made, unlabeled=rest, negatives=negatives)


def real_pairs(manifest: Manifest) -> int:
    """Return the number of pairs that were labelled, not made, and are not known to have no object;
    they are the first ones."""
    return sum(pair.labeled and not pair.made and not pair.empty for pair in manifest.pairs)


def mixed_in(number: int, available: int, share: float) -> int:
    """Return how many of the ``available`` images an epoch mixes in: ``share`` of all its images
    together with ``number`` others, at most all of them."""
    return min(available, round(number * share / (1 - share)))
