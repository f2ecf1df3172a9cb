"""Episodes: which references a training image is shown with, a pure function of (seed, epoch,
index)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from camoxpert.config.guidance import EpisodeConfig

STREAM = 1 << 20
"""Separates the random numbers from those of the order and of the augmentation."""


@dataclass(frozen=True)
class Episodes:
    """Draws the references of training images.

    Attributes:
        classes: of every image, by its index; "" where it is shown with none.
        members: class -> rows of the references that show it, by rising number.
        own: row of every image among the references, which is never shown with itself; -1: none.
        config: share of images without references, and how many the others have at most.
        seed: of the run.
    """

    classes: tuple[str, ...]
    members: dict[str, tuple[int, ...]]
    own: tuple[int, ...]
    config: EpisodeConfig
    seed: int

    def draw(self, *, epoch: int, index: int) -> list[int]:
        """Return the rows of the references of an image in an epoch; [] is none."""
        rows = [row for row in self.members.get(self.classes[index], ()) if row != self.own[index]]
        generator = np.random.default_rng([self.seed, epoch, index, STREAM])
        if not rows or generator.random() < self.config.dropout:
            return []
        number = min(int(generator.integers(1, self.config.shots + 1)), len(rows))
        return [rows[place] for place in generator.permutation(len(rows))[:number].tolist()]

    @property
    def shown(self) -> int:
        """How many images have references."""
        return sum(
            any(row != own for row in self.members.get(name, ()))
            for name, own in zip(self.classes, self.own, strict=True)
        )


def episodes_of(
    classes: Sequence[str],
    references: Sequence[str],
    own: Sequence[int],
    config: EpisodeConfig,
    *,
    seed: int,
) -> Episodes:
    """Return the episodes of training images.

    Args:
        classes: of every image, "" where it is not known.
        references: class of every reference, "" for those that cannot be used.
        own: row of every image among the references; -1: none.
        config: settings.
        seed: of the run.
    """
    members: dict[str, list[int]] = defaultdict(list)
    for row, name in enumerate(references):
        if name:
            members[name].append(row)
    found = {name: tuple(rows) for name, rows in members.items()}
    return Episodes(tuple(classes), found, tuple(own), config, seed)
