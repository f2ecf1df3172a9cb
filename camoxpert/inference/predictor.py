"""A trained model ready to use: images in, probability maps at their original size out."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import count, islice
from pathlib import Path
from typing import TypeVar, overload

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from camoxpert import stop
from camoxpert.config import TrainConfig
from camoxpert.data.samples.augment import image_sides
from camoxpert.errors import CheckpointError, ConfigError, DataError
from camoxpert.inference.prediction import Prediction
from camoxpert.inference.score import probability_maps
from camoxpert.inference.sources import ImageInput, find_photos, name_of, read_pixels
from camoxpert.models.camoxpert import CamoXpert, build_model
from camoxpert.models.zoom import Zoomed, zoomed_side
from camoxpert.runs.checkpoint import Checkpoint, load_checkpoint, resolve_checkpoint
from camoxpert.runtime.device import (
    Precision,
    check_architecture,
    choose_device,
    choose_precision,
)

Input = TypeVar("Input", bound=ImageInput)
DECODERS = 2
"""Threads that read images during the forward pass."""


class Predictor:
    """A model in evaluation mode with its preprocessing; ``camoxpert.load`` makes one.

    Args:
        checkpoint: a verified checkpoint; its EMA weights are used if it has them.
        device: device of the model.
        precision: number format of the forward pass.
        max_pixels: larger images are refused; None: as in training.
        zoom: look at every image at two sizes; see ``models.zoom``.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        device: torch.device,
        precision: Precision,
        max_pixels: int | None = None,
        zoom: bool = False,
    ) -> None:
        self.checkpoint = checkpoint
        self.config = checkpoint.config
        self.device = device
        self.precision = precision
        self.img_size = self.config.data.img_size
        self.max_pixels = max_pixels or self.config.data.max_pixels
        # The checkpoint has the weights: nothing is downloaded.
        model = dataclasses.replace(checkpoint.config.model, pretrained=False, weights="")
        sides, self.zoom = image_sides(self.config.data), zoom
        if zoom:
            sides = (*sides, zoomed_side(self.img_size))
        try:
            built = build_model(model, sides=sides)
        except ConfigError as error:
            if not zoom:
                raise
            raise ConfigError(f"--zoom looks at images at two sizes. {error}") from error
        try:
            built.load_state_dict(checkpoint.evaluated_weights)
        except RuntimeError as error:
            raise CheckpointError(
                f"{checkpoint.path} does not fit its own settings: {error}"
            ) from error
        self.model: CamoXpert | Zoomed = built
        if zoom:
            # Images are read at the larger size.
            self.model, self.img_size = Zoomed(built, self.img_size), sides[-1]
        self.model.to(device).eval()

    @overload
    def predict(
        self, images: ImageInput, *, threshold: float = ..., batch_size: int = ...
    ) -> Prediction: ...

    @overload
    def predict(
        self,
        images: list[Input] | tuple[Input, ...],
        *,
        threshold: float = ...,
        batch_size: int = ...,
    ) -> list[Prediction]: ...

    def predict(
        self,
        images: ImageInput | list[Input] | tuple[Input, ...],
        *,
        threshold: float = 0.5,
        batch_size: int = 8,
    ) -> Prediction | list[Prediction]:
        """Find the hidden objects in one image, or in each of a list.

        Args:
            images: a path, uint8 RGB pixels (H, W, 3) or a Pillow image; or a list or tuple of
                these.
            threshold: probability above which a pixel counts as object, 0..1.
            batch_size: images per forward pass, for a list.

        Returns:
            A Prediction, or a list of them in order.

        Raises:
            DataError: an image cannot be read.
            ConfigError: ``threshold`` or ``batch_size`` is out of range.
        """
        if isinstance(images, (list, tuple)):
            return list(self.stream(images, threshold=threshold, batch_size=batch_size))
        (prediction,) = self.stream([images], threshold=threshold)
        return dataclasses.replace(prediction, name=name_of(images, "image"))

    def stream(
        self,
        images: str | Path | Iterable[ImageInput],
        *,
        threshold: float = 0.5,
        batch_size: int = 8,
    ) -> Iterator[Prediction]:
        """Yield a prediction for each image, in order, with two batches of images in memory.

        The next batch is read during the forward pass of the current one. With the same batch size
        the values equal those of ``camoxpert predict``.

        Args:
            images: any iterable of paths, uint8 RGB pixels and Pillow images, finite or not; or a
                folder, glob or CSV file, as on the command line.
            threshold: probability above which a pixel counts as object, 0..1.
            batch_size: images per forward pass.

        Raises:
            DataError: no image was found; or, during the iteration, an image cannot be read.
            ConfigError: ``threshold`` or ``batch_size`` is out of range.
        """
        if batch_size < 1 or not 0 <= threshold <= 1:
            raise ConfigError(
                "batch_size must be at least 1 and threshold between 0 and 1; they are "
                f"{batch_size} and {threshold}."
            )
        chosen = find_photos([str(images)]) if isinstance(images, (str, Path)) else images
        attempts = self.attempts(chosen, threshold=threshold, batch_size=batch_size)
        return (_or_raise(found) for _, found in attempts)

    def attempts(
        self, images: Iterable[Input], *, threshold: float, batch_size: int
    ) -> Iterator[tuple[Input, Prediction | DataError]]:
        """Yield each image with its prediction, or with the error if it cannot be read.

        Args:
            images, threshold, batch_size: see ``stream``.
        """
        rest = iter(images)
        numbers = count(1)
        pool = ThreadPoolExecutor(max_workers=DECODERS)

        def read_ahead() -> list[tuple[Input, Future[NDArray[np.uint8] | DataError]]]:
            chunk = list(islice(rest, batch_size))
            return [(image, pool.submit(self._read, image)) for image in chunk]

        try:
            ahead = read_ahead()
            while ahead:
                current, ahead = ahead, read_ahead()
                read = [(image, future.result()) for image, future in current]
                stop.check()
                readable = [pixels for _, pixels in read if not isinstance(pixels, DataError)]
                predictions = iter(self._batch(readable, threshold))
                for image, pixels in read:
                    name = name_of(image, f"image-{next(numbers)}")
                    if isinstance(pixels, DataError):
                        yield image, pixels
                    else:
                        yield image, dataclasses.replace(next(predictions), name=name)
        finally:
            pool.shutdown(cancel_futures=True)

    def _read(self, image: ImageInput) -> NDArray[np.uint8] | DataError:
        try:
            return read_pixels(image, max_pixels=self.max_pixels)
        except DataError as error:
            return error

    def _batch(self, images: Sequence[NDArray[np.uint8]], threshold: float) -> list[Prediction]:
        """Return predictions of uint8 RGB images from one forward pass, still without names."""
        if not images:
            return []
        started = time.monotonic()
        prepared = torch.stack([self.prepare(image) for image in images])
        maps = self(prepared, [(image.shape[0], image.shape[1]) for image in images])
        each = (time.monotonic() - started) / len(images)
        return [
            Prediction("", image, map_HW, each, threshold)
            for image, map_HW in zip(images, maps, strict=True)
        ]

    def prepare(self, image_HWC: NDArray[np.uint8]) -> Tensor:
        """Return an RGB uint8 image (H, W, 3) resized to the training size, uint8 (3, S, S)."""
        size = (self.img_size, self.img_size)
        shrink = min(image_HWC.shape[:2]) > self.img_size
        resized = cv2.resize(
            image_HWC, size, interpolation=cv2.INTER_AREA if shrink else cv2.INTER_LINEAR
        )
        return torch.from_numpy(np.ascontiguousarray(resized.transpose(2, 0, 1)))

    def __call__(
        self, images: Tensor, sizes: Sequence[tuple[int, int]]
    ) -> list[NDArray[np.float32]]:
        """Return float32 probability maps (H, W) in 0..1 for prepared images (B, 3, S, S)."""
        on_device = images.to(self.device)
        maps, _ = probability_maps(self.model, on_device, sizes, precision=self.precision)
        return [map_HW.cpu().numpy() for map_HW in maps]


def _or_raise(found: Prediction | DataError) -> Prediction:
    if isinstance(found, DataError):
        raise found
    return found


def load_predictor(
    path: Path,
    *,
    device: str = "auto",
    precision: str = "auto",
    max_pixels: int | None = None,
    zoom: bool = False,
) -> Predictor:
    """Load a predictor from a checkpoint file, a run folder or a folder of shared weights.

    Args:
        path: where the model is.
        device, precision, zoom: as the flags of ``predict``.
        max_pixels: larger images are refused; None: as in training.

    Raises:
        CheckpointError: no usable checkpoint at ``path``.
        ConfigError: the device or precision is not available.
    """
    checkpoint = load_checkpoint(resolve_checkpoint(path))
    where = choose_device(device)
    check_architecture(where)
    if precision not in ("auto", "fp32", "bf16", "fp16"):
        raise ConfigError(f"--precision {precision}: use auto, fp32, bf16 or fp16.")
    chosen = choose_precision(TrainConfig(precision=precision), where)
    return Predictor(checkpoint, device=where, precision=chosen, max_pixels=max_pixels, zoom=zoom)
