"""Batches of training samples, of decoded pairs, and of pairs to evaluate."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor

from camoxpert.data.files.labels import VOID, has_void
from camoxpert.data.samples.augment import SampleTransform
from camoxpert.data.samples.augment_device import apply_draws, move_maps
from camoxpert.data.samples.scenes import relit
from camoxpert.data.unreadable import Fault
from camoxpert.errors import DataError
from camoxpert.runtime.device import upload


@dataclass
class Batch:
    """A training batch.

    Attributes:
        images: uint8 (B, 3, S, S), RGB.
        masks: uint8 (B, 1, S, S), 0 or 255, VOID where nobody labelled the pixel.
        names: names of the pairs.
        sizes: original (height, width) of each.
        indices: manifest positions of the requested samples, which determine the augmentation.
        replaced: (name, reason) of every unreadable pair that was replaced by another.
        void: masks may have void pixels.
        soft: uint8 (B, 1, S, S), the teacher's maps, moved as the masks are; None without teacher.
        unlabeled: bool (B,), True for images without a mask; None: all have one.
    """

    images: Tensor
    masks: Tensor
    names: list[str]
    sizes: list[tuple[int, int]]
    indices: list[int]
    replaced: list[Fault] = field(default_factory=list)
    void: bool = False
    soft: Tensor | None = None
    unlabeled: Tensor | None = None

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors by the name of their field."""
        named = {name: getattr(self, name) for name in ("images", "masks", "soft", "unlabeled")}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    def pin_memory(self) -> Batch:
        """Return the batch in page-locked memory: copies from it to the GPU are asynchronous."""
        pinned: dict[str, Any] = {name: t.pin_memory() for name, t in self.tensors().items()}
        return replace(self, **pinned)

    def split(self, parts: int) -> list[Batch]:
        """Return at most ``parts`` parts of nearly equal size, in order, as views.

        The first part keeps ``replaced``.
        """
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
                [] if start else self.replaced,
                self.void,
                None if self.soft is None else self.soft[start : start + size],
                None if self.unlabeled is None else self.unlabeled[start : start + size],
            )
            for start in range(0, len(self.names), size)
        ]

    def target(self) -> Tensor:
        """Return the masks as 0/1 float targets (B, 1, H, W)."""
        return (self.masks > VOID).float()

    def known(self) -> Tensor | None:
        """Return 1 on labelled and 0 on void pixels (B, 1, H, W); None if every pixel counts."""
        return (self.masks != VOID).float() if self.void else None

    def teacher(self) -> Tensor | None:
        """Return the teacher's probabilities, float (B, 1, H, W) in 0..1; None without one."""
        return None if self.soft is None else self.soft.float() / 255

    def to(self, device: torch.device, *, non_blocking: bool = True) -> Batch:
        """Return the batch with its tensors on ``device``."""
        moved: dict[str, Any] = {
            name: tensor.to(device, non_blocking=non_blocking)
            for name, tensor in self.tensors().items()
        }
        return replace(self, **moved)


@dataclass
class EvalBatch:
    """An evaluation batch: resized images, everything else at its original size.

    Attributes:
        images: uint8 (B, 3, S, S), RGB.
        names, sizes: as in Batch.
        full_masks: uint8 (H, W) arrays, 0 or 255, VOID where nobody labelled the pixel.
        originals: uint8 (H, W, 3) RGB arrays, or empty.
        unreadable: (name, reason) of pairs that were left out; the batch may be empty.
    """

    images: Tensor
    names: list[str]
    sizes: list[tuple[int, int]]
    full_masks: list[np.ndarray]
    originals: list[np.ndarray] = field(default_factory=list)
    unreadable: list[Fault] = field(default_factory=list)


