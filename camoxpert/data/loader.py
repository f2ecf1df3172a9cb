"""From pairs to batches on the device: pure data sets, loaders, and the reader of the cache.

A sample is a pure function of (seed, epoch, index). So any number of workers, kept or not, cached
or not, and any resume give the same batches bit for bit.
"""

from __future__ import annotations

import queue
import threading
import time
import weakref
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from camoxpert.data.augment import SampleTransform, resize_pair, square_pair
from camoxpert.data.batches import (
    Batch,
    EvalBatch,
    RawBatch,
    collate,
    collate_eval,
    collate_raw,
)
from camoxpert.data.cache_table import PixelCache
from camoxpert.data.image_io import MAX_PIXELS, read_pair
from camoxpert.data.manifest import Manifest
from camoxpert.data.sampler import EpochSampler
from camoxpert.data.workers import checked, end_workers, loader_options
from camoxpert.errors import DataError


class PairDataset(Dataset[Any]):
    """Reads pairs, from their files or from the cache, and changes them unless the device will.

    A fault is returned as a value: an exception raised in a worker reaches the main process as a
    traceback inside a message, and the readable text is lost.
    """

    def __init__(
        self,
        manifest: Manifest,
        transform: SampleTransform,
        *,
        max_pixels: int = MAX_PIXELS,
        cache: PixelCache | None = None,
        raw: bool = False,
    ) -> None:
        self.pairs = manifest.pairs
        self.transform = transform
        self.max_pixels = max_pixels
        self.cache = cache
        self.rows = None if cache is None else cache.of(manifest)
        self.raw = raw

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, key: tuple[int, int, int]) -> Any:
        """Return sample (epoch, index, target) as ``collate`` or, raw, as ``collate_raw`` takes it;
        or the DataError."""
        epoch, index, target = key
        pair = self.pairs[index]
        if self.cache is not None and self.rows is not None:
            pixels = self.cache.pixels[self.rows[index]]
            height, width = self.cache.sizes[self.rows[index]].tolist()
        else:
            try:
                image, mask = read_pair(
                    pair.image,
                    pair.mask,
                    max_pixels=self.max_pixels,
                    at_least=self.transform.source,
                )
            except DataError as error:
                return error
            height, width = mask.shape
            pixels = square_pair(image, mask, self.transform.source)
        if self.raw:
            return pixels, pair.name, (height, width), index, epoch, target
        changed = self.transform.change(pixels, epoch=epoch, index=index, target=target)
        return *changed, pair.name, (height, width), index


class EvalDataset(Dataset[Any]):
    """Reads pairs for scoring: the image resized, the mask as it is."""

    def __init__(
        self, manifest: Manifest, *, img_size: int, max_pixels: int, keep_images: bool
    ) -> None:
        self.pairs = manifest.pairs
        self.img_size = img_size
        self.max_pixels = max_pixels
        self.keep_images = keep_images

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> Any:
        """Return (resized image, name, mask, original image or None), or the DataError."""
        pair = self.pairs[index]
        try:
            image, mask = read_pair(pair.image, pair.mask, max_pixels=self.max_pixels)
        except DataError as error:
            return error
        resized, _ = resize_pair(image, mask, self.img_size)
        return resized, pair.name, mask, image if self.keep_images else None


class Loader:
    """Training batches of one manifest, epoch after epoch; ``close`` ends its worker processes."""

    def __init__(
        self, loader: DataLoader[Any], sampler: EpochSampler, transform: SampleTransform
    ) -> None:
        self.transform = transform
        self._loader = loader
        self._sampler = sampler
        self._running: list[Any] = []
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
        return len(self._loader)

    def __iter__(self) -> Iterator[Batch | RawBatch]:
        return checked(self._loader, self._running)


