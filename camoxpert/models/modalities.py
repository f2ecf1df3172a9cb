"""What other sensors saw joins the maps of the photograph, and which of them there is steers the
routers.

Every part that leads into the rest starts at zero, and a modality that an image lacks adds exactly
nothing, so that a photograph alone is seen as by the same model without modalities, bit for bit.

Shape letters: B batch, C channels, H height, W width in pixels; M modalities beside the photograph,
R hidden features of a router.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from camoxpert.errors import ConfigError
from camoxpert.models.layers import LayerNorm2d, depthwise, pointwise, resize
from camoxpert.text import did_you_mean

WIDTHS = (24, 32, 48, 64)
"""Channels of a stem at strides 4, 8, 16 and 32."""
JOINT = 32
"""Channels in which the maps of photograph and modality meet."""
LEVELS = 254
PART = "modalities."
"""Start of the names of the parameters in a model."""


class Modalities(NamedTuple):
    """What other sensors saw of the images of a batch, and what of it counts.

    Attributes:
        planes_BMHW: uint8, 1 to 255, 0 where nothing is known; M in the order of the model.
        present_BM: bool; the planes of the others are not looked at.
        rgb_B: bool, False for images whose photograph is not looked at.
    """

    planes_BMHW: Tensor
    present_BM: Tensor
    rgb_B: Tensor

    def shown(self, chosen_BN: Tensor) -> Modalities:
        """Return the same with less of it: photograph first, then the modalities, bool (B, 1 + M).

        An image of which nothing would be left keeps its photograph.
        """
        present_BM = self.present_BM & chosen_BN[:, 1:]
        rgb_B = self.rgb_B & chosen_BN[:, 0]
        return Modalities(self.planes_BMHW, present_BM, rgb_B | ~present_BM.any(1))

    def resized(self, size: tuple[int, int]) -> Modalities:
        """Return the same at another size (H, W); what is unknown does not blend."""
        known, values = (
            F.interpolate(part, size=size, mode="bilinear", align_corners=False, antialias=True)
            for part in ((self.planes_BMHW > 0).float(), self.planes_BMHW.float())
        )
        means = (values / known.clamp_min(1e-6)).round().clamp(1, 255)
        planes_BMHW = means.masked_fill(known < 0.5, 0).to(torch.uint8)
        return self._replace(planes_BMHW=planes_BMHW)


def all_there_is(planes_BMHW: Tensor) -> Modalities:
    """Return everything that planes know: a modality is there if any of its pixels is known."""
    present_BM = (planes_BMHW > 0).flatten(2).any(2)
    return Modalities(planes_BMHW, present_BM, torch.ones_like(present_BM[:, 0]))


def in_order(planes: Mapping[str, Tensor], names: Sequence[str]) -> Tensor:
    """Return planes by name, (B, 1, H, W) each, as (B, M, H, W)."""
    return torch.cat([planes[name] for name in names], 1)


def subsets(modalities: int) -> list[tuple[bool, ...]]:
    """Return every non-empty subset of the photograph and so many modalities: which are in it, the
    photograph first. The photograph alone is first, all of them last."""
    every = [chosen for chosen in product((False, True), repeat=1 + modalities) if any(chosen)]
    return sorted(every, key=lambda chosen: (sum(chosen), [not one for one in chosen]))


def photograph_alone(seen: Modalities) -> Modalities:
    """Return the same with the photographs alone."""
    return seen._replace(
        present_BM=torch.zeros_like(seen.present_BM), rgb_B=torch.ones_like(seen.rgb_B)
    )


def chosen(subset: Sequence[bool], seen: Modalities) -> Modalities:
    """Return the same with one subset for all images, photograph first."""
    row: Tensor = torch.tensor(list(subset), device=seen.rgb_B.device)
    return seen.shown(row.expand(len(seen.rgb_B), -1))


class Stem(nn.Module):
    """Four maps of one plane, at strides 4 to 32, with few channels."""

    def __init__(self) -> None:
        super().__init__()
        blocks, previous = [], 2
        for index, width in enumerate(WIDTHS):
            stride = 4 if index == 0 else 2
            blocks.append(
                nn.Sequential(
                    nn.Conv2d(previous, width, stride + 1, stride, stride // 2),
                    LayerNorm2d(width),
                    nn.GELU(),
                    depthwise(width, 3),
                    pointwise(width, width),
                    nn.GELU(),
                )
            )
            previous = width
        self.blocks = nn.ModuleList(blocks)

    def forward(self, plane_B1HW: Tensor) -> list[Tensor]:
        """Return the maps of a uint8 plane, the finest first."""
        known = (plane_B1HW > 0).float()
        # -1 to 1, and 0 where nothing is known: the second channel says where.
        x = torch.cat([((plane_B1HW.float() - 1) / LEVELS * 2 - 1) * known, known], 1)
        maps = []
        for block in self.blocks:
            x = block(x)
            maps.append(x)
        return maps


class Gate(nn.Module):
    """What one modality adds to one map of the photograph, seen together with it; nothing at first.

    Source of the zero start: Zhang et al., Adding Conditional Control to Text-to-Image Diffusion
    Models, ICCV 2023.
    """

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.norm = LayerNorm2d(channels)
        self.photo = pointwise(channels, JOINT)
        self.plane = pointwise(width, JOINT)
        self.leave = pointwise(JOINT, channels)
        nn.init.zeros_(self.leave.weight)
        assert self.leave.bias is not None
        nn.init.zeros_(self.leave.bias)

    def forward(self, x_BCHW: Tensor, map_BCHW: Tensor) -> Tensor:
        """Return what is added to the photograph's map ``x_BCHW``, of the same shape."""
        met = self.photo(self.norm(x_BCHW)) + self.plane(map_BCHW)
        added: Tensor = self.leave(F.gelu(met))
        return added.to(x_BCHW.dtype)


