"""Pairs as samples: pure functions of (epoch, index) for training, of the index for scoring."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch.utils.data import Dataset

from camoxpert.data.cache.table import PixelCache
from camoxpert.data.files.image_io import MAX_PIXELS, read_pair
from camoxpert.data.files.manifest import Manifest
from camoxpert.data.samples.augment import SampleTransform, resize_pair, square_pair
from camoxpert.data.unreadable import first_readable
from camoxpert.errors import DataError


class PairDataset(Dataset[Any]):
    """Reads pairs, from their files or from the cache, and changes them unless the device will.

    A fault is returned as a value: an exception raised in a worker reaches the main process as a
    traceback inside a message, and the readable text is lost.

    Args:
        manifest, transform, max_pixels, cache: as ``build_loader`` takes them.
        raw: samples are for ``collate_raw``, not changed yet.
        skip: how many unreadable pairs in a row the next ones stand in for; 0: one is an error.
    """

    def __init__(
        self,
        manifest: Manifest,
        transform: SampleTransform,
        *,
        max_pixels: int = MAX_PIXELS,
        cache: PixelCache | None = None,
        raw: bool = False,
        skip: int = 0,
    ) -> None:
        self.pairs = manifest.pairs
        self.names = [pair.name for pair in manifest.pairs]
        self.transform = transform
        self.max_pixels = max_pixels
        self.cache = cache
        self.rows = None if cache is None else cache.of(manifest)
        self.bad = {} if cache is None else cache.unreadable_of(manifest)
        self.raw = raw
        self.skip = skip

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, key: tuple[int, int, int]) -> Any:
        """Return sample (epoch, index, target) as ``collate`` or, raw, as ``collate_raw`` takes it;
        or the DataError."""
        epoch, index, target = key
        try:
            place, (pixels, size), faults = first_readable(
                index, self.names, self._decoded, skip=self.skip
            )
        except DataError as error:
            return error
        name = self.names[place]
        if self.raw:
            return pixels, name, size, index, epoch, target, faults
        changed = self.transform.change(pixels, epoch=epoch, index=index, target=target)
        return *changed, name, size, index, faults

    def _decoded(self, place: int) -> tuple[np.ndarray, tuple[int, int]]:
        """Return a pair as uint8 (S, S, 4), and its original (height, width)."""
        if self.cache is not None and self.rows is not None:
            if place in self.bad:
                raise DataError(self.bad[place])
            height, width = self.cache.sizes[self.rows[place]].tolist()
            return self.cache.pixels[self.rows[place]], (height, width)
        pair, source = self.pairs[place], self.transform.source
        image, mask = read_pair(pair.image, pair.mask, max_pixels=self.max_pixels, at_least=source)
        return square_pair(image, mask, source), (mask.shape[0], mask.shape[1])


class EvalDataset(Dataset[Any]):
    """Reads pairs for scoring: the image resized, the mask as it is."""

    def __init__(
        self,
        manifest: Manifest,
        *,
        img_size: int,
        max_pixels: int,
        keep_images: bool,
        skip: bool = False,
    ) -> None:
        self.pairs = manifest.pairs
        self.img_size = img_size
        self.max_pixels = max_pixels
        self.keep_images = keep_images
        self.skip = skip

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> Any:
        """Return (resized image, name, mask, original image or None); for an unreadable pair the
        DataError or, with ``skip``, (name, reason)."""
        pair = self.pairs[index]
        try:
            image, mask = read_pair(pair.image, pair.mask, max_pixels=self.max_pixels)
        except DataError as error:
            return (pair.name, str(error)) if self.skip else error
        resized, _ = resize_pair(image, mask, self.img_size)
        return resized, pair.name, mask, image if self.keep_images else None
