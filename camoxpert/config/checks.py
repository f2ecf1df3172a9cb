"""What a setting may be: its type, its range, and settings that contradict each other."""

from __future__ import annotations

import math
import re
import types
import typing
from collections.abc import Mapping
from typing import Any, get_args, get_origin

from camoxpert.config.data import RGB, DataConfig
from camoxpert.config.guidance import EpisodeConfig, SupportConfig
from camoxpert.config.model import EXPERT_KINDS, ModelConfig
from camoxpert.config.optim import OptimConfig
from camoxpert.config.schema import Leaf
from camoxpert.config.train import TrainConfig
from camoxpert.config.tree import Config
from camoxpert.errors import ConfigError
from camoxpert.files import expand_user
from camoxpert.text import did_you_mean

TYPE_NAMES: Mapping[Any, str] = {
    int: "a whole number",
    float: "a number",
    str: "text",
    bool: "true or false",
}


MODALITY_NAME = re.compile("[a-z][a-z0-9]*")
NOT_MODALITIES = ("image", "mask", "split", "class", "name", "dataset")
"""Columns of a CSV that mean something else."""
MOST_MODALITIES = 4
"""Beside the photograph: 31 subsets are scored."""
PATHS = frozenset(
    (
        *("data.roots", "data.test_roots", "data.clean_list", "data.cache_dir"),
        *("data.teacher", "data.unlabeled", "data.synthetic", "data.negatives"),
        *("model.weights", "model.init_from", "train.resume", "run.dir"),
        *("model.support.weights", "data.episodes.references", "data.splits"),
    )
)
"""Settings in which a leading ``~`` is the home folder: no shell expands it in a file."""


def check_value(value: Any, leaf: Leaf) -> Any:
    """Return ``value`` in the type of the setting, or raise ConfigError with what is allowed."""
    value = coerce(value, leaf.type, leaf.path)
    if leaf.path in PATHS and value:
        several = isinstance(value, tuple)
        value = tuple(map(expand_user, value)) if several else expand_user(value)
    name = f"{leaf.path} ({leaf.flag})" if leaf.flag else leaf.path
    if leaf.choices and value not in leaf.choices:
        raise ConfigError(
            f"{name} must be one of {', '.join(leaf.choices)}; got {value}."
            f"{did_you_mean(str(value), leaf.choices)}"
        )
    if value is None or isinstance(value, (str, tuple)):
        return value
    if leaf.minimum is not None and value < leaf.minimum:
        raise ConfigError(f"{name} must be at least {leaf.minimum:g}; got {value:g}.")
    if leaf.maximum is not None and value > leaf.maximum:
        raise ConfigError(f"{name} must be at most {leaf.maximum:g}; got {value:g}.")
    if leaf.above is not None and value <= leaf.above:
        raise ConfigError(f"{name} must be above {leaf.above:g}; got {value:g}.")
    return value


def coerce(value: Any, kind: Any, path: str) -> Any:
    """Convert ``value`` to the declared type if nothing is lost, or raise ConfigError."""
    origin = get_origin(kind)
    if origin in (types.UnionType, typing.Union):
        # The program chooses what is unset: "auto" is a word for that.
        return None if value in (None, "auto") else coerce(value, get_args(kind)[0], path)
    if origin is tuple:
        members = get_args(kind)
        any_length = members[-1] is Ellipsis
        items = [value] if any_length and isinstance(value, (str, int, float)) else value
        if isinstance(items, (list, tuple)) and (any_length or len(items) == len(members)):
            return tuple(coerce(item, members[0], path) for item in items)
    elif kind is bool:
        if isinstance(value, bool):
            return value
    elif kind is int:
        if isinstance(value, int) and not isinstance(value, bool):
            return value
        if isinstance(value, float) and value.is_integer():
            return int(value)
    elif kind is float:
        number = _as_float(value)
        if number is not None:
            return number
    elif kind is str:
        # YAML 1.1 reads off and on as booleans, and some settings have these words as choices.
        if isinstance(value, bool):
            return "on" if value else "off"
        if isinstance(value, (str, int)):
            return str(value)
    raise ConfigError(f"{path} must be {_type_name(kind)}, got {value!r}.")


def _as_float(value: Any) -> float | None:
    if isinstance(value, str):
        # YAML 1.1 reads 3e-4 (no dot) as text; people write it all the time.
        try:
            value = float(value)
        except ValueError:
            return None
    if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
        return float(value)
    return None


def _type_name(kind: Any) -> str:
    if get_origin(kind) in (types.UnionType, typing.Union):
        return f"{_type_name(get_args(kind)[0])} or auto"
    if get_origin(kind) is tuple:
        return f"a list ({_type_name(get_args(kind)[0])} each)"
    return TYPE_NAMES.get(kind, str(kind))


