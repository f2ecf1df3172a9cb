"""From pairs to batches: a stateless sampler, a pure data set, batches moved to the device.

The sampler yields (epoch, index); a sample is a pure function of (seed, epoch, index). So any
number of workers, kept or not, and any resume give the same batches bit for bit.
"""

from __future__ import annotations

import signal
import time
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from camoxpert.data.augment import SampleTransform, resize_pair
from camoxpert.data.image_io import MAX_PIXELS, read_pair
from camoxpert.data.manifest import Manifest
from camoxpert.data.resources import usable_cores
from camoxpert.errors import DataError


@dataclass
class Batch:
    """A training batch.

    Attributes:
        images: uint8 (B, 3, S, S), RGB.
        masks: uint8 (B, 1, S, S), 0 or 255.
        names: names of the pairs.
        sizes: original (height, width) of each.
        indices: positions in the manifest.
    """

    images: Tensor
    masks: Tensor
    names: list[str]
    sizes: list[tuple[int, int]]
    indices: list[int]

    def pin_memory(self) -> Batch:
        """Return the batch in page-locked memory, from which copies to the GPU run beside the
        host."""
        return replace(self, images=self.images.pin_memory(), masks=self.masks.pin_memory())

    def split(self, parts: int) -> list[Batch]:
        """Return the batch in up to so many parts of nearly equal size, in order, without
        copies."""
        size = -(-len(self.names) // parts)
        if size >= len(self.names):
            return [self]
        return [
            Batch(
                self.images[start : start + size],
                self.masks[start : start + size],
                self.names[start : start + size],
                self.sizes[start : start + size],
                self.indices[start : start + size],
            )
            for start in range(0, len(self.names), size)
        ]

    def to(self, device: torch.device, *, non_blocking: bool = True) -> Batch:
        """Return the batch with its tensors on ``device``."""
        return replace(
            self,
            images=self.images.to(device, non_blocking=non_blocking),
            masks=self.masks.to(device, non_blocking=non_blocking),
        )


@dataclass
class EvalBatch:
    """An evaluation batch: resized images and everything at its original size.

    Attributes:
        images: uint8 (B, 3, S, S), RGB.
        names, sizes: as in Batch.
        full_masks: uint8 (H, W) arrays, 0 or 255.
        originals: uint8 (H, W, 3) RGB arrays, or empty.
    """

    images: Tensor
    names: list[str]
    sizes: list[tuple[int, int]]
    full_masks: list[np.ndarray]
    originals: list[np.ndarray] = field(default_factory=list)


class PairDataset(Dataset[Any]):
    """Reads and transforms pairs.

    A fault is returned as a value: an exception raised in a worker reaches the main process as a
    traceback inside a message, and the readable text is lost.
    """

    def __init__(
        self, manifest: Manifest, transform: SampleTransform, *, max_pixels: int = MAX_PIXELS
    ) -> None:
        self.pairs = manifest.pairs
        self.transform = transform
        self.max_pixels = max_pixels

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, key: tuple[int, int]) -> Any:
        """Return (image, mask, name, size, index) of sample (epoch, index), or the DataError."""
        epoch, index = key
        pair = self.pairs[index]
        try:
            image, mask = read_pair(pair.image, pair.mask, max_pixels=self.max_pixels)
        except DataError as error:
            return error
        size = image.shape[:2]
        image, mask = self.transform(image, mask, epoch=epoch, index=index)
        return image, mask, pair.name, size, index


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


