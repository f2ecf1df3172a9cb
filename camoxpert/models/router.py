"""The gate: which experts an image uses, or a region of it, decided from its own features.

Shape letters: B batch (of images, or of the regions of all images), C channels, E experts, K
experts chosen per image.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SMALLEST_VARIANCE = 1e-8
"""Added to the variance of logits: where all images are alike, noise would decide."""
FIRST_VARIANCE = 1e-3
"""Of the logits of a new gate: 0.0003 to 0.0016 over 48 photographs or generated scenes, with the
ImageNet weights of tf_efficientnet_lite0."""


class Routing(NamedTuple):
    """The decision of one MoE level for a batch: all that auxiliary losses and reports need.

    With a grid a row is a region; the rows of an image follow each other.

    Attributes:
        logits_BE: gate logits, float32; standardised where the router does so.
        probs_BE: softmax over all experts, float32; carries the gradient of the balance loss.
        experts_BK: indices of the chosen experts, int64, most probable first.
        gates_BK: weights of the chosen experts, float32; they sum to 1 for K > 1. For K = 1 the
            gate is the probability itself: renormalised it would always be 1 and the router
            would never get a gradient.
    """

    logits_BE: Tensor
    probs_BE: Tensor
    experts_BK: Tensor
    gates_BK: Tensor


class LogitNorm(nn.BatchNorm1d):
    """Standardises each expert's logits over images: batch norm without gains.

    What an expert is ahead for all images can be as large as what differs between them, and then
    one expert serves nearly all of them (docs/results.md, "Other experts"). Standardised, none is
    ahead for all, and content decides. In training the batch's own statistics do that: running ones
    lag behind a router that learns, and the lag puts one expert ahead again. They are kept for
    evaluation.
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, num_experts: int) -> None:
        super().__init__(num_experts, eps=SMALLEST_VARIANCE, affine=False)
        # From 1, a hundred steps would not be enough to get near.
        self.running_var.fill_(FIRST_VARIANCE)

    def forward(self, logits_BE: Tensor) -> Tensor:
        """Standardise float32 logits (B, E)."""
        if self.training and len(logits_BE) > 1:
            normed: Tensor = super().forward(logits_BE)
            return normed
        # One image has no spread.
        return F.batch_norm(logits_BE, self.running_mean, self.running_var, eps=self.eps)


def folded(weight_ER: Tensor, mean_E: Tensor, variance_E: Tensor) -> tuple[Tensor, Tensor]:
    """Return weights and bias of a gate that decides as one whose logits are standardised."""
    spread_E = (variance_E + SMALLEST_VARIANCE).sqrt()
    return weight_ER / spread_E[:, None], -mean_E / spread_E


