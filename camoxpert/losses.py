"""Losses on logits, always in float32, and their sum with the terms that balance the router.

Masks are 0 or 1. Shape letters: B batch, H height, W width, L levels, E experts.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from camoxpert.config import LossConfig
from camoxpert.models.balance import balance_loss, router_z_loss
from camoxpert.models.camoxpert import ModelOutput

WINDOW = 31
"""Side of the window of the edge weight, in pixels."""


class Loss(NamedTuple):
    """What training minimises.

    Attributes:
        total: the scalar loss, with its graph.
        terms: its weighted parts, detached, still on the device: ``mask``, ``side``, ``balance``,
            ``router_z``; they sum to the total.
    """

    total: Tensor
    terms: dict[str, Tensor]


def edge_weight(mask_B1HW: Tensor) -> Tensor:
    """Return 1 + 5 |mean over 31x31 - mask|: pixels near an outline count up to six times.

    Source: Wei et al., F3Net, AAAI 2020, equation 3 (outside the image counts as background). The
    sum over the window is a product with a band of ones from either side: 5 to 8 times as fast as
    pooling on a CPU, and exact for masks of 0 and 1, with TF32 as well.
    """
    height, width = mask_B1HW.shape[-2:]
    with torch.autocast(mask_B1HW.device.type, enabled=False):
        mask = mask_B1HW.float()
        rows_HH, columns_WW = _band(height, mask.device), _band(width, mask.device)
        mean = rows_HH @ mask @ columns_WW / WINDOW**2
        return 1 + 5 * (mean - mask).abs()


def _band(size: int, device: torch.device) -> Tensor:
    """Return a square matrix with ones up to half a window from the diagonal."""
    place = torch.arange(size, device=device)
    return ((place[:, None] - place).abs() <= WINDOW // 2).float()


def structure_loss(
    logits_B1HW: Tensor,
    mask_B1HW: Tensor,
    *,
    weighted: bool = True,
    weight_B1HW: Tensor | None = None,
) -> Tensor:
    """Return weighted BCE plus weighted IoU, both with the edge weight; mean over images.

    Args:
        logits_B1HW: logits.
        mask_B1HW: target, 0 or 1.
        weighted: False drops the weight. Many published scripts do so by mistake: they call
            ``binary_cross_entropy_with_logits(..., reduce='none')``, which averages first.
        weight_B1HW: the edge weight of the mask, if the caller has it.

    Source: Wei et al., F3Net, AAAI 2020, equations 3 to 6.
    """
    logits, mask = logits_B1HW.float(), mask_B1HW.float()
    weight = weight_B1HW if weighted else torch.ones_like(mask)
    if weight is None:
        weight = edge_weight(mask)
    bce = F.binary_cross_entropy_with_logits(logits, mask, reduction="none")
    weighted_bce = (weight * bce).sum((1, 2, 3)) / weight.sum((1, 2, 3))
    return (weighted_bce + _soft_iou(logits, mask, weight)).mean()


def bce_loss(logits_B1HW: Tensor, mask_B1HW: Tensor) -> Tensor:
    """Return the plain binary cross entropy, mean over pixels."""
    return F.binary_cross_entropy_with_logits(logits_B1HW.float(), mask_B1HW.float())


def iou_loss(logits_B1HW: Tensor, mask_B1HW: Tensor) -> Tensor:
    """Return 1 - soft IoU (intersection and union each plus 1), mean over images."""
    mask = mask_B1HW.float()
    return _soft_iou(logits_B1HW.float(), mask, torch.ones_like(mask)).mean()


def dice_loss(logits_B1HW: Tensor, mask_B1HW: Tensor) -> Tensor:
    """Return 1 - soft Dice (numerator and denominator plus 1), mean over images."""
    probability, mask = logits_B1HW.float().sigmoid(), mask_B1HW.float()
    both = (probability * mask).sum((1, 2, 3))
    total = (probability + mask).sum((1, 2, 3))
    return (1 - (2 * both + 1) / (total + 1)).mean()


def segmentation_loss(
    logits_B1HW: Tensor,
    mask_B1HW: Tensor,
    config: LossConfig,
    *,
    weight_B1HW: Tensor | None = None,
) -> Tensor:
    """Return the sum of the configured mask losses for one logit map at the mask's size.

    Args:
        logits_B1HW, mask_B1HW: as the losses take them.
        config: weights of the losses.
        weight_B1HW: the edge weight of the mask, if the caller has it.
    """
    total = logits_B1HW.new_zeros((), dtype=torch.float32)
    if config.structure:
        total = total + config.structure * structure_loss(
            logits_B1HW,
            mask_B1HW,
            weighted=config.structure_weighting,
            weight_B1HW=weight_B1HW,
        )
    if config.bce:
        total = total + config.bce * bce_loss(logits_B1HW, mask_B1HW)
    if config.iou:
        total = total + config.iou * iou_loss(logits_B1HW, mask_B1HW)
    if config.dice:
        total = total + config.dice * dice_loss(logits_B1HW, mask_B1HW)
    return total


def total_loss(
    output: ModelOutput,
    mask_B1HW: Tensor,
    config: LossConfig,
    *,
    counts_LE: Tensor | None = None,
) -> Loss:
    """Return the sum of all weighted terms.

    Args:
        output: logits, side logits and routing of a batch.
        mask_B1HW: target, 0 or 1, any float or integer type.
        config: weights of the terms.
        counts_LE: choices per level and expert over the whole batch of an optimizer step; None
            counts this batch alone.
    """
    mask = mask_B1HW.float()
    # Once for the mask and all side heads, which have the same target.
    weighted = config.structure and config.structure_weighting
    weight = edge_weight(mask) if weighted else None
    parts = {
        "mask": segmentation_loss(output.logits_B1HW, mask, config, weight_B1HW=weight),
    }
    if config.deep_supervision and config.side_weight:
        parts["side"] = config.side_weight * sum(
            (
                segmentation_loss(_resized(side.float(), mask), mask, config, weight_B1HW=weight)
                for side in output.side_logits
            ),
            start=mask.new_zeros(()),
        )
    elif output.side_logits:
        # With weight 0, not left out: distributed training needs a gradient for every parameter.
        unused = torch.stack([side.float().mean() for side in output.side_logits])
        parts["mask"] = parts["mask"] + 0.0 * unused.sum()
    if output.routing and output.routing[0].probs_BE.shape[1] > 1:
        levels = len(output.routing)
        parts["balance"] = config.balance * sum(
            (
                balance_loss(
                    r.probs_BE, r.experts_BK, None if counts_LE is None else counts_LE[index]
                )
                / levels
                for index, r in enumerate(output.routing)
            ),
            start=mask.new_zeros(()),
        )
        parts["router_z"] = config.router_z * sum(
            (router_z_loss(r.logits_BE) / levels for r in output.routing),
            start=mask.new_zeros(()),
        )
    total = torch.stack(list(parts.values())).sum()
    return Loss(total, {name: part.detach() for name, part in parts.items()})


def _soft_iou(logits: Tensor, mask: Tensor, weight: Tensor) -> Tensor:
    probability = logits.sigmoid()
    both = (weight * probability * mask).sum((1, 2, 3))
    total = (weight * (probability + mask)).sum((1, 2, 3))
    return 1 - (both + 1) / (total - both + 1)


def _resized(logits: Tensor, like: Tensor) -> Tensor:
    if logits.shape[-2:] == like.shape[-2:]:
        return logits
    return F.interpolate(logits, size=like.shape[-2:], mode="bilinear", align_corners=False)
