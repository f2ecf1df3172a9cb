"""Losses on logits, always in float32, and their sum with the terms that balance the router.

Masks are 0 or 1. Where some pixels are void (nobody labelled them), ``known`` is 1 on the others:
void pixels are in no sum and in no normaliser, and an image without a known pixel adds nothing.
Without ``known`` every pixel counts.

Shape letters: B batch, H height, W width, L levels, E experts.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from camoxpert.config import LossConfig
from camoxpert.models.balance import balance_loss, router_z_loss
from camoxpert.models.camoxpert import ModelOutput

WINDOW = 31
"""Side of the window of the edge weight, in pixels."""
SMALL, LARGE = 0.02, 0.8
"""Share of an image below which its object is small, and above which it is large."""


class Loss(NamedTuple):
    """What training minimises.

    Attributes:
        total: the scalar loss, with its graph.
        terms: its weighted parts, detached, still on the device: ``mask``, ``side``, ``teacher``,
            ``uncertainty``, ``presence``, ``balance``, ``router_z``; they sum to the total.
    """

    total: Tensor
    terms: dict[str, Tensor]


def edge_weight(mask_B1HW: Tensor, known_B1HW: Tensor | None = None) -> Tensor:
    """Return 1 + 5 |mean over 31x31 - mask|: pixels near an outline count up to six times.

    Source: Wei et al., F3Net, AAAI 2020, equation 3 (outside the image counts as background). The
    sum over the window is a product with a band of ones from either side: 5 to 8 times as fast as
    pooling on a CPU, and exact for masks of 0 and 1, with TF32 as well.

    With ``known`` the mean is that of the window's known pixels, and the weight of void is 0.
    """
    with torch.autocast(mask_B1HW.device.type, enabled=False):
        mask = mask_B1HW.float()
        mean = _window_mean(mask)
        if known_B1HW is None:
            return 1 + 5 * (mean - mask).abs()
        known = known_B1HW.float()
        # A known pixel's window holds at least this pixel.
        share = (1 - _window_mean(1 - known)).clamp_min(1 / WINDOW**2)
        return known * (1 + 5 * (mean / share - mask).abs())


def _window_mean(mask_B1HW: Tensor) -> Tensor:
    """Return the mean over a square window around each pixel; 0 outside of the image."""
    height, width = mask_B1HW.shape[-2:]
    rows_HH, columns_WW = _band(height, mask_B1HW.device), _band(width, mask_B1HW.device)
    return rows_HH @ mask_B1HW @ columns_WW / WINDOW**2


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
    known_B1HW: Tensor | None = None,
    image_weight_B: Tensor | None = None,
    object_B: Tensor | None = None,
) -> Tensor:
    """Return weighted BCE plus weighted IoU, both with the edge weight; mean over images.

    Args:
        logits_B1HW: logits.
        mask_B1HW: target, 0 or 1.
        weighted: False drops the weight. Many published scripts do so by mistake: they call
            ``binary_cross_entropy_with_logits(..., reduce='none')``, which averages first.
        weight_B1HW: the edge weight of the mask, if the caller has it.
        known_B1HW: 0 on void pixels, else 1.
        image_weight_B: weights of the images; None: all equal.
        object_B: 0 for images whose IoU term is left out, else 1; None: no image.

    Source: Wei et al., F3Net, AAAI 2020, equations 3 to 6.
    """
    logits, mask = logits_B1HW.float(), mask_B1HW.float()
    weight = weight_B1HW if weighted else _ones(mask, known_B1HW)
    if weight is None:
        weight = edge_weight(mask, known_B1HW)
    bce = F.binary_cross_entropy_with_logits(logits, mask, reduction="none")
    total = weight.sum((1, 2, 3))
    if known_B1HW is not None:
        total = total.clamp_min(1)
    weighted_bce = (weight * bce).sum((1, 2, 3)) / total
    overlap = _soft_iou(logits, mask, weight)
    if object_B is not None:
        overlap = overlap * object_B
    return _mean(weighted_bce + overlap, image_weight_B)


def _mean(values_B: Tensor, image_weight_B: Tensor | None) -> Tensor:
    """Return the mean over images, each times its weight."""
    return (values_B if image_weight_B is None else values_B * image_weight_B).mean()


def _ones(mask_B1HW: Tensor, known_B1HW: Tensor | None) -> Tensor:
    return torch.ones_like(mask_B1HW) if known_B1HW is None else known_B1HW


def bce_loss(
    logits_B1HW: Tensor,
    mask_B1HW: Tensor,
    known_B1HW: Tensor | None = None,
    image_weight_B: Tensor | None = None,
) -> Tensor:
    """Return the plain binary cross entropy, mean over pixels.

    With ``known`` it is the mean over images of the mean over their known pixels, so that every
    image has the same weight however its batch is divided.
    """
    if known_B1HW is not None or image_weight_B is not None:
        terms = F.binary_cross_entropy_with_logits(
            logits_B1HW.float(), mask_B1HW.float(), reduction="none"
        )
        return _mean(_known_mean(terms, known_B1HW), image_weight_B)
    return F.binary_cross_entropy_with_logits(logits_B1HW.float(), mask_B1HW.float())


def _known_mean(values_B1HW: Tensor, known_B1HW: Tensor | None) -> Tensor:
    """Return each image's mean over its known pixels; 0 where it has none."""
    if known_B1HW is None:
        return values_B1HW.mean((1, 2, 3))
    known_B = known_B1HW.sum((1, 2, 3)).clamp_min(1)
    return (known_B1HW * values_B1HW).sum((1, 2, 3)) / known_B


