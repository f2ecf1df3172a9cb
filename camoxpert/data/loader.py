"""From pairs to batches on the device.

A sample is a pure function of (seed, epoch, index). So any number of workers, kept or not, cached
or not, and any resume give the same batches bit for bit.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from camoxpert.data.cache.reader import CacheReader
from camoxpert.data.cache.table import PixelCache
from camoxpert.data.files.image_io import MAX_PIXELS
from camoxpert.data.files.manifest import Manifest
from camoxpert.data.samples.augment import SampleTransform
from camoxpert.data.samples.batches import (
    Batch,
    EvalBatch,
    RawBatch,
    collate,
    collate_eval,
    collate_raw,
)
from camoxpert.data.samples.datasets import EvalDataset, PairDataset
from camoxpert.data.samples.sampler import EpochSampler, InOrderSampler
from camoxpert.data.supervise import Report, Supervised, end_workers
from camoxpert.data.unreadable import allowed
from camoxpert.data.workers import loader_options


class Loader:
    """Training batches of one manifest, epoch after epoch; ``close`` ends its worker processes.

    Args:
        make: builds the DataLoader; called again when its workers died.
        sampler: which its samples come from.
        transform: how they are changed.
        names: of the manifest's pairs.
        timeout, report: see ``Supervised``.
    """

    def __init__(
        self,
        make: Callable[[], DataLoader[Any]],
        sampler: EpochSampler,
        transform: SampleTransform,
        names: Sequence[str],
        *,
        timeout: float = 0.0,
        report: Report | None = None,
    ) -> None:
        self.transform = transform
        self._sampler = sampler
        self._batches = Supervised(make, sampler, names, timeout=timeout, report=report)
        self._running = self._batches.running
        # Workers do not obey SIGTERM (see start_worker), and that is how the interpreter ends its
        # children: without this an exception that keeps a loader alive hangs the exit for ever.
        self._finalizer = weakref.finalize(self, end_workers, self._running)

    def set_epoch(self, epoch: int, start_batch: int = 0) -> None:
        """Choose the epoch to iterate next, from its ``start_batch``-th batch on."""
        self._sampler.epoch = epoch
        self._sampler.start = start_batch * self._sampler.batch_size

    def close(self) -> None:
        """End the worker processes; the loader cannot be used afterwards."""
        self._finalizer()

    def __len__(self) -> int:
        return len(self._batches.loader)

    def __iter__(self) -> Iterator[Batch | RawBatch]:
        return iter(self._batches)


Batches = Loader | CacheReader


def build_loader(
    manifest: Manifest,
    transform: SampleTransform,
    *,
    batch_size: int,
    num_workers: int,
    shuffle: bool,
    seed: int,
    drop_last: bool = False,
    persistent_workers: bool = True,
    prefetch_factor: int = 2,
    pin_memory: bool = False,
    max_pixels: int = MAX_PIXELS,
    cache: PixelCache | None = None,
    on_device: bool = False,
    targets: Sequence[int] = (),
    start_method: str = "auto",
    rank: int = 0,
    world_size: int = 1,
    worker_timeout: float = 300.0,
    unreadable: str = "error",
    max_unreadable: float = 0.01,
    report: Report | None = None,
) -> Batches:
    """Build a loader of training batches.

    Args:
        manifest: the pairs.
        transform: how they become samples.
        batch_size, num_workers, shuffle, seed, drop_last: as usual; the batch is this process's.
        persistent_workers, prefetch_factor, pin_memory, start_method: about the workers.
        max_pixels: larger images are refused.
        cache: decoded pairs to read instead of files.
        on_device: batches are RawBatch, to be finished on the device. With a cache and no workers
            they are read straight from it.
        targets: sides of the training images, one drawn per batch; empty: the transform's.
        rank, world_size: this process among those that share an epoch.
        worker_timeout: seconds without a batch after which workers are taken for hung; 0: never.
        unreadable: error, or skip: the next readable pair stands in, and ``replaced`` says so.
        max_unreadable: share of the pairs; more in a row are an error under skip, too.
        report: receives a line when workers died and were started anew; by default stderr does.
    """
    sampler = EpochSampler(
        len(manifest),
        seed=seed,
        shuffle=shuffle,
        rank=rank,
        world_size=world_size,
        batch_size=batch_size,
        targets=targets or (transform.img_size,),
    )
    skip = allowed(len(manifest), max_unreadable) if unreadable == "skip" else 0
    if cache is not None and on_device and num_workers == 0 and not drop_last:
        return CacheReader(
            manifest,
            cache,
            sampler,
            transform,
            ahead=prefetch_factor,
            pin_memory=pin_memory,
            skip=skip,
        )
    dataset = PairDataset(
        manifest, transform, max_pixels=max_pixels, cache=cache, raw=on_device, skip=skip
    )
    make = partial(
        DataLoader,
        dataset,
        batch_size=batch_size,
        sampler=sampler,
        drop_last=drop_last,
        collate_fn=collate_raw if on_device else collate,
        pin_memory=pin_memory,
        **loader_options(
            num_workers,
            persistent=persistent_workers,
            prefetch=prefetch_factor,
            start_method=start_method,
            timeout=worker_timeout,
        ),
    )
    return Loader(make, sampler, transform, dataset.names, timeout=worker_timeout, report=report)


def build_eval_loader(
    manifest: Manifest,
    *,
    img_size: int,
    batch_size: int,
    num_workers: int = 0,
    max_pixels: int = MAX_PIXELS,
    keep_images: bool = False,
    start_method: str = "auto",
    worker_timeout: float = 300.0,
    unreadable: str = "error",
    report: Report | None = None,
) -> EvalLoader:
    """Build a loader of evaluation batches in manifest order; see ``EvalBatch``.

    ``unreadable`` (error, or skip: left out and listed in the batch), ``worker_timeout`` and
    ``report`` are as in ``build_loader``.
    """
    dataset = EvalDataset(
        manifest,
        img_size=img_size,
        max_pixels=max_pixels,
        keep_images=keep_images,
        skip=unreadable == "skip",
    )
    sampler = InOrderSampler(len(manifest), batch_size)
    make = partial(
        DataLoader,
        dataset,
        batch_size=batch_size,
        sampler=sampler,
        collate_fn=partial(collate_eval, img_size=img_size),
        **loader_options(
            num_workers,
            persistent=False,
            prefetch=2,
            start_method=start_method,
            timeout=worker_timeout,
        ),
    )
    return EvalLoader(
        make,
        sampler,
        [pair.name for pair in manifest.pairs],
        timeout=worker_timeout,
        report=report,
    )


class EvalLoader:
    """Evaluation batches in manifest order; workers that die are started anew once."""

    def __init__(
        self,
        make: Callable[[], DataLoader[Any]],
        sampler: InOrderSampler,
        names: Sequence[str],
        *,
        timeout: float = 0.0,
        report: Report | None = None,
    ) -> None:
        self._batches = Supervised(make, sampler, names, timeout=timeout, report=report)
        self._running = self._batches.running
        self._finalizer = weakref.finalize(self, end_workers, self._running)

    def __len__(self) -> int:
        return len(self._batches.loader)

    def __iter__(self) -> Iterator[EvalBatch]:
        return iter(self._batches)


def finish(loader: Batches, batch: Batch | RawBatch, device: torch.device) -> Batch:
    """Return a loader's batch on ``device``, its draws applied."""
    if isinstance(batch, RawBatch):
        return batch.finish(loader.transform, device)
    return batch.to(device)