class EpochSampler(Sampler[tuple[int, int]]):
    """Yields (epoch, index); the order is a pure function of (seed, epoch).

    Every rank gets equally many: the order is filled up from its own beginning.

    Args:
        num_samples: samples of the whole data set.
        seed: seed of the run.
        shuffle: False keeps the manifest's order.
        rank, world_size: this process among those that share an epoch.
    """

    def __init__(
        self, num_samples: int, *, seed: int, shuffle: bool, rank: int = 0, world_size: int = 1
    ) -> None:
        self.num_samples = num_samples
        self.seed = seed
        self.shuffle = shuffle
        self.rank = rank
        self.world_size = world_size
        self.epoch = 0
        self.start = 0

    def order(self, epoch: int) -> np.ndarray:
        """Return this rank's indices in an epoch."""
        indices = np.arange(self.num_samples)
        if self.shuffle:
            indices = np.random.default_rng([self.seed, epoch]).permutation(self.num_samples)
        each = -(-self.num_samples // self.world_size)
        return np.resize(indices, each * self.world_size)[self.rank :: self.world_size]

    def __iter__(self) -> Iterator[tuple[int, int]]:
        epoch = self.epoch
        for index in self.order(epoch)[self.start :]:
            yield epoch, int(index)

    def __len__(self) -> int:
        return len(self.order(self.epoch)) - self.start


class Loader:
    """Batches of one manifest, epoch after epoch; ``close`` ends its worker processes."""

    def __init__(self, loader: DataLoader[Any], sampler: EpochSampler, batch_size: int) -> None:
        self._loader = loader
        self._sampler = sampler
        self._batch_size = batch_size
        self._running: list[Any] = []
        # Workers do not obey SIGTERM (see start_worker), and that is how the interpreter ends its
        # children: without this an exception that keeps a loader alive hangs the exit for ever.
        self._finalizer = weakref.finalize(self, _end_workers, self._running)

    def set_epoch(self, epoch: int, start_batch: int = 0) -> None:
        """Choose the epoch to iterate next, from its ``start_batch``-th batch on."""
        self._sampler.epoch = epoch
        self._sampler.start = start_batch * self._batch_size

    def close(self) -> None:
        """End the worker processes; the loader cannot be used afterwards."""
        self._finalizer()

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[Batch]:
        return _checked(self._loader, self._running)


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
) -> Loader:
    """Build a loader of training batches; see ``Batch``."""
    sampler = EpochSampler(len(manifest), seed=seed, shuffle=shuffle)
    loader = DataLoader(
        PairDataset(manifest, transform, max_pixels=max_pixels),
        batch_size=batch_size,
        sampler=sampler,
        drop_last=drop_last,
        collate_fn=collate,
        pin_memory=pin_memory,
        **_workers(num_workers, persistent_workers, prefetch_factor),
    )
    return Loader(loader, sampler, batch_size)


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
            **_workers(num_workers, False, 2),
        )
    )


class EvalLoader:
    """Evaluation batches in manifest order."""

    def __init__(self, loader: DataLoader[Any]) -> None:
        self._loader = loader
        self._running: list[Any] = []
        self._finalizer = weakref.finalize(self, _end_workers, self._running)

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[EvalBatch]:
        return _checked(self._loader, self._running)


def device_batches(loader: Loader, device: torch.device) -> Iterator[tuple[Batch, float]]:
    """Yield (batch on the device, seconds the host waited for it), one batch ahead on CUDA.

    On CUDA the next batch is copied on a side stream while the current one is computed.
    """
    if device.type != "cuda":
        for batch, waited in _timed(iter(loader)):
            yield batch.to(device), waited
        return
    side = torch.cuda.Stream(device)
    ahead: tuple[Batch, float] | None = None
    for batch, waited in _timed(iter(loader)):
        with torch.cuda.stream(side):
            following = batch.to(device), waited
        if ahead is not None:
            yield _arrived(ahead, side, device)
        ahead = following
    if ahead is not None:
        yield _arrived(ahead, side, device)


def choose_num_workers(wanted: int | None) -> tuple[int, str]:
    """Return the number of worker processes and why."""
    if wanted is not None:
        return wanted, "as asked"
    cores = usable_cores()
    if cores == 1:
        return 0, "a single core gains nothing from workers"
    return min(cores, 8), f"{cores} cores"


