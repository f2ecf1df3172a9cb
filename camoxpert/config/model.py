"""The settings of the network."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from camoxpert.config.guidance import SupportConfig
from camoxpert.config.schema import setting

EXPERT_KINDS = ("texture", "attention", "hybrid", "frequency", "edge", "semantic", "contrast")
DISPATCH_NAMES = ("auto", "loop", "sorted", "gathered", "dense")
DECODERS = ("moe", "unet", "fpn", "deeplabv3plus", "upernet", "segformer")


@dataclass(frozen=True)
class ModelConfig:
    """The network: backbone, decoder and experts."""

    backbone: str = setting(
        "edgenext_base", "any timm backbone with a four-level pyramid", flag="--backbone"
    )
    pretrained: bool = setting(
        True, "start from timm's ImageNet weights (downloads)", flag="--pretrained"
    )
    weights: str = setting(
        "", "backbone weights file (.pth, .pt, .safetensors), used instead", flag="--weights"
    )
    init_from: str = setting(
        "",
        "start from an own model (a run, a checkpoint, a folder or file of shared weights, or "
        "hf:USER/NAME): all that fits is taken, what does not is listed",
        flag="--init-from",
    )
    upcycle_noise: float = setting(
        0.0,
        "noise on each copy where --init-from turns one expert per level into several of its kind, "
        "in standard deviations of the copied tensor",
        minimum=0,
    )
    decoder: str = setting(
        "moe",
        "moe: the mixture of experts; the others are those of segmentation-models-pytorch, to "
        "compare with (extra `peers`); settings of levels and experts do not reach them",
        flag="--decoder",
        choices=DECODERS,
    )
    drop_path: float = setting(0.0, "stochastic depth rate of the backbone", minimum=0, maximum=0.9)
    layer_scale_init: float | None = setting(
        None,
        "initial layer scale of the backbone's blocks; unset: timm's value, or 0.1 without weights",
        above=0,
    )
    width: int = setting(96, "channels of every decoder level, a multiple of 8", minimum=8)
    num_experts: int = setting(7, "experts per decoder level", flag="--num-experts", minimum=1)
    top_k: int = setting(2, "experts each image uses per level", flag="--top-k", minimum=1)
    expert_family: str = setting(
        "specialist",
        "specialist: experts of different kinds, one for each cue; uniform: experts of one kind "
        "that differ in receptive field, in stacked weights: no host sync, compiled as one graph",
        flag="--expert-family",
        choices=("specialist", "uniform"),
    )
    routing: str = setting(
        "lateral",
        "features a level routes on: lateral, its own (all levels decided at once, one host sync); "
        "fused, with those from above (one sync per level)",
        flag="--routing",
        choices=("lateral", "fused"),
    )
    router_norm: str = setting(
        "none",
        "batch: standardise each expert's logits over the images of a micro-batch, in evaluation "
        "by running statistics, so that none is ahead for all images and content decides; none: "
        "logits as they are",
        flag="--router-norm",
        choices=("none", "batch"),
    )
    routing_grid: int = setting(
        1,
        "route regions: each image in up to this many rows and columns of cells, as far as cells "
        "are 4 pixels of a level's map; 1: whole images",
        minimum=1,
        maximum=16,
    )
    experts: tuple[str, ...] = setting(
        (),
        f"specialist kinds in order, repeated up to num_experts; empty: {', '.join(EXPERT_KINDS)}",
    )
    shared_expert: str = setting(
        "", "kind of an expert that every image uses besides its chosen ones; empty: none"
    )
    expert_expansion: float = setting(
        1.0, "width of an expert's hidden features over the decoder width", above=0
    )
    dispatch: str = setting(
        "auto", "how images reach their experts", flag="--dispatch", choices=DISPATCH_NAMES
    )
    presence: str = setting(
        "auto",
        "a head that says whether an image holds any object at all; auto: on when the training "
        "data has images without objects",
        flag="--presence",
        choices=("auto", "on", "off"),
    )
    detail_width: int = setting(
        16,
        "channels of the stride-2 detail branch that sharpens outlines, a multiple of 8; 0: none",
        minimum=0,
    )
    support: SupportConfig = dataclasses.field(default_factory=SupportConfig)
