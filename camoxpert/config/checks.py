"""Settings that contradict each other, and the nearest name to a typo."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

from camoxpert.config.tree import EXPERT_KINDS, Config
from camoxpert.errors import ConfigError


def nearest(name: str, known: Sequence[str]) -> str:
    """Return `` Did you mean X?`` for the closest known name, or nothing."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f" Did you mean {close[0]}?" if close else ""


def check_conflicts(config: Config) -> None:
    """Raise ConfigError for settings that contradict each other."""
    data, model, train, optim = config.data, config.model, config.train, config.optim
    if data.img_size % 32:
        low = data.img_size // 32 * 32
        raise ConfigError(
            f"--img-size must be a multiple of 32; {data.img_size} is not. Use {low} or {low + 32}."
        )
    if any(not 0.25 <= factor <= 4 for factor in data.multi_scale):
        raise ConfigError(
            f"--multi-scale: factors of --img-size lie between 0.25 and 4; got "
            f"{', '.join(f'{factor:g}' for factor in data.multi_scale)}."
        )
    if data.strict_cache and data.cache in ("none", "ram"):
        raise ConfigError(
            f"--strict-cache asks for a disk cache and --cache {data.cache} rules it out. Give "
            f"one of them."
        )
    if (
        data.cache == "ram"
        and data.start_method in ("spawn", "forkserver")
        and data.num_workers != 0
    ):
        raise ConfigError(
            f"--cache ram lives in this process, which workers started by {data.start_method} do "
            f"not share. Use --cache disk, data.start_method=fork or --num-workers 0."
        )
    if data.source_size is not None and data.source_size < data.img_size:
        raise ConfigError(
            f"data.source_size {data.source_size} is less than --img-size {data.img_size}: pairs "
            f"would be shrunk and enlarged again."
        )
    for name, value in (("model.width", model.width), ("model.detail_width", model.detail_width)):
        if value % 8:
            raise ConfigError(f"{name} must be a multiple of 8; {value} is not.")
    if model.top_k > model.num_experts:
        raise ConfigError(
            f"--top-k {model.top_k} is more than --num-experts {model.num_experts}: an image "
            f"cannot use more experts than there are. Lower --top-k or raise --num-experts."
        )
    for kind in (*model.experts, *([model.shared_expert] if model.shared_expert else [])):
        if kind not in EXPERT_KINDS:
            raise ConfigError(
                f"model: unknown expert kind {kind!r}.{nearest(kind, EXPERT_KINDS)} Known: "
                f"{', '.join(EXPERT_KINDS)}."
            )
    if len(model.experts) > model.num_experts:
        raise ConfigError(
            f"model.experts names {len(model.experts)} kinds but --num-experts is "
            f"{model.num_experts}; some would never exist. Raise --num-experts or shorten the "
            f"list."
        )
    if model.dispatch == "gathered" and model.expert_family != "uniform":
        raise ConfigError(
            "--dispatch gathered needs like experts in stacked weights: add --expert-family "
            "uniform, or leave the dispatch to auto."
        )
    if model.experts and model.expert_family == "uniform":
        raise ConfigError(
            "model.experts names specialist kinds, but --expert-family is uniform. Give one of "
            "them."
        )
    if train.stage1_epochs is not None and train.stage1_epochs > train.epochs:
        raise ConfigError(
            f"--stage1-epochs {train.stage1_epochs} is more than --epochs {train.epochs}; "
            f"--epochs counts both stages together. Lower the first or raise the second."
        )
    if train.batch_size is None or train.effective_batch_size is not None:
        asked = "--batch-size auto" if train.batch_size is None else "--effective-batch-size"
        if train.accumulation_steps != 1:
            raise ConfigError(
                f"{asked} chooses the accumulation itself; --accumulation-steps "
                f"{train.accumulation_steps} contradicts it. Say how many images an optimizer step "
                f"takes with --effective-batch-size, and leave --accumulation-steps at 1."
            )
        if train.stage2_batch_size is not None:
            raise ConfigError(
                f"{asked} holds for both stages; --stage2-batch-size {train.stage2_batch_size} "
                f"contradicts it. Give one of them."
            )
    if not train.amp and train.precision in ("bf16", "fp16"):
        raise ConfigError(
            f"--no-amp and --precision {train.precision} contradict each other. Give one of them."
        )
    if train.resume_from and train.resume == "never":
        raise ConfigError(
            "--resume never and --resume-from contradict each other. Give one of them."
        )
    for name, low_lr in (("--lr", optim.lr), ("--stage2-lr", optim.stage2_lr)):
        if low_lr is not None and optim.min_lr > low_lr:
            raise ConfigError(
                f"--min-lr {optim.min_lr:g} is above {name} {low_lr:g}; the schedule ends at "
                f"--min-lr."
            )
    loss = config.loss
    if not (loss.structure or loss.bce or loss.iou or loss.dice):
        raise ConfigError(
            "All segmentation losses have weight 0 (loss.structure, .bce, .iou, .dice). Give one a "
            "weight."
        )
    if train.early_stopping and data.val_fraction == 0:
        raise ConfigError(
            "--early-stopping needs a validation split; --val-fraction 0 leaves none."
        )
    if (
        train.device not in ("auto", "cpu", "cuda", "mps")
        and not train.device.removeprefix("cuda:").isdigit()
    ):
        raise ConfigError(f"--device {train.device}: use auto, cpu, cuda, cuda:N or mps.")
