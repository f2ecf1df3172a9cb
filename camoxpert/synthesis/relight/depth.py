"""Depth maps from a Depth-Anything-V2-Small network in a local folder.

Its code and weights are under Apache-2.0; those of the Base, Large and Giant networks may not be
used commercially. Nothing is downloaded.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from camoxpert import console
from camoxpert.errors import CheckpointError, ConfigError

PATCH = 14
SIDE = 518
"""Shorter side of the network's input, as it was trained."""
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SMALL_WIDTH = 384
"""Width of the Small network's backbone, by which it is told from the larger ones."""


class DepthModel:
    """Estimates depth: larger values are nearer; unit and origin differ between images."""

    def __init__(self, model: torch.nn.Module, device: torch.device) -> None:
        self._model = model.to(device).eval()

    @torch.no_grad()
    def depths(self, images_B3HW: Tensor) -> Tensor:
        """Return depth (B, 1, H, W), float32, of uint8 sRGB images on the model's device."""
        height, width = images_B3HW.shape[-2:]
        scale = SIDE / min(height, width)
        shape = [max(1, round(side * scale / PATCH)) * PATCH for side in (height, width)]
        pixels = F.interpolate(
            images_B3HW.float() / 255, shape, mode="bicubic", align_corners=False, antialias=True
        )
        # Channel by channel: a tensor made from numbers would make the host wait for the device.
        planes = [
            (plane - mean) / deviation
            for plane, mean, deviation in zip(pixels.split(1, 1), MEAN, DEVIATION, strict=True)
        ]
        depth: Tensor = self._model(pixel_values=torch.cat(planes, 1)).predicted_depth
        return F.interpolate(
            depth[:, None].float(), [height, width], mode="bilinear", align_corners=False
        )


def load_depth_model(folder: str | Path, device: torch.device) -> DepthModel:
    """Load Depth-Anything-V2-Small from a folder with its ``config.json`` and weights.

    Raises:
        ConfigError: transformers is not installed, or the folder holds no such network.
        CheckpointError: its files cannot be read.
    """
    folder = Path(folder)
    settings = _settings(folder)
    try:
        from transformers import AutoModelForDepthEstimation
    except ImportError as error:
        raise ConfigError(
            "Depth is estimated with transformers, which is not installed: "
            'pip install "camoxpert[depth]".'
        ) from error
    try:
        model = AutoModelForDepthEstimation.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{folder} cannot be loaded as a depth network: {error}") from error
    if settings.get("backbone_config", {}).get("hidden_size") == SMALL_WIDTH:
        console.decide("height", f"depth by {folder.name} (Depth-Anything-V2-Small, Apache-2.0)")
    else:
        console.decide("height", f"depth by {folder.name}")
        console.warn(
            f"{folder} is not the Small network: only that one is under Apache-2.0; the larger "
            "ones may not be used commercially."
        )
    return DepthModel(model, device)


def _settings(folder: Path) -> dict[str, Any]:
    try:
        settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{folder} has no readable config.json. Download the folder of "
            "depth-anything/Depth-Anything-V2-Small-hf (Apache-2.0) and name it."
        ) from error
    if not isinstance(settings, dict) or settings.get("model_type") != "depth_anything":
        raise ConfigError(
            f"{folder} does not hold a Depth-Anything network: the model_type in its config.json "
            f"is not depth_anything. Use depth-anything/Depth-Anything-V2-Small-hf."
        )
    return settings
