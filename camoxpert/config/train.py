"""The settings of the training loop."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from camoxpert.config.quick import QuickConfig
from camoxpert.config.schema import setting

PRESET_NAMES = ("auto", "tiny", "standard", "full")
SELECTION_MEASURES = ("wFmeasure", "Smeasure", "meanEm", "meanFm", "IoU", "Dice", "MAE")


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
    keep_rgb: bool = setting(
        False,
        "train the parts of --modalities alone: a photograph alone stays exactly what the model of "
        "--init-from finds in it",
        flag="--keep-rgb",
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
    quick: QuickConfig = dataclasses.field(default_factory=QuickConfig)
