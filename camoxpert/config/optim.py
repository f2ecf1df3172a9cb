"""The settings of the optimizer and its schedule."""

from __future__ import annotations

from dataclasses import dataclass

from camoxpert.config.schema import setting

SCHEDULERS = ("cosine", "poly", "linear", "step", "constant", "onecycle")
LR_SCALINGS = ("none", "linear", "sqrt")


@dataclass(frozen=True)
class OptimConfig:
    """AdamW and its schedule, a pure function of the optimizer step."""

    lr: float | None = setting(
        None, "peak learning rate of the decoder; unset: by --preset", flag="--lr", above=0
    )
    stage2_lr: float | None = setting(
        None, "peak learning rate of stage 2; unset: the same as --lr", flag="--stage2-lr", above=0
    )
    scale_lr: str = setting(
        "none",
        "scale the rate from --base-batch to the images of an optimizer step over all processes: "
        "linear (Goyal et al., 2017), or by the square root, as AdamW's theory has it",
        flag="--scale-lr",
        choices=LR_SCALINGS,
    )
    base_batch: int = setting(
        16, "images per step that --lr is meant for", flag="--base-batch", minimum=1
    )
    backbone_lr_scale: float | None = setting(
        None,
        "backbone learning rate over the decoder's; unset: by --preset with weights, 1 without",
        above=0,
    )
    router_bias_rate: float = setting(
        0.0,
        "balance the experts by a bias on the choice as well, moved by this much per step (0.001 "
        "is a good rate); 0: by the balance loss alone",
        flag="--router-bias-rate",
        minimum=0,
    )
    router_lr_scale: float = setting(
        0.1,
        "router learning rate over the decoder's; a fast router settles on a few experts",
        above=0,
    )
    weight_decay: float = setting(
        1e-4,
        "decoupled weight decay (of matrices and filters; not of norms, biases, gains, "
        "temperatures)",
        flag="--weight-decay",
        minimum=0,
    )
    betas: tuple[float, float] = setting((0.9, 0.999), "AdamW's betas")
    scheduler: str = setting(
        "cosine", "shape of the schedule", flag="--scheduler", choices=SCHEDULERS
    )
    min_lr: float = setting(
        1e-6, "learning rate at the end of each stage", flag="--min-lr", minimum=0
    )
    warmup_epochs: float = setting(
        1.0,
        "epochs of linear warm-up at the start of each stage",
        flag="--warmup-epochs",
        minimum=0,
    )
    clip_grad_norm: float = setting(
        1.0, "largest gradient norm; 0: no clipping", flag="--clip-grad-norm", minimum=0
    )
