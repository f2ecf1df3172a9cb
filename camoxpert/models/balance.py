"""Terms that keep the router balanced, computed from the routing record.

Shape letters: B batch, E experts, K experts per image.
"""

import torch
from torch import Tensor


def expert_counts(experts_BK: Tensor, num_experts: int) -> Tensor:
    """Return how often each expert was chosen, float32 (E,), without a host sync."""
    flat = experts_BK.reshape(-1)
    counts = torch.zeros(num_experts, dtype=torch.float32, device=flat.device)
    return counts.scatter_add_(0, flat, torch.ones_like(flat, dtype=torch.float32))


def balance_loss(probs_BE: Tensor, experts_BK: Tensor, counts_E: Tensor | None = None) -> Tensor:
    """Return E * sum over experts of (mean probability) * (share of choices).

    It is 1 when both are uniform. The share is a count and carries no gradient; the mean of the
    full softmax does. A loss made of counts alone trains nothing. Source: Fedus et al., Switch
    Transformers, JMLR 2022, equation 4.

    Args:
        probs_BE: softmax over all experts.
        experts_BK: chosen experts.
        counts_E: choices of a larger batch that contains this one (all micro-batches, all ranks).
            A share taken from a few images would force every few images to use all experts, and
            prevent specialisation (Qiu et al., Demons in the Detail, 2025).
    """
    num_experts = probs_BE.shape[1]
    counts = expert_counts(experts_BK, num_experts) if counts_E is None else counts_E
    share_E = counts / counts.sum().clamp_min(1)
    return num_experts * (probs_BE.mean(0) * share_E.detach()).sum()


def router_z_loss(logits_BE: Tensor) -> Tensor:
    """Return the mean squared log-sum-exp of the gate logits, which keeps them small.

    Source: Zoph et al., ST-MoE, 2022, equation 5.
    """
    return logits_BE.float().logsumexp(-1).square().mean()
