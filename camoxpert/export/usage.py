"""Which experts a model uses, so that those it never uses need not be shipped."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from camoxpert import console, stop
from camoxpert.config import DataConfig
from camoxpert.data.files.manifest import Manifest
from camoxpert.data.loader import build_eval_loader
from camoxpert.models.camoxpert import CamoXpert


@dataclass(frozen=True)
class Usage:
    """How often images chose the experts.

    Attributes:
        images: how many were looked at.
        counts: of every expert, for every level, stride 4 first.
        kept: numbers of the experts that stay, for every level.
    """

    images: int
    counts: tuple[tuple[int, ...], ...]
    kept: tuple[tuple[int, ...], ...]

    @property
    def removed(self) -> int:
        """How many experts go."""
        return sum(map(len, self.counts)) - sum(map(len, self.kept))


def count_usage(network: CamoXpert, manifests: Sequence[Manifest], data: DataConfig) -> Usage:
    """Count the choices of a network's experts over images.

    Args:
        network: in evaluation mode, on the CPU.
        manifests: of the images.
        data: how they are read.
    """
    levels = network.moe_levels
    counters = [Counter[int]() for _ in levels]
    images = 0
    for manifest in manifests:
        loader = build_eval_loader(manifest, data, batch_size=8)
        for batch in console.track(loader, f"experts {manifest.dataset}"):
            stop.check()
            images += len(batch.names)
            with torch.inference_mode():
                routing = network(batch.images).routing
            for counter, decided in zip(counters, reversed(routing), strict=True):
                counter.update(decided.experts_BK.flatten().tolist())
    counts = tuple(
        tuple(counter[number] for number in range(len(level.experts)))
        for counter, level in zip(counters, levels, strict=True)
    )
    kept = tuple(
        kept_of(row, level.router.top_k) for row, level in zip(counts, levels, strict=True)
    )
    return Usage(images, counts, kept)


def kept_of(counts: Sequence[int], least: int) -> tuple[int, ...]:
    """Return the numbers of the experts that were used, at least as many as an image needs."""
    order = sorted(range(len(counts)), key=lambda number: -counts[number])
    used = [number for number in order if counts[number]]
    return tuple(sorted([*used, *(n for n in order if n not in used)][: max(len(used), least)]))
