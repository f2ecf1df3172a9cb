"""The settings tree: every setting with its type, default, range, flag and help text."""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass
from typing import Any

from camoxpert.config.augment import AugmentConfig
from camoxpert.config.guidance import EpisodeConfig, SupportConfig
from camoxpert.config.loss import LossConfig
from camoxpert.config.run import RunConfig
from camoxpert.config.schema import Leaf, get_setting, setting, walk

EXPERT_KINDS = ("texture", "attention", "hybrid", "frequency", "edge", "semantic", "contrast")
DISPATCH_NAMES = ("auto", "loop", "sorted", "gathered", "dense")
DECODERS = ("moe", "unet", "fpn", "deeplabv3plus", "upernet", "segformer")
SCHEDULERS = ("cosine", "poly", "linear", "step", "constant", "onecycle")
PRESET_NAMES = ("auto", "tiny", "standard", "full")
SELECTION_MEASURES = ("wFmeasure", "Smeasure", "meanEm", "meanFm", "IoU", "Dice", "MAE")


@dataclass(frozen=True)
class DataConfig:
    """Where samples come from and how they reach the model."""

    roots: tuple[str, ...] = setting(
        (), "training data: one or more data set folders or CSV files", flag="--dataset-path"
    )
    test_roots: tuple[str, ...] = setting(
        (),
        "more test sets to score when training ends, beside those that come with the training data",
        flag="--test-data",
    )
    teacher: str = setting(
        "",
        "soft maps to learn from beside the masks: those of an own model (a run, a checkpoint, "
        "shared weights), made once and kept in the cache folder, or a folder of any model's maps",
        flag="--teacher",
    )
    unlabeled: str = setting(
        "",
        "folder of images without masks that join the training; they learn from --teacher alone",
        flag="--unlabeled",
    )
    unlabeled_share: float = setting(
        0.5,
        "share of a batch that --unlabeled may take; an epoch sees each of these images at most "
        "once",
        above=0,
        maximum=0.95,
    )
    synthetic: tuple[str, ...] = setting(
        (),
        "made data that joins the training: one or more data set folders, as `synthesize` writes "
        "them; validation and tests stay real",
        flag="--synthetic",
    )
    synthetic_share: float = setting(
        0.3,
        "share of the images with masks in a batch that --synthetic may take; an epoch sees every "
        "real image once, and each made one at most once",
        flag="--synthetic-share",
        above=0,
        maximum=0.95,
    )
    negatives: tuple[str, ...] = setting(
        (),
        "images without any hidden object that join the training: one or more folders, without "
        "masks; part of them validates and calibrates",
        flag="--negatives",
    )
    negative_share: float = setting(
        0.3,
        "share of the labelled images in a batch that images without an object may take (0.25 to "
        "0.5 serve the presence head); an epoch sees each of them at most once",
        flag="--negative-share",
        above=0,
        maximum=0.95,
    )
    calibration_fraction: float = setting(
        0.05,
        "share of TRAIN, of either kind, set aside to calibrate the presence head after training: "
        "at least 32 images of a kind, at most a quarter of them; 0: not calibrated",
        minimum=0,
        maximum=0.5,
    )
    layout: str = setting(
        "auto", "name of a known layout, or auto to recognise it", flag="--layout"
    )
    noncam: str = setting(
        "exclude",
        "COD10K images without a camouflaged object (their masks are black)",
        flag="--noncam",
        choices=("exclude", "include"),
    )
    resize: str = setting(
        "error",
        "a mask of another size than its image: refused, or resized with it (bilinear)",
        flag="--resize",
        choices=("error", "bilinear"),
    )
    clean_list: str = setting(
        "",
        "CSV of images to leave out (columns dataset, split, name), as doctor writes it",
        flag="--clean-list",
    )
    allow_outside: bool = setting(
        False,
        "a CSV may name files outside its own folder; only for a CSV you trust",
        flag="--allow-outside",
    )
    val_fraction: float = setting(
        0.1,
        "share of TRAIN set aside to choose the best checkpoint, unless the data has a validation "
        "split; test sets never choose anything. "
        "0: keep the last",
        flag="--val-fraction",
        minimum=0,
        maximum=0.5,
    )
    group_copies: bool = setting(
        True,
        "keep copies of a picture (identical files, or re-encoded, resized, cropped or flipped "
        "ones) on one side of the validation split",
        flag="--group-copies",
    )
    img_size: int = setting(
        352, "side of the square training image, a multiple of 32", flag="--img-size", minimum=32
    )
    num_workers: int | None = setting(
        None, "data worker processes; unset: chosen from the cores", flag="--num-workers", minimum=0
    )
    persistent_workers: bool = setting(True, "keep the workers between epochs")
    start_method: str = setting(
        "auto",
        "how data workers start",
        choices=("auto", "fork", "spawn", "forkserver"),
    )
    worker_timeout: float = setting(
        300.0,
        "seconds without a batch until data workers count as hung and are restarted; 0: never",
        minimum=0,
    )
    unreadable: str = setting(
        "error",
        "unreadable images and masks: an error, or skip: replaced by the next readable pair (left "
        "out in validation)",
        flag="--unreadable",
        choices=("error", "skip"),
    )
    max_unreadable: float = setting(
        0.01,
        "share of the images that may be unreadable under --unreadable skip; one always may",
        minimum=0,
        maximum=1,
    )
    cache: str = setting(
        "auto",
        "where decoded training pairs are kept: on disk, in memory, or nowhere (none)",
        flag="--cache",
        choices=("auto", "none", "ram", "disk"),
    )
    cache_dir: str = setting(
        "",
        "folder of the disk caches; empty: $CAMOXPERT_CACHE, or camoxpert in the user's cache "
        "folder",
        flag="--cache-dir",
    )
    strict_cache: bool = setting(
        False, "a disk cache that is missing or stale is an error", flag="--strict-cache"
    )
    augment_on: str = setting(
        "auto",
        "where samples are augmented: in the data workers (cpu) or in batches on the training "
        "device (device); auto: device on CUDA",
        flag="--augment-on",
        choices=("auto", "cpu", "device"),
    )
    multi_scale: tuple[float, ...] = setting(
        (),
        "training sizes as factors of --img-size, one drawn per batch, for example 0.75 1.0 1.25",
        flag="--multi-scale",
    )
    source_size: int | None = setting(
        None,
        "side to which pairs are decoded before they are augmented; more than the training size "
        "leaves detail to zoom into; unset: the largest training size",
        minimum=32,
    )
    prefetch_factor: int = setting(4, "batches each worker prepares ahead", minimum=1)
    pin_memory: bool = setting(True, "page-locked batches for faster copies (CUDA only)")
    max_pixels: int = setting(
        50_000_000,
        "larger images are refused from their header",
        flag="--max-pixels",
        minimum=1,
    )
    augment: AugmentConfig = dataclasses.field(default_factory=AugmentConfig)
    episodes: EpisodeConfig = dataclasses.field(default_factory=EpisodeConfig)


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
        "start from an own model (a run, a checkpoint, a folder or file of shared weights): all "
        "that fits is taken, what does not is listed",
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


