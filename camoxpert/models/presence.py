"""Is anything hidden in the image at all? One logit from what the network saw and what it marked.

Shape letters: B batch, C channels, H height, W width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

HIDDEN = 64
TOP_PART = 100
"""The mean of the highest hundredth of the mask's logits says how certain the most certain pixels
are."""
CELL = 4
"""Logits are averaged over cells of this many pixels a side before they are sorted: a single pixel
is no evidence, and a sixteenth of the values are left to sort."""
SMALLEST_AREA = 1e-6
"""Added to the soft area before its logarithm, as a share of the image."""


class Calibration(nn.Module):
    """Turns presence logits into calibrated probabilities: ``sigmoid(logit / temperature + bias)``.

    Both numbers are saved with the weights. Until they are fitted they are 1 and 0. They assume
    that the images are of the kind of those they were fitted to, seen as whole images at the
    model's own size, and that as many of them have an object as have none.

    Source: Guo et al., On Calibration of Modern Neural Networks, ICML 2017 (temperature); the bias
    is that of Platt scaling.
    """

    temperature: Tensor
    bias: Tensor
    images: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("temperature", torch.ones(()))
        self.register_buffer("bias", torch.zeros(()))
        # Number of images that the two were fitted on; 0: not calibrated.
        self.register_buffer("images", torch.zeros((), dtype=torch.int64))

    def forward(self, logits_B: Tensor) -> Tensor:
        """Return calibrated probabilities (B,), 0..1, float32, for presence logits."""
        return torch.sigmoid(logits_B.float() / self.temperature + self.bias)

    @property
    def is_fitted(self) -> bool:
        """Whether the probabilities were calibrated; reads a tensor of the device."""
        return int(self.images) > 0

    def set(self, temperature: float, bias: float, images: int) -> None:
        """Set what was fitted on a number of images."""
        self.temperature.fill_(temperature)
        self.bias.fill_(bias)
        self.images.fill_(images)


class PresenceHead(nn.Module):
    """Logit of the probability that an image holds a hidden object.

    It sees the stride-32 features, averaged over the image, and two numbers of the mask: the mean
    of the highest 1 % of its logits and the logarithm of its soft area. The average assumes that an
    object fills enough of the image to change it; smaller ones are left to the two numbers.

    Args:
        channels: of the stride-32 features.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels)
        self.enter = nn.Linear(channels + 2, HIDDEN)
        self.leave = nn.Linear(HIDDEN, 1)
        self.calibration = Calibration()

    def forward(self, features_BCHW: Tensor, logits_B1HW: Tensor) -> Tensor:
        """Return presence logits (B,), float32.

        Nothing flows back from here: with the head the network learns the same masks as without.
        A gradient into the features cost .023 of the S-measure on generated scenes and gained
        nothing (AUROC .955 instead of .960; one seed).

        Args:
            features_BCHW: the backbone's last level.
            logits_B1HW: logits of the mask.
        """
        # One number per image: float32 costs nothing, and bf16 would round the evidence.
        with torch.autocast(features_BCHW.device.type, enabled=False):
            pooled_BC = self.norm(features_BCHW.detach().float().mean((2, 3)))
            evidence_B2 = mask_evidence(logits_B1HW.detach())
            hidden = F.gelu(self.enter(torch.cat([pooled_BC, evidence_B2], 1)))
            logits_B1: Tensor = self.leave(hidden)
        return logits_B1[:, 0]


def mask_evidence(logits_B1HW: Tensor) -> Tensor:
    """Return two numbers per image, (B, 2), each of the order of 1.

    They are the mean of the highest 1 % of the logits and the logarithm of the share of the image
    that the mask covers.
    """
    logits = logits_B1HW.float()
    cells_BN = F.avg_pool2d(logits, CELL).flatten(1)
    # In whole numbers, which a graph of any size can hold.
    number = torch.sym_max(1, (cells_BN.shape[1] + TOP_PART // 2) // TOP_PART)
    top_B = cells_BN.topk(number, 1).values.mean(1)
    area_B = logits.sigmoid().mean((1, 2, 3))
    return torch.stack([top_B / 4, ((area_B + SMALLEST_AREA).log() + 4) / 3], 1)