class ModalityBranch(nn.Module):
    """A stem for each modality, gates into the maps of the photograph, and a view of what there is
    for the routers.

    Args:
        names: of the modalities.
        channels: of the backbone's levels, stride 4 first.
        hidden: hidden features R of the levels' routers, stride 4 first.
    """

    def __init__(
        self, names: Sequence[str], channels: Sequence[int], hidden: Sequence[int]
    ) -> None:
        super().__init__()
        self.names = tuple(names)
        self.stems = nn.ModuleDict({name: Stem() for name in names})
        self.gates = nn.ModuleDict(
            {
                name: nn.ModuleList(
                    Gate(c, width) for c, width in zip(channels, WIDTHS, strict=True)
                )
                for name in names
            }
        )
        # Without a bias: of a photograph alone every input is 0, and so is what is added.
        routers = [nn.Linear(1 + len(names), size, bias=False) for size in hidden]
        for router in routers:
            nn.init.zeros_(router.weight)
        self.routers = nn.ModuleList(routers)

    def forward(
        self, features: Sequence[Tensor], seen: Modalities
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Join.

        Args:
            features: maps of the photograph (B, C, H, W), stride 4 first.
            seen: of every image.

        Returns:
            The maps, and what is added to the hidden features of every router, (B, R) each.
        """
        maps = list(features)
        for number, name in enumerate(self.names):
            own = self.stems[name](seen.planes_BMHW[:, number : number + 1])
            there = seen.present_BM[:, number, None, None, None]
            gates: Any = self.gates[name]  # a list of them, which ModuleDict does not know
            for level, gate in enumerate(gates):
                # Of the photograph's own map, so that the order of modalities does not matter.
                plane = resize(own[level], features[level].shape[-2:])
                added = gate(features[level], plane)
                maps[level] = torch.where(there, maps[level] + added, maps[level])
        absent_B1 = (~seen.rgb_B)[:, None]
        told = torch.cat([absent_B1, seen.present_BM], 1).float()
        with torch.autocast(told.device.type, enabled=False):
            added_R = [router(told) for router in self.routers]
        return maps, added_R

    def check(self, names: Sequence[str]) -> None:
        """Raise ConfigError for a modality that the model was not trained with."""
        require_known(names, self.names)

    def trial(self, batch_size: int, side: int, device: torch.device) -> Modalities:
        """Return made-up planes for a step whose cost is to be measured."""
        shape = (batch_size, len(self.names), side, side)
        return all_there_is(torch.ones(shape, dtype=torch.uint8, device=device))


def require_known(names: Sequence[str], known: Sequence[str]) -> None:
    """Raise ConfigError for a modality that a model does not know.

    Args:
        names: that are given.
        known: those of the model's training, beside the photograph.
    """
    for name in names:
        if not known:
            raise ConfigError(
                f"{name} was given, and this model was trained with photographs alone: it has no "
                f"input for other modalities. Leave it out, or train a model with --modalities rgb "
                f"{name}."
            )
        if name not in known:
            raise ConfigError(
                f"{name} was given, and this model was not trained with it."
                f"{did_you_mean(name, known)} It knows, beside the photograph: {', '.join(known)}."
            )
