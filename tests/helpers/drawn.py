"""Networks with drawn weights whose logits vary, as those of a trained one do."""

from __future__ import annotations

import torch

from camoxpert.config import load_config
from camoxpert.models.camoxpert import CamoXpert, build_model

SIDE = 64
SMALL = (
    "model.pretrained=false",
    "model.width=16",
    "model.detail_width=8",
    f"data.img_size={SIDE}",
)


def drawn_network(*settings: str, gain: float = 30.0) -> CamoXpert:
    """Return a network in evaluation mode; references steer it where it is guided."""
    config = load_config(overrides=[*SMALL, *settings])
    torch.manual_seed(0)
    network = build_model(config.model, sides=(SIDE,)).eval()
    with torch.no_grad():
        for name, weights in network.named_parameters():
            if name.startswith("guidance.steering") and "film.weight" in name:
                weights.normal_()
        detail = config.model.detail_width > 0
        head = network.decoder.detail.head if detail else network.decoder.levels[-1].head
        head.weight.mul_(gain)
    return network
