"""Top-down decoder; every level projects, fuses with the level above, mixes experts and predicts.

Shape letters: B batch, C channels, H height, W width; levels are ordered strides 4, 8, 16, 32.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from camoxpert.config import ModelConfig
from camoxpert.models.layers import LayerNorm2d, depthwise, pointwise, resize
from camoxpert.models.moe import Counts, MoE, read_counts
from camoxpert.models.router import Routing


class Fuse(nn.Module):
    """Join a level with the one above it: concatenate, mix channels, 3x3 filter."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.enter = pointwise(2 * width, width)
        self.norm = LayerNorm2d(width)
        self.filter = depthwise(width, 3)
        self.leave = pointwise(width, width)

    def forward(self, lateral_BCHW: Tensor, above_BCHW: Tensor) -> Tensor:
        """Return (B, C, H, W) at the lateral's size; ``above`` is resized to it."""
        above = resize(above_BCHW, lateral_BCHW.shape[-2:])
        h = self.enter(torch.cat([lateral_BCHW, above], 1))
        y: Tensor = lateral_BCHW + above + self.leave(F.gelu(self.filter(self.norm(h))))
        return y


class Level(nn.Module):
    """One decoder level: lateral projection, fusion, mixture of experts and side head."""

    def __init__(self, channels: int, config: ModelConfig, *, top: bool) -> None:
        super().__init__()
        self.lateral = nn.Sequential(pointwise(channels, config.width), LayerNorm2d(config.width))
        self.fuse = None if top else Fuse(config.width)
        self.moe = MoE(
            config.width,
            num_experts=config.num_experts,
            top_k=config.top_k,
            family=config.expert_family,
            kinds=config.experts,
            expansion=config.expert_expansion,
            dispatch=config.dispatch,
            shared=config.shared_expert,
            grid=config.routing_grid,
            standardise=config.router_norm == "batch",
        )
        self.head = pointwise(config.width, 1)

    def forward(
        self,
        lateral_BCHW: Tensor,
        above_BCHW: Tensor | None,
        routing: Routing | None = None,
        counts: Counts = None,
        added_BR: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Routing]:
        """Return this level's features, side logits (B, 1, H, W) and routing.

        Args:
            lateral_BCHW: the backbone's features after ``lateral``.
            above_BCHW: features of the level above; None at the top.
            routing, counts, added_BR: as ``MoE.forward`` takes them.
        """
        x = lateral_BCHW
        if self.fuse is not None and above_BCHW is not None:
            x = self.fuse(x, above_BCHW)
        x, routing = self.moe(x, routing, counts, added_BR)
        return x, self.head(x), routing


class DetailHead(nn.Module):
    """The final logits at stride 2: decoder features joined with a thin branch on the image itself.

    A mask at stride 4 cannot follow legs and antennae; two cheap convolutions at stride 2 can.
    """

    def __init__(self, width: int, detail: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, detail, 3, stride=2, padding=1),
            LayerNorm2d(detail),
            nn.GELU(),
            depthwise(detail, 3),
            pointwise(detail, detail),
        )
        self.reduce = pointwise(width, detail)
        self.mix = nn.Sequential(
            nn.Conv2d(2 * detail, detail, 3, padding=1), LayerNorm2d(detail), nn.GELU()
        )
        self.head = nn.Conv2d(detail, 1, 3, padding=1)

    def forward(self, images_BCHW: Tensor, x_BCHW: Tensor) -> Tensor:
        """Return logits (B, 1, H/2, W/2) for normalised images (B, 3, H, W)."""
        stem = self.stem(images_BCHW)
        decoded = resize(self.reduce(x_BCHW), stem.shape[-2:])
        logits: Tensor = self.head(self.mix(torch.cat([stem, decoded], 1)))
        return logits


class Decoder(nn.Module):
    """From four backbone levels to logits.

    Args:
        channels: backbone channels at strides 4, 8, 16, 32.
        config: width, experts and detail branch.
    """

    def __init__(self, channels: Sequence[int], config: ModelConfig) -> None:
        super().__init__()
        self.levels = nn.ModuleList(
            Level(c, config, top=index == len(channels) - 1) for index, c in enumerate(channels)
        )
        self.detail = DetailHead(config.width, config.detail_width) if config.detail_width else None
        self.routing = config.routing
        self.checkpointing = False

    def forward(
        self, images_BCHW: Tensor, features: Sequence[Tensor], added: Sequence[Tensor] = ()
    ) -> tuple[Tensor, tuple[Tensor, ...], tuple[Routing, ...]]:
        """Decode.

        Args:
            images_BCHW: normalised images (B, 3, H, W), for the detail branch.
            features: maps at strides 4, 8, 16, 32.
            added: what the routers get beside their level's features, (B, R) each, in the same
                order; empty: nothing.

        Returns:
            logits (B, 1, H, W); side logits from stride 32 to stride 4, each at its own size;
            routing records in the same order.
        """
        # ModuleList does not know the type of its elements.
        levels: list[Level] = list(reversed(self.levels))  # type: ignore[arg-type]
        laterals = [
            level.lateral(feature)
            for level, feature in zip(levels, reversed(features), strict=True)
        ]
        guided: list[Tensor | None] = [*reversed(added)] if added else [None] * len(levels)
        decided, counts = self._route(levels, laterals, guided)
        above: Tensor | None = None
        side_logits, routings = [], []
        for level, *inputs in zip(levels, laterals, decided, counts, guided, strict=True):
            lateral, routing, number, target = inputs
            if self.checkpointing and torch.is_grad_enabled():
                above, side, routing = checkpoint(
                    level, lateral, above, routing, number, target, use_reentrant=False
                )
            else:
                above, side, routing = level(lateral, above, routing, number, target)
            side_logits.append(side)
            routings.append(routing)
        assert above is not None
        logits = side_logits[-1] if self.detail is None else self.detail(images_BCHW, above)
        return resize(logits, images_BCHW.shape[-2:]), tuple(side_logits), tuple(routings)

    def _route(
        self,
        levels: Sequence[Level],
        laterals: Sequence[Tensor],
        guided: Sequence[Tensor | None],
    ) -> tuple[list[Routing | None], list[Counts]]:
        """Route all levels at once if they route on lateral features; read all counts in one sync.

        Returns:
            routing and counts of every level; None is left to the level itself.
        """
        nothing: list[None] = [None] * len(levels)
        if self.routing != "lateral":
            return list(nothing), list(nothing)
        decided: list[Routing] = [
            level.moe.route(x, added_BR)
            for level, x, added_BR in zip(levels, laterals, guided, strict=True)
        ]
        if any(level.moe.dispatch != "sorted" for level in levels):
            return list(decided), list(nothing)
        num_experts = len(levels[0].moe.experts)
        return list(decided), list(read_counts([r.experts_BK for r in decided], num_experts))
