"""Scoring a model on a set of images at their original size, through the metric engine."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from camoxpert.metrics import Evaluator
from camoxpert.models.router import Routing


@torch.inference_mode()
def probabilities(
    model: nn.Module,
    images_BCHW: Tensor,
    sizes: Sequence[tuple[int, int]],
    *,
    context: AbstractContextManager[Any] | None = None,
) -> tuple[list[np.ndarray], tuple[Routing, ...]]:
    """Return one probability map per image at its own size, and the routing.

    The logits are resized (bilinear, align_corners=False), then the sigmoid is taken.

    Args:
        model: returns a ModelOutput; its mode is left alone.
        images_BCHW: uint8 images on the model's device.
        sizes: (height, width) of every original image.
        context: autocast, or None.

    Returns:
        float32 arrays (H, W) in 0..1; routing records.
    """
    with context or nullcontext():
        output = model(images_BCHW)
    logits = output.logits_B1HW.float()
    maps = [
        F.interpolate(logits[i : i + 1], size=size, mode="bilinear", align_corners=False)
        .sigmoid()[0, 0]
        .cpu()
        .numpy()
        for i, size in enumerate(sizes)
    ]
    return maps, output.routing


def to_uint8(probability_HW: np.ndarray) -> np.ndarray:
    """Turn probabilities into the 0..255 map that is saved and scored (truncated, as the field
    does)."""
    return (probability_HW * 255).astype(np.uint8)


def score(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    device: torch.device,
    evaluator: Evaluator,
    context: Callable[[], AbstractContextManager[Any]] | None = None,
    seen: Callable[[Any, int, np.ndarray, dict[str, Any]], None] | None = None,
    check_stop: Callable[[], None] | None = None,
) -> tuple[Routing, ...] | None:
    """Score a model on evaluation batches into ``evaluator``.

    Args:
        model: put into evaluation mode for the time of the call.
        batches: evaluation batches with images, original-size masks, names and sizes.
        device: the model's device.
        evaluator: receives one map per image.
        context: makes an autocast context.
        seen: called with (batch, position, uint8 map, score row) for every image.
        check_stop: called between batches; raises to stop.

    Returns:
        The routing records of the last batch.
    """
    training = model.training
    model.eval()
    routing = None
    try:
        for batch in batches:
            if check_stop is not None:
                check_stop()
            maps, routing = probabilities(
                model,
                batch.images.to(device),
                batch.sizes,
                context=context() if context is not None else None,
            )
            for i, (name, probability, mask) in enumerate(
                zip(batch.names, maps, batch.full_masks, strict=True)
            ):
                prediction = to_uint8(probability)
                row = evaluator.add(name, prediction, mask)
                if seen is not None:
                    seen(batch, i, prediction, row)
    finally:
        model.train(training)
    return routing
