"""The backbone: any timm network that yields a pyramid at strides 4, 8, 16 and 32.

An unknown name is an error that names the closest one; it never selects another backbone.
"""

from __future__ import annotations

import logging
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from camoxpert.config import ModelConfig
from camoxpert.errors import ConfigError
from camoxpert.models.weights import load_weights, offline_if_unreachable
from camoxpert.text import did_you_mean

STRIDES = (4, 8, 16, 32)
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
TINY = "tiny_test"

# Tested: the test suite builds each of them, trains a step and checks the shapes. Other timm names
# work if timm gives them four levels at the strides above.
BACKBONES: dict[str, str] = {
    "edgenext_xx_small": "EdgeNeXt, 1.2 M parameters",
    "edgenext_x_small": "EdgeNeXt, 2.1 M parameters",
    "edgenext_small": "EdgeNeXt, 5.3 M parameters",
    "edgenext_base": "EdgeNeXt, 17.9 M parameters: the default",
    "tf_efficientnet_lite0": "EfficientNet-Lite0, 3.4 M parameters",
    "resnet18": "ResNet-18, 11.2 M parameters",
    "resnet50": "ResNet-50, 23.5 M parameters",
    "pvt_v2_b2": "PVTv2-B2, 24.8 M parameters",
    TINY: "four plain convolutions for tests: without weights",
}


class TinyBackbone(nn.Module):
    """Four strided convolutions, a backbone that a test can afford."""

    def __init__(self, channels: tuple[int, ...] = (16, 24, 32, 48)) -> None:
        super().__init__()
        self.channels = channels
        previous, blocks = 3, []
        for index, width in enumerate(channels):
            stride = 4 if index == 0 else 2
            blocks.append(
                nn.Sequential(
                    nn.Conv2d(previous, width, stride + 1, stride, stride // 2),
                    nn.GroupNorm(1, width),
                    nn.GELU(),
                    nn.Conv2d(width, width, 3, padding=1, groups=width),
                    nn.Conv2d(width, width, 1),
                    nn.GELU(),
                )
            )
            previous = width
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x_BCHW: Tensor) -> list[Tensor]:
        """Return four feature maps at strides 4, 8, 16, 32."""
        features = []
        for block in self.blocks:
            x_BCHW = block(x_BCHW)
            features.append(x_BCHW)
        return features


class Backbone(nn.Module):
    """Four feature maps of a timm network.

    Attributes:
        channels: channels of the maps at strides 4, 8, 16, 32.
        mean, std: the per-channel normalisation the weights were trained with, for images in 0..1.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.name = config.backbone
        if config.backbone == TINY:
            tiny = TinyBackbone()
            self.net: nn.Module = tiny
            self.levels: tuple[int, ...] = (0, 1, 2, 3)
            self.channels: tuple[int, ...] = tiny.channels
            self.level_modules: tuple[str, ...] = tuple(f"blocks.{i}" for i in range(4))
            self.mean: tuple[float, ...] = IMAGENET_MEAN
            self.std: tuple[float, ...] = IMAGENET_STD
        else:
            net: Any = _build_timm(config)
            info = net.feature_info
            reductions = list(info.reduction())
            # The last level of a stride: some networks list a stem and a stage at the same one.
            self.levels = tuple(max(i for i, r in enumerate(reductions) if r == s) for s in STRIDES)
            self.channels = tuple(info.channels()[level] for level in self.levels)
            self.level_modules = tuple(info.module_name()[level] for level in self.levels)
            settings: dict[str, Any] = net.pretrained_cfg or {}
            self.mean = tuple(settings.get("mean", IMAGENET_MEAN))
            self.std = tuple(settings.get("std", IMAGENET_STD))
            self.net = net
        if config.weights:
            load_weights(self.net, Path(config.weights))
        elif not config.pretrained or config.backbone == TINY:
            initialise_layer_scale(self.net, config.layer_scale_init or 0.1)

    def forward(self, x_BCHW: Tensor) -> list[Tensor]:
        """Map normalised images (B, 3, H, W) to four maps at strides 4, 8, 16, 32."""
        maps = self.net(x_BCHW)
        return [maps[level] for level in self.levels]

    def parameter_levels(self) -> list[list[nn.Parameter]]:
        """Split the parameters by level, strides 4, 8, 16, 32, to unfreeze one level at a time.

        A level owns all parameters after those of the level before it, so that none is left out.
        """
        names = [name for name, _ in self.net.named_parameters()]
        # features_only writes stages.0 as stages_0 for some networks: compare without the dots.
        plain = [name.replace(".", "_") for name in names]
        ends = []
        for module in self.level_modules:
            prefix = module.replace(".", "_") + "_"
            ends.append(max(i for i, name in enumerate(plain) if name.startswith(prefix)) + 1)
        parameters = [parameter for _, parameter in self.net.named_parameters()]
        ends[-1] = len(parameters)
        starts = [0, *ends[:-1]]
        return [parameters[start:end] for start, end in zip(starts, ends, strict=True)]

    def set_gradient_checkpointing(self, enabled: bool) -> bool:
        """Recompute the blocks' activations in the backward pass; return False if timm cannot."""
        setter: Any = getattr(self.net, "set_grad_checkpointing", None)
        if setter is None:
            return False
        setter(enabled)
        return True


