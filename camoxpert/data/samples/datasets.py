"""Datasets of pairs: pure functions of (epoch, index) to train, of the index to evaluate."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np
from torch.utils.data import Dataset

from camoxpert.config import DataConfig
from camoxpert.data.cache.table import CHANNELS, PixelCache
from camoxpert.data.files.manifest import Manifest
from camoxpert.data.files.mixing import real_pairs
from camoxpert.data.files.modalities import read_planes
from camoxpert.data.files.pairing import Pair
from camoxpert.data.files.unlabeled import read_files
from camoxpert.data.samples.augment import SampleTransform, resize_pair
from camoxpert.data.samples.corruptions import corrupt
from camoxpert.data.samples.decode import decode_pair
from camoxpert.data.samples.soft import SoftMaps
from camoxpert.data.unreadable import first_readable, skippable
from camoxpert.errors import DataError


class PairDataset(Dataset[Any]):
    """Reads pairs, from their files or from the cache, and augments them unless the device does.

    A DataError is returned as a value: an exception raised in a worker reaches the main process as
    a traceback inside a message, and the readable text is lost.

    Args:
        manifest: the pairs.
        data: settings.
        transform: how pairs become samples.
        cache: decoded pairs to read instead of files.
        raw: return samples for ``collate_raw``, not augmented.
        soft: the teacher's maps of the pairs.
    """

    def __init__(
        self,
        manifest: Manifest,
        data: DataConfig,
        transform: SampleTransform,
        *,
        cache: PixelCache | None = None,
        raw: bool = False,
        soft: SoftMaps | None = None,
    ) -> None:
        self.pairs = manifest.pairs
        self.names = [pair.name for pair in manifest.pairs]
        self.transform = transform
        self.max_pixels = data.max_pixels
        self.modalities = data.beside_rgb
        self.cache = cache
        self.rows = None if cache is None else cache.of(manifest)
        self.bad = {} if cache is None else cache.unreadable_of(manifest)
        self.raw = raw
        self.soft = soft
        self.maps = None if soft is None else soft.of(manifest)
        self.skip = skippable(data, len(manifest))
        self.givers = real_pairs(manifest)

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, key: tuple[int, int, int]) -> Any:
        """Return sample (epoch, index, target) for ``collate`` or ``collate_raw``, or DataError."""
        epoch, index, target = key
        try:
            place, (pixels, size), faults = first_readable(
                index, self.names, self._decoded, skip=self.skip
            )
            pixels = self._composed(pixels, place, epoch=epoch, index=index)
            soft = None
            if self.soft is not None and self.maps is not None:
                soft = self.soft.read(self.maps[place])
        except DataError as error:
            return error
        name, labeled = self.names[place], self.pairs[place].labeled
        if self.raw:
            return pixels, name, size, index, epoch, target, faults, soft, labeled
        planes = None
        if self.modalities:
            pixels, planes = pixels[..., :CHANNELS], pixels[..., CHANNELS:]
            planes = self.transform.change_planes(planes, epoch=epoch, index=index, target=target)
        changed = self.transform.change(pixels, epoch=epoch, index=index, target=target)
        if soft is not None:
            soft = self.transform.change_map(soft, epoch=epoch, index=index, target=target)
        return *changed, name, size, index, faults, soft, labeled, planes

    def _composed(self, pixels: np.ndarray, place: int, *, epoch: int, index: int) -> np.ndarray:
        """Return a pair with the object of another image, if its draw has one."""
        if self.transform.scenes is None or not self.pairs[place].labeled:
            return pixels

        def read(giver: int) -> np.ndarray:
            _, (guest, _), _ = first_readable(giver, self.names, self._decoded, skip=self.skip)
            return guest

        sample = self.transform.draw(epoch=epoch, index=index)
        return self.transform.compose(pixels, place, sample, givers=self.givers, read=read)

    def _decoded(self, place: int) -> tuple[np.ndarray, tuple[int, int]]:
        """Return a pair as uint8 (S, S, 4 + M), and its original (height, width)."""
        if self.cache is not None and self.rows is not None:
            if place in self.bad:
                raise DataError(self.bad[place])
            height, width = self.cache.sizes[self.rows[place]].tolist()
            return self.cache.pixels[self.rows[place]], (height, width)
        pixels, mask = decode_pair(
            self.pairs[place],
            self.transform.source,
            self.modalities,
            max_pixels=self.max_pixels,
        )
        return pixels, (mask.shape[0], mask.shape[1])


class EvalDataset(Dataset[Any]):
    """Reads pairs for evaluation: the image resized, the mask at its original size."""

    def __init__(self, manifest: Manifest, data: DataConfig, *, keep_images: bool) -> None:
        self.pairs = manifest.pairs
        self.img_size = data.img_size
        self.max_pixels = data.max_pixels
        self.modalities = data.beside_rgb
        self.keep_images = keep_images
        self.skip = data.unreadable == "skip"

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> Any:
        """Return (resized image, name, mask, original image or None, planes or None).

        An unreadable pair gives the DataError or, with ``skip``, (name, reason).
        """
        pair = self.pairs[index]
        try:
            image, mask = read_files(pair, max_pixels=self.max_pixels)
            planes = self._planes(pair, image.shape) if self.modalities else None
        except DataError as error:
            return (pair.name, str(error)) if self.skip else error
        resized, _ = resize_pair(image, mask, self.img_size)
        if not self.keep_images:
            return resized, pair.name, mask, None, planes
        if image.shape[:2] != mask.shape:
            image = cv2.resize(image, mask.shape[::-1], interpolation=cv2.INTER_LINEAR)
        return resized, pair.name, mask, image, planes

    def _planes(self, pair: Pair, shape: tuple[int, ...]) -> np.ndarray:
        size = (shape[0], shape[1])
        return read_planes(pair, self.modalities, size, self.img_size, max_pixels=self.max_pixels)


class CorruptedDataset(EvalDataset):
    """Reads pairs for evaluation: versions of the resized image, the mask as it is.

    The image is corrupted at the size that the network sees, so that noise does not depend on the
    resolution of a photo.

    Args:
        manifest, data: as in ``EvalDataset``.
        versions: (corruption, severity) of each version.
        seed: of the corruptions; the image's name selects its stream.
    """

    def __init__(
        self,
        manifest: Manifest,
        data: DataConfig,
        versions: Sequence[tuple[str, int]],
        *,
        seed: int,
    ) -> None:
        super().__init__(manifest, data, keep_images=False)
        self.versions = tuple(versions)
        self.seed = seed

    def __getitem__(self, index: int) -> Any:
        """Return a sample of ``EvalDataset`` for each version.

        An unreadable pair gives the DataError.
        """
        sample = super().__getitem__(index)
        if isinstance(sample, DataError):
            return sample
        if len(sample) == 2:
            return [sample] * len(self.versions)
        image, *rest = sample
        return [
            (corrupt(image, kind, severity, seed=self.seed, key=rest[0]), *rest)
            for kind, severity in self.versions
        ]