def iou_loss(
    logits_B1HW: Tensor,
    mask_B1HW: Tensor,
    known_B1HW: Tensor | None = None,
    image_weight_B: Tensor | None = None,
) -> Tensor:
    """Return 1 - soft IoU (intersection and union each plus 1), mean over images."""
    mask = mask_B1HW.float()
    return _mean(_soft_iou(logits_B1HW.float(), mask, _ones(mask, known_B1HW)), image_weight_B)


def dice_loss(
    logits_B1HW: Tensor,
    mask_B1HW: Tensor,
    known_B1HW: Tensor | None = None,
    image_weight_B: Tensor | None = None,
) -> Tensor:
    """Return 1 - soft Dice (numerator and denominator plus 1), mean over images."""
    probability, mask = logits_B1HW.float().sigmoid(), mask_B1HW.float()
    if known_B1HW is not None:
        probability, mask = probability * known_B1HW, mask * known_B1HW
    both = (probability * mask).sum((1, 2, 3))
    total = (probability + mask).sum((1, 2, 3))
    return _mean(1 - (2 * both + 1) / (total + 1), image_weight_B)


def uncertainty_loss(logits_B1HW: Tensor, known_B1HW: Tensor | None = None) -> Tensor:
    """Return the mean of 1 - |2p - 1|^2: 1 where a probability is 1/2, 0 where it is 0 or 1.

    It needs no mask: it asks for a decision, not for the right one. Computed as 4 p (1 - p), which
    is exact for saturated logits. Mean over the known pixels of an image, then over images.

    Source: Pang et al., ZoomNeXt, TPAMI 2024 (uncertainty awareness loss).
    """
    logits = logits_B1HW.float()
    return _known_mean(4 * logits.sigmoid() * (-logits).sigmoid(), known_B1HW).mean()


def uncertainty_ramp(progress: float) -> float:
    """Return the share of the uncertainty loss's weight: a cosine from 0 at the start of a run to 1
    at its end.

    Before the masks are learned the network would only be sure of its first guess.

    Source: Pang et al., ZoomNeXt, TPAMI 2024 (increasing cosine strategy).
    """
    return (1 - math.cos(math.pi * min(max(progress, 0.0), 1.0))) / 2


def size_weights(mask_B1HW: Tensor, extra: float, known_B1HW: Tensor | None = None) -> Tensor:
    """Return each image's weight by the size of its object, (B,): 1 + extra or 1.

    1 + extra where the object covers under 2 % or over 80 % of the known pixels, as the network
    sees them; 1 for all others, and for images without an object.
    """
    share = _known_mean(mask_B1HW.float(), known_B1HW)
    return 1 + extra * (((share > 0) & (share < SMALL)) | (share > LARGE)).float()


