"""A trained model ready to use: images in, probability maps at their original size out."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterable, Iterator
from itertools import count, islice
from pathlib import Path
from typing import Any, TypeVar, overload

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from camoxpert.config import TrainConfig
from camoxpert.data.samples.augment import image_sides
from camoxpert.errors import CheckpointError, ConfigError, DataError
from camoxpert.inference.batching import BatchSize
from camoxpert.inference.engine import Chunk, Pipeline, Row
from camoxpert.inference.prediction import Prediction
from camoxpert.inference.score import enlarged
from camoxpert.inference.sources import ImageInput, find_photos, name_of, read_pixels
from camoxpert.inference.timing import Timing
from camoxpert.models.camoxpert import build_model
from camoxpert.runs.checkpoint import Checkpoint, load_checkpoint, resolve_checkpoint
from camoxpert.runtime.device import (
    Precision,
    check_architecture,
    choose_device,
    choose_precision,
)

Input = TypeVar("Input", bound=ImageInput)


class Predictor:
    """A model in evaluation mode with its preprocessing; ``camoxpert.load`` makes one.

    Args:
        checkpoint: a verified checkpoint; its EMA weights are used if it has them.
        device: device of the model.
        precision: number format of the forward pass.
        max_pixels: larger images are refused; None: as in training.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        device: torch.device,
        precision: Precision,
        max_pixels: int | None = None,
    ) -> None:
        self.checkpoint = checkpoint
        self.config = checkpoint.config
        self.device = device
        self.precision = precision
        self.img_size = self.config.data.img_size
        self.max_pixels = max_pixels or self.config.data.max_pixels
        # The checkpoint has the weights: nothing is downloaded.
        model = dataclasses.replace(checkpoint.config.model, pretrained=False, weights="")
        self.model = build_model(model, sides=image_sides(self.config.data))
        try:
            self.model.load_state_dict(checkpoint.evaluated_weights)
        except RuntimeError as error:
            raise CheckpointError(
                f"{checkpoint.path} does not fit its own settings: {error}"
            ) from error
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
        source = _Iterated(images, batch_size)
        stages = _StreamStages(self, threshold)
        with Pipeline(
            stages,
            source,
            batch_size=BatchSize(batch_size),
            timing=Timing(),
            worker="",
            most_chunks=1,
        ) as pipeline:
            for result in pipeline.results():
                for row in result.rows:
                    found = row["found"]
                    if isinstance(found, Prediction):
                        found = dataclasses.replace(found, seconds=row["seconds"]["forward"])
                    yield row["image"], found

    def prepare(self, image_HWC: NDArray[np.uint8]) -> Tensor:
        """Return an RGB uint8 image (H, W, 3) resized to the training size, uint8 (3, S, S)."""
        size = (self.img_size, self.img_size)
        shrink = min(image_HWC.shape[:2]) > self.img_size
        resized = cv2.resize(
            image_HWC, size, interpolation=cv2.INTER_AREA if shrink else cv2.INTER_LINEAR
        )
        return torch.from_numpy(np.ascontiguousarray(resized.transpose(2, 0, 1)))

    def logits(self, images_BCHW: Tensor) -> Tensor:
        """Return float32 logits (B, 1, h, w) of prepared images (B, 3, S, S) on the device."""
        with self.precision.autocast(self.device):
            output: Tensor = self.model(images_BCHW).logits_B1HW
        return output.float()


@dataclasses.dataclass(frozen=True)
class _Given:
    """An image that a caller gave, with the name of its outputs."""

    image: Any
    name: str


@dataclasses.dataclass(frozen=True)
class _Read:
    """An image that was read: see ``engine.Sample``."""

    inputs: tuple[Tensor, ...]
    pixels: NDArray[np.uint8]
    seconds: dict[str, float]

    @property
    def held_bytes(self) -> int:
        """Memory until it is finished: pixels, and the map at their size."""
        return 3 * self.pixels.nbytes


class _Iterated:
    """Images of an iterable as chunks, taken as they are needed."""

    def __init__(self, images: Iterable[ImageInput], size: int) -> None:
        self._images = iter(images)
        self._size = size
        self._number = 0
        self._unnamed = count(1)

    def take(self, *, wait: bool) -> Chunk | None:
        """Return the next chunk, or None after the last."""
        images = list(islice(self._images, self._size))
        if not images:
            return None
        self._number += 1
        items = [_Given(image, name_of(image, f"image-{next(self._unnamed)}")) for image in images]
        return Chunk(self._number, tuple(items))


class _StreamStages:
    """Reads images and returns predictions in the rows."""

    def __init__(self, predictor: Predictor, threshold: float) -> None:
        self.predictor, self.threshold = predictor, threshold
        self.device = predictor.device

    def read(self, given: _Given) -> _Read:
        started = time.monotonic()
        pixels = read_pixels(given.image, max_pixels=self.predictor.max_pixels)
        prepared = self.predictor.prepare(pixels)
        return _Read((prepared,), pixels, {"read": time.monotonic() - started})

    def forward(self, inputs: Tensor) -> Tensor:
        return self.predictor.logits(inputs)

    def finish(self, given: _Given, sample: _Read, outputs: list[Tensor]) -> Row:
        started = time.monotonic()
        height, width = sample.pixels.shape[:2]
        with torch.inference_mode():
            map_HW = enlarged(outputs[0], (height, width)).numpy()
        found = Prediction(given.name, sample.pixels, map_HW, 0.0, self.threshold)
        seconds = {"enlarge": time.monotonic() - started}
        return {"image": given.image, "found": found, "seconds": seconds}

    def failed(self, given: _Given, reason: str) -> Row:
        return {"image": given.image, "found": DataError(reason)}

    def example(self) -> Tensor:
        side = self.predictor.img_size
        return torch.zeros(1, 3, side, side, dtype=torch.uint8, device=self.device)


def _or_raise(found: Prediction | DataError) -> Prediction:
    if isinstance(found, DataError):
        raise found
    return found


def load_predictor(
    path: Path, *, device: str = "auto", precision: str = "auto", max_pixels: int | None = None
) -> Predictor:
    """Load a predictor from a checkpoint file, a run folder or a folder of shared weights.

    Args:
        path: where the model is.
        device, precision: as the flags of ``predict``.
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
    return Predictor(checkpoint, device=where, precision=chosen, max_pixels=max_pixels)
