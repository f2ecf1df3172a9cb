"""Run one training step of a tiny model on the device that training would use."""

from __future__ import annotations

import torch

from camoxpert.config import load_config
from camoxpert.doctor.finding import Finding
from camoxpert.errors import CamoXpertError
from camoxpert.losses import total_loss
from camoxpert.models.camoxpert import build_model
from camoxpert.runtime.device import check_architecture, choose_device, choose_precision

SIDE = 64
TINY = {"model.backbone": "tiny_test", "model.pretrained": False, "data.img_size": SIDE}


def check_step(device: str) -> Finding:
    """Run the step and return whether it works, as a finding."""
    config = load_config(flags=TINY)
    try:
        chosen = choose_device(device)
        check_architecture(chosen)
        precision = choose_precision(config.train, chosen)
        model = build_model(config.model).to(chosen).train()
        model.set_active_experts(config.model.num_experts)
        images = torch.zeros(2, 3, SIDE, SIDE, dtype=torch.uint8, device=chosen)
        masks = torch.zeros(2, 1, SIDE, SIDE, device=chosen)
        enabled = precision.dtype is not None
        with torch.autocast(chosen.type, dtype=precision.dtype, enabled=enabled):
            output = model(images)
        loss, _ = total_loss(output, masks, config.loss)
        loss.backward()
    except CamoXpertError as error:
        return Finding("error", "step", str(error))
    except RuntimeError as error:
        words = " ".join(str(error).split())[:300]
        return Finding("error", "step", f"A training step of a tiny model failed: {words}")
    return Finding("note", "step", f"A training step works on {chosen} ({precision.reason}).")
