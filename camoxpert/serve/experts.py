"""Which experts a model uses for one image, at every level."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from camoxpert.models.camoxpert import CamoXpert, ModelOutput
from camoxpert.models.experts import expert_names
from camoxpert.models.router import Routing
from camoxpert.models.zoom import Zoomed


@contextmanager
def noted_routing(model: nn.Module) -> Iterator[list[tuple[Routing, ...]]]:
    """Return the list that gets the routing of every forward pass inside the block."""
    noted: list[tuple[Routing, ...]] = []

    def note(module: nn.Module, given: Any, output: ModelOutput) -> None:
        noted.append(output.routing)

    handle = model.register_forward_hook(note)
    try:
        yield noted
    finally:
        handle.remove()


def network_of(model: CamoXpert | Zoomed) -> CamoXpert:
    """Return the network that has the experts."""
    return model.model if isinstance(model, Zoomed) else model


def chosen_experts(network: CamoXpert, routing: Sequence[Routing]) -> list[dict[str, Any]]:
    """Return the experts that one image uses, per level, the most important first.

    Args:
        network: whose routing it is.
        routing: of a forward pass over this image alone; empty for a decoder without experts.

    Returns:
        ``{"level": "stride 32", "experts": [{"name": "edge", "weight": 0.7}, ...]}`` per level, the
        coarsest first. A weight is that of the expert's output in the mixture, 0..1; where regions
        are routed, its mean over them.
    """
    names = expert_names(network.expert_kinds)
    found = []
    for level, record in zip(network.level_names(), routing, strict=False):
        empty_BE = record.gates_BK.new_zeros(len(record.gates_BK), len(names))
        weights_E = empty_BE.scatter_add(1, record.experts_BK, record.gates_BK).mean(0).tolist()
        used = sorted(zip(weights_E, names, strict=True), key=lambda pair: -pair[0])
        experts = [{"name": name, "weight": weight} for weight, name in used if weight > 0]
        found.append({"level": level, "experts": experts})
    return found
