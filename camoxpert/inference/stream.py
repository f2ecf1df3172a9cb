"""The stages of ``Predictor.stream``: images of an iterable in, predictions out, through the engine
of ``predict``."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import count, islice
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from camoxpert.errors import DataError
from camoxpert.inference.aligned import photograph, planes_of
from camoxpert.inference.engine import Chunk, Row
from camoxpert.inference.prediction import Prediction, emptied
from camoxpert.inference.sources import ImageInput, name_of, read_pixels
from camoxpert.inference.tta import Looked
from camoxpert.inference.views import Views


@dataclass(frozen=True)
class Given:
    """An image that a caller gave, with the name of its outputs."""

    image: Any
    name: str


@dataclass(frozen=True)
class Read:
    """An image that was read: see ``engine.Sample``."""

    inputs: tuple[Tensor, ...]
    pixels: NDArray[np.uint8]
    seconds: dict[str, float]
    view_bytes: int

    @property
    def held_bytes(self) -> int:
        """Memory until it is finished: pixels, inputs, logits, and the map at the pixels' size."""
        return self.pixels.nbytes + self.view_bytes


class Iterated:
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
        items = [
            Given(image, name_of(photograph(image), f"image-{next(self._unnamed)}"))
            for image in images
        ]
        return Chunk(self._number, tuple(items))


class StreamStages:
    """Reads images and returns predictions in the rows.

    Args:
        device: of the model.
        threshold: probability above which a pixel counts as object, 0..1.
        views: how images become inputs.
        min_presence: maps of images whose presence is lower are empty; None: every map stays.
        max_pixels: larger images are refused.
        modalities: what the model can be given beside photographs.
    """

    def __init__(
        self,
        device: torch.device,
        threshold: float,
        views: Views,
        min_presence: float | None,
        *,
        max_pixels: int,
        modalities: Sequence[str] = (),
    ) -> None:
        self.device, self.threshold, self.views = device, threshold, views
        self.min_presence, self.max_pixels = min_presence, max_pixels
        self.modalities = tuple(modalities)
        self.models = 1

    def read(self, given: Given) -> Read:
        """Decode and resize an image."""
        started = time.monotonic()
        image = given.image
        pixels = read_pixels(photograph(image), max_pixels=self.max_pixels)
        planes = planes_of(image, self.modalities, pixels, max_pixels=self.max_pixels)
        inputs = self.views.inputs(pixels, planes)
        needed = self.views.held_bytes(inputs, (pixels.shape[0], pixels.shape[1]))
        return Read(inputs, pixels, {"read": time.monotonic() - started}, needed)

    def forward(self, inputs: Tensor, samples: Sequence[Read] = ()) -> Looked:
        """Pass a batch through the network."""
        return self.views.logits(inputs)

    def finish(self, given: Given, sample: Read, outputs: list[Any]) -> Row:
        """Return the row with the prediction."""
        started = time.monotonic()
        height, width = sample.pixels.shape[:2]
        with torch.inference_mode():
            map_HW = self.views.probability(outputs, (height, width)).numpy()
        presence = self.views.presence(outputs)
        map_HW = emptied(map_HW, presence, self.min_presence)
        found = Prediction(given.name, sample.pixels, map_HW, 0.0, self.threshold, presence)
        seconds = {"enlarge": time.monotonic() - started}
        return {"image": given.image, "found": found, "seconds": seconds}

    def failed(self, given: Given, reason: str) -> Row:
        """Return the row with the error."""
        return {"image": given.image, "found": DataError(reason)}

    def example(self) -> Tensor:
        """Return an input of the largest size."""
        side = max(self.views.sides)
        return torch.zeros(1, 3, side, side, dtype=torch.uint8, device=self.device)


def or_raise(found: Prediction | DataError) -> Prediction:
    """Return a prediction; raise the error of an image that cannot be read."""
    if isinstance(found, DataError):
        raise found
    return found
