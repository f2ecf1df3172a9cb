"""Batches of training samples, of decoded pairs, and of pairs to evaluate."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor

from camoxpert.data.files.labels import VOID, has_void
from camoxpert.data.samples.augment import SampleTransform
from camoxpert.data.samples.augment_device import apply_draws, move_maps, move_planes
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
        modalities: name -> uint8 (B, 1, S, S), what other sensors saw, moved as the images are: 1
            to 255, 0 where nothing is known; all 0 for images that lack the modality.
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
    modalities: dict[str, Tensor] = field(default_factory=dict)

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors by the name of their field, those of modalities by their own."""
        named = {name: getattr(self, name) for name in ("images", "masks", "soft", "unlabeled")}
        return {n: tensor for n, tensor in named.items() if tensor is not None} | self.modalities

    def present(self) -> dict[str, Tensor]:
        """Return name -> bool (B,): the images of which a modality knows any pixel."""
        return {name: (plane > 0).flatten(1).any(1) for name, plane in self.modalities.items()}

    def changed(self, change: Callable[[Tensor], Tensor]) -> Batch:
        """Return the batch with every tensor changed; names and the like stay."""
        changed = {name: change(tensor) for name, tensor in self.tensors().items()}
        own: dict[str, Any] = {n: t for n, t in changed.items() if n not in self.modalities}
        return replace(self, **own, modalities={name: changed[name] for name in self.modalities})

    def pin_memory(self) -> Batch:
        """Return the batch in page-locked memory: copies from it to the GPU are asynchronous."""
        return self.changed(lambda tensor: tensor.pin_memory())

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
                {name: plane[start : start + size] for name, plane in self.modalities.items()},
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
        return self.changed(lambda tensor: tensor.to(device, non_blocking=non_blocking))


@dataclass
class EvalBatch:
    """An evaluation batch: resized images, everything else at its original size.

    Attributes:
        images: uint8 (B, 3, S, S), RGB.
        names, sizes: as in Batch.
        full_masks: uint8 (H, W) arrays, 0 or 255, VOID where nobody labelled the pixel.
        originals: uint8 (H, W, 3) RGB arrays, or empty.
        unreadable: (name, reason) of pairs that were left out; the batch may be empty.
        planes: uint8 (B, M, S, S), what other sensors saw, in the order of the model; 0 where
            nothing is known. None: nothing is read beside the images.
    """

    images: Tensor
    names: list[str]
    sizes: list[tuple[int, int]]
    full_masks: list[np.ndarray]
    originals: list[np.ndarray] = field(default_factory=list)
    unreadable: list[Fault] = field(default_factory=list)
    planes: Tensor | None = None

    def only(self, rows: Sequence[int]) -> EvalBatch:
        """Return the images at these positions."""
        chosen = list(rows)
        return EvalBatch(
            self.images[chosen],
            [self.names[row] for row in chosen],
            [self.sizes[row] for row in chosen],
            [self.full_masks[row] for row in chosen],
            [self.originals[row] for row in chosen] if self.originals else [],
            self.unreadable,
            None if self.planes is None else self.planes[chosen],
        )


@dataclass
class RawBatch:
    """Decoded pairs that are still to be augmented, on the device of the step.

    Attributes:
        pixels: uint8 (B, S, S, 4 + M), RGB, mask and the planes of modalities.
        names, sizes, indices, replaced: as in Batch.
        epoch: epoch of the augmentation.
        target: side of the training images, in pixels.
        void: masks may have void pixels.
        soft: uint8 (B, S, S), the teacher's maps; None without a teacher.
        unlabeled: which images have no mask; None: all have one.
        modalities: names of the planes.
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
    modalities: tuple[str, ...] = ()

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
        planes: dict[str, Tensor] = {}
        if self.modalities:
            own = move_planes(pixels[..., 4:], draws, self.target).split(1, 1)
            planes = dict(zip(self.modalities, own, strict=True))
            pixels = pixels[..., :4].contiguous()
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
            planes,
        )


def collate(samples: list[Any], *, modalities: Sequence[str] = ()) -> Batch | DataError:
    """Stack (image, mask, name, size, index, faults, soft map or None, whether it has a mask,
    planes or None) samples, or return the first DataError."""
    for sample in samples:
        if isinstance(sample, DataError):
            return sample
    images, masks, names, sizes, indices, faults, soft, labeled, planes = zip(*samples, strict=True)
    stacked = _stacked(planes)
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
        {} if stacked is None else dict(zip(modalities, stacked.split(1, 1), strict=True)),
    )


def _stacked(planes: Sequence[np.ndarray | None]) -> Tensor | None:
    """Return planes (H, W, M) as one tensor (B, M, H, W); None without any."""
    known = [plane.transpose(2, 0, 1) for plane in planes if plane is not None]
    return torch.from_numpy(np.stack(known)) if known else None


def collate_raw(samples: list[Any], *, modalities: Sequence[str] = ()) -> RawBatch | DataError:
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
        tuple(modalities),
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
    images, names, masks, originals, planes = zip(*read, strict=True)
    sizes = [(int(mask.shape[0]), int(mask.shape[1])) for mask in masks]
    kept = [image for image in originals if image is not None]
    return EvalBatch(
        _planes(images), list(names), sizes, list(masks), kept, skipped, _stacked(planes)
    )


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
