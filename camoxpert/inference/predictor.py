"""A trained model ready to use: checkpoint in, probability maps at original size out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
import torch
from torch import Tensor

from camoxpert.config import TrainConfig
from camoxpert.errors import CheckpointError, ConfigError
from camoxpert.inference.score import probability_maps
from camoxpert.models.camoxpert import build_model
from camoxpert.runs.checkpoint import Checkpoint, load_checkpoint, resolve_checkpoint
from camoxpert.runtime.device import (
    Precision,
    check_architecture,
    choose_device,
    choose_precision,
)


class Predictor:
    """A model in evaluation mode with its preprocessing.

    Args:
        checkpoint: a verified checkpoint; its EMA weights are used where it has them.
        device: where to run.
        precision: number format of the forward pass.
    """

    def __init__(
        self, checkpoint: Checkpoint, *, device: torch.device, precision: Precision
    ) -> None:
        self.checkpoint = checkpoint
        self.config = checkpoint.config
        self.device = device
        self.precision = precision
        self.img_size = self.config.data.img_size
        self.model = build_model(without_weights(checkpoint))
        try:
            self.model.load_state_dict(checkpoint.evaluated_weights)
        except RuntimeError as error:
            raise CheckpointError(
                f"{checkpoint.path} does not fit its own settings: {error}"
            ) from error
        self.model.to(device).eval()

    def context(self) -> torch.autocast:
        """Return the autocast context of the chosen precision."""
        return torch.autocast(
            self.device.type, dtype=self.precision.dtype, enabled=self.precision.dtype is not None
        )

    def prepare(self, image_HWC: np.ndarray) -> Tensor:
        """Resize an RGB uint8 image (H, W, 3) to the training size; uint8 (3, S, S)."""
        size = (self.img_size, self.img_size)
        shrink = min(image_HWC.shape[:2]) > self.img_size
        resized = cv2.resize(
            image_HWC, size, interpolation=cv2.INTER_AREA if shrink else cv2.INTER_LINEAR
        )
        return torch.from_numpy(np.ascontiguousarray(resized.transpose(2, 0, 1)))

    def __call__(self, images: Tensor, sizes: Sequence[tuple[int, int]]) -> list[np.ndarray]:
        """Return float32 probability maps (H, W) in 0..1 for prepared images (B, 3, S, S)."""
        on_device = images.to(self.device)
        maps, _ = probability_maps(self.model, on_device, sizes, context=self.context())
        return [map_HW.cpu().numpy() for map_HW in maps]


def without_weights(checkpoint: Checkpoint):  # type: ignore[no-untyped-def]
    """Return the model settings with nothing to download: the checkpoint brings the weights."""
    import dataclasses

    return dataclasses.replace(checkpoint.config.model, pretrained=False, weights="")


def load_predictor(path: Path, *, device: str = "auto", precision: str = "auto") -> Predictor:
    """Load a predictor from a checkpoint file or run folder.

    Raises:
        CheckpointError: no usable checkpoint there.
        ConfigError: the device or precision is not available.
    """
    checkpoint = load_checkpoint(resolve_checkpoint(path))
    where = choose_device(device)
    check_architecture(where)
    if precision not in ("auto", "fp32", "bf16", "fp16"):
        raise ConfigError(f"--precision {precision}: use auto, fp32, bf16 or fp16.")
    chosen = choose_precision(TrainConfig(precision=precision), where)
    return Predictor(checkpoint, device=where, precision=chosen)
