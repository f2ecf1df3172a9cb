"""The preset: values for the settings that the user left open, by the length of the run.

Few optimizer steps want a high learning rate and weak augmentation, many want the opposite;
freezing the backbone first costs steps that a short run does not have. docs/results.md says which
of these values were measured, and on what.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from camoxpert.config import (
    AugmentConfig,
    Config,
    build_config,
    changed_settings,
    check_conflicts,
    get_setting,
)
from camoxpert.data.samples.draw import SCALED
from camoxpert.training.batching import effective_batch
from camoxpert.training.optim import starts_with_weights

GOVERNED = (
    *("optim.lr", "optim.backbone_lr_scale", "train.stage1_epochs"),
    "data.augment.strength",
)
"""Settings that a preset fills where they are unset."""
SHOWN = ("lr", "backbone x", "stage 1 epochs", "augmentation x")
"""Their names in the line that the user reads."""


@dataclass(frozen=True)
class Preset:
    """Values for runs of some length.

    Attributes:
        steps: optimizer steps below which ``auto`` takes it.
        lr: peak learning rate of the decoder over a backbone with weights.
        backbone: learning rate of a backbone with weights, as a multiple of the decoder's.
        lr_from_scratch: rate of all parts without weights.
        strength: of the augmentation.
    """

    steps: float
    lr: float
    backbone: float
    lr_from_scratch: float
    strength: float


PRESETS = {
    "tiny": Preset(steps=1_000, lr=5.5e-3, backbone=0.3, lr_from_scratch=3e-3, strength=0.0),
    "standard": Preset(steps=10_000, lr=3e-3, backbone=0.3, lr_from_scratch=2e-3, strength=1.0),
    "full": Preset(steps=math.inf, lr=5e-4, backbone=0.1, lr_from_scratch=1e-3, strength=1.0),
}


@dataclass(frozen=True)
class Recipe:
    """What was decided.

    Attributes:
        config: the settings with nothing left open.
        values: dotted path -> value of the settings in GOVERNED.
        reason: one line for the user.
    """

    config: Config
    values: dict[str, float]
    reason: str


def choose_recipe(
    asked: Config,
    num_images: int,
    *,
    processes: int = 1,
    kept: Mapping[str, float] | None = None,
) -> Recipe:
    """Fill in what the user left open.

    Args:
        asked: the user's settings.
        num_images: of TRAIN, validation included.
        processes: that train together.
        kept: values of the stopped run that this one continues: they stay as they are.

    Raises:
        ConfigError: what was set contradicts what the preset chose.
    """
    batch = effective_batch(asked.train)
    if asked.train.batch_size is not None and asked.train.effective_batch_size is None:
        batch *= processes
    steps = asked.train.epochs * math.ceil(max(num_images, 1) / batch)
    name, why = _choose(asked.train.preset, steps)
    preset = PRESETS[name]
    has_weights = starts_with_weights(asked.model)
    own = any(
        getattr(asked.data.augment, field) != getattr(AugmentConfig(), field) for field in SCALED
    )
    values: dict[str, float] = {
        "optim.lr": preset.lr if has_weights else preset.lr_from_scratch,
        "optim.backbone_lr_scale": preset.backbone if has_weights else 1.0,
        "train.stage1_epochs": 0,
        # Whoever sets a strength of augmentation means it.
        "data.augment.strength": 1.0 if own else preset.strength,
    }
    if kept:
        values |= {path: kept[path] for path in GOVERNED if path in kept}
        why = "as the stopped run had it"
    given = {path: get_setting(asked, path) for path in GOVERNED}
    values |= {path: value for path, value in given.items() if value is not None}
    shown = ", ".join(
        f"{word} {values[path]:g}{' (as asked)' if given[path] is not None else ''}"
        for path, word in zip(GOVERNED, SHOWN, strict=True)
    )
    if not values["train.stage1_epochs"]:
        shown += _of_stage2(asked)
    config = build_config({**changed_settings(asked), **values})
    # What was unset may contradict what was set: --min-lr 0.1.
    check_conflicts(config)
    return Recipe(config, values, f"{name} ({why}): {shown}")


def _of_stage2(asked: Config) -> str:
    """Return which settings of stage 2 hold for the whole run, as there is no stage 1."""
    given = (("lr", asked.optim.stage2_lr), ("batch-size", asked.train.stage2_batch_size))
    texts = [f"--stage2-{flag} {value:g} in place of --{flag}" for flag, value in given if value]
    return f"; there is no stage 1, so everything takes {' and '.join(texts)}" if texts else ""


def _choose(name: str, steps: int) -> tuple[str, str]:
    if name != "auto":
        return name, "as asked"
    fits = next(known for known, preset in PRESETS.items() if steps < preset.steps)
    return fits, f"about {steps} optimizer steps"


def recipe_of_older_version(config: Config) -> dict[str, float]:
    """Return what a run of a version without presets had where its settings are unset."""
    has_weights = starts_with_weights(config.model)
    old = {
        "optim.lr": 2.5e-4,
        "optim.backbone_lr_scale": 0.1 if has_weights else 1.0,
        "train.stage1_epochs": config.train.epochs // 4 if has_weights else 0,
        "data.augment.strength": 1.0,
    }
    given = {path: get_setting(config, path) for path in GOVERNED}
    return old | {path: value for path, value in given.items() if value is not None}
