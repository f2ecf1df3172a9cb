"""Multiply-adds of the network: of the experts an image uses, and of all of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import nn

from camoxpert.config import ModelConfig
from camoxpert.models.backbone import STRIDES
from camoxpert.models.camoxpert import CamoXpert
from camoxpert.models.decoder import Decoder
from camoxpert.models.moe import MoE


class Cost(NamedTuple):
    """Multiply-adds of one image's forward pass: convolutions and matrix products.

    Attributes:
        active: with the experts that an image uses; of unlike experts, the mean over all choices.
        total: with all experts.
    """

    active: float
    total: float


def network_cost(model: CamoXpert, img_size: int) -> Cost:
    """Count the whole network on a square image."""
    image = torch.zeros(1, 3, img_size, img_size, dtype=torch.uint8, device=model.mean.device)
    return _count(model, lambda: model(image))


def decoder_cost(channels: Sequence[int], config: ModelConfig, img_size: int) -> Cost:
    """Count our decoder alone.

    Args:
        channels: of the backbone's levels.
        config: of the decoder.
        img_size: side of the image, pixels.
    """
    images = torch.zeros(1, 3, img_size, img_size)
    features = [
        torch.zeros(1, c, img_size // stride, img_size // stride)
        for c, stride in zip(channels, STRIDES, strict=True)
    ]
    with torch.random.fork_rng(devices=[]):
        decoder = Decoder(channels, config)
    return _count(decoder, lambda: decoder(images, features))


@torch.no_grad()
def _count(module: nn.Module, call: Callable[[], object]) -> Cost:
    from torch.utils.flop_counter import FlopCounterMode

    training = module.training
    module.eval()
    with _all_experts(module) as levels, FlopCounterMode(display=False) as counter:
        call()
    module.train(training)
    total = counter.get_total_flops() / 2
    counts = counter.get_flop_counts()
    root = type(module).__name__
    idle = 0.0
    # Routing on lateral features calls the routers from outside of the blocks.
    fused = any(m.routing == "fused" for m in module.modules() if isinstance(m, Decoder))
    for name, level, share in levels:
        # Not the sum over the experts: stacked ones run without a module call of their own.
        own = sum(counts[f"{root}.{name}"].values())
        if fused:
            own -= sum(counts[f"{root}.{name}.router"].values())
        if level.shared is not None:
            own -= sum(counts[f"{root}.{name}.shared"].values())
        idle += (1 - share) * own / 2
    return Cost(total - idle, total)


@contextmanager
def _all_experts(module: nn.Module) -> Iterator[list[tuple[str, MoE, float]]]:
    """Run every expert on the image inside the block; yields name, level and the share of its
    experts that an image uses."""
    levels = [(name, level) for name, level in module.named_modules() if isinstance(level, MoE)]
    before = [(level.asked, level.router.top_k) for _, level in levels]
    try:
        for _, level in levels:
            level.dispatch = "dense"
            level.router.top_k = len(level.experts)
        yield [
            (name, level, top_k / len(level.experts))
            for (name, level), (_, top_k) in zip(levels, before, strict=True)
        ]
    finally:
        for (_, level), (asked, top_k) in zip(levels, before, strict=True):
            level.dispatch, level.router.top_k = asked, top_k
