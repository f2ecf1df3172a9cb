"""AdamW with separate learning rates for the backbone and the routers."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from camoxpert.config import ModelConfig, OptimConfig
from camoxpert.models.camoxpert import CamoXpert

NORMS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm)


def starts_with_weights(model: ModelConfig) -> bool:
    """Return whether the backbone starts from learned weights."""
    return bool(model.weights or model.init_from) or model.pretrained


def lr_scales(
    model: CamoXpert, config: OptimConfig, *, has_weights: bool
) -> list[tuple[nn.Module, float]]:
    """Return the parts of the model with a learning rate of their own, as multiples of the
    decoder's."""
    backbone = (model.backbone, backbone_scale(config, has_weights=has_weights))
    routers = [moe.router for moe in model.moe_levels]
    guided = [] if model.guidance is None else [model.guidance.routers]
    guided += [] if model.modalities is None else [model.modalities.routers]
    return [backbone, *((part, config.router_lr_scale) for part in (*routers, *guided))]


def backbone_scale(config: OptimConfig, *, has_weights: bool) -> float:
    """Return the backbone's learning rate as a multiple of the decoder's."""
    if config.backbone_lr_scale is not None:
        return config.backbone_lr_scale
    return 0.1 if has_weights else 1.0


def build_optimizer(
    model: nn.Module, config: OptimConfig, *, scales: Sequence[tuple[nn.Module, float]] = ()
) -> torch.optim.AdamW:
    """Build AdamW; each group has a ``scale``, its learning rate as a multiple of the decoder's,
    and the ``names`` of its parameters.

    It holds all parameters from the start; those of a frozen backbone have no gradient and are
    skipped. What ``decayed`` does not name is not decayed.

    Args:
        model: all of it is trained.
        config: betas and weight decay.
        scales: parts of the model with another learning rate; everything else has scale 1.
    """
    decay = decayed(model)
    parameters = dict(model.named_parameters())
    settings: list[dict[str, Any]] = [
        {
            "params": [parameters[name] for name in names],
            "weight_decay": config.weight_decay if names[0] in decay else 0.0,
            "scale": scale,
            "names": names,
        }
        for scale, names in _grouped(model, scales, decay)
    ]
    # The schedule sets the rate before every step.
    return torch.optim.AdamW(settings, lr=config.lr or 1e-3, betas=config.betas, fused=True)


def decayed(model: nn.Module) -> set[str]:
    """Return the names of the parameters that are decayed: matrices and filters.

    These are parameters called ``weight`` with more than one dimension, outside norms, and those
    that a module lists in its attribute ``decayed``. The shape alone would not tell: biases of
    stacked experts, gains, temperatures, layer scales and position tables have two to four
    dimensions. Networks of timm may exclude more.
    """
    names: set[str] = set()
    spared: set[str] = set()
    for prefix, module in model.named_modules():
        start = f"{prefix}." if prefix else ""
        listed = getattr(module, "decayed", ())
        for name, parameter in module.named_parameters(recurse=False):
            weight = (name == "weight" or name.endswith("_weight")) and parameter.ndim > 1
            if name in listed or (weight and not isinstance(module, NORMS)):
                names.add(start + name)
        exclusions = getattr(module, "no_weight_decay", None)
        if callable(exclusions):
            spared |= {start + name for name in exclusions()}
    return names - spared


def load_optimizer(
    optimizer: torch.optim.Optimizer, saved: Mapping[str, Any], names: Sequence[Sequence[str]]
) -> None:
    """Load what ``state_dict`` returned, parameter by parameter by name.

    Moments come from ``saved``; weight decay, betas and scales from the optimizer, or a change of
    them would be printed but not applied.

    Args:
        optimizer: of ``build_optimizer``.
        saved: of an optimizer of the same parameters, in any groups.
        names: of the parameters in the groups of ``saved``; see ``saved_names``.

    Raises:
        ValueError, KeyError: of other parameters.
    """
    state = {
        name: saved["state"][index]
        for group, known in zip(saved["param_groups"], names, strict=True)
        for index, name in zip(group["params"], known, strict=True)
        if index in saved["state"]
    }
    now = optimizer.state_dict()
    places = {
        name: index
        for group in now["param_groups"]
        for index, name in zip(group["params"], group["names"], strict=True)
    }
    now["state"] = {places[name]: values for name, values in state.items()}
    # A run that continues at the end of an epoch saves again before a step sets the rate.
    rates = {
        name: group["lr"]
        for group, known in zip(saved["param_groups"], names, strict=True)
        for name in known
    }
    for group in now["param_groups"]:
        group["lr"] = rates[group["names"][0]]
    optimizer.load_state_dict(now)


def saved_names(
    saved: Mapping[str, Any], model: nn.Module, scales: Sequence[tuple[nn.Module, float]]
) -> list[list[str]]:
    """Return the names of the parameters in the groups of a saved optimizer state.

    Checkpoints written before groups had names were grouped by scale and by having more than one
    dimension.

    Args:
        saved: what ``state_dict`` returned.
        model: whose optimizer it is.
        scales: with which it was built.
    """
    groups = saved["param_groups"]
    if all("names" in group for group in groups):
        return [list(group["names"]) for group in groups]
    matrices = {name for name, parameter in model.named_parameters() if parameter.ndim > 1}
    return [names for _, names in _grouped(model, scales, matrices)]


def _grouped(
    model: nn.Module, scales: Sequence[tuple[nn.Module, float]], decay: Collection[str]
) -> list[tuple[float, list[str]]]:
    """Return (scale, names) of parameters that are treated alike, in the order of the model."""
    scale_of = {id(p): scale for part, scale in scales for p in part.parameters()}
    groups: dict[tuple[float, bool], list[str]] = {}
    for name, parameter in model.named_parameters():
        groups.setdefault((scale_of.get(id(parameter), 1.0), name in decay), []).append(name)
    return [(scale, names) for (scale, _), names in groups.items()]


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set every group to ``lr`` times its scale."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["scale"]