class Router(nn.Module):
    """Content-aware top-k gate over the mean and the spread of an image's features.

    The spread (standard deviation over pixels) tells a busy texture from a flat one where the mean
    cannot. Everything runs in float32 even under autocast: bf16 logits flip the top-2 set of some
    images, and then training and evaluation use different experts.

    Args:
        channels: of the features.
        num_experts: experts E.
        top_k: experts per image K.
        standardise: standardise the logits of each expert over images; see ``LogitNorm``.
    """

    bias_E: Tensor

    def __init__(
        self, channels: int, num_experts: int, top_k: int, *, standardise: bool = False
    ) -> None:
        super().__init__()
        self.top_k = top_k
        # Probability that training hides one expert at random from an image.
        self.dropout = 0.0
        hidden = max(channels // 2, num_experts)
        self.norm = nn.LayerNorm(2 * channels)
        self.hidden = nn.Linear(2 * channels, hidden)
        self.gate = nn.Linear(hidden, num_experts)
        # Even probabilities at first. The choice is not even: what an expert has before the others
        # is as large as what differs between images (docs/results.md, "Other experts").
        nn.init.normal_(self.gate.weight, std=0.02)
        nn.init.zeros_(self.gate.bias)
        # Added to the probabilities when experts are chosen, never to the gates; it changes only
        # with ``optim.router_bias_rate`` (Wang et al., Auxiliary-Loss-Free Load Balancing, 2024).
        self.register_buffer("bias_E", torch.zeros(num_experts))
        self.logit_norm = LogitNorm(num_experts) if standardise else None
        if standardise:
            # The mean would take it away.
            self.gate.register_parameter("bias", None)

    def forward(self, x_BCHW: Tensor, added_BR: Tensor | None = None) -> Routing:
        """Route a batch of feature maps (B, C, H, W), one decision per image.

        Args:
            x_BCHW: the maps.
            added_BR: added to the hidden features before their activation, so that the choice
                follows what is searched for as well; None: nothing.
        """
        with torch.autocast(x_BCHW.device.type, enabled=False):
            x = x_BCHW.float()
            mean_BC = x.mean((2, 3))
            spread_BC = (x - mean_BC[..., None, None]).square().mean((2, 3)).add(1e-6).sqrt()
            summary = self.norm(torch.cat([mean_BC, spread_BC], 1))
            hidden_BR = self.hidden(summary)
            if added_BR is not None:
                hidden_BR = hidden_BR + added_BR.float()
            logits_BE = self.gate(F.gelu(hidden_BR))
            if self.logit_norm is not None:
                logits_BE = self.logit_norm(logits_BE)
            hidden_BE = None
            if self.training and self.dropout and self.top_k < logits_BE.shape[1]:
                hidden_BE = hide_one(logits_BE, self.dropout)
            return choose(logits_BE, self.top_k, self.bias_E, hidden_BE)

    @torch.no_grad()
    def move_bias(self, counts_E: Tensor, rate: float | Tensor) -> None:
        """Make experts chosen less often than the mean more likely to be chosen, the others less.

        Args:
            counts_E: choices of the last optimizer step.
            rate: step, in units of probability.
        """
        self.bias_E += rate * (counts_E.mean() - counts_E).sign()

    @torch.no_grad()
    def fold(self) -> None:
        """Put the standardisation into the gate's weights: the same logits, no statistics."""
        if self.logit_norm is None:
            return
        weight_ER, bias_E = folded(
            self.gate.weight, self.logit_norm.running_mean, self.logit_norm.running_var
        )
        self.gate.weight.copy_(weight_ER)
        self.gate.bias = nn.Parameter(bias_E, requires_grad=self.gate.weight.requires_grad)
        self.logit_norm = None


def first_choices(routing: Routing, images: int) -> Tensor:
    """Return the expert that each image uses most, int64 (images,), without a host sync.

    It is the first choice of most of its routing units; of equals the one with the lowest number.

    Args:
        routing: of one level, for one or more units of every image.
        images: how many.
    """
    first_BU = routing.experts_BK[:, 0].reshape(images, -1)
    votes_BE = routing.probs_BE.new_zeros(images, routing.probs_BE.shape[1])
    return votes_BE.scatter_add_(
        1, first_BU, torch.ones_like(first_BU, dtype=votes_BE.dtype)
    ).argmax(1)


def hide_one(logits_BE: Tensor, rate: float) -> Tensor:
    """Return True for one expert, drawn evenly, in a share ``rate`` of the rows; (B, E).

    Drawn from torch's generator of the device, whose state is saved with a run, as stochastic depth
    is.
    """
    batch, num_experts = logits_BE.shape
    device = logits_BE.device
    hit_B1 = torch.rand(batch, 1, device=device) < rate
    which_B1 = torch.randint(num_experts, (batch, 1), device=device)
    return hit_B1 & (which_B1 == torch.arange(num_experts, device=device))


def choose(
    logits_BE: Tensor,
    top_k: int,
    bias_E: Tensor | None = None,
    hidden_BE: Tensor | None = None,
) -> Routing:
    """Turn gate logits (B, E) into a routing decision with ``top_k`` experts per image.

    Args:
        logits_BE: of the gate.
        top_k: experts per image.
        bias_E: added to the probabilities for the choice alone.
        hidden_BE: True for experts that cannot be chosen and have probability 0; at least ``top_k``
            of each row are left.
    """
    open_BE = logits_BE if hidden_BE is None else logits_BE.masked_fill(hidden_BE, -torch.inf)
    probs_BE = open_BE.softmax(-1)
    favoured_BE = probs_BE if bias_E is None else probs_BE.detach() + bias_E
    if hidden_BE is not None:
        favoured_BE = favoured_BE.masked_fill(hidden_BE, -torch.inf)
    experts_BK = favoured_BE.topk(top_k, dim=-1).indices
    gates_BK = probs_BE.gather(1, experts_BK)
    if top_k > 1:
        gates_BK = gates_BK / gates_BK.sum(-1, keepdim=True)
    return Routing(logits_BE, probs_BE, experts_BK, gates_BK)