@dataclass
class RawBatch:
    """Decoded pairs that are still to be augmented, on the device of the step.

    Attributes:
        pixels: uint8 (B, S, S, 4), RGB and mask.
        names, sizes, indices, replaced: as in Batch.
        epoch: epoch of the augmentation.
        target: side of the training images, in pixels.
        void: masks may have void pixels.
        soft: uint8 (B, S, S), the teacher's maps; None without a teacher.
        unlabeled: which images have no mask; None: all have one.
    """

    pixels: Tensor
    names: list[str]
    sizes: list[tuple[int, int]]
    indices: list[int]
    epoch: int
    target: int
    replaced: list[Fault] = field(default_factory=list)
    void: bool = False
    soft: Tensor | None = None
    unlabeled: list[bool] | None = None

    def pin_memory(self) -> RawBatch:
        """Return the batch in page-locked memory."""
        soft = None if self.soft is None else self.soft.pin_memory()
        return replace(self, pixels=self.pixels.pin_memory(), soft=soft)

    def finish(self, transform: SampleTransform, device: torch.device) -> Batch:
        """Copy the pixels to ``device``, augment them there and return the batch."""
        draws = [
            transform.draw(epoch=self.epoch, index=index, target=self.target)
            for index in self.indices
        ]
        pixels = self.pixels.to(device, non_blocking=True)
        pixels = relit(pixels, draws, transform.scenes, self.unlabeled)
        images, masks = apply_draws(pixels, draws, self.target, void=self.void)
        soft = unlabeled = None
        if self.soft is not None:
            soft = move_maps(self.soft.to(device, non_blocking=True), draws, self.target)
        if self.unlabeled is not None:
            unlabeled = upload(np.array(self.unlabeled), pixels) > 0
        return Batch(
            images,
            masks,
            self.names,
            self.sizes,
            self.indices,
            self.replaced,
            self.void,
            soft,
            unlabeled,
        )


def collate(samples: list[Any]) -> Batch | DataError:
    """Stack (image, mask, name, size, index, faults, soft map or None, whether it has a mask)
    samples, or return the first DataError."""
    for sample in samples:
        if isinstance(sample, DataError):
            return sample
    images, masks, names, sizes, indices, faults, soft, labeled = zip(*samples, strict=True)
    return Batch(
        _planes(images),
        torch.from_numpy(np.stack(masks))[:, None],
        list(names),
        list(sizes),
        list(indices),
        list(chain(*faults)),
        any(has_void(mask) for mask in masks),
        None if soft[0] is None else torch.from_numpy(np.stack(soft))[:, None],
        None if all(labeled) else ~torch.tensor(labeled),
    )


def collate_raw(samples: list[Any]) -> RawBatch | DataError:
    """Stack (pixels, name, size, index, epoch, target, faults, soft map or None, whether it has a
    mask) samples, or return the first DataError."""
    for sample in samples:
        if isinstance(sample, DataError):
            return sample
    pixels, names, sizes, indices, epochs, targets, faults, soft, labeled = zip(
        *samples, strict=True
    )
    return RawBatch(
        torch.from_numpy(np.stack(pixels)),
        list(names),
        list(sizes),
        list(indices),
        epochs[0],
        targets[0],
        list(chain(*faults)),
        any(has_void(cv2.extractChannel(np.ascontiguousarray(p), 3)) for p in pixels),
        None if soft[0] is None else torch.from_numpy(np.stack(soft)),
        None if all(labeled) else [not known for known in labeled],
    )


def collate_eval(samples: Sequence[Any], *, img_size: int) -> EvalBatch | DataError:
    """Stack the images and list the rest, or return the first DataError.

    (name, reason) pairs of skipped images become ``unreadable``.
    """
    for sample in samples:
        if isinstance(sample, DataError):
            return sample
    skipped = [sample for sample in samples if len(sample) == 2]
    read = [sample for sample in samples if len(sample) != 2]
    if not read:
        empty = torch.empty((0, 3, img_size, img_size), dtype=torch.uint8)
        return EvalBatch(empty, [], [], [], unreadable=skipped)
    images, names, masks, originals = zip(*read, strict=True)
    sizes = [(int(mask.shape[0]), int(mask.shape[1])) for mask in masks]
    kept = [image for image in originals if image is not None]
    return EvalBatch(_planes(images), list(names), sizes, list(masks), kept, skipped)


def collate_versions(
    samples: Sequence[Any], *, img_size: int, num_versions: int
) -> list[EvalBatch] | DataError:
    """Return an evaluation batch for each version of the images, or the first DataError."""
    batches = []
    for sample in samples:
        if isinstance(sample, DataError):
            return sample
    for version in range(num_versions):
        batch = collate_eval([sample[version] for sample in samples], img_size=img_size)
        assert isinstance(batch, EvalBatch)
        batches.append(batch)
    return batches


def _planes(images: Sequence[np.ndarray]) -> Tensor:
    """Stack uint8 (H, W, 3) images to (B, 3, H, W).

    OpenCV splits channels several times faster than a transposing copy.
    """
    height, width = images[0].shape[:2]
    stacked = np.empty((len(images), 3, height, width), np.uint8)
    for planes, image in zip(stacked, images, strict=True):
        for plane, channel in zip(planes, cv2.split(image), strict=True):
            plane[:] = channel
    return torch.from_numpy(stacked)
