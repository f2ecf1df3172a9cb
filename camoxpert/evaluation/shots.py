"""Which references images are scored with, and the scores by what the model was shown.

References of a test image are training images of its class, drawn from (seed, name): those of a
larger number begin with those of a smaller one. Wrong references show another class: that of
another object in the same image where the data has one, else a drawn one. They are the control:
what they lose is what the model takes from references at all.
"""

from __future__ import annotations

import zlib
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path

import numpy as np

from camoxpert.data.files.classes import object_classes
from camoxpert.data.files.manifest import Manifest
from camoxpert.data.files.pairing import Pair
from camoxpert.files import file_digest
from camoxpert.runs.scores import CacheCounts, ShotsEntry, ShownEntry, SubsetsEntry


@dataclass(frozen=True)
class ShotScore:
    """The scores of all images with one kind of reference.

    Attributes:
        shown: what the model was shown.
        scores: measure -> value.
        differences: measure -> ``metrics.statistics.Comparison`` with no reference; empty where it
            was not asked for.
        images: how many were shown something; the others are scored with no reference.
    """

    shown: str
    scores: dict[str, float]
    differences: dict[str, dict[str, float]]
    images: int

    def entry(self) -> ShownEntry:
        """Return it as ``scores.json`` holds it."""
        return {
            "shown": self.shown,
            "scores": self.scores,
            "differences": self.differences,
            "images": self.images,
        }


@dataclass(frozen=True)
class ShotTable:
    """The scores of one model on one data set by the number of references.

    Attributes:
        images, classes: how many.
        left_out: images without a class, or without another image of it to refer to.
        seed: of the draws.
        rows: one per kind of reference, none first.
        cache: what the support cache did.
    """

    images: int
    classes: int
    left_out: int
    seed: int
    rows: tuple[ShotScore, ...]
    cache: CacheCounts

    def entry(self) -> ShotsEntry:
        """Return it as ``scores.json`` holds it."""
        return {
            "images": self.images,
            "classes": self.classes,
            "left_out": self.left_out,
            "seed": self.seed,
            "rows": [row.entry() for row in self.rows],
            "cache": self.cache,
        }


@dataclass(frozen=True)
class SubsetTable:
    """The scores of one model on one data set by what it is shown of each image.

    Attributes:
        images: of the data set.
        have: modality -> how many of the images have it.
        rows: one per subset, the photograph alone first; differences are to it. Images of which a
            subset shows nothing are left out of its row; one that lacks a part is shown the rest.
        mean, worst: measure -> mean of the rows, and the worst of them.
    """

    images: int
    have: dict[str, int]
    rows: tuple[ShotScore, ...]
    mean: dict[str, float]
    worst: dict[str, float]

    def entry(self) -> SubsetsEntry:
        """Return it as ``scores.json`` holds it."""
        return {
            "images": self.images,
            "have": self.have,
            "rows": [row.entry() for row in self.rows],
            "mean": self.mean,
            "worst": self.worst,
        }


class Shots:
    """Which references each image of a data set is shown with.

    Args:
        manifest: the images.
        pool: training images.
        usable: whether one of them can be a reference; asked of those that are drawn, and another
            is drawn for one that cannot.
        seed: of the draws.
    """

    def __init__(
        self,
        manifest: Manifest,
        pool: Sequence[Pair],
        *,
        usable: Callable[[Pair], bool] = lambda _: True,
        seed: int = 0,
    ) -> None:
        self.manifest, self.seed = manifest, seed
        self._pool: dict[str, list[Pair]] = defaultdict(list)
        for pair, kind in zip(pool, object_classes(pool), strict=True):
            if kind:
                self._pool[kind].append(pair)
        # A test set of one class still has a name for it.
        self.classes = {
            (pair.dataset, pair.name): pair.group.rpartition("/")[2] for pair in manifest.pairs
        }
        self._usable = usable
        self._digest: Callable[[Path], str] = lru_cache(maxsize=None)(_digest)

    @cached_property
    def pairs(self) -> tuple[Pair, ...]:
        """The images that have references."""
        return tuple(pair for pair in self.manifest.pairs if self.right(pair, 1))

    def class_of(self, pair: Pair) -> str:
        """Return the class of the object in an image, as the training has it."""
        return self.classes[pair.dataset, pair.name]

    def right(self, pair: Pair, number: int) -> list[Pair]:
        """Return up to ``number`` training images of the image's class; never the image itself."""
        return self._drawn(pair, self.class_of(pair), number)

    def wrong(self, pair: Pair, number: int) -> list[Pair]:
        """Return up to ``number`` training images of another class."""
        others = [group for group in self._beside(pair) if group in self._pool]
        if not others:
            others = sorted(self._pool.keys() - {self.class_of(pair)})
        if not others:
            return []
        return self._drawn(
            pair, others[int(self._rng(pair, "class").integers(len(others)))], number
        )

    def _beside(self, pair: Pair) -> list[str]:
        """Return the classes of the other objects in the same image."""
        own = self._digest(pair.image)
        return sorted(self._same_image[own] - {self.class_of(pair)})

    @cached_property
    def _same_image(self) -> Mapping[str, set[str]]:
        classes: dict[str, set[str]] = defaultdict(set)
        for pair in self.manifest.pairs:
            classes[self._digest(pair.image)].add(self.class_of(pair))
        return classes

    def _drawn(self, pair: Pair, group: str, number: int) -> list[Pair]:
        known = self._pool.get(group, ())
        order = self._rng(pair, group).permutation(len(known))
        chosen: list[Pair] = []
        for index in order:
            if len(chosen) == number:
                break
            other = self._digest(known[index].image) != self._digest(pair.image)
            if other and self._usable(known[index]):
                chosen.append(known[index])
        return chosen

    def _rng(self, pair: Pair, what: str) -> np.random.Generator:
        text = f"{pair.dataset}/{pair.name}/{what}".encode(errors="surrogateescape")
        return np.random.default_rng([self.seed, zlib.crc32(text)])


def _digest(path: Path) -> str:
    """Return the hash of a file; one that cannot be read, which is said elsewhere, is no copy."""
    try:
        return file_digest(path)
    except OSError:
        return str(path)