def teacher_loss(
    logits_B1HW: Tensor,
    teacher_B1HW: Tensor,
    mask_B1HW: Tensor,
    *,
    known_B1HW: Tensor | None = None,
    unlabeled_B: Tensor | None = None,
) -> Tensor:
    """Return the cross entropy to a teacher's probabilities p, weighted by its confidence
    ``|2p - 1|``; mean over all pixels.

    Where there is a mask, a pixel counts only if the teacher agrees with it (p >= 1/2 on the
    object, and only there): what the teacher adds is how sure to be, not another answer. Void
    pixels of a mask do not count. In images without a mask every pixel counts.

    The sum is divided by the number of pixels and not by that of the weights: an image that the
    teacher is unsure of counts less.

    Args:
        logits_B1HW: logits.
        teacher_B1HW: probabilities, 0..1.
        mask_B1HW: target, 0 or 1; anything where there is no mask.
        known_B1HW: 0 on void pixels, else 1.
        unlabeled_B: True for images without a mask; None: all have one.
    """
    probs = teacher_B1HW.float()
    weight = (2 * probs - 1).abs()
    counts = ((probs >= 0.5) == (mask_B1HW > 0.5)).float()
    if known_B1HW is not None:
        counts = counts * known_B1HW
    if unlabeled_B is not None:
        counts = torch.where(unlabeled_B.view(-1, 1, 1, 1), 1.0, counts)
    bce = F.binary_cross_entropy_with_logits(logits_B1HW.float(), probs, reduction="none")
    return (weight * counts * bce).mean()


def segmentation_loss(
    logits_B1HW: Tensor,
    mask_B1HW: Tensor,
    config: LossConfig,
    *,
    weight_B1HW: Tensor | None = None,
    known_B1HW: Tensor | None = None,
    image_weight_B: Tensor | None = None,
    object_B: Tensor | None = None,
) -> Tensor:
    """Return the sum of the configured mask losses for one logit map at the mask's size.

    Overlap means nothing where there is no object: soft IoU and Dice then ask for less area, with a
    gradient that fades as more is marked. Images without an object may learn by cross entropy
    alone: that of the structure loss, and where neither it nor plain cross entropy is configured,
    one with the weight of the overlap losses.

    Args:
        logits_B1HW, mask_B1HW: as the losses take them.
        config: weights of the losses.
        weight_B1HW: the edge weight of the mask, if the caller has it.
        known_B1HW: 0 on void pixels, else 1.
        image_weight_B: weights of the images; None: all equal.
        object_B: 0 for images that learn by cross entropy alone, else 1; None: no image.
    """
    known, per_image = known_B1HW, image_weight_B
    of_objects = _times(object_B, per_image)
    total = logits_B1HW.new_zeros((), dtype=torch.float32)
    if config.structure:
        total = total + config.structure * structure_loss(
            logits_B1HW,
            mask_B1HW,
            weighted=config.structure_weighting,
            weight_B1HW=weight_B1HW,
            known_B1HW=known,
            image_weight_B=per_image,
            object_B=object_B,
        )
    if config.bce:
        total = total + config.bce * bce_loss(logits_B1HW, mask_B1HW, known, per_image)
    if config.iou:
        total = total + config.iou * iou_loss(logits_B1HW, mask_B1HW, known, of_objects)
    if config.dice:
        total = total + config.dice * dice_loss(logits_B1HW, mask_B1HW, known, of_objects)
    if object_B is not None and not (config.structure or config.bce):
        of_others = _times(1 - object_B, per_image)
        weight = config.iou + config.dice
        total = total + weight * bce_loss(logits_B1HW, mask_B1HW, known, of_others)
    return total


def _times(first_B: Tensor | None, second_B: Tensor | None) -> Tensor | None:
    """Return the product of weights of images; None is 1 for all of them."""
    if first_B is None or second_B is None:
        return second_B if first_B is None else first_B
    return first_B * second_B


