"""The network as it is exported: uint8 images in, probabilities out, nothing left to do outside.

Shape letters: B batch, C channels, D features of the support encoder, H height, W width.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from camoxpert.errors import ConfigError
from camoxpert.models.camoxpert import CamoXpert, ModelOutput
from camoxpert.models.guidance import Reference
from camoxpert.models.moe import MoE
from camoxpert.models.router import Router, Routing
from camoxpert.models.stacked import UniformExperts

STRIDE = 32
"""Sides of the images are multiples of it."""
MOST_SIDES = 128
"""Largest side in strides: 4096 px."""
MOST_IMAGES = 1024
"""Largest batch."""
IMAGES, REFERENCE = "images", "reference"
"""Names of the graph's inputs."""
PROBABILITY, LOGITS, PRESENCE = "probability", "logits", "presence"
"""Names of the graph's outputs."""


class ExportGraph(nn.Module):
    """Normalisation, network, sigmoid and the calibration of presence in one.

    Args:
        network: in evaluation mode; it is copied. Its mixtures run every expert on every image
            (dispatch ``dense``), which is the only form with a free batch size.
        kept: experts that stay, for every level, stride 4 first; None: all.
    """

    def __init__(self, network: CamoXpert, kept: Sequence[Sequence[int]] | None = None) -> None:
        super().__init__()
        self.network = copy.deepcopy(network).eval()
        self.network.search_for(None)
        # The graph takes photographs alone: what other sensors saw is not part of it.
        self.network.modalities = None
        for index, level in enumerate(self.network.moe_levels):
            level.dispatch = "dense"
            level.router.fold()
            if kept is not None:
                prune(level, kept[index])
        fix_padding(self.network)

    @classmethod
    def around(cls, network: CamoXpert) -> ExportGraph:
        """Return a graph of a network as it is: not a copy, with its own dispatch."""
        made = cls.__new__(cls)
        nn.Module.__init__(made)
        made.network = network
        return made

    @property
    def has_references(self) -> bool:
        """Whether references are an input."""
        return self.network.guidance is not None

    @property
    def input_names(self) -> tuple[str, ...]:
        """Names of the inputs, in order."""
        return (IMAGES, REFERENCE) if self.has_references else (IMAGES,)

    @property
    def output_names(self) -> tuple[str, ...]:
        """Names of the outputs, in order."""
        names = (PROBABILITY, LOGITS)
        return names if self.network.presence is None else (*names, PRESENCE)

    def forward(self, images: Tensor, reference: Tensor | None = None) -> tuple[Tensor, ...]:
        """Return what the names of the outputs say.

        Args:
            images: RGB (B, 3, H, W), uint8 in 0..255; H and W multiples of 32.
            reference: features (B, D) of what each image is searched for, joined; zeros: any hidden
                object.

        Returns:
            probability: of each pixel, (B, 1, H, W), 0..1, float32.
            logits: of the same, before the sigmoid; larger maps are made from these.
            presence: calibrated probability (B,) that there is any object; with the head only.
        """
        output = self.run(images, reference)
        logits = output.logits_B1HW.float()
        # Named apart: two outputs that are one value would be one output.
        found = (logits.sigmoid(), logits + 0)
        presence = self.network.presence_probability(output)
        return found if presence is None else (*found, presence)

    def run(self, images: Tensor, reference: Tensor | None = None) -> ModelOutput:
        """Return what the network says of the graph's inputs."""
        told = None
        if reference is not None:
            told = Reference(reference, reference.abs().sum(1) > 0)
        output: ModelOutput = self.network(images, told)
        return output

    def example(self, batch: int, height: int, width: int) -> tuple[Tensor, ...]:
        """Return inputs of a shape: noise, and without references where they are an input."""
        generator = torch.Generator().manual_seed(0)
        shape = (batch, 3, height, width)
        images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
        if self.network.guidance is None:
            return (images,)
        return images, torch.zeros(batch, self.network.guidance.features)

    def free_sizes(self) -> tuple[Mapping[int, Any], ...]:
        """Return which sizes of the inputs stay open, as ``torch.export`` takes it."""
        batch = torch.export.Dim("batch", min=1, max=MOST_IMAGES)
        rows = torch.export.Dim("rows", min=1, max=MOST_SIDES)
        columns = torch.export.Dim("columns", min=1, max=MOST_SIDES)
        images = {0: batch, 2: STRIDE * rows, 3: STRIDE * columns}
        return (images, {0: batch}) if self.has_references else (images,)