def _build_timm(config: ModelConfig) -> Any:
    """Build timm's feature pyramid; raise ConfigError for a wrong name, option or weights."""
    import timm

    if not timm.is_model(config.backbone):
        known = [*BACKBONES, *timm.list_models()]
        raise ConfigError(
            f"Unknown backbone {config.backbone!r}.{did_you_mean(config.backbone, known)} Tested: "
            f"{', '.join(BACKBONES)}; any timm network with levels at strides 4, 8, 16 and 32 "
            f"works."
        )
    options: dict[str, Any] = {"drop_path_rate": config.drop_path} if config.drop_path else {}
    pretrained = config.pretrained and not config.weights
    # timm logs every download attempt; our own error reports it once, with what to do.
    logging.getLogger("timm").setLevel(logging.ERROR)
    try:
        with offline_if_unreachable() if pretrained else nullcontext():
            net: Any = timm.create_model(
                config.backbone, pretrained=pretrained, features_only=True, **options
            )
    except TypeError as error:
        raise ConfigError(
            f"Backbone {config.backbone} does not accept model.drop_path: {error}."
        ) from error
    except (RuntimeError, AttributeError, NotImplementedError) as error:
        if pretrained and "pretrained" in str(error).lower():
            raise ConfigError(_no_weights(config.backbone, error)) from error
        raise ConfigError(
            f"Backbone {config.backbone} gives no feature pyramid: {error}."
        ) from error
    except OSError as error:
        raise ConfigError(_no_weights(config.backbone, error)) from error
    reductions = list(net.feature_info.reduction())
    missing = [stride for stride in STRIDES if stride not in reductions]
    if missing:
        raise ConfigError(
            f"Backbone {config.backbone} has levels at strides {reductions}; the decoder needs "
            f"{list(STRIDES)} ({missing} missing). Choose another, for example "
            f"{', '.join(list(BACKBONES)[:4])}."
        )
    return net


def _no_weights(name: str, error: Exception) -> str:
    reason = " ".join(str(error).split())[:200]
    return (
        f"The ImageNet weights of {name} could not be loaded ({type(error).__name__}: {reason}). "
        "Without internet access give a file with --weights FILE, or train from scratch with "
        "--no-pretrained."
    )


def initialise_layer_scale(net: nn.Module, value: float) -> None:
    """Set every untrained layer scale (parameters named gamma..., constant and tiny) to ``value``.

    timm starts them at 1e-6 for EdgeNeXt and ConvNeXt. That suits schedules of 300 epochs; in a
    shorter training from scratch the blocks contribute nothing for the first thousands of steps.
    """
    for name, parameter in net.named_parameters():
        last = name.rsplit(".", 1)[-1]
        if (
            last.startswith("gamma")
            and parameter.ndim == 1
            and not parameter.is_meta
            and float(parameter.detach().max()) <= 1e-4
        ):
            nn.init.constant_(parameter, value)
