"""What a predictor searches for: references that show it, or a class that the model remembers."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from camoxpert import console
from camoxpert.data.cache.choice import default_folder
from camoxpert.data.cache.support import Reference, SupportCache
from camoxpert.data.files.image_io import read_mask
from camoxpert.errors import ConfigError, DataError
from camoxpert.inference.sources import ImageInput, read_pixels
from camoxpert.models.camoxpert import CamoXpert
from camoxpert.models.guidance import combine
from camoxpert.models.support import Facts, SupportEncoder, load_support_encoder
from camoxpert.text import count

MaskInput = str | Path | NDArray[np.uint8] | NDArray[np.bool_]
"""A file, or an array (H, W): bool, 0 and 1, or 0 and 255."""
Shown = TypeVar("Shown", bound=ImageInput)
Marked = TypeVar("Marked", bound=MaskInput)


@dataclass(frozen=True)
class Target:
    """What to search for.

    Attributes:
        name: for messages and the head of a ledger: by the content of the references, in any
            order, or the class.
        values: the features, as ``models.guidance.combine`` joins them.
    """

    name: str
    values: tuple[float, ...]

    def tensor(self) -> Tensor:
        """Return the features, float32 (D,)."""
        return torch.tensor(self.values, dtype=torch.float32)


class KnownEncoder:
    """The support encoder of a model, built when a reference is not in the cache.

    A checkpoint holds the digest under which features are kept, so that known references need
    neither the encoder nor its weights.

    Args:
        network: trained with guidance.
        weights: file of the encoder's weights, where the one of the training is not.

    Raises:
        ConfigError: the model takes no references.
    """

    frozen = True

    def __init__(self, network: CamoXpert, weights: str = "") -> None:
        guidance = network.require_guidance()
        self._network, self._weights = network, weights
        self.width = guidance.features
        self.digest = guidance.encoder_digest or self.built.digest

    @cached_property
    def _loaded(self) -> SupportEncoder:
        expected = self._network.require_guidance().encoder_digest
        return load_support_encoder(self._network.config, weights=self._weights, expected=expected)

    @property
    def built(self) -> SupportEncoder:
        """The encoder, on the device of the model; built once.

        Raises:
            ConfigError: its weights cannot be had.
            CheckpointError: they are not those of the training.
        """
        return self._loaded.to(self.device)

    @property
    def device(self) -> torch.device:
        """Where it runs."""
        return self._network.mean.device

    @property
    def facts(self) -> Facts:
        """What its features depend on."""
        return self.built.facts

    def encode(self, images_NCHW: Sequence[Tensor], masks_N1HW: Sequence[Tensor]) -> Tensor:
        """Return the features (N, D) of references."""
        return self.built.encode(images_NCHW, masks_N1HW)


class Searching:
    """What a model can be told to search for; the part of ``Predictor`` about references.

    Args:
        network: the model.
        max_pixels: larger references are refused.

    Attributes:
        network: the model.
        target: what images are searched for; None: any hidden object.
        support_cache: keeps the features of references; None before the first.
    """

    def __init__(self, network: CamoXpert, *, max_pixels: int) -> None:
        self.network, self.max_pixels = network, max_pixels
        self.target: Target | None = None
        self.support_cache: SupportCache | None = None
        self._weights = ""

    def set_references(
        self,
        images: ImageInput | list[Shown] | tuple[Shown, ...],
        masks: MaskInput | list[Marked] | tuple[Marked, ...],
        *,
        weights: str | Path = "",
    ) -> None:
        """Search all images from now on for what references show.

        Features of files are kept in the cache folder, so that the next call with the same
        references does not run the encoder.

        Args:
            images: one or more references: paths, uint8 RGB pixels or Pillow images. Training
                showed up to ``data.episodes.shots`` at a time.
            masks: of what to look for, one for each: paths, or arrays (H, W) of 0 and 1 or 0 and
                255.
            weights: file of the support encoder's weights, where the one of the training is not;
                "": the one that was named last, if any.

        Raises:
            ConfigError: the model was trained without guidance; or its encoder cannot be had.
            CheckpointError: the encoder's weights are not those of the training.
            DataError: a reference cannot be read, or its mask marks nothing.
        """
        given = list(images) if isinstance(images, (list, tuple)) else [images]
        marked = list(masks) if isinstance(masks, (list, tuple)) else [masks]
        file = str(weights) or self._weights
        cache = self.support_cache_with(file)
        target = target_of_references(cache, given, marked)
        # Kept only now: weights that are refused must not be tried again.
        self.support_cache, self._weights = cache, file
        self.search_for(target)

    def support_cache_with(self, weights: str = "") -> SupportCache:
        """Return a cache of reference features: the open one, unless it is of another weights file.

        Raises:
            ConfigError, CheckpointError: as ``set_references``.
        """
        if self.support_cache is not None and weights in ("", self._weights):
            return self.support_cache
        encoder = KnownEncoder(self.network, weights)
        return SupportCache(encoder, default_folder() / "stages", max_pixels=self.max_pixels)

    def set_reference_class(self, name: str) -> None:
        """Search all images from now on for a class of the training; needs no reference.

        Raises:
            ConfigError: the model was trained without guidance, or does not know the class.
        """
        self.search_for(target_of_class(self.network, name))

    def clear_references(self) -> None:
        """Search for any hidden object again: the model without guidance, bit for bit."""
        self.search_for(None)

    def search_for(self, target: Target | None) -> None:
        """Search all images from now on for a target; None: any hidden object.

        Raises:
            ConfigError: the model takes no references, or these are not of its encoder.
        """
        self.network.search_for(None if target is None else target.tensor())
        self.target = target


def target_of_references(
    cache: SupportCache, images: Sequence[ImageInput], masks: Sequence[MaskInput]
) -> Target:
    """Return what references show; their order changes nothing.

    Args:
        cache: of the model's support encoder; it keeps the features of files.
        images, masks: one mask for each image.

    Raises:
        ConfigError: no reference, or not one mask for each.
        DataError: one cannot be read, or a mask marks nothing or has another size.
    """
    if not images or len(images) != len(masks):
        raise ConfigError(
            f"Every reference is an image with the mask of what to look for in it; "
            f"{count(len(images), 'image')} and {count(len(masks), 'mask')} were given."
        )
    files = [
        Reference(Path(image), Path(mask))
        for image, mask in zip(images, masks, strict=True)
        if isinstance(image, (str, Path)) and isinstance(mask, (str, Path))
    ]
    if len(files) == len(images):
        features_ND = cache.features(files)
        contents = cache.digests(files)
    else:
        pixels = [read_pixels(image, max_pixels=cache.max_pixels) for image in images]
        marked = [_mask_pixels(mask, cache.max_pixels) for mask in masks]
        # One at a time, as the cache does: see there.
        features_ND = torch.cat(
            [
                cache.encoder.encode([_channels_first(image)], [torch.from_numpy(mask)[None]])
                for image, mask in zip(pixels, marked, strict=True)
            ]
        )
        contents = [
            hashlib.sha256(image.tobytes() + mask.tobytes()).hexdigest()
            for image, mask in zip(pixels, marked, strict=True)
        ]
    digest = hashlib.sha256("\n".join(sorted(contents)).encode()).hexdigest()
    shown = f"{count(len(images), 'image')} (sha256 {digest[:16]})"
    return Target(shown, tuple(combine(features_ND).cpu().tolist()))


def target_of_class(network: CamoXpert, name: str) -> Target:
    """Return a class of the training as what to search for.

    Raises:
        ConfigError: the model takes no references, or does not remember the class.
    """
    values = network.require_guidance().prototype(name)
    return Target(f"class {name}", tuple(values.cpu().tolist()))


def decide_target(target: Target, cache: SupportCache | None) -> None:
    """Print what is searched for, and what the cache did."""
    console.decide(
        "guidance",
        f"search for what is in {target.name}"
        if cache is not None
        else f"search for {target.name}",
    )
    if cache is not None:
        console.decide("", f"support cache: {cache.stats.describe()}")


def _mask_pixels(mask: MaskInput, max_pixels: int) -> NDArray[np.bool_]:
    """Return where a mask marks the object, bool (H, W)."""
    if isinstance(mask, (str, Path)):
        marked: NDArray[np.bool_] = read_mask(mask, max_pixels=max_pixels) == 255
        return marked
    array = np.asarray(mask)
    if array.ndim != 2 or array.dtype not in (np.bool_, np.uint8):
        raise DataError(
            f"An array of {array.dtype} and shape {array.shape} is not a mask. Give bool or uint8 "
            "of shape (H, W): 0 and 1, or 0 and 255."
        )
    levels = array.astype(np.uint8)
    return np.ascontiguousarray(levels > (127 if levels.max(initial=0) > 1 else 0))


def _channels_first(image_HWC: NDArray[np.uint8]) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(image_HWC.transpose(2, 0, 1)))
