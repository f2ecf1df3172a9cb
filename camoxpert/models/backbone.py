"""The backbone: any timm network that yields a pyramid at strides 4, 8, 16 and 32.

An unknown name is an error that names the closest one; it never selects another backbone. Networks
that timm builds for one input size are built for the size of the run.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from camoxpert.config import ModelConfig
from camoxpert.errors import ConfigError
from camoxpert.models.positions import keep_positions_on_device
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

    Args:
        config: name, weights and options.
        sides: sides of the images it will see, in pixels, that of evaluation first; () leaves the
            network as timm builds it.
        from_stride_2: also return the map at stride 2, first; without channels where there is none.
        dilated: the last level keeps stride 16, with dilated filters.

    Attributes:
        channels: channels of the maps.
        mean, std: the per-channel normalisation the weights were trained with, for images in 0..1.
    """

    def __init__(
        self,
        config: ModelConfig,
        sides: Sequence[int] = (),
        *,
        from_stride_2: bool = False,
        dilated: bool = False,
    ) -> None:
        super().__init__()
        self.name = config.backbone
        self.channels_last = False
        self.from_stride_2 = from_stride_2
        self.half_level: int | None = None
        self._options: dict[str, Any] = {}
        self._level_names: list[list[str]] | None = None
        if config.backbone == TINY:
            if dilated:
                raise ConfigError(f"Backbone {TINY} cannot be dilated.")
            tiny = TinyBackbone()
            self.net: nn.Module = tiny
            self.levels: tuple[int, ...] = (0, 1, 2, 3)
            self.channels: tuple[int, ...] = tiny.channels
            self.level_modules: tuple[str, ...] = tuple(f"blocks.{i}" for i in range(4))
            self.mean: tuple[float, ...] = IMAGENET_MEAN
            self.std: tuple[float, ...] = IMAGENET_STD
        else:
            _check_name(config.backbone)
            self._options = {"drop_path_rate": config.drop_path} if config.drop_path else {}
            if sides and config.backbone not in BACKBONES:
                self._options |= _size_options(config.backbone, sides, self._options)
            # Levels are told by their strides, which dilation changes.
            plain = _on_meta(config.backbone, self._options).feature_info if dilated else None
            if dilated:
                self._options["output_stride"] = STRIDES[-2]
            net: Any = _build_timm(config, self._options)
            info = net.feature_info
            reductions = list((plain or info).reduction())
            _check_pyramid(config.backbone, reductions)
            # The last level of a stride: some networks list a stem and a stage at the same one.
            self.levels = tuple(max(i for i, r in enumerate(reductions) if r == s) for s in STRIDES)
            self.channels = tuple(info.channels()[level] for level in self.levels)
            self.half_level = reductions.index(2) if from_stride_2 and 2 in reductions else None
            self.level_modules = tuple(info.module_name()[level] for level in self.levels)
            settings: dict[str, Any] = net.pretrained_cfg or {}
            self.mean = tuple(settings.get("mean", IMAGENET_MEAN))
            self.std = tuple(settings.get("std", IMAGENET_STD))
            self.channels_last = _is_channels_last(net)
            self.net = net
        if from_stride_2:
            at_half = 0 if self.half_level is None else info.channels()[self.half_level]
            self.channels = (at_half, *self.channels)
        allow_single_values(self.net)
        keep_positions_on_device(self.net)
        if config.weights:
            load_weights(self.net, Path(config.weights), name=self.name, options=self._options)
        elif not config.pretrained or config.backbone == TINY:
            initialise_layer_scale(self.net, config.layer_scale_init or 0.1)

    def forward(self, x_BCHW: Tensor) -> list[Tensor]:
        """Map normalised images (B, 3, H, W) to maps at strides 4, 8, 16, 32; with
        ``from_stride_2`` at stride 2 as well, first."""
        maps = self.net(x_BCHW)
        levels = self.levels if self.half_level is None else (self.half_level, *self.levels)
        chosen = [maps[level] for level in levels]
        if self.channels_last:
            chosen = [x.permute(0, 3, 1, 2) for x in chosen]
        if self.from_stride_2 and self.half_level is None:
            batch, _, height, width = x_BCHW.shape
            chosen.insert(0, chosen[0].new_empty(batch, 0, height // 2, width // 2))
        return chosen

    def parameter_levels(self) -> list[list[nn.Parameter]]:
        """Split the parameters by level, strides 4, 8, 16, 32, to unfreeze one level at a time.

        A level owns all parameters after those of the level before it, so that none is left out.
        """
        if self._level_names is None:
            self._level_names = self._by_order() or self._by_gradient()
        parameters = dict(self.net.named_parameters())
        return [[parameters[name] for name in names] for names in self._level_names]

    def _by_order(self) -> list[list[str]] | None:
        """Split the names behind the modules that timm names as the levels' ends; None if the
        network has no parameters under these names, or not in this order."""
        names = [name for name, _ in self.net.named_parameters()]
        # features_only writes stages.0 as stages_0 for some networks: compare without the dots.
        plain = [name.replace(".", "_") for name in names]
        ends = []
        for module in self.level_modules:
            prefix = module.replace(".", "_") + "_"
            inside = [i for i, name in enumerate(plain) if name.startswith(prefix)]
            if not inside:
                return None
            ends.append(max(inside) + 1)
        ends[-1] = len(names)
        if ends != sorted(ends):
            return None
        return [names[start:end] for start, end in zip([0, *ends[:-1]], ends, strict=True)]

    def _by_gradient(self) -> list[list[str]]:
        """Give each parameter to the first level whose map depends on it; needs no memory."""
        net = _on_meta(self.name, self._options)
        names, parameters = zip(*net.named_parameters(), strict=True)
        sides = [self._options.get("img_size", 256), *_own_sides(net)]
        side = next(side for side in sides if _runs(net, side))
        maps = net(torch.zeros(2, 3, side, side, device="meta"))
        owner = dict.fromkeys(names, len(self.levels) - 1)
        for number, level in reversed(list(enumerate(self.levels))):
            needed = torch.autograd.grad(
                maps[level].sum(), parameters, retain_graph=True, allow_unused=True
            )
            owner |= {name: number for name, g in zip(names, needed, strict=True) if g is not None}
        return [[n for n in names if owner[n] == number] for number in range(len(self.levels))]

    def set_gradient_checkpointing(self, enabled: bool) -> bool:
        """Recompute the blocks' activations in the backward pass; return False if timm cannot."""
        setter: Any = getattr(self.net, "set_grad_checkpointing", None)
        if setter is None:
            return False
        try:
            setter(enabled)
        except AssertionError:  # how timm says that a network has no such mode
            return False
        return True


def allow_single_values(net: nn.Module) -> None:
    """Let the batch norms of a network train on a batch with one value per channel."""
    for module in net.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.register_forward_pre_hook(_before_norm)
            module.register_forward_hook(_after_norm, always_call=True)


def _before_norm(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    """Let batch norm use its running statistics where a channel has one value: a single image with
    a map of 1x1, whose variance does not exist.

    So a last short batch is neither dropped nor merged, and a run takes the same steps.
    """
    x = inputs[0]
    if module.training and x.ndim > 1 and x.numel() == x.shape[1]:
        module.training = False
        module.single_value = True  # type: ignore[assignment]  # a plain mark, read back below


def _after_norm(module: nn.Module, inputs: object, output: object) -> None:
    if getattr(module, "single_value", False):
        module.training = True
        module.single_value = False  # type: ignore[assignment]  # as above


def require_name(name: str, *, option: str) -> None:
    """Raise ConfigError for a name that timm does not know.

    Args:
        name: of a network.
        option: that names it, for the message.
    """
    import timm

    if not timm.is_model(name):
        near = did_you_mean(name, timm.list_models())
        raise ConfigError(f"{option}: timm has no network {name!r}.{near}")


def _check_name(name: str) -> None:
    """Raise ConfigError for a name that timm does not know."""
    import timm

    if not timm.is_model(name):
        known = [*BACKBONES, *timm.list_models()]
        raise ConfigError(
            f"Unknown backbone {name!r}.{did_you_mean(name, known)} Tested: "
            f"{', '.join(BACKBONES)}; any timm network with levels at strides 4, 8, 16 and 32 "
            f"works."
        )


def _size_options(name: str, sides: Sequence[int], options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options with which a network takes images of all sides; on the meta device, which
    computes shapes alone.

    A network that takes them as timm builds it stays as it is.

    Raises:
        ConfigError: it cannot, or it has no pyramid.
    """
    ways: list[dict[str, Any]] = [{}, {"img_size": sides[0]}]
    ways.append({"img_size": sides[0], "strict_img_size": False})
    reasons = []
    for way in ways:
        try:
            net = _on_meta(name, {**options, **way})
            _check_pyramid(name, list(net.feature_info.reduction()))
            for side in sides:
                maps = net(torch.zeros(2, 3, side, side, device="meta"))
                _check_sizes(name, net.feature_info, maps, side)
        except ConfigError:
            raise
        except Exception as error:  # each network has its own way to refuse a size
            if not (isinstance(error, TypeError) and "unexpected keyword" in str(error)):
                reasons.append(" ".join(str(error).split())[:120] or type(error).__name__)
            elif not way:
                return {}  # another option is the one it does not know: building it says so
            continue
        return way
    taken = [side for side in _own_sides(_on_meta(name, options)) if _works(name, side, options)]
    advice = f"Use --img-size {taken[0]}, or choose another" if taken else "Choose another"
    several = f" with one set of weights (--multi-scale asks for {len(sides)} sizes)"
    raise ConfigError(
        f"Backbone {name} cannot take images of {', '.join(map(str, dict.fromkeys(sides)))} px"
        f"{several if len(set(sides)) > 1 else ''}: {reasons[-1]}. {advice}, for example "
        f"{', '.join(list(BACKBONES)[:4])}."
    )


def _on_meta(name: str, options: Mapping[str, Any]) -> Any:
    """Build a network without memory for its weights."""
    import timm

    with torch.device("meta"), quiet_timm():
        return timm.create_model(name, pretrained=False, features_only=True, **options)


def _own_sides(net: Any) -> list[int]:
    """Return the multiples of 32 around the side of the images that a network was made for."""
    side = int((net.pretrained_cfg or {}).get("input_size", (3, 224, 224))[-1])
    return sorted({side // 32 * 32, -(-side // 32) * 32}, key=lambda near: abs(near - side))


def _runs(net: Any, side: int) -> bool:
    """Return whether a network on the meta device takes images of a size."""
    try:
        net(torch.zeros(2, 3, side, side, device="meta"))
    except Exception:  # as in _size_options
        return False
    return True


def _works(name: str, side: int, options: Mapping[str, Any]) -> bool:
    for way in ({}, {"img_size": side}):
        try:
            if _runs(_on_meta(name, {**options, **way}), side):
                return True
        except TypeError:
            continue
    return False


def _is_channels_last(net: Any) -> bool:
    """Return whether a network's maps are (B, H, W, C), by its own word."""
    written = getattr(net, "output_fmt", None)
    return str(getattr(written, "value", written)).upper() == "NHWC"


@contextmanager
def quiet_timm() -> Iterator[None]:
    """Silence timm's log: our own errors report what it tried once, with what to do."""
    logger = logging.getLogger("timm")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _build_timm(config: ModelConfig, options: Mapping[str, Any]) -> Any:
    """Build timm's feature pyramid; raise ConfigError for a wrong option or weights."""
    import timm

    pretrained = config.pretrained and not config.weights
    try:
        with quiet_timm(), offline_if_unreachable() if pretrained else nullcontext():
            net: Any = timm.create_model(
                config.backbone, pretrained=pretrained, features_only=True, **options
            )
    except TypeError as error:
        names = {"drop_path_rate": "model.drop_path", "output_stride": "dilation (output_stride)"}
        raise ConfigError(
            f"Backbone {config.backbone} does not accept "
            f"{' or '.join(names.get(option, option) for option in options)}: {error}."
        ) from error
    except (RuntimeError, AttributeError, NotImplementedError, ValueError, AssertionError) as error:
        if pretrained and re.search("pretrained|weights", str(error), re.IGNORECASE):
            raise ConfigError(_no_weights(config.backbone, error)) from error
        raise ConfigError(
            f"Backbone {config.backbone} gives no feature pyramid: {error}."
        ) from error
    except OSError as error:
        raise ConfigError(_no_weights(config.backbone, error)) from error
    return net


def _check_pyramid(name: str, reductions: Sequence[int]) -> None:
    """Raise ConfigError unless a network has levels at the strides of the decoder."""
    missing = [stride for stride in STRIDES if stride not in reductions]
    if missing:
        raise ConfigError(
            f"Backbone {name} has levels at strides {list(reductions)}; the decoder needs "
            f"{list(STRIDES)} ({missing} missing). Choose another, for example "
            f"{', '.join(list(BACKBONES)[:4])}."
        )


def _check_sizes(name: str, info: Any, maps: Sequence[Tensor], side: int) -> None:
    """Raise ConfigError unless the map at each stride covers the whole image, but for a pixel.

    Convolutions without padding lose the border: resized, such a map would lie beside the image.
    """
    for stride in STRIDES:
        sizes = []
        for reduction, channels, found in zip(info.reduction(), info.channels(), maps, strict=True):
            if reduction == stride:
                last = found.shape[1] != channels
                sizes.append(tuple(found.shape[1:3] if last else found.shape[2:4]))
        # A pixel less lies beside the image by half of one.
        if not any(abs(side // stride - length) <= 1 for length, _ in sizes):
            raise ConfigError(
                f"Backbone {name}: its map at stride {stride} is {sizes[-1][0]} x {sizes[-1][1]} "
                f"for an image of {side} px, not {side // stride} x {side // stride}: it has "
                f"convolutions without padding, so its maps do not cover the whole image. Choose "
                f"another, for example {', '.join(list(BACKBONES)[:4])}."
            )


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
