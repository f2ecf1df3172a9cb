"""EdgeNeXt's position encoding without the host.

timm (1.0.31) makes the mask of all pixels on the host in every forward pass and copies it to the
device. A copy from pageable memory waits until the device has done all its work.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn


class FourierPositions(nn.Module):
    """Sines and cosines of rows and columns, then a learned projection (EdgeNeXt, section 3.1).

    Args:
        module: of timm; its projection is kept, under the same name.
    """

    def __init__(self, module: Any) -> None:
        super().__init__()
        self.token_projection: nn.Conv2d = module.token_projection
        self.scale: float = module.scale
        self.temperature: float = module.temperature
        self.hidden_dim: int = module.hidden_dim

    def forward(self, shape: tuple[int, int, int]) -> Tensor:
        """Return the encoding (B, C, H, W) for a shape (B, H, W); equal to timm's to the last bit.

        The values of a row are the same in all images and columns: they are computed once.
        """
        batch, height, width = shape
        rows_HD, columns_WD = self._waves(height), self._waves(width)
        grid = (batch, height, width, rows_HD.shape[1])
        both = torch.cat(
            (rows_HD[None, :, None].expand(grid), columns_WD[None, None].expand(grid)), dim=3
        )
        weight = self.token_projection.weight
        encoding: Tensor = self.token_projection(both.permute(0, 3, 1, 2).to(weight.dtype))
        return encoding

    def _waves(self, length: int) -> Tensor:
        """Return the sines and cosines, in turns, of each place along one side."""
        device = self.token_projection.weight.device
        place_L = torch.arange(1, length + 1, device=device, dtype=torch.float32)
        place_L = place_L / (place_L[-1:] + 1e-6) * self.scale
        number = torch.arange(self.hidden_dim, device=device).to(torch.float32)
        pair = torch.div(number, 2, rounding_mode="floor")
        wave_LD = place_L[:, None] / self.temperature ** (2 * pair / self.hidden_dim)
        return torch.stack((wave_LD[:, 0::2].sin(), wave_LD[:, 1::2].cos()), dim=2).flatten(1)


def keep_positions_on_device(net: nn.Module) -> None:
    """Replace the position encodings of an EdgeNeXt, in place and without new parameter names."""
    # timm takes seconds to import, which a mistake in a command need not wait for.
    edgenext: Any = sys.modules.get("timm.models.edgenext")
    if edgenext is None:
        return
    for module in list(net.modules()):
        for name, child in module.named_children():
            if type(child) is edgenext.PositionalEncodingFourier:
                setattr(module, name, FourierPositions(child))
