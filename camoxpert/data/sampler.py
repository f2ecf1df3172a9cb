"""Which sample comes when: a stateless sampler, the same for any worker count and after any
resume."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from torch.utils.data import Sampler


class EpochSampler(Sampler[tuple[int, int, int]]):
    """Yields (epoch, index, target); the order is a pure function of (seed, epoch).

    Every rank gets equally many: the order is filled up from its own beginning.

    Args:
        num_samples: samples of the whole data set.
        seed: seed of the run.
        shuffle: False keeps the manifest's order.
        rank, world_size: this process among those that share an epoch.
        batch_size: samples of a batch; they share a target.
        targets: sides of the training images in pixels; each batch draws one from (seed, epoch,
            position), the same on every rank.
    """

    def __init__(
        self,
        num_samples: int,
        *,
        seed: int,
        shuffle: bool,
        rank: int = 0,
        world_size: int = 1,
        batch_size: int = 1,
        targets: Sequence[int] = (0,),
    ) -> None:
        self.num_samples = num_samples
        self.seed = seed
        self.shuffle = shuffle
        self.rank = rank
        self.world_size = world_size
        self.batch_size = batch_size
        self.targets = tuple(targets)
        self.epoch = 0
        self.start = 0

    def order(self, epoch: int) -> np.ndarray:
        """Return this rank's indices in an epoch."""
        indices = np.arange(self.num_samples)
        if self.shuffle:
            indices = np.random.default_rng([self.seed, epoch]).permutation(self.num_samples)
        each = -(-self.num_samples // self.world_size)
        return np.resize(indices, each * self.world_size)[self.rank :: self.world_size]

    def target(self, epoch: int, batch: int) -> int:
        """Return the side of the images of an epoch's ``batch``-th batch."""
        if len(self.targets) == 1:
            return self.targets[0]
        # The last number keeps this stream apart from the order's.
        generator = np.random.default_rng([self.seed, epoch, batch, 1])
        return self.targets[int(generator.integers(len(self.targets)))]

    def __iter__(self) -> Iterator[tuple[int, int, int]]:
        epoch = self.epoch
        target = self.targets[0]
        for position, index in enumerate(self.order(epoch)[self.start :], start=self.start):
            if position == self.start or position % self.batch_size == 0:
                target = self.target(epoch, position // self.batch_size)
            yield epoch, int(index), target

    def __len__(self) -> int:
        return len(self.order(self.epoch)) - self.start
