"""The mixture-of-experts block and its four dispatch back ends, which agree in every output and
gradient.

All back ends have one signature, ``Dispatch``: the experts, the features x_BCHW, the routing
decision, and the number of images of every expert if the caller has read it already. They return
``sum_k gates_BK[:, k] * expert[experts_BK[:, k]](x)`` for every image. Where regions are routed,
each is an image to them (see ``regions``). Shape letters: B batch, C
width, H height, W width in pixels, E experts, K experts per image.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from camoxpert.errors import ConfigError
from camoxpert.models.experts import EXPERTS, expert_kinds
from camoxpert.models.layers import LayerNorm2d
from camoxpert.models.regions import HALO, cut, grid_of, join
from camoxpert.models.router import Router, Routing
from camoxpert.models.stacked import UniformExperts

Experts = nn.ModuleList | UniformExperts
Counts = Sequence[int] | None
Dispatch = Callable[[Experts, Tensor, Routing, Counts], Tensor]


def dispatch_loop(experts: Experts, x_BCHW: Tensor, routing: Routing, counts: Counts) -> Tensor:
    """Reference: one expert call and one host sync per (image, choice).

    This is the slow code that the project replaces; it is kept because it is obviously right.
    """
    images = []
    for b in range(x_BCHW.shape[0]):
        mixed = torch.zeros_like(x_BCHW[b : b + 1])
        for k in range(routing.experts_BK.shape[1]):
            expert = experts[int(routing.experts_BK[b, k])]
            gate = routing.gates_BK[b, k].to(x_BCHW.dtype)
            mixed = mixed + gate * expert(x_BCHW[b : b + 1])
        images.append(mixed)
    if not images:
        return torch.zeros_like(x_BCHW)
    # A zero-sample call includes the experts that no image chose: their gradient is zero, not
    # missing.
    idle = sum(expert(x_BCHW[:0]).sum() for expert in _each(experts))
    return torch.cat(images) + idle


def dispatch_sorted(experts: Experts, x_BCHW: Tensor, routing: Routing, counts: Counts) -> Tensor:
    """Each expert once, on the contiguous slice of images that chose it; one host sync at most.

    A stable sort of the (image, choice) pairs by expert makes the slices; their lengths are the
    only numbers the host needs, and none if the caller gives them. Idle experts run on zero
    samples.
    """
    batch, top_k = routing.experts_BK.shape
    order = routing.experts_BK.reshape(-1).argsort(stable=True)
    places = order.argsort()
    if counts is None:
        counts = read_counts([routing.experts_BK], len(experts))[0]
    # Channels last, as the norm before the experts leaves them: taking images from a map or joining
    # maps would otherwise put the channels first, and every expert's norm then turns them back.
    taken: Tensor = _Take.apply(x_BCHW.permute(0, 2, 3, 1), order, places, top_k)
    slices = taken.permute(0, 3, 1, 2).split(list(counts))
    outputs = torch.cat(
        [
            expert(part).permute(0, 2, 3, 1)
            for expert, part in zip(_each(experts), slices, strict=True)
        ]
    )
    placed: Tensor = _Take.apply(outputs, places, order, 1)
    gates_BK = routing.gates_BK.to(outputs.dtype)
    mixed = placed.unflatten(0, (batch, top_k)) * gates_BK[:, :, None, None, None]
    return mixed.sum(1).permute(0, 3, 1, 2)


class _Take(torch.autograd.Function):
    """Take maps in an order in which each of them occurs ``times`` times.

    Plain indexing adds up its gradients pair by pair through an index of every value: on a CPU at
    several times the cost of a copy, on CUDA in an order that changes. As the order is known, so
    is where each copy went, and the gradient is another taking and a sum.
    """

    @staticmethod
    def forward(ctx: Any, maps: Tensor, order: Tensor, places: Tensor, times: int) -> Tensor:
        """Return map ``order // times``; ``places`` is the inverse of ``order``."""
        ctx.save_for_backward(places)
        ctx.times = times
        chosen = order if times == 1 else order.div(times, rounding_mode="floor")
        return maps.index_select(0, chosen)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        """Return the sum of the gradients of each map's copies."""
        (places,) = ctx.saved_tensors
        gradient = gradients[0].index_select(0, places)
        if ctx.times > 1:
            gradient = gradient.unflatten(0, (len(places) // ctx.times, ctx.times)).sum(1)
        return gradient, None, None, None


def dispatch_dense(experts: Experts, x_BCHW: Tensor, routing: Routing, counts: Counts) -> Tensor:
    """Every expert on every image, gates of 0 where it was not chosen: no sort, no host sync.

    E / K times the work, and the only form that exports with a free batch size.
    """
    gates_BK = routing.gates_BK
    empty_BE = gates_BK.new_zeros(gates_BK.shape[0], len(experts))
    gates_BE = empty_BE.scatter(1, routing.experts_BK, gates_BK)
    total: Tensor | None = None
    for index, expert in enumerate(_each(experts)):
        y = expert(x_BCHW)
        y = y * gates_BE[:, index].to(y.dtype)[:, None, None, None]
        total = y if total is None else total + y
    assert total is not None
    return total


def dispatch_gathered(experts: Experts, x_BCHW: Tensor, routing: Routing, counts: Counts) -> Tensor:
    """Each image with its own gathered weights: no sort, no host sync, one program.

    Raises:
        ConfigError: the experts have no stacked weights.
    """
    if not isinstance(experts, UniformExperts):
        raise ConfigError(
            "Dispatch `gathered` needs like experts in stacked weights: --expert-family uniform."
        )
    mixture: Tensor = experts(x_BCHW, routing.gates_BK, routing.experts_BK)
    return mixture


def _each(experts: Experts) -> list[Callable[[Tensor], Tensor]]:
    return [experts[index] for index in range(len(experts))]


def read_counts(experts_BK: Sequence[Tensor], num_experts: int) -> list[list[int]]:
    """Read how many images chose each expert, for several routing decisions in ONE host sync."""
    offsets = torch.arange(len(experts_BK), device=experts_BK[0].device) * num_experts
    shifted = [
        chosen.reshape(-1) + offset for chosen, offset in zip(experts_BK, offsets, strict=True)
    ]
    flat = torch.cat(shifted)
    total = len(experts_BK) * num_experts
    # Not bincount, which waits for the device on its own.
    counts = torch.zeros(total, dtype=torch.int64, device=flat.device)
    counts.scatter_add_(0, flat, torch.ones_like(flat))
    listed: list[int] = counts.tolist()
    return [listed[i : i + num_experts] for i in range(0, total, num_experts)]


DISPATCH: dict[str, Dispatch] = {
    "loop": dispatch_loop,
    "sorted": dispatch_sorted,
    "gathered": dispatch_gathered,
    "dense": dispatch_dense,
}


def choose_dispatch(
    name: str, *, family: str = "specialist", num_experts: int = 2, top_k: int = 1
) -> tuple[str, str]:
    """Resolve ``auto``; return the back end's name and the reason."""
    if name != "auto":
        return name, "as asked"
    if num_experts == top_k:
        return "dense", "every image uses every expert: there is nothing to sort"
    if family == "uniform":
        return "gathered", "like experts: weights gathered per image, no host sync"
    return "sorted", "unlike experts: each runs once on its own images, one host sync"


class MoE(nn.Module):
    """Residual mixture of experts: norm, route, dispatch, add.

    Args:
        width: channels C.
        num_experts: experts E.
        top_k: experts per image K.
        family: "specialist" (unlike experts of the given kinds) or "uniform" (like experts in
            stacked weights).
        kinds: specialist kinds in order, repeated up to E; empty means all seven.
        expansion: hidden width of an expert over C.
        dispatch: name of the back end, or "auto".
        shared: kind of an expert that every image uses beside the chosen ones, or "". It learns
            what all images need from all of them (Dai et al., DeepSeekMoE, ACL 2024, section 3.2).
        grid: an image is routed in up to grid x grid regions; 1: as a whole.
        standardise: the router standardises its logits over images.
    """

    def __init__(
        self,
        width: int,
        *,
        num_experts: int,
        top_k: int,
        family: str = "specialist",
        kinds: tuple[str, ...] = (),
        expansion: float = 1.0,
        dispatch: str = "auto",
        shared: str = "",
        grid: int = 1,
        standardise: bool = False,
    ) -> None:
        super().__init__()
        hidden = max(8, round(width * expansion / 8) * 8)
        self.norm = LayerNorm2d(width)
        self.router = Router(width, num_experts, top_k, standardise=standardise)
        self.experts: Experts
        if family == "uniform":
            self.experts = UniformExperts(num_experts, width, hidden)
            self.kinds = self.experts.kinds
        else:
            self.kinds = expert_kinds(num_experts, kinds)
            self.experts = nn.ModuleList(EXPERTS[kind](width, hidden) for kind in self.kinds)
        self.family = family
        self.asked = dispatch
        self.grid = grid
        self.shared = EXPERTS[shared](width, hidden) if shared else None

    @property
    def dispatch(self) -> str:
        """The back end in use; with ``auto`` it follows the number of active experts."""
        return choose_dispatch(
            self.asked,
            family=self.family,
            num_experts=len(self.experts),
            top_k=self.router.top_k,
        )[0]

    @dispatch.setter
    def dispatch(self, name: str) -> None:
        self.asked = name

    def route(self, x_BCHW: Tensor, added_BR: Tensor | None = None) -> Routing:
        """Decide for every image, or every region of it, from its features (B, C, H, W).

        Args:
            x_BCHW: the features.
            added_BR: as ``Router.forward`` takes it, for every image.
        """
        grid = grid_of(self.grid, *x_BCHW.shape[-2:])
        if added_BR is not None and grid > 1:
            added_BR = added_BR.repeat_interleave(grid * grid, 0)
        decided: Routing = self.router(cut(x_BCHW, grid), added_BR)
        return decided

    def forward(
        self,
        x_BCHW: Tensor,
        routing: Routing | None = None,
        counts: Counts = None,
        added_BR: Tensor | None = None,
    ) -> tuple[Tensor, Routing]:
        """Mix.

        Args:
            x_BCHW: features (B, C, H, W).
            routing: the decision if it was made before; None routes on ``x_BCHW``.
            counts: images (regions) per expert, if the caller has read them.
            added_BR: as ``route`` takes it.

        Returns:
            x + mixture, (B, C, H, W); the routing.
        """
        if routing is None:
            # Routed on the raw features: the norm would hide how strongly they respond.
            routing = self.route(x_BCHW, added_BR)
        h = self.norm(x_BCHW)
        size = x_BCHW.shape[-2:]
        grid = grid_of(self.grid, *size)
        parts = DISPATCH[self.dispatch](self.experts, cut(h, grid, halo=HALO), routing, counts)
        mixture = join(parts, size, grid=grid, halo=HALO)
        if self.shared is not None:
            mixture = mixture + self.shared(h)
        return x_BCHW + mixture, routing
