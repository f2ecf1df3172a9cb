"""The settings tree: every setting with its type, default, range, flag and help text."""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass
from typing import Any

from camoxpert.config.data import DataConfig
from camoxpert.config.loss import LossConfig
from camoxpert.config.model import ModelConfig
from camoxpert.config.optim import OptimConfig
from camoxpert.config.run import RunConfig
from camoxpert.config.schema import Leaf, get_setting, walk
from camoxpert.config.train import TrainConfig


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