def device_batches(loader: Batches, device: torch.device) -> Iterator[tuple[Batch, float]]:
    """Yield (batch on the device, seconds the host waited for it), one batch ahead on CUDA.

    On CUDA the next batch is copied and changed on a side stream while the current one is computed.
    """
    if device.type != "cuda":
        for batch, waited in _timed(iter(loader)):
            yield finish(loader, batch, device), waited
        return
    side = torch.cuda.Stream(device)
    ahead: tuple[Batch, float, torch.cuda.Event] | None = None
    for batch, waited in _timed(iter(loader)):
        with torch.cuda.stream(side):
            arriving = finish(loader, batch, device)
            done = torch.cuda.Event()
            done.record(side)
        if ahead is not None:
            yield _arrived(*ahead, device)
        ahead = arriving, waited, done
    if ahead is not None:
        yield _arrived(*ahead, device)


def seconds_per_sample(dataset: PairDataset, target: int, *, samples: int = 8) -> float:
    """Measure what one sample takes this process, without the first, which imports and opens."""
    count = min(samples, len(dataset))
    if not count:
        return 0.0
    dataset[0, 0, target]
    taken = []
    for index in np.linspace(0, len(dataset) - 1, count).astype(int).tolist():
        started = time.perf_counter()
        dataset[0, index, target]
        taken.append(time.perf_counter() - started)
    return float(np.median(taken))


def _timed(batches: Iterator[Any]) -> Iterator[tuple[Any, float]]:
    while True:
        started = time.perf_counter()
        try:
            batch = next(batches)
        except StopIteration:
            return
        yield batch, time.perf_counter() - started


def _arrived(
    batch: Batch, waited: float, done: torch.cuda.Event, device: torch.device
) -> tuple[Batch, float]:
    """Let the step wait for its own batch, and not for the one after it."""
    current = torch.cuda.current_stream(device)
    current.wait_event(done)
    for tensor in (batch.images, batch.masks):
        # The allocator must not hand the memory out while this stream still reads it.
        tensor.record_stream(current)
    return batch, waited