def normalise(images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Turn uint8 images into normalised float32 on their device; mean and std for 0..1 images."""
    return (images.float() / 255 - mean) / std


def collate(samples: list[Any]) -> Batch | DataError:
    """Stack samples; the first fault wins."""
    for sample in samples:
        if isinstance(sample, DataError):
            return sample
    images, masks, names, sizes, indices = zip(*samples, strict=True)
    stacked = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()
    return Batch(
        stacked, torch.from_numpy(np.stack(masks))[:, None], list(names), list(sizes), list(indices)
    )


def collate_eval(samples: list[Any]) -> EvalBatch | DataError:
    """Stack the images and list the rest; the first fault wins."""
    for sample in samples:
        if isinstance(sample, DataError):
            return sample
    images, names, masks, originals = zip(*samples, strict=True)
    stacked = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()
    sizes = [(int(mask.shape[0]), int(mask.shape[1])) for mask in masks]
    kept = [image for image in originals if image is not None]
    return EvalBatch(stacked, list(names), sizes, list(masks), kept)


def start_worker(worker: int) -> None:
    """Prepare a worker: one thread, and deaf to signals meant for the main process."""
    import cv2

    cv2.setNumThreads(0)
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _workers(num_workers: int, persistent: bool, prefetch: int) -> dict[str, Any]:
    # A private generator: iter(DataLoader) otherwise draws from torch's global one.
    options: dict[str, Any] = {"num_workers": num_workers, "generator": torch.Generator()}
    if num_workers:
        options |= {
            "persistent_workers": persistent,
            "prefetch_factor": prefetch,
            "worker_init_fn": start_worker,
        }
    return options


def _checked(loader: DataLoader[Any], running: list[Any]) -> Iterator[Any]:
    """Yield batches; raise faults that came as values, and say what a dead worker means."""
    try:
        iterator = iter(loader)
        running[:] = [iterator]
        for batch in iterator:
            if isinstance(batch, DataError):
                raise batch
            yield batch
    except (RuntimeError, OSError, EOFError) as error:
        # How a death shows depends on what the worker was doing: a closed pipe, a message that
        # ends early, or torch's own words. A fault of our own code in a worker keeps its traceback.
        if not is_worker_death(error) and not _any_dead(running):
            raise
        # Its siblings end now, and with them torch's watch: it would raise again, anywhere.
        _end_workers(running)
        raise worker_death(error) from error


def is_worker_death(error: BaseException) -> bool:
    """Whether an exception is torch's way to say that a data worker died."""
    return "DataLoader worker (pid" in str(error) or "shared memory" in str(error)


def worker_death(error: BaseException) -> DataError:
    """Return the readable form of a data worker's death."""
    reason = " ".join(str(error).split())[:200] or type(error).__name__
    return DataError(
        f"A data worker died ({reason}). Often the machine ran out of memory or shared memory: "
        "lower --num-workers or data.prefetch_factor, or use --num-workers 0."
    )


def _any_dead(running: list[Any]) -> bool:
    workers = [w for iterator in running for w in getattr(iterator, "_workers", ())]
    # The end of its pipe is seen a moment before the process is gone.
    return any(worker.join(timeout=0.2) or not worker.is_alive() for worker in workers)


def _end_workers(running: list[Any]) -> None:
    for iterator in running:
        shutdown = getattr(iterator, "_shutdown_workers", None)
        if shutdown is not None:
            shutdown()
    running.clear()


def _timed(batches: Iterator[Batch]) -> Iterator[tuple[Batch, float]]:
    while True:
        started = time.perf_counter()
        try:
            batch = next(batches)
        except StopIteration:
            return
        yield batch, time.perf_counter() - started


def _arrived(
    item: tuple[Batch, float], side: torch.cuda.Stream, device: torch.device
) -> tuple[Batch, float]:
    current = torch.cuda.current_stream(device)
    current.wait_stream(side)
    for tensor in (item[0].images, item[0].masks):
        # The allocator must not hand the memory out while this stream still reads it.
        tensor.record_stream(current)
    return item
