"""Split an image into the light that falls on it and the colour of its surfaces."""

from __future__ import annotations

import torch
from torch import Tensor

from camoxpert.synthesis.relight.blur import blur
from camoxpert.synthesis.relight.colour import luminance

SIGMAS = (15.0, 80.0, 250.0)
"""Widths of the surrounds, in pixels of an image whose longer side is ``NOMINAL``."""
NOMINAL = 1024
FLOOR = 2e-3
"""Added to linear light before its logarithm: black has none."""


def multi_scale_retinex(linear_BCHW: Tensor) -> Tensor:
    """Return the logarithm of the reflectance, channel by channel.

    The mean over three widths of log(image) - log(blurred image). Source: Jobson, Rahman and
    Woodell, A multiscale retinex for bridging the gap between color images and the human
    observation of scenes, 1997; in linear light.

    Args:
        linear_BCHW: linear light, 0..1.
    """
    return (linear_BCHW + FLOOR).log_() - log_surround(linear_BCHW)


def log_surround(linear_BCHW: Tensor) -> Tensor:
    """Return the logarithm of the light that falls on a scene: the mean of three log blurs."""
    size = max(linear_BCHW.shape[-2:])
    total = torch.zeros_like(linear_BCHW)
    for sigma in SIGMAS:
        # Not in place: blur returns its argument where sigma is less than a third of a pixel.
        total += (blur(linear_BCHW, sigma * size / NOMINAL) + FLOOR).log_()
    return total.div_(len(SIGMAS))


def albedo(linear_B3HW: Tensor) -> Tensor:
    """Return the colour of the surfaces, linear, of the mean brightness of the image or so.

    The light is taken from the luminance, so that surfaces keep their hue: the surround of one
    channel is mostly the colour of the scene, not of its light.
    """
    return linear_B3HW * (-log_surround(luminance(linear_B3HW))).exp_()


def log_light(luminance_B1HW: Tensor, albedo_B3HW: Tensor) -> Tensor:
    """Return the logarithm of the light that an albedo leaves to explain, (B, 1, H, W)."""
    return ((luminance_B1HW + FLOOR) / (luminance(albedo_B3HW) + FLOOR)).log_()