@dataclass(frozen=True)
class OptimConfig:
    """AdamW and its schedule, a pure function of the optimizer step."""

    lr: float | None = setting(
        None, "peak learning rate of the decoder; unset: by --preset", flag="--lr", above=0
    )
    stage2_lr: float | None = setting(
        None, "peak learning rate of stage 2; unset: the same as --lr", flag="--stage2-lr", above=0
    )
    backbone_lr_scale: float | None = setting(
        None,
        "backbone learning rate over the decoder's; unset: by --preset with weights, 1 without",
        above=0,
    )
    router_bias_rate: float = setting(
        0.0,
        "balance the experts by a bias on the choice as well, moved by this much per step (0.01 is "
        "a good rate); 0: by the balance loss alone",
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


@dataclass(frozen=True)
class TrainConfig:
    """Length, batches, precision and memory of a run, and when it stops."""

    preset: str = setting(
        "auto",
        "values for what is left unset, by the length of the run: --lr, the backbone's rate, "
        "--stage1-epochs, the strength of augmentation; auto: by the number of optimizer steps",
        flag="--preset",
        choices=PRESET_NAMES,
    )
    epochs: int = setting(120, "epochs of both stages together", flag="--epochs", minimum=1)
    stage1_epochs: int | None = setting(
        None,
        "epochs with the backbone frozen; unset: by --preset",
        flag="--stage1-epochs",
        minimum=0,
    )
    progressive_unfreeze: bool = setting(
        False,
        "stage 2 unfreezes the backbone level by level, deepest first",
        flag="--progressive-unfreeze",
    )
    batch_size: int | None = setting(
        16,
        "images per micro-batch; auto: the largest that fits the memory, with as many "
        "micro-batches as the effective batch needs",
        flag="--batch-size",
        minimum=1,
    )
    effective_batch_size: int | None = setting(
        None,
        "images per optimizer step; unset: --batch-size x --accumulation-steps (16 with "
        "--batch-size auto)",
        flag="--effective-batch-size",
        minimum=1,
    )
    stage2_batch_size: int | None = setting(
        None, "micro-batch of stage 2; unset: the same", flag="--stage2-batch-size", minimum=1
    )
    accumulation_steps: int = setting(
        1, "micro-batches per optimizer step", flag="--accumulation-steps", minimum=1
    )
    precision: str = setting(
        "auto",
        "number format of the forward pass; auto: what the hardware gains from",
        flag="--precision",
        choices=("auto", "fp32", "bf16", "fp16"),
    )
    tf32: bool = setting(True, "TF32 matrix products on Ampere and later", flag="--tf32")
    compile: bool = setting(False, "torch.compile the network", flag="--compile")
    channels_last: bool = setting(False, "channels-last memory format", flag="--channels-last")
    gradient_checkpointing: str = setting(
        "auto",
        "recompute activations to save memory; bare flag = on; auto decides from measured memory",
        flag="--gradient-checkpointing",
        choices=("auto", "on", "off"),
        bare="on",
    )
    router_warmup: int = setting(
        0,
        "first epochs in which every image passes through all experts, so that each learns before "
        "the router settles; they cost num_experts / top_k of the experts' time",
        flag="--router-warmup",
        minimum=0,
    )
    expert_dropout: float = setting(
        0.0,
        "probability, for each image and level, that training hides one expert at random from the "
        "router",
        minimum=0,
        maximum=1,
    )
    use_ema: bool = setting(
        True, "evaluate and keep an exponential moving average", flag="--use-ema"
    )
    ema_decay: float = setting(
        0.9999,
        "largest EMA decay; warmed up from the first step",
        flag="--ema-decay",
        minimum=0,
        maximum=1,
    )
    early_stopping: int = setting(
        0,
        "stop after this many epochs without a better score; 0: never",
        flag="--early-stopping",
        minimum=0,
    )
    select: str = setting(
        "wFmeasure",
        "measure on the validation split that chooses the best checkpoint",
        flag="--select",
        choices=SELECTION_MEASURES,
    )
    validate_every: int = setting(
        1, "epochs between validations", flag="--validate-every", minimum=1
    )
    device: str = setting("auto", "auto, cpu, cuda or cuda:N", flag="--device")
    seed: int = setting(42, "seed of everything random", flag="--seed", minimum=0)
    max_skipped_steps: int = setting(
        10, "non-finite steps in a row that are skipped before giving up", minimum=0
    )
    max_hours: float | None = setting(
        None, "save and stop with code 75 after this time", flag="--max-hours", above=0
    )
    resume: str = setting(
        "auto",
        "auto: continue a stopped run of the same command; never; or a checkpoint or run folder",
        flag="--resume",
    )
    allow_data_change: bool = setting(
        False,
        "continue a run although its training data changed; the epoch in progress restarts",
        flag="--allow-data-change",
    )
    process_timeout: float = setting(
        600.0, "seconds that the ranks of torchrun wait for each other", above=0
    )


@dataclass(frozen=True)
class Config:
    """The whole tree."""

    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    loss: LossConfig = dataclasses.field(default_factory=LossConfig)
    optim: OptimConfig = dataclasses.field(default_factory=OptimConfig)
    train: TrainConfig = dataclasses.field(default_factory=TrainConfig)
    run: RunConfig = dataclasses.field(default_factory=RunConfig)


@functools.cache
def leaves() -> tuple[Leaf, ...]:
    """Return every setting of the tree in declaration order."""
    return tuple(walk(Config))


def changed_settings(config: Config) -> dict[str, Any]:
    """Return dotted path -> value of every setting that differs from its default."""
    return {
        leaf.path: value
        for leaf in leaves()
        if (value := get_setting(config, leaf.path)) != leaf.default
    }
