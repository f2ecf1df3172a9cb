"""From pairs to batches on the device.

A sample is a pure function of (seed, epoch, index). The batches are therefore bit-for-bit the same
for any number of workers, persistent or not, with or without a cache, and after any resume.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch
from torch.utils.data import DataLoader

from camoxpert.config import DataConfig
from camoxpert.data.cache.reader import CacheReader
from camoxpert.data.cache.table import PixelCache
from camoxpert.data.files.manifest import Manifest
from camoxpert.data.files.mixing import mix_of
from camoxpert.data.samples.augment import SampleTransform, sample_transform, training_sides
from camoxpert.data.samples.batches import (
    Batch,
    EvalBatch,
    RawBatch,
    collate,
    collate_eval,
    collate_raw,
    collate_versions,
)
from camoxpert.data.samples.datasets import CorruptedDataset, EvalDataset, PairDataset
from camoxpert.data.samples.sampler import (
    MADE_STREAM,
    NEGATIVE_STREAM,
    UNLABELED_STREAM,
    EpochSampler,
    InOrderSampler,
    Mixed,
)
from camoxpert.data.samples.scenes import Scenes
from camoxpert.data.samples.soft import SoftMaps
from camoxpert.data.supervise import Supervised, loader_options
from camoxpert.data.unreadable import skippable
from camoxpert.data.workers import choose_start_method

T = TypeVar("T")


@dataclass(frozen=True)
class LoaderPlan:
    """What was decided about the loader from the settings and the machine.

    Attributes:
        num_workers: data worker processes.
        prefetch: batches each worker prepares ahead.
        cache: decoded pairs to read instead of files, or None.
        on_device: samples are augmented on the device of the step; batches are RawBatch. With a
            cache and no workers, batches are read straight from the cache.
        pin_memory: batches are in page-locked memory.
        soft: maps of a teacher that the batches carry, or None.
        scenes: what relights and composes images, where the settings ask for it, or None.
    """

    num_workers: int = 0
    prefetch: int = 2
    cache: PixelCache | None = None
    on_device: bool = False
    pin_memory: bool = False
    soft: SoftMaps | None = None
    scenes: Scenes | None = None


SIMPLE = LoaderPlan()


class Loader(Supervised[Batch | RawBatch]):
    """Training batches of one manifest, epoch after epoch; ``close`` ends its worker processes.

    Args:
        make, names, timeout: see ``Supervised``.
        sampler: sampler of the DataLoader.
        transform: how samples are augmented.
    """

    def __init__(
        self,
        make: Callable[[], DataLoader[Any]],
        sampler: EpochSampler,
        names: Sequence[str],
        transform: SampleTransform,
        *,
        timeout: float = 0.0,
    ) -> None:
        super().__init__(make, sampler, names, timeout=timeout)
        self.transform = transform
        self._order = sampler

    def set_epoch(self, epoch: int, start_batch: int = 0) -> None:
        """Set the epoch to iterate next, starting at batch ``start_batch``."""
        self._order.seek(epoch, start_batch)


Batches = Loader | CacheReader


def build_loader(
    manifest: Manifest,
    data: DataConfig,
    plan: LoaderPlan = SIMPLE,
    *,
    batch_size: int,
    seed: int,
    rank: int = 0,
    world_size: int = 1,
    batches: int | None = None,
    by_heart: bool = False,
) -> Batches:
    """Build a loader of training batches.

    Args:
        manifest: the pairs: real ones, then made ones, those without an object, without a mask.
        data: settings. Images are augmented by ``data.augment``; with several training sizes one
            is drawn per batch.
        plan: workers and cache.
        batch_size: samples per batch in this process.
        seed: seed of the order and of the augmentation.
        rank, world_size: rank of this process, and number of processes that share an epoch.
        batches, by_heart: fewer batches an epoch, or the same repeated; see ``EpochSampler``.
    """
    transform = sample_transform(data, seed, plan.scenes)
    mix = mix_of(manifest, data)
    sampler = EpochSampler(
        mix.real,
        seed=seed,
        rank=rank,
        world_size=world_size,
        batch_size=batch_size,
        targets=training_sides(data),
        mixed=(
            Mixed(mix.made, mix.made_seen, MADE_STREAM),
            Mixed(mix.negatives, mix.negatives_seen, NEGATIVE_STREAM),
            Mixed(mix.unlabeled, mix.unlabeled_seen, UNLABELED_STREAM),
        ),
        batches=batches,
        by_heart=by_heart,
    )
    if plan.cache is not None and plan.on_device and plan.num_workers == 0:
        return CacheReader(
            manifest,
            plan.cache,
            sampler,
            transform,
            ahead=plan.prefetch,
            pin_memory=plan.pin_memory,
            skip=skippable(data, len(manifest)),
            soft=plan.soft,
            modalities=data.beside_rgb,
        )
    dataset = PairDataset(
        manifest, data, transform, cache=plan.cache, raw=plan.on_device, soft=plan.soft
    )
    make = partial(
        DataLoader,
        dataset,
        batch_size=batch_size,
        sampler=sampler,
        collate_fn=partial(collate_raw if plan.on_device else collate, modalities=data.beside_rgb),
        pin_memory=plan.pin_memory,
        **_worker_options(data, plan.num_workers, data.persistent_workers, plan.prefetch),
    )
    return Loader(make, sampler, dataset.names, transform, timeout=data.worker_timeout)


def build_eval_loader(
    manifest: Manifest,
    data: DataConfig,
    *,
    batch_size: int,
    num_workers: int = 0,
    keep_images: bool = False,
) -> Supervised[EvalBatch]:
    """Build a loader of evaluation batches in manifest order; see ``EvalBatch``.

    Args:
        manifest: the pairs.
        data: settings. With ``unreadable`` skip, unreadable pairs are left out and listed in the
            batch.
        batch_size: images per batch.
        num_workers: data worker processes.
        keep_images: also keep the original images in the batches.
    """
    dataset = EvalDataset(manifest, data, keep_images=keep_images)
    together = partial(collate_eval, img_size=data.img_size)
    return _in_order(dataset, data, together, batch_size=batch_size, num_workers=num_workers)


def build_corrupted_loader(
    manifest: Manifest,
    data: DataConfig,
    versions: Sequence[tuple[str, int]],
    *,
    seed: int,
    batch_size: int,
    num_workers: int = 0,
) -> Supervised[list[EvalBatch]]:
    """Build a loader in manifest order whose batches are lists, an ``EvalBatch`` per version.

    Args:
        manifest, data, batch_size, num_workers: see ``build_eval_loader``.
        versions: (corruption, severity) of each version of an image.
        seed: of the corruptions.
    """
    dataset = CorruptedDataset(manifest, data, versions, seed=seed)
    together = partial(collate_versions, img_size=data.img_size, num_versions=len(versions))
    return _in_order(dataset, data, together, batch_size=batch_size, num_workers=num_workers)


def _in_order(
    dataset: EvalDataset,
    data: DataConfig,
    together: Callable[[Sequence[Any]], Any],
    *,
    batch_size: int,
    num_workers: int,
) -> Supervised[Any]:
    sampler = InOrderSampler(len(dataset), batch_size)
    make = partial(
        DataLoader,
        dataset,
        batch_size=batch_size,
        sampler=sampler,
        collate_fn=together,
        **_worker_options(data, num_workers, False, 2),
    )
    names = [pair.name for pair in dataset.pairs]
    return Supervised(make, sampler, names, timeout=data.worker_timeout)


def _worker_options(
    data: DataConfig, num_workers: int, persistent: bool, prefetch: int
) -> dict[str, Any]:
    return loader_options(
        num_workers,
        start_method=choose_start_method(data.start_method)[0],
        persistent=persistent,
        prefetch=prefetch,
        timeout=data.worker_timeout,
    )


def finish(loader: Batches, batch: Batch | RawBatch, device: torch.device) -> Batch:
    """Return a loader's batch on ``device``, augmented."""
    if isinstance(batch, RawBatch):
        return batch.finish(loader.transform, device)
    return batch.to(device)


def device_batches(loader: Batches, device: torch.device) -> Iterator[tuple[Batch, float]]:
    """Yield (batch on the device, seconds the host waited for it), one batch ahead on CUDA.

    On CUDA the next batch is copied and augmented on a side stream during the current step.
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
    """Return the median seconds per sample in this process; the first one imports: left out.

    Where some samples are relit or composed, which takes longer, it is the mean of more of them.
    """
    scenes = dataset.transform.scenes is not None
    count = min(samples * (3 if scenes else 1), len(dataset))
    if not count:
        return 0.0
    dataset[0, 0, target]
    taken = []
    for index in np.linspace(0, len(dataset) - 1, count).astype(int).tolist():
        started = time.perf_counter()
        dataset[0, index, target]
        taken.append(time.perf_counter() - started)
    return float(np.mean(taken) if scenes else np.median(taken))


def _timed(batches: Iterator[T]) -> Iterator[tuple[T, float]]:
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
    """Make the step wait for its own batch, but not for the next one."""
    current = torch.cuda.current_stream(device)
    current.wait_event(done)
    for tensor in batch.tensors().values():
        # The allocator must not reuse the memory while this stream still reads it.
        tensor.record_stream(current)
    return batch, waited
