"""Stateless samplers: the same order for any worker count and after any resume."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
from torch.utils.data import Sampler


class BatchPlaces:
    """A sampler that can start at any batch.

    Attributes:
        start: position in the order of the first sample to yield.
        batch_size: samples per batch.
    """

    start: int
    batch_size: int

    def indices(self) -> Sequence[int]:
        """Return the indices from ``start`` on."""
        raise NotImplementedError

    @contextmanager
    def at_batch(self, batch: int) -> Iterator[None]:
        """Start ``batch`` batches after ``start`` inside the block."""
        start = self.start
        self.start = start + batch * self.batch_size
        try:
            yield
        finally:
            self.start = start

    def batch_indices(self, batch: int) -> list[int]:
        """Return the indices of the batch that is ``batch`` batches after ``start``."""
        with self.at_batch(batch):
            return [int(index) for index in self.indices()[: self.batch_size]]


class Mixed(NamedTuple):
    """Images of one kind that are mixed into the others.

    Attributes:
        number: how many there are; their indices follow those of the kinds before.
        per_epoch: how many of them an epoch sees, drawn from (seed, epoch) and spread evenly.
        stream: separates their random stream from those of other kinds.
    """

    number: int
    per_epoch: int
    stream: int


UNLABELED_STREAM, MADE_STREAM, NEGATIVE_STREAM = 2, 3, 4


class EpochSampler(BatchPlaces, Sampler[tuple[int, int, int]]):
    """Yields (epoch, index, target); the order is a pure function of (seed, epoch).

    Every rank gets the same number of samples: the order is padded with its first samples.

    Args:
        num_samples: samples of the whole data set.
        seed: seed of the run.
        rank, world_size: rank of this process, and number of processes that share an epoch.
        batch_size: samples per batch; they share a target.
        targets: sides of the training images in pixels; each batch draws one from (seed, epoch,
            position), the same on every rank.
        mixed: other kinds of images, in the order of their indices, which follow those of the
            samples.
        batches: of an epoch, if it has fewer than all; None: all.
        by_heart: the samples come in their own order, again and again until there are ``batches``.
    """

    def __init__(
        self,
        num_samples: int,
        *,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        batch_size: int = 1,
        targets: Sequence[int] = (0,),
        mixed: Sequence[Mixed] = (),
        batches: int | None = None,
        by_heart: bool = False,
    ) -> None:
        self.batches = batches
        self.by_heart = by_heart
        self.num_samples = num_samples
        self.mixed = tuple(mixed)
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.batch_size = batch_size
        self.targets = tuple(targets)
        self.epoch = 0
        self.start = 0

    def seek(self, epoch: int, batch: int) -> None:
        """Set the epoch to iterate next, starting at batch ``batch``."""
        self.epoch = epoch
        self.start = batch * self.batch_size

    def order(self, epoch: int) -> np.ndarray:
        """Return this rank's indices in an epoch."""
        if self.by_heart:
            own = self._share(np.arange(self.num_samples))
            return own if self.batches is None else np.resize(own, self.batches * self.batch_size)
        indices = np.random.default_rng([self.seed, epoch]).permutation(self.num_samples)
        order, first = self._share(indices), self.num_samples
        for kind in self.mixed:
            if kind.per_epoch:
                # The last numbers separate this stream from those of the order and of the targets.
                generator = np.random.default_rng([self.seed, epoch, 0, kind.stream])
                chosen = generator.permutation(kind.number)[: kind.per_epoch]
                order = _spread(order, self._share(chosen + first))
            first += kind.number
        return order if self.batches is None else order[: self.batches * self.batch_size]

    def _share(self, indices: np.ndarray) -> np.ndarray:
        """Return this rank's part of indices that all ranks share, the same number for each."""
        each = -(-len(indices) // self.world_size)
        return np.resize(indices, each * self.world_size)[self.rank :: self.world_size]

    def indices(self) -> Sequence[int]:
        """Return this rank's indices of the epoch from ``start`` on."""
        indices: list[int] = self.order(self.epoch)[self.start :].tolist()
        return indices

    def target(self, epoch: int, batch: int) -> int:
        """Return the side of the images in batch ``batch`` of an epoch."""
        if len(self.targets) == 1:
            return self.targets[0]
        # The last number separates this stream from that of the order.
        generator = np.random.default_rng([self.seed, epoch, batch, 1])
        return self.targets[int(generator.integers(len(self.targets)))]

    def __iter__(self) -> Iterator[tuple[int, int, int]]:
        # Read once: at_batch may restore ``start`` while samples are yielded.
        epoch, start = self.epoch, self.start
        target = self.targets[0]
        for position, index in enumerate(self.order(epoch)[start:], start=start):
            if position == start or position % self.batch_size == 0:
                target = self.target(epoch, position // self.batch_size)
            yield epoch, int(index), target

    def __len__(self) -> int:
        # After a short last batch ``start`` can be beyond the end.
        return max(0, len(self.order(self.epoch)) - self.start)


def _spread(order: np.ndarray, extra: np.ndarray) -> np.ndarray:
    """Return an order with others mixed in evenly, so that every batch has its share whatever its
    size: the n-th of the extra images comes where n of their total is reached."""
    length = len(order) + len(extra)
    reached = np.arange(length + 1) * len(extra) // length
    is_extra = np.diff(reached) > 0
    spread = np.empty(length, order.dtype)
    spread[is_extra], spread[~is_extra] = extra, order
    return spread


class InOrderSampler(BatchPlaces, Sampler[int]):
    """Yields every index in order, from ``start`` on."""

    def __init__(self, num_samples: int, batch_size: int) -> None:
        self.num_samples = num_samples
        self.batch_size = batch_size
        self.start = 0

    def indices(self) -> Sequence[int]:
        """Return the indices from ``start`` on."""
        return range(self.start, self.num_samples)

    def __iter__(self) -> Iterator[int]:
        return iter(self.indices())

    def __len__(self) -> int:
        return max(0, self.num_samples - self.start)
