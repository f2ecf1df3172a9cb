"""The mixture-of-experts block and its dispatch back ends, which must agree in every output and
gradient.

A back end takes the experts, the features x_BCHW and the routing decision and returns
``sum_k gates_BK[:, k] * expert[experts_BK[:, k]](x)`` for every image. Shape letters: B batch,
C width, H height, W width in pixels, E experts, K experts per image.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from camoxpert.models.experts import EXPERTS, expert_kinds
from camoxpert.models.layers import LayerNorm2d
from camoxpert.models.router import Router, Routing

Dispatch = Callable[[nn.ModuleList, Tensor, Tensor, Tensor], Tensor]


def dispatch_loop(
    experts: nn.ModuleList, x_BCHW: Tensor, gates_BK: Tensor, experts_BK: Tensor
) -> Tensor:
    """Reference: one expert call and one host sync per (image, choice).

    The slow code this project exists to replace; kept because it is obviously right.
    """
    images = []
    for b in range(x_BCHW.shape[0]):
        mixed = torch.zeros_like(x_BCHW[b : b + 1])
        for k in range(experts_BK.shape[1]):
            expert = experts[int(experts_BK[b, k])]
            mixed = mixed + gates_BK[b, k].to(x_BCHW.dtype) * expert(x_BCHW[b : b + 1])
        images.append(mixed)
    if not images:
        return torch.zeros_like(x_BCHW)
    # A zero-sample call touches the experts nobody chose: their gradient is zero, not missing.
    idle = sum(expert(x_BCHW[:0]).sum() for expert in experts)
    return torch.cat(images) + idle


def dispatch_sorted(
    experts: nn.ModuleList, x_BCHW: Tensor, gates_BK: Tensor, experts_BK: Tensor
) -> Tensor:
    """Each expert once, on the contiguous slice of images that chose it; one host sync per call.

    A stable sort of the (image, choice) pairs by expert makes the slices; their lengths are the
    only
    numbers the host needs. Idle experts run on zero samples.
    """
    top_k = experts_BK.shape[1]
    flat = experts_BK.reshape(-1)
    order = flat.argsort(stable=True)
    counts = torch.bincount(flat, minlength=len(experts)).tolist()
    images = order.div(top_k, rounding_mode="floor")
    slices = x_BCHW.index_select(0, images).split(counts)
    outputs = torch.cat([expert(part) for expert, part in zip(experts, slices, strict=True)])
    weights = gates_BK.reshape(-1).index_select(0, order).to(outputs.dtype)
    mixed = torch.zeros_like(x_BCHW, dtype=outputs.dtype)
    return mixed.index_add(0, images, outputs * weights[:, None, None, None])


DISPATCH: dict[str, Dispatch] = {"loop": dispatch_loop, "sorted": dispatch_sorted}


def choose_dispatch(name: str) -> tuple[str, str]:
    """Resolve ``auto``; return the back end's name and one sentence that says why."""
    if name != "auto":
        return name, "as asked"
    return "sorted", "each expert runs once on its own images, one host sync per level"


class MoE(nn.Module):
    """Residual mixture of experts: norm, route, dispatch, add.

    Args:
        width: channels C.
        num_experts: experts E.
        top_k: experts per image K.
        kinds: expert kinds in order, repeated up to E; empty means all seven.
        expansion: hidden width of an expert over C.
        dispatch: name of the back end.
        shared: kind of an expert that every image uses beside the chosen ones, or "". What all
            images
            need is then learned from all of them (Dai et al., DeepSeekMoE, ACL 2024, section 3.2).
    """

    def __init__(
        self,
        width: int,
        *,
        num_experts: int,
        top_k: int,
        kinds: tuple[str, ...] = (),
        expansion: float = 1.0,
        dispatch: str = "sorted",
        shared: str = "",
    ) -> None:
        super().__init__()
        self.kinds = expert_kinds(num_experts, kinds)
        self.dispatch = dispatch
        hidden = max(8, round(width * expansion / 8) * 8)
        self.norm = LayerNorm2d(width)
        self.router = Router(width, num_experts, top_k)
        self.experts = nn.ModuleList(EXPERTS[kind](width, hidden) for kind in self.kinds)
        self.shared = EXPERTS[shared](width, hidden) if shared else None

    def forward(self, x_BCHW: Tensor) -> tuple[Tensor, Routing]:
        """Return (x + mixture, routing); the mixture has the shape of x, (B, C, H, W)."""
        # Routed on the raw features: the norm would hide how strongly they respond.
        routing = self.router(x_BCHW)
        h = self.norm(x_BCHW)
        mixture = DISPATCH[self.dispatch](self.experts, h, routing.gates_BK, routing.experts_BK)
        if self.shared is not None:
            mixture = mixture + self.shared(h)
        return x_BCHW + mixture, routing
