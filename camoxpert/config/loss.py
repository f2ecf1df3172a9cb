"""The settings of the loss."""

from __future__ import annotations

from dataclasses import dataclass

from camoxpert.config.schema import setting


@dataclass(frozen=True)
class LossConfig:
    """Weights of the loss terms; every term takes logits and is computed in float32."""

    structure: float = setting(
        1.0, "weight of the structure loss (weighted BCE + weighted IoU)", minimum=0
    )
    structure_weighting: bool = setting(
        True, "false: the unweighted form many public scripts compute by accident"
    )
    bce: float = setting(0.0, "weight of plain binary cross entropy", minimum=0)
    iou: float = setting(0.0, "weight of the soft IoU loss", minimum=0)
    dice: float = setting(0.0, "weight of the soft Dice loss", minimum=0)
    teacher: float = setting(
        1.0, "weight of the cross entropy to the maps of --teacher; 0: they are not used", minimum=0
    )
    size_balance: float = setting(
        0.0,
        "extra weight of images whose object covers under 2 % or over 80 % of the pixels (1: twice "
        "the weight of the others); the mean weight of a step stays 1",
        minimum=0,
    )
    uncertainty: float = setting(
        0.0,
        "weight of the uncertainty loss, 1 - |2p - 1|^2 (ZoomNeXt); it rises from 0 to this over "
        "the run",
        minimum=0,
    )
    presence: float = setting(
        1.0, "weight of the presence head's cross entropy, which reaches the head alone", minimum=0
    )
    deep_supervision: bool = setting(
        True, "also train the side heads, one per decoder level", flag="--deep-supervision"
    )
    side_weight: float = setting(0.4, "weight of each side head's loss", minimum=0)
    balance: float = setting(0.01, "weight of the load-balance loss", minimum=0)
    router_z: float = setting(0.001, "weight of the router z-loss", minimum=0)
