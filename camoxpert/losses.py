"""Losses on logits, always in float32, and their sum with the terms that balance the router.

Masks are 0 or 1. Where some pixels are void (nobody labelled them), ``known`` is 1 on the others:
void pixels are in no sum and in no normaliser, and an image without a known pixel adds nothing.
Without ``known`` every pixel counts.

Shape letters: B batch, H height, W width, L levels, E experts.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from camoxpert.config import LossConfig
from camoxpert.models.balance import balance_loss, router_z_loss
from camoxpert.models.camoxpert import ModelOutput


class Loss(NamedTuple):
    """What training minimises.

    Attributes:
        total: the scalar loss, with its graph.
        terms: its weighted parts, detached, still on the device: ``mask``, ``side``, ``balance``,
            ``router_z``; they sum to the total.
    """

    total: Tensor
    terms: dict[str, Tensor]


def edge_weight(mask_B1HW: Tensor, known_B1HW: Tensor | None = None) -> Tensor:
    """Return 1 + 5 |mean over 31x31 - mask|: pixels near an outline count up to six times.

    Source: Wei et al., F3Net, AAAI 2020, equation 3 (outside the image counts as background). The
    square window is two strips, which is the same sum in 62 instead of 961 additions.

    With ``known`` the mean is that of the window's known pixels, and the weight of void is 0.
    """
    mean = _window_mean(mask_B1HW)
    if known_B1HW is None:
        return 1 + 5 * (mean - mask_B1HW).abs()
    # A known pixel's window holds at least this pixel.
    share = (1 - _window_mean(1 - known_B1HW)).clamp_min(1 / 31**2)
    return known_B1HW * (1 + 5 * (mean / share - mask_B1HW).abs())


def _window_mean(mask_B1HW: Tensor) -> Tensor:
    strips = F.avg_pool2d(mask_B1HW, (31, 1), 1, (15, 0))
    return F.avg_pool2d(strips, (1, 31), 1, (0, 15))


def structure_loss(
    logits_B1HW: Tensor,
    mask_B1HW: Tensor,
    *,
    weighted: bool = True,
    known_B1HW: Tensor | None = None,
) -> Tensor:
    """Return weighted BCE plus weighted IoU, both with the edge weight; mean over images.

    Args:
        logits_B1HW: logits.
        mask_B1HW: target, 0 or 1.
        weighted: False drops the weight. Many published scripts do so by mistake: they call
            ``binary_cross_entropy_with_logits(..., reduce='none')``, which averages first.
        known_B1HW: 0 on void pixels, else 1.

    Source: Wei et al., F3Net, AAAI 2020, equations 3 to 6.
    """
    logits, mask = logits_B1HW.float(), mask_B1HW.float()
    weight = edge_weight(mask, known_B1HW) if weighted else _ones(mask, known_B1HW)
    bce = F.binary_cross_entropy_with_logits(logits, mask, reduction="none")
    total = weight.sum((1, 2, 3))
    if known_B1HW is not None:
        total = total.clamp_min(1)
    weighted_bce = (weight * bce).sum((1, 2, 3)) / total
    return (weighted_bce + _soft_iou(logits, mask, weight)).mean()


def _ones(mask_B1HW: Tensor, known_B1HW: Tensor | None) -> Tensor:
    return torch.ones_like(mask_B1HW) if known_B1HW is None else known_B1HW


def bce_loss(logits_B1HW: Tensor, mask_B1HW: Tensor, known_B1HW: Tensor | None = None) -> Tensor:
    """Return the plain binary cross entropy, mean over pixels.

    With ``known`` it is the mean over images of the mean over their known pixels, so that every
    image has the same weight however its batch is divided.
    """
    if known_B1HW is not None:
        terms = F.binary_cross_entropy_with_logits(
            logits_B1HW.float(), mask_B1HW.float(), reduction="none"
        )
        known_B = known_B1HW.sum((1, 2, 3)).clamp_min(1)
        return ((known_B1HW * terms).sum((1, 2, 3)) / known_B).mean()
    return F.binary_cross_entropy_with_logits(logits_B1HW.float(), mask_B1HW.float())


def iou_loss(logits_B1HW: Tensor, mask_B1HW: Tensor, known_B1HW: Tensor | None = None) -> Tensor:
    """Return 1 - soft IoU (intersection and union each plus 1), mean over images."""
    mask = mask_B1HW.float()
    return _soft_iou(logits_B1HW.float(), mask, _ones(mask, known_B1HW)).mean()


def dice_loss(logits_B1HW: Tensor, mask_B1HW: Tensor, known_B1HW: Tensor | None = None) -> Tensor:
    """Return 1 - soft Dice (numerator and denominator plus 1), mean over images."""
    probability, mask = logits_B1HW.float().sigmoid(), mask_B1HW.float()
    if known_B1HW is not None:
        probability, mask = probability * known_B1HW, mask * known_B1HW
    both = (probability * mask).sum((1, 2, 3))
    total = (probability + mask).sum((1, 2, 3))
    return (1 - (2 * both + 1) / (total + 1)).mean()


def segmentation_loss(
    logits_B1HW: Tensor,
    mask_B1HW: Tensor,
    config: LossConfig,
    known_B1HW: Tensor | None = None,
) -> Tensor:
    """Return the sum of the configured mask losses for one logit map at the mask's size."""
    known = known_B1HW
    total = logits_B1HW.new_zeros((), dtype=torch.float32)
    if config.structure:
        weighted = config.structure_weighting
        total = total + config.structure * structure_loss(
            logits_B1HW, mask_B1HW, weighted=weighted, known_B1HW=known
        )
    if config.bce:
        total = total + config.bce * bce_loss(logits_B1HW, mask_B1HW, known)
    if config.iou:
        total = total + config.iou * iou_loss(logits_B1HW, mask_B1HW, known)
    if config.dice:
        total = total + config.dice * dice_loss(logits_B1HW, mask_B1HW, known)
    return total


def total_loss(
    output: ModelOutput,
    mask_B1HW: Tensor,
    config: LossConfig,
    *,
    counts_LE: Tensor | None = None,
    known_B1HW: Tensor | None = None,
) -> Loss:
    """Return the sum of all weighted terms.

    Args:
        output: logits, side logits and routing of a batch.
        mask_B1HW: target, 0 or 1, any float or integer type.
        config: weights of the terms.
        counts_LE: choices per level and expert over the whole batch of an optimizer step; None
            counts this batch alone.
        known_B1HW: 0 on void pixels, which are left out, else 1; None: every pixel counts.
    """
    mask = mask_B1HW.float()
    parts = {"mask": segmentation_loss(output.logits_B1HW, mask, config, known_B1HW)}
    if config.deep_supervision and config.side_weight:
        parts["side"] = config.side_weight * sum(
            (
                segmentation_loss(_resized(side.float(), mask), mask, config, known_B1HW)
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