class CacheReader:
    """Batches straight from the cache's memory map: a thread reads ahead, no process is needed.

    A batch is one gather of rows; handing it between processes would cost more than making it.
    """

    def __init__(
        self,
        manifest: Manifest,
        cache: PixelCache,
        sampler: EpochSampler,
        transform: SampleTransform,
        *,
        ahead: int = 2,
        pin_memory: bool = False,
    ) -> None:
        self.transform = transform
        self._pairs = manifest.pairs
        self._cache = cache
        self._rows = cache.of(manifest)
        self._sampler = sampler
        self._ahead = ahead
        self._pin = pin_memory
        self._free: list[np.ndarray] = []

    def set_epoch(self, epoch: int, start_batch: int = 0) -> None:
        """Choose the epoch to iterate next, from its ``start_batch``-th batch on."""
        self._sampler.epoch = epoch
        self._sampler.start = start_batch * self._sampler.batch_size

    def close(self) -> None:
        """Nothing to end: the thread ends with its iteration."""

    def __len__(self) -> int:
        return -(-len(self._sampler) // self._sampler.batch_size)

    def __iter__(self) -> Iterator[RawBatch]:
        keys = list(self._sampler)
        size = self._sampler.batch_size
        batches = [keys[start : start + size] for start in range(0, len(keys), size)]
        ready: queue.Queue[RawBatch | BaseException] = queue.Queue(maxsize=self._ahead)
        stopped = threading.Event()

        def put(item: RawBatch | BaseException) -> None:
            while not stopped.is_set():
                try:
                    return ready.put(item, timeout=0.1)
                except queue.Full:
                    continue

        def read() -> None:
            for batch in batches:
                if stopped.is_set():
                    return
                try:
                    put(self.read(batch))
                except BaseException as error:
                    put(error)
                    return

        thread = threading.Thread(target=read, daemon=True)
        thread.start()
        try:
            for _ in batches:
                item = ready.get()
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            stopped.set()
            thread.join()

    def _buffer(self, count: int) -> Tensor:
        """Return memory for a batch: what earlier batches used, once nothing refers to it any more.

        The kernel would otherwise clear megabytes of fresh pages for every batch, which takes
        longer than filling them. Page-locked memory is kept by torch itself.
        """
        side = self._cache.pixels.shape[1]
        if self._pin:
            return torch.empty((count, side, side, 4), dtype=torch.uint8, pin_memory=True)
        size = self._sampler.batch_size
        whole = self._free.pop() if self._free else np.empty((size, side, side, 4), np.uint8)
        lent = whole[:count]
        # torch holds this very array as long as any tensor looks into it.
        weakref.finalize(lent, self._free.append, whole).atexit = False
        return torch.from_numpy(lent)

    def read(self, keys: Sequence[tuple[int, int, int]]) -> RawBatch:
        """Gather the rows of one batch of (epoch, index, target)."""
        epochs, indices, targets = zip(*keys, strict=True)
        rows = self._rows[list(indices)]
        pixels = self._buffer(len(rows))
        np.take(self._cache.pixels, rows, axis=0, out=pixels.numpy(), mode="clip")
        sizes = [(int(height), int(width)) for height, width in self._cache.sizes[rows]]
        names = [self._pairs[index].name for index in indices]
        return RawBatch(pixels, names, sizes, list(indices), epochs[0], targets[0])


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
) -> Batches:
    """Build a loader of training batches.

    Args:
        manifest: the pairs.
        transform: how they become samples.
        batch_size, num_workers, shuffle, seed, drop_last: as usual.
        persistent_workers, prefetch_factor, pin_memory, start_method: about the workers.
        max_pixels: larger images are refused.
        cache: decoded pairs to read instead of files.
        on_device: batches are RawBatch, to be finished on the device. With a cache and no workers
            they are read straight from it.
        targets: sides of the training images, one drawn per batch; empty: the transform's.
    """
    sampler = EpochSampler(
        len(manifest),
        seed=seed,
        shuffle=shuffle,
        batch_size=batch_size,
        targets=targets or (transform.img_size,),
    )
    if cache is not None and on_device and num_workers == 0 and not drop_last:
        return CacheReader(
            manifest, cache, sampler, transform, ahead=prefetch_factor, pin_memory=pin_memory
        )
    dataset = PairDataset(manifest, transform, max_pixels=max_pixels, cache=cache, raw=on_device)
    loader = DataLoader(
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
        ),
    )
    return Loader(loader, sampler, transform)


def build_eval_loader(
    manifest: Manifest,
    *,
    img_size: int,
    batch_size: int,
    num_workers: int = 0,
    max_pixels: int = MAX_PIXELS,
    keep_images: bool = False,
) -> EvalLoader:
    """Build a loader of evaluation batches in manifest order; see ``EvalBatch``."""
    dataset = EvalDataset(
        manifest, img_size=img_size, max_pixels=max_pixels, keep_images=keep_images
    )
    return EvalLoader(
        DataLoader(
            dataset,
            batch_size=batch_size,
            collate_fn=collate_eval,
            **loader_options(num_workers, persistent=False, prefetch=2),
        )
    )


class EvalLoader:
    """Evaluation batches in manifest order."""

    def __init__(self, loader: DataLoader[Any]) -> None:
        self._loader = loader
        self._running: list[Any] = []
        self._finalizer = weakref.finalize(self, end_workers, self._running)

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[EvalBatch]:
        return checked(self._loader, self._running)


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
