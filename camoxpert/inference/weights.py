"""Weights in the number format of the forward pass, once instead of in every pass."""

from __future__ import annotations

import torch
from torch import nn

from camoxpert.models.camoxpert import CamoXpert
from camoxpert.models.layers import Depthwise
from camoxpert.models.router import Router

CAST = (nn.Conv2d, nn.Linear, Depthwise)
"""Layers whose weights autocast casts, and which do nothing else with them."""


def cast_weights(model: CamoXpert, dtype: torch.dtype | None) -> int:
    """Cast the weights that autocast would cast in every forward pass; the output stays the same.

    A fifth of a forward pass's operators are such casts (edgenext_base: 495 of 2 409), and a GPU
    waits for the host to launch them. Subclasses of the layers stay, as some compute with their
    weights first (weight standardisation), and so do the routers, which run in float32.

    Args:
        model: in evaluation mode, for inference under ``torch.autocast`` only; changed in place.
        dtype: of that autocast; None changes nothing.

    Returns:
        Number of layers.
    """
    if dtype is None:
        return 0
    own = {id(part) for router in model.modules() if isinstance(router, Router)
           for part in router.modules()}  # fmt: skip
    layers = [
        layer
        for part in (model.backbone, model.decoder)
        for layer in part.modules()
        if type(layer) in CAST and id(layer) not in own
    ]
    for layer in layers:
        layer.to(dtype)
    return len(layers)
