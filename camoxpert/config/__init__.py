"""Every setting of the product: a typed tree with its defaults, and the one way to fill it.

``load_config`` merges, in this order, the defaults, a YAML file, command-line flags and dotted
overrides (``optim.lr=3e-4``), and returns frozen dataclasses.
"""

from camoxpert.config.aliases import ALIASES
from camoxpert.config.augment import AugmentConfig
from camoxpert.config.checks import check_conflicts
from camoxpert.config.data import DataConfig
from camoxpert.config.load import (
    build_config,
    config_from_dict,
    load_config,
    read_yaml,
    settings_of,
    to_yaml,
)
from camoxpert.config.loss import LossConfig
from camoxpert.config.model import DECODERS, DISPATCH_NAMES, EXPERT_KINDS, ModelConfig
from camoxpert.config.optim import SCHEDULERS, OptimConfig
from camoxpert.config.quick import QuickConfig, quick_name, quick_words
from camoxpert.config.run import RunConfig
from camoxpert.config.schema import Leaf, get_setting, to_dict
from camoxpert.config.train import SELECTION_MEASURES, TrainConfig
from camoxpert.config.tree import Config, changed_settings, leaves

__all__ = [
    "ALIASES",
    "DECODERS",
    "DISPATCH_NAMES",
    "EXPERT_KINDS",
    "SCHEDULERS",
    "SELECTION_MEASURES",
    "AugmentConfig",
    "Config",
    "DataConfig",
    "Leaf",
    "LossConfig",
    "ModelConfig",
    "OptimConfig",
    "QuickConfig",
    "RunConfig",
    "TrainConfig",
    "build_config",
    "changed_settings",
    "check_conflicts",
    "config_from_dict",
    "get_setting",
    "leaves",
    "load_config",
    "quick_name",
    "quick_words",
    "read_yaml",
    "settings_of",
    "to_dict",
    "to_yaml",
]