def check_exportable(network: CamoXpert, *, static: bool) -> None:
    """Raise ConfigError for a network that has no graph with open sizes."""
    grid = max((level.grid for level in network.moe_levels), default=1)
    if grid > 1 and not static:
        raise ConfigError(
            f"This model routes up to {grid} x {grid} regions of an image, and where they lie "
            "depends on the size. Export it for one size: --static."
        )


class KeptExperts(nn.Module):
    """A router that chooses among the experts that are left.

    Where all of an image's experts are left, its gates are those of the whole router.

    Args:
        router: of all experts.
        kept: their numbers, ascending.
    """

    kept_L: Tensor

    def __init__(self, router: Router, kept: Sequence[int]) -> None:
        super().__init__()
        self.router, self.top_k = router, router.top_k
        self.register_buffer("kept_L", torch.tensor(list(kept)), persistent=False)

    def fold(self) -> None:
        """As ``Router.fold``."""
        self.router.fold()

    def forward(self, x_BCHW: Tensor, added_BR: Tensor | None = None) -> Routing:
        """As ``Router.forward``; experts are numbered among those that are left."""
        routing: Routing = self.router(x_BCHW, added_BR)
        logits_BL = routing.logits_BE.index_select(1, self.kept_L)
        probs_BL = routing.probs_BE.index_select(1, self.kept_L)
        favoured_BL = probs_BL + self.router.bias_E.index_select(0, self.kept_L)
        experts_BK = favoured_BL.topk(self.top_k, dim=-1).indices
        gates_BK = probs_BL.gather(1, experts_BK)
        if self.top_k > 1:
            gates_BK = gates_BK / gates_BK.sum(-1, keepdim=True)
        return Routing(logits_BL, probs_BL, experts_BK, gates_BK)


def prune(level: MoE, kept: Sequence[int]) -> None:
    """Take experts out of a level; an image that would use them gets the next probable ones.

    Args:
        level: of the network.
        kept: numbers of the experts that stay, ascending; at least as many as an image uses.
    """
    if len(kept) < level.router.top_k:
        raise ValueError(f"{len(kept)} experts are left of {level.router.top_k} that are used.")
    if isinstance(level.experts, UniformExperts):
        level.experts.keep(kept)
    else:
        level.experts = nn.ModuleList(level.experts[index] for index in kept)
    level.kinds = tuple(level.kinds[index] for index in kept)
    level.router = KeptExperts(level.router, kept)  # type: ignore[assignment]  # stands for it


class PaddedConv2d(nn.Module):
    """A convolution of timm with TensorFlow's padding, for sides that its stride divides.

    There the padding is a constant. As timm writes it, it is computed from the size, which the
    exporter works on for minutes.

    Args:
        conv: ``timm.layers.Conv2dSame``.
    """

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.conv = conv
        sides = zip(conv.kernel_size, conv.stride, conv.dilation, strict=True)
        totals = [
            max((kernel - 1) * dilation + 1 - stride, 0) for kernel, stride, dilation in sides
        ]
        (top, bottom), (left, right) = ((total // 2, total - total // 2) for total in totals)
        self.pad = (left, right, top, bottom)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Filter (B, C, H, W)."""
        conv = self.conv
        return F.conv2d(
            F.pad(x_BCHW, self.pad),
            conv.weight,
            conv.bias,
            conv.stride,
            0,
            conv.dilation,
            conv.groups,
        )


def fix_padding(module: nn.Module) -> None:
    """Replace the convolutions whose padding timm computes from the size."""
    from timm.layers import Conv2dSame

    for name, child in module.named_children():
        if isinstance(child, Conv2dSame):
            setattr(module, name, PaddedConv2d(child))
        else:
            fix_padding(child)