def presence_loss(logits_B: Tensor, mask_B1HW: Tensor, known_B1HW: Tensor | None = None) -> Tensor:
    """Return the binary cross entropy of presence logits; mean over all images.

    An image has an object if its mask has a pixel of it. One without that has void pixels says
    nothing: an object may be among them. Its loss is 0.
    """
    found_B = has_object(mask_B1HW, known_B1HW)
    losses_B = F.binary_cross_entropy_with_logits(logits_B.float(), found_B, reduction="none")
    if known_B1HW is not None:
        whole_B = (known_B1HW > 0).flatten(1).all(1)
        losses_B = losses_B * torch.maximum(found_B, whole_B.float())
    return losses_B.mean()


def has_object(mask_B1HW: Tensor, known_B1HW: Tensor | None = None) -> Tensor:
    """Return 1 for images whose mask has a pixel of an object, else 0, (B,), float32."""
    marked = mask_B1HW > 0.5
    if known_B1HW is not None:
        marked = marked & (known_B1HW > 0)
    return marked.flatten(1).any(1).float()


def total_loss(
    output: ModelOutput,
    mask_B1HW: Tensor,
    config: LossConfig,
    *,
    counts_LE: Tensor | None = None,
    known_B1HW: Tensor | None = None,
    teacher_B1HW: Tensor | None = None,
    unlabeled_B: Tensor | None = None,
    size_mean: Tensor | None = None,
    progress: float = 1.0,
    empty_alone: bool = False,
) -> Loss:
    """Return the sum of all weighted terms.

    Args:
        output: logits, side logits and routing of a batch.
        mask_B1HW: target, 0 or 1, any float or integer type.
        config: weights of the terms.
        counts_LE: choices per level and expert over the whole batch of an optimizer step; None
            counts this batch alone.
        known_B1HW: 0 on void pixels, which are left out, else 1; None: every pixel counts.
        teacher_B1HW: probabilities of a teacher, which the final logits learn from as well.
        unlabeled_B: True for images without a mask, whose pixels are all void.
        size_mean: the mean of ``size_weights`` over all images of an optimizer step, by which they
            are divided: a step's mean weight is 1. None takes that of this batch.
        progress: share of the run that is done, 0 to 1, for ``uncertainty_ramp``.
        empty_alone: images without an object learn by cross entropy alone.
    """
    mask = mask_B1HW.float()
    # Once for the mask and all side heads, which have the same target.
    weighted = config.structure and config.structure_weighting
    pixels = {
        "weight_B1HW": edge_weight(mask, known_B1HW) if weighted else None,
        "known_B1HW": known_B1HW,
    }
    if empty_alone:
        pixels["object_B"] = has_object(mask, known_B1HW)
    if config.size_balance:
        weights_B = size_weights(mask, config.size_balance, known_B1HW)
        pixels["image_weight_B"] = weights_B / (
            weights_B.mean() if size_mean is None else size_mean
        )
    parts = {"mask": segmentation_loss(output.logits_B1HW, mask, config, **pixels)}
    if config.deep_supervision and config.side_weight:
        parts["side"] = config.side_weight * sum(
            (
                segmentation_loss(_resized(side.float(), mask), mask, config, **pixels)
                for side in output.side_logits
            ),
            start=mask.new_zeros(()),
        )
    elif output.side_logits:
        # With weight 0, not left out: distributed training needs a gradient for every parameter.
        unused = torch.stack([side.float().mean() for side in output.side_logits])
        parts["mask"] = parts["mask"] + 0.0 * unused.sum()
    if teacher_B1HW is not None and config.teacher:
        parts["teacher"] = config.teacher * teacher_loss(
            output.logits_B1HW,
            teacher_B1HW,
            mask,
            known_B1HW=known_B1HW,
            unlabeled_B=unlabeled_B,
        )
    if config.uncertainty:
        strength = config.uncertainty * uncertainty_ramp(progress)
        parts["uncertainty"] = strength * uncertainty_loss(output.logits_B1HW, known_B1HW)
    if output.presence_logit_B is not None:
        # With weight 0 as well: distributed training needs a gradient for every parameter.
        found = presence_loss(output.presence_logit_B, mask, known_B1HW)
        parts["presence"] = config.presence * found
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
