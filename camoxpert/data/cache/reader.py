"""Read batches straight from the cache, without worker processes."""

from __future__ import annotations

import queue
import threading
import weakref
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from camoxpert.data.cache.table import PixelCache
from camoxpert.data.files.manifest import Manifest
from camoxpert.data.files.mixing import real_pairs
from camoxpert.data.samples.augment import SampleTransform
from camoxpert.data.samples.batches import RawBatch
from camoxpert.data.samples.sampler import EpochSampler
from camoxpert.data.samples.soft import SoftMaps
from camoxpert.data.unreadable import Fault, first_readable
from camoxpert.errors import DataError
from camoxpert.runtime.host import usable_cores


class CacheReader:
    """Reads batches from the cache's memory map in a thread that reads ahead.

    A batch is one gather of rows; passing it between processes would cost more than making it.
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
        skip: int = 0,
        soft: SoftMaps | None = None,
        modalities: Sequence[str] = (),
    ) -> None:
        self.transform = transform
        self._modalities = tuple(modalities)
        self._names = [pair.name for pair in manifest.pairs]
        self._cache = cache
        self._rows = cache.of(manifest)
        self._bad = cache.unreadable_of(manifest)
        self._void = np.isin(self._rows, sorted(cache.void))
        self._skip = skip
        self._soft = soft
        self._maps = [] if soft is None else soft.of(manifest)
        # OpenCV releases the interpreter's lock: a batch's maps are read, its scenes made at once.
        busy = soft is not None or transform.scenes is not None
        self._pool = ThreadPoolExecutor(usable_cores()) if busy else None
        self._givers = real_pairs(manifest)
        self._unlabeled = [not pair.labeled for pair in manifest.pairs]
        self._sampler = sampler
        self._ahead = ahead
        self._pin = pin_memory
        self._free: list[np.ndarray] = []

    def set_epoch(self, epoch: int, start_batch: int = 0) -> None:
        """Set the epoch to iterate next, starting at batch ``start_batch``."""
        self._sampler.seek(epoch, start_batch)

    def close(self) -> None:
        """End the threads that make samples; the one that reads ahead ends with its iteration."""
        if self._pool is not None:
            self._pool.shutdown()

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
        """Return memory for a batch, reusing that of earlier batches that are no longer referenced.

        The kernel would otherwise clear megabytes of fresh pages for every batch, which takes
        longer than filling them. torch itself reuses page-locked memory.
        """
        row = self._cache.pixels.shape[1:]
        if self._pin:
            return torch.empty((count, *row), dtype=torch.uint8, pin_memory=True)
        size = self._sampler.batch_size
        whole = self._free.pop() if self._free else np.empty((size, *row), np.uint8)
        lent = whole[:count]
        # torch keeps a reference to this array while any tensor is a view of it.
        weakref.finalize(lent, self._free.append, whole).atexit = False
        return torch.from_numpy(lent)

    def read(self, keys: Sequence[tuple[int, int, int]]) -> RawBatch:
        """Return one batch, gathered from the rows of its (epoch, index, target) keys."""
        epochs, indices, targets = zip(*keys, strict=True)
        replaced: list[Fault] = []
        places = list(indices)
        if self._bad:
            for position, index in enumerate(indices):
                places[position], _, faults = first_readable(
                    index, self._names, self._require, skip=self._skip
                )
                replaced += faults
        rows = self._rows[places]
        pixels = self._buffer(len(rows))
        np.take(self._cache.pixels, rows, axis=0, out=pixels.numpy(), mode="clip")
        self._compose(pixels.numpy(), keys, places)
        sizes = [(int(height), int(width)) for height, width in self._cache.sizes[rows]]
        names = [self._names[place] for place in places]
        void = bool(self._void[places].any())
        batch = RawBatch(pixels, names, sizes, list(indices), epochs[0], targets[0], replaced, void)
        batch.modalities = self._modalities
        if self._soft is not None and self._pool is not None:
            maps = self._pool.map(self._soft.read, [self._maps[place] for place in places])
            soft = torch.from_numpy(np.stack(list(maps)))
            batch.soft = soft.pin_memory() if self._pin else soft
        unlabeled = [self._unlabeled[place] for place in places]
        if any(unlabeled):
            batch.unlabeled = unlabeled
        return batch

    def _compose(
        self, pixels: np.ndarray, keys: Sequence[tuple[int, int, int]], places: Sequence[int]
    ) -> None:
        """Put the objects of other images into those of a batch that have one drawn, in place."""
        if self._pool is None or self.transform.scenes is None:
            return

        def read(giver: int) -> np.ndarray:
            place, _, _ = first_readable(giver, self._names, self._require, skip=self._skip)
            return np.asarray(self._cache.pixels[self._rows[place]])

        def one(position: int) -> None:
            place, sample = places[position], chosen[position]
            pixels[position] = self.transform.compose(
                pixels[position], place, sample, givers=self._givers, read=read
            )

        draws = (self.transform.draw(epoch=epoch, index=index) for epoch, index, _ in keys)
        chosen = {
            position: sample
            for position, sample in enumerate(draws)
            if sample.guest is not None and not self._unlabeled[places[position]]
        }
        for _ in self._pool.map(one, chosen):
            pass

    def _require(self, place: int) -> None:
        """Raise DataError for a row that could not be decoded."""
        if place in self._bad:
            raise DataError(self._bad[place])
