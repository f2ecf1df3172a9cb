"""``--zoom``: a model that looks at every image at two sizes and joins what it sees."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from camoxpert.models.camoxpert import CamoXpert, ModelOutput
from camoxpert.models.guidance import Reference
from camoxpert.models.layers import resize
from camoxpert.models.modalities import Modalities

ZOOM = 1.5
"""The larger of the two sizes, as a multiple of the size of training."""


def zoomed_side(side: int) -> int:
    """Return the side of the larger image, a multiple of 32."""
    return max(32, round(ZOOM * side / 32) * 32)


def describe_zoom(side: int) -> str:
    """Return what it does to images of a side and what it costs, for the user."""
    larger = zoomed_side(side)
    # Multiply-adds grow with the number of pixels.
    times = 1 + (larger / side) ** 2
    return (
        f"zoom: each image is seen at {side} and {larger} px, which takes {times:.2f} times the "
        f"multiply-adds of {side} px alone"
    )


class Zoomed(nn.Module):
    """Takes the larger images and returns joined logits at their size.

    Args:
        model: a model trained on images of ``side``.
        side: of the smaller image, which is made from the larger one.
    """

    def __init__(self, model: CamoXpert, side: int) -> None:
        super().__init__()
        self.model = model
        self.side = side

    def forward(
        self,
        images_BCHW: Tensor,
        reference: Reference | None = None,
        modalities: Modalities | None = None,
    ) -> ModelOutput:
        """Segment a batch of uint8 images; routing and presence are those of the smaller size.

        Args:
            images_BCHW: the larger images.
            reference: what each of them is searched for, at both sizes.
            modalities: what other sensors saw of them, at the larger size.
        """
        small = F.interpolate(
            images_BCHW.float(),
            size=(self.side, self.side),
            mode="bilinear",
            align_corners=False,
            antialias=True,
        )
        far_too = None if modalities is None else modalities.resized((self.side, self.side))
        near: ModelOutput = self.model(images_BCHW, reference, modalities)
        smaller = small.round().clamp(0, 255).to(torch.uint8)
        far: ModelOutput = self.model(smaller, reference, far_too)
        logits = resize(far.logits_B1HW.float(), near.logits_B1HW.shape[-2:])
        joined = join_logits(logits, near.logits_B1HW.float())
        # Presence was calibrated at the size of training.
        return ModelOutput(joined, (), far.routing, far.presence_logit_B)

    def presence_probability(self, output: ModelOutput) -> Tensor | None:
        """As that of the model."""
        return self.model.presence_probability(output)


def join_logits(*logits_B1HW: Tensor) -> Tensor:
    """Return the mean of logits, each weighted by its confidence ``|2p - 1|``.

    Where one size is sure and the other is not, the sure one decides; 0 where neither is.
    """
    stacked = torch.stack(logits_B1HW)
    # |2 sigmoid(x) - 1|
    confidence = (stacked / 2).tanh().abs()
    return (confidence * stacked).sum(0) / confidence.sum(0).clamp_min(1e-6)
