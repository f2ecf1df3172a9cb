"""Put the new light on the image: on the object, and where its shadow falls."""

from __future__ import annotations

import torch
from torch import Tensor

from camoxpert.synthesis.relight.blur import blur
from camoxpert.synthesis.relight.light import Numbers

FEATHER = 1.2
"""Width in pixels of the transition at the outline, on the inner side."""
MOST_DELIGHT = 1.2
"""Largest change of log light that removing the old shading makes."""


def recombine(
    linear_B3HW: Tensor,
    masks_B1HW: Tensor,
    numbers: Numbers,
    *,
    key_BHW: Tensor,
    around_BHW: Tensor,
    visible_B1HW: Tensor,
    log_light_B1HW: Tensor | None,
) -> Tensor:
    """Return relit linear light, equal to the image outside of the mask and the shadows.

    The object: light from everywhere and visible directional light, in their colours, instead of
    a part of the light that it had. The ground keeps its light, less the directional part where
    something is before it; what remains has the colour of the sky.

    Args:
        linear_B3HW: linear light.
        masks_B1HW: float, 0 or 1.
        numbers: see ``to_numbers``.
        key_BHW, around_BHW: see ``shading``.
        visible_B1HW: share of the directional light that shadows leave, 0..1.
        log_light_B1HW: logarithm of the light in the image; None: none is removed.
    """
    key = numbers["key"][:, None]
    direct, other = numbers["temperature"] * key, numbers["sky"] * (1 - key)
    gain = numbers["exposure"][:, None].exp2()
    if log_light_B1HW is not None:
        count = masks_B1HW.sum((1, 2, 3), keepdim=True).clamp(min=1)
        mean = (log_light_B1HW * masks_B1HW).sum((1, 2, 3), keepdim=True) / count
        removed = (mean - log_light_B1HW).clamp_(-MOST_DELIGHT, MOST_DELIGHT)
        gain = removed.mul_(numbers["delight"][:, None]).exp_().mul_(gain)
    lit_key, lit_around = key_BHW[:, None] * visible_B1HW * gain, around_BHW[:, None] * gain
    inner = ((blur(masks_B1HW, FEATHER) - 0.5) * 2).clamp_(0, 1).mul_(masks_B1HW)
    result = torch.empty_like(linear_B3HW)
    # Channel by channel: temporary maps stay small and in the cache.
    for c in range(3):
        own, rest = direct[:, c : c + 1], other[:, c : c + 1]
        ground = (visible_B1HW * own).add_(rest).div_(own + rest)
        lit = (lit_key * own).add_(lit_around * rest)
        result[:, c : c + 1] = expose(linear_B3HW[:, c : c + 1], ground.lerp_(lit, inner))
    return result


def expose(linear_BCHW: Tensor, factor_BCHW: Tensor) -> Tensor:
    """Multiply light; what grows approaches white instead of being cut off at it.

    f x / (1 + (f - 1) x) for factors above 1: x for f = 1, f x where x is small. Never above 1.
    """
    bent = (factor_BCHW - 1).clamp_(min=0).mul_(linear_BCHW).add_(1)
    return (linear_BCHW * factor_BCHW).div_(bent)
