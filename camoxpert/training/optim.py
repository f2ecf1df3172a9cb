"""AdamW with separate learning rates for the backbone and the routers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from camoxpert.config import OptimConfig


def backbone_scale(config: OptimConfig, *, has_weights: bool) -> float:
    """Return the backbone's learning rate as a multiple of the decoder's."""
    if config.backbone_lr_scale is not None:
        return config.backbone_lr_scale
    return 0.1 if has_weights else 1.0


def build_optimizer(
    model: nn.Module, config: OptimConfig, *, scales: Sequence[tuple[nn.Module, float]] = ()
) -> torch.optim.AdamW:
    """Build AdamW; each group has a ``scale``, its learning rate as a multiple of the decoder's.

    It holds all parameters from the start; those of a frozen backbone have no gradient and are
    skipped. Vectors (norms, biases) are not decayed.

    Args:
        model: all of it is trained.
        config: betas and weight decay.
        scales: parts of the model with another learning rate; everything else has scale 1.
    """
    scale_of = {id(p): scale for part, scale in scales for p in part.parameters()}
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for parameter in model.parameters():
        key = (scale_of.get(id(parameter), 1.0), parameter.ndim > 1)
        groups.setdefault(key, []).append(parameter)
    settings: list[dict[str, Any]] = [
        {
            "params": parameters,
            "weight_decay": config.weight_decay if decay else 0.0,
            "scale": scale,
        }
        for (scale, decay), parameters in groups.items()
    ]
    return torch.optim.AdamW(settings, lr=config.lr, betas=config.betas, fused=True)


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set every group to ``lr`` times its scale."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["scale"]