def check_conflicts(config: Config) -> None:
    """Raise ConfigError for settings that contradict each other."""
    train, optim, loss = config.train, config.optim, config.loss
    _check_data(config.data)
    _check_model(config.model)
    _check_batches(train)
    _check_quick(config)
    _check_scaling(config)
    _check_modalities(config)
    if config.data.episodes != EpisodeConfig() and not config.model.support.encoder:
        changed = "--reference-data" if config.data.episodes.references else "data.episodes"
        raise ConfigError(
            f"{changed} is about reference images, and no encoder of them is named. Add "
            f"--support-encoder NAME, or leave it out."
        )
    if train.stage1_epochs is not None and train.stage1_epochs > train.epochs:
        raise ConfigError(
            f"--stage1-epochs {train.stage1_epochs} is more than --epochs {train.epochs}; "
            f"--epochs counts both stages together. Lower the first or raise the second."
        )
    for name, low_lr in (("--lr", optim.lr), ("--stage2-lr", optim.stage2_lr)):
        if low_lr is not None and optim.min_lr > low_lr:
            raise ConfigError(
                f"--min-lr {optim.min_lr:g} is above {name} {low_lr:g}; the schedule ends at "
                f"--min-lr."
            )
    if not all(0 <= beta < 1 for beta in optim.betas):
        raise ConfigError(
            f"optim.betas {list(optim.betas)}: each is at least 0 and less than 1, as in "
            f"[0.9,0.999]."
        )
    if train.expert_dropout and config.model.num_experts <= config.model.top_k:
        raise ConfigError(
            f"train.expert_dropout {train.expert_dropout:g} hides an expert, and --num-experts "
            f"{config.model.num_experts} --top-k {config.model.top_k} can spare none. Raise the "
            f"first, or leave it out."
        )
    if not (loss.structure or loss.bce or loss.iou or loss.dice):
        raise ConfigError(
            "All segmentation losses have weight 0 (loss.structure, .bce, .iou, .dice). Give one a "
            "weight."
        )
    if config.data.unlabeled and not (config.data.teacher and loss.teacher):
        missing = "loss.teacher is 0" if config.data.teacher else "there is no --teacher"
        raise ConfigError(
            f"--unlabeled {config.data.unlabeled}: images without masks learn from a teacher "
            f"alone, and {missing}. Name a model or a folder of maps with --teacher, or leave "
            f"--unlabeled out."
        )
    share = config.data.negative_share
    unused = config.model.presence == "off" and not config.data.negatives
    if unused and share != DataConfig().negative_share:
        raise ConfigError(
            f"--negative-share {share:g} is for images without an object, which are not told apart "
            f"with --presence off. Name a folder of them with --negatives, or leave out one of the "
            f"two."
        )
    if train.early_stopping and config.data.val_fraction == 0:
        raise ConfigError(
            "--early-stopping needs a validation split; --val-fraction 0 leaves none."
        )
    if (
        train.device not in ("auto", "cpu", "cuda", "mps")
        and not train.device.removeprefix("cuda:").isdigit()
    ):
        raise ConfigError(f"--device {train.device}: use auto, cpu, cuda, cuda:N or mps.")


def _check_modalities(config: Config) -> None:
    data, names = config.data, config.data.beside_rgb
    for name in names:
        if not MODALITY_NAME.fullmatch(name) or name in NOT_MODALITIES:
            raise ConfigError(
                f"--modalities {name}: the name of a modality is that of its folder or CSV column: "
                f"small letters and digits, and none of {', '.join(NOT_MODALITIES)}."
            )
    if len(set(names)) < len(names) or len(names) > MOST_MODALITIES:
        raise ConfigError(
            f"--modalities {' '.join(data.modalities)}: name up to {MOST_MODALITIES} of them "
            f"beside {RGB}, each once."
        )
    if not names and data.modality_dropout != DataConfig().modality_dropout:
        raise ConfigError(
            f"data.modality_dropout {data.modality_dropout:g} is for modalities beside the "
            f"photograph, and none is named. Name them with --modalities, or leave it out."
        )
    if config.train.keep_rgb and not (names and config.model.init_from):
        missing = "--init-from" if names else "--modalities"
        raise ConfigError(
            f"--keep-rgb keeps what the model of --init-from finds in photographs and trains the "
            f"parts of --modalities alone, and there is no {missing}. Add it, or leave --keep-rgb "
            f"out."
        )
    if config.train.keep_rgb and config.optim.router_bias_rate:
        raise ConfigError(
            f"--keep-rgb keeps the choice of experts for photographs, and --router-bias-rate "
            f"{config.optim.router_bias_rate:g} would move it. Leave out one of the two."
        )
    beside = {
        f"--decoder {config.model.decoder}": config.model.decoder != "moe",
        f"--support-encoder {config.model.support.encoder}": bool(config.model.support.encoder),
        "data.augment.compose": data.augment.compose > 0,
    }
    for setting in (setting for setting, given in beside.items() if names and given):
        raise ConfigError(
            f"{setting} does not work with --modalities {' '.join(data.modalities)}: it knows "
            f"photographs alone. Leave one of the two out."
        )


