"""sRGB to linear light and back, and the colour of a light from its temperature."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from camoxpert.runtime.device import upload
from camoxpert.synthesis.relight.draw import DAYLIGHT

LUMINANCE = (0.2126, 0.7152, 0.0722)
"""Weights of linear red, green and blue (Rec. 709)."""
STEPS = 65536
"""Steps of linear light in the table that encodes it; the finest level is 20 of them wide."""
# XYZ to linear sRGB (IEC 61966-2-1).
FROM_XYZ = np.array(
    [[3.2406, -1.5372, -0.4986], [-0.9689, 1.8758, 0.0415], [0.0557, -0.2040, 1.0570]]
)


@lru_cache(maxsize=8)
def _decoding(device: torch.device) -> Tensor:
    """Return the linear value of each of the 256 levels."""
    value = np.arange(256) / 255
    linear = np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)
    return upload(linear, torch.empty(0, device=device))


def to_linear(images_BCHW: Tensor) -> Tensor:
    """Return linear light 0..1, float32, of uint8 sRGB pixels."""
    flat = images_BCHW.reshape(-1).int()
    return _decoding(images_BCHW.device).index_select(0, flat).view(images_BCHW.shape)


@lru_cache(maxsize=8)
def _encoding(device: torch.device) -> Tensor:
    """Return the sRGB level of each of ``STEPS`` equal steps of linear light."""
    linear = np.arange(STEPS) / (STEPS - 1)
    value = np.where(linear <= 0.0031308, linear * 12.92, 1.055 * linear ** (1 / 2.4) - 0.055)
    table = torch.from_numpy(np.round(255 * value).astype(np.uint8))
    return table.to(device)


def to_srgb(linear_BCHW: Tensor) -> Tensor:
    """Return uint8 sRGB pixels of linear light 0..1; inverts ``to_linear`` exactly.

    By a table: 0.4 of the time of the power function, and rounded the same within 1 / STEPS.
    """
    steps = linear_BCHW.mul(STEPS - 1).add_(0.5).clamp_(0, STEPS - 1).int().reshape(-1)
    return _encoding(linear_BCHW.device).index_select(0, steps).view(linear_BCHW.shape)


def luminance(linear_B3HW: Tensor) -> Tensor:
    """Return the luminance (B, 1, H, W) of linear RGB."""
    red, green, blue = linear_B3HW.split(1, 1)
    return (red * LUMINANCE[0]).add_(green, alpha=LUMINANCE[1]).add_(blue, alpha=LUMINANCE[2])


def light_colour(kelvin: float) -> tuple[float, float, float]:
    """Return the linear RGB of a black body's light, of luminance 1; white at ``DAYLIGHT``.

    Source: Kim et al., Design of advanced color temperature control system for HDTV applications,
    2002: cubic approximations of the Planckian locus for 1667 to 25000 K. Relative to its point
    at ``DAYLIGHT``, as a camera balanced for daylight sees it.
    """
    colour = _planckian(kelvin) / _planckian(DAYLIGHT)
    red, green, blue = (colour / (colour @ np.array(LUMINANCE))).tolist()
    return red, green, blue


def _planckian(kelvin: float) -> np.ndarray:
    u = 1e3 / kelvin
    if kelvin <= 4000:
        x = -0.2661239 * u**3 - 0.2343589 * u**2 + 0.8776956 * u + 0.179910
    else:
        x = -3.0258469 * u**3 + 2.1070379 * u**2 + 0.2226347 * u + 0.240390
    if kelvin <= 2222:
        y = -1.1063814 * x**3 - 1.34811020 * x**2 + 2.18555832 * x - 0.20219683
    elif kelvin <= 4000:
        y = -0.9549476 * x**3 - 1.37418593 * x**2 + 2.09137015 * x - 0.16748867
    else:
        y = 3.0817580 * x**3 - 5.87338670 * x**2 + 3.75112997 * x - 0.37001483
    return np.maximum(FROM_XYZ @ np.array([x / y, 1.0, (1 - x - y) / y]), 0.01)
