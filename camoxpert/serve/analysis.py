"""From an image file to an answer: numbers, what the page shows, map, mask or cut-out."""

from __future__ import annotations

import base64
import ctypes
import sys
import time
import zlib
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from camoxpert.data.files.image_io import encode
from camoxpert.errors import DataError
from camoxpert.inference.prediction import Prediction
from camoxpert.inference.predictor import Predictor
from camoxpert.inference.score import to_uint8
from camoxpert.models.experts import expert_names
from camoxpert.pages.pictures import fit
from camoxpert.serve.answers import Answer, Fault, json_answer
from camoxpert.serve.checks import MOST_BYTES
from camoxpert.serve.experts import chosen_experts, network_of, noted_routing
from camoxpert.serve.uploads import read_upload

KINDS = ("predict", "view", "map", "mask", "cutout")
"""What is made of an image: numbers, numbers with what the page shows, pictures as PNG."""
VIEW_SIDE = 2048
"""Longer side of what the page shows of a larger image, pixels."""
TRIM_EVERY = 20
"""Images after which freed memory is returned to the system. The engine's threads live as long as
an image, and glibc keeps what they freed: the process grew by 25 KB with each small image."""
STEPS = np.array([step / 100 for step in range(101)], np.float32)
"""Thresholds of the page's slider."""


class Analyst:
    """Answers for one image at a time; its methods are called by one thread.

    Args:
        predictor: the model.
        threshold: where a request names none, 0..1.
    """

    def __init__(self, predictor: Predictor, threshold: float) -> None:
        self.predictor, self.threshold = predictor, threshold
        model: Any = predictor.model  # An exported network stands for ours.
        self.network = network_of(model)
        self.done = 0

    @property
    def presence(self) -> str | None:
        """``calibrated`` or ``uncalibrated``; None: the model has no presence head."""
        if not self.predictor.has_presence:
            return None
        return "calibrated" if self.predictor.presence_is_calibrated else "uncalibrated"

    def describe(self) -> dict[str, Any]:
        """Return what the server says of its model and its limits."""
        experts = expert_names(self.network.expert_kinds)
        return {
            "backbone": self.predictor.config.model.backbone,
            "img_size": self.predictor.img_size,
            "experts": experts,
            "levels": list(self.network.level_names()) if experts else [],
            "presence": self.presence,
            "threshold": self.threshold,
            "limits": {"bytes": MOST_BYTES, "pixels": self.predictor.max_pixels},
        }

    def warm_up(self) -> float:
        """Predict an empty image, so that what is slow or fails at first does so now; return the
        seconds."""
        started = time.monotonic()
        side = self.predictor.img_size
        self.predictor.predict(np.zeros((side, side, 3), np.uint8))
        return time.monotonic() - started

    def answer(self, path: Path, kind: str, threshold: float | None) -> Answer:
        """Return what is asked for of an image file.

        Args:
            path: the file, which is deleted as soon as it is decoded.
            kind: of KINDS.
            threshold: above which a pixel counts as object, 0..1; None: the server's.

        Raises:
            Fault: the file cannot be used.
        """
        answer = self._answer(path, kind, threshold)
        self.done += 1
        if self.done % TRIM_EVERY == 0:
            trim_memory()
        return answer

    def _answer(self, path: Path, kind: str, threshold: float | None) -> Answer:
        started = time.monotonic()
        pixels_HWC = read_upload(path, max_pixels=self.predictor.max_pixels)
        read = time.monotonic()
        try:
            with noted_routing(self.predictor.model) as noted:
                prediction = self.predictor.predict(
                    pixels_HWC, threshold=self.threshold if threshold is None else threshold
                )
            if kind not in ("predict", "view"):
                return _picture(prediction, kind)
        except (DataError, cv2.error):
            size = f"{pixels_HWC.shape[1]} x {pixels_HWC.shape[0]}"
            raise Fault(
                422, f"An image of {size} pixels cannot be worked on here. Shrink or crop it."
            ) from None
        found: dict[str, Any] = prediction.fields()
        found["threshold"] = prediction.threshold
        found["presence"] = prediction.presence
        # The last pass: a first one may have run out of memory.
        found["experts"] = chosen_experts(self.network, noted[-1])
        if kind == "view":
            found["view"] = view(prediction)
        found["seconds"] = {
            "read": read - started,
            "forward": prediction.seconds,
            "total": time.monotonic() - started,
        }
        return json_answer(found)


def view(prediction: Prediction) -> dict[str, Any]:
    """Return what the page draws: the image, and where each threshold of the slider cuts.

    ``levels`` holds a byte for each pixel, row by row, deflated: the number of thresholds of STEPS
    that the probability lies above. Above threshold N of the slider are the pixels with a level
    greater than N: exactly those of ``Prediction.mask_HW``, which 8-bit probabilities could not
    say.
    """
    image_HWC, probability_HW = prediction.image_HWC, prediction.probability_HW
    if max(prediction.size) > VIEW_SIDE:
        image_HWC, probability_HW = fit(image_HWC, VIEW_SIDE), fit(probability_HW, VIEW_SIDE)
    levels_HW = np.searchsorted(STEPS, probability_HW, side="left").astype(np.uint8)
    height, width = levels_HW.shape
    return {
        "width": width,
        "height": height,
        "image": base64.b64encode(encode(image_HWC, ".jpg", quality=90)).decode(),
        "levels": base64.b64encode(zlib.compress(levels_HW.tobytes(), 1)).decode(),
    }


def _picture(prediction: Prediction, kind: str) -> Answer:
    """Return a PNG with the pixels that ``predict`` writes."""
    if kind == "map":
        pixels = to_uint8(prediction.probability_HW)
    elif kind == "mask":
        pixels = prediction.mask_HW.view(np.uint8) * np.uint8(255)
    else:
        pixels = prediction.cutout()
    headers = (("Content-Disposition", f'attachment; filename="{kind}.png"'),)
    return Answer(encode(pixels, ".png"), "image/png", headers=headers)


def trim_memory() -> None:
    """Return freed memory to the system, where the C library has a function for it."""
    if sys.platform == "linux":
        # musl has none.
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)