def _check_data(data: DataConfig) -> None:
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
    if not data.synthetic and data.synthetic_share != DataConfig().synthetic_share:
        raise ConfigError(
            f"--synthetic-share {data.synthetic_share:g} is for made data, and none is named. Name "
            f"its folder with --synthetic, or leave it out."
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
    if data.augment.corrupt and data.augment_on == "device":
        raise ConfigError(
            f"--augment-on device: data.augment.corrupt {data.augment.corrupt:g} needs the CPU, "
            f"where the JPEG codec is. Use --augment-on cpu, or auto."
        )
    if data.source_size is not None and data.source_size < data.img_size:
        raise ConfigError(
            f"data.source_size {data.source_size} is less than --img-size {data.img_size}: pairs "
            f"would be shrunk and enlarged again."
        )


def _check_model(model: ModelConfig) -> None:
    if model.weights and model.init_from:
        raise ConfigError(
            f"--weights {model.weights} starts the backbone and --init-from {model.init_from} the "
            f"whole model. Give one of them."
        )
    support = model.support
    if not support.encoder and support != SupportConfig():
        changed = "--support-weights" if support.weights else "model.support"
        raise ConfigError(
            f"{changed} is for the encoder of reference images, and none is named. Add "
            f"--support-encoder NAME, or leave it out."
        )
    if model.upcycle_noise and not model.init_from:
        raise ConfigError(
            f"model.upcycle_noise {model.upcycle_noise:g} is for the copies of an expert that "
            f"--init-from makes, and no model is named. Add --init-from, or leave it out."
        )
    for name, value in (("model.width", model.width), ("model.detail_width", model.detail_width)):
        if value % 8:
            raise ConfigError(f"{name} must be a multiple of 8; {value} is not.")
    if model.top_k > model.num_experts:
        raise ConfigError(
            f"--top-k {model.top_k} is more than --num-experts {model.num_experts}: an image "
            f"cannot use more experts than there are. Lower --top-k or raise --num-experts."
        )
    if model.routing_grid > 1 and model.num_experts == 1:
        raise ConfigError(
            f"model.routing_grid {model.routing_grid} routes regions, and with --num-experts 1 "
            f"there is nothing to choose. Raise --num-experts, or leave it out."
        )
    if model.router_norm != "none" and model.num_experts == 1:
        raise ConfigError(
            f"--router-norm {model.router_norm} is for a choice among experts, and with "
            f"--num-experts 1 there is none. Raise --num-experts, or leave it out."
        )
    for kind in (*model.experts, *([model.shared_expert] if model.shared_expert else [])):
        if kind not in EXPERT_KINDS:
            raise ConfigError(
                f"model: unknown expert kind {kind!r}.{did_you_mean(kind, EXPERT_KINDS)} Known: "
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
            "--dispatch gathered needs experts of one kind in stacked weights: add --expert-family "
            "uniform, or leave the dispatch to auto."
        )
    if model.experts and model.expert_family == "uniform":
        raise ConfigError(
            "model.experts names specialist kinds, but --expert-family is uniform. Give one of "
            "them."
        )


def _check_batches(train: TrainConfig) -> None:
    if train.batch_size is not None and train.effective_batch_size is None:
        return
    asked = "--batch-size auto" if train.batch_size is None else "--effective-batch-size"
    if train.accumulation_steps != 1:
        raise ConfigError(
            f"{asked} chooses the accumulation itself; --accumulation-steps "
            f"{train.accumulation_steps} contradicts it. Set the images per optimizer step with "
            f"--effective-batch-size, and leave --accumulation-steps at 1."
        )
    if train.stage2_batch_size is not None:
        raise ConfigError(
            f"{asked} holds for both stages; --stage2-batch-size {train.stage2_batch_size} "
            f"contradicts it. Give one of them."
        )


def _check_quick(config: Config) -> None:
    quick = config.train.quick
    if quick.overfit_batches is None:
        return
    for flag, other in (
        (f"--data-fraction {quick.data_fraction:g}", quick.data_fraction < 1),
        (f"--limit-batches {quick.limit_batches}", quick.limit_batches is not None),
    ):
        if other:
            raise ConfigError(
                f"--overfit-batches {quick.overfit_batches} chooses the images of the run itself; "
                f"{flag} contradicts it. Give one of them."
            )


def _check_scaling(config: Config) -> None:
    optim = config.optim
    if optim.scale_lr == "none":
        if optim.base_batch != OptimConfig().base_batch:
            raise ConfigError(
                f"--base-batch {optim.base_batch} is the batch that --lr was meant for, and no "
                f"scaling is asked for. Add --scale-lr linear or sqrt, or leave it out."
            )
        return
    if optim.stage2_lr is not None:
        raise ConfigError(
            f"--scale-lr {optim.scale_lr} computes the rate of both stages from their batches; "
            f"--stage2-lr {optim.stage2_lr:g} contradicts it. Give one of them."
        )
