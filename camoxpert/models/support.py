"""The support encoder: a frozen timm network that describes what reference images show.

Its weights are neither trained nor averaged nor saved with the model: a checkpoint holds its name
and the hash of everything that its features depend on, and refuses another one.

Shape letters: N references, C channels, H height, W width, D features, T tokens (or pixels of the
last map).
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from camoxpert import console
from camoxpert.config import ModelConfig
from camoxpert.config.guidance import SupportConfig
from camoxpert.errors import CheckpointError, ConfigError, DataError
from camoxpert.models.backbone import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    TINY,
    TinyBackbone,
    quiet_timm,
    require_name,
)
from camoxpert.models.weights import load_weights, offline_if_unreachable
from camoxpert.runtime.device import full_precision

ENCODING_VERSION = 3
"""Increased when the same file and weights give other features."""
CONTEXT = 1.2
"""Side of the window around an object, as a multiple of the longer side of its box."""
SMALLEST_WINDOW = 16
"""Pixels; a smaller window would be enlarged to nothing but interpolation."""
TINY_SIDE = 64


class Facts(NamedTuple):
    """What the features of a reference depend on, besides its image and mask.

    Attributes:
        encoder: name of the network.
        weights: sha256 of its weights, hexadecimal.
        side: of its inputs, in pixels.
        version: of the code.
    """

    encoder: str
    weights: str
    side: int
    version: int

    @property
    def digest(self) -> str:
        """The sha256 of all of them, hexadecimal."""
        text = f"{self.encoder}\n{self.weights}\n{self.side}\n{self.version}\n"
        return hashlib.sha256(text.encode()).hexdigest()


class SupportEncoder(nn.Module):
    """A frozen network and what turns reference images with masks into features.

    An object is cut out, resized to the side of the network, set before the network's mean colour,
    and described by the mean of the last layer's tokens, each weighted by the share of it that the
    mask covers. Surroundings would be most of what a deep layer sees, and hidden objects look like
    them: with them a reference finds its kind among 5 in 73 % of generated scenes, without in 93 %
    (nearest neighbour, tf_efficientnet_lite0 at 224 px, 150 objects; 20 % is chance).

    Args:
        config: the encoder.

    Attributes:
        name, side: of the network.
        width: number of features D.
        prefix: tokens that belong to no place in the image.
        mean, std: per-channel normalisation of images in 0..1.

    Raises:
        ConfigError: no such network, or it gives no tokens or maps.
        CheckpointError: the weights do not fit.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, config: SupportConfig) -> None:
        super().__init__()
        self.name = config.encoder
        self.channels_last = False
        self.prefix = 0
        if config.encoder == TINY:
            self.side = config.side or TINY_SIDE
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                self.net: nn.Module = _TinyEncoder()
            mean, std = IMAGENET_MEAN, IMAGENET_STD
            self.width = 24
        else:
            require_name(config.encoder, option="--support-encoder")
            settings = pretrained_settings(config.encoder)
            self.side = config.side or int(settings.get("input_size", (3, 224, 224))[-1])
            net = _build(config, self.side)
            self.width = int(net.num_features)
            self.prefix = int(getattr(net, "num_prefix_tokens", 0))
            self.channels_last = _is_channels_last(net)
            mean = tuple(settings.get("mean", IMAGENET_MEAN))
            std = tuple(settings.get("std", IMAGENET_STD))
            self.net = net
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1), persistent=False)
        self.requires_grad_(False)
        self.eval()
        self._facts: Facts | None = None

    def train(self, mode: bool = True) -> SupportEncoder:
        """Stay in evaluation mode: the encoder is frozen."""
        return super().train(False)

    @property
    def frozen(self) -> bool:
        """Whether no weight of it is trained, so that features of a file can be kept."""
        return not any(parameter.requires_grad for parameter in self.parameters())

    @property
    def device(self) -> torch.device:
        """Where it runs."""
        return self.mean.device

    @property
    def facts(self) -> Facts:
        """What its features depend on; the weights are hashed once."""
        if self._facts is None:
            weights = weights_digest(self.net)
            self._facts = Facts(self.name, weights, self.side, ENCODING_VERSION)
        return self._facts

    @property
    def digest(self) -> str:
        """The sha256 of ``facts``, hexadecimal."""
        return self.facts.digest

    @torch.no_grad()
    def encode(
        self, images_NCHW: Tensor | Sequence[Tensor], masks_N1HW: Tensor | Sequence[Tensor]
    ) -> Tensor:
        """Describe what references show.

        Args:
            images_NCHW: RGB, uint8 in 0..255 or float in 0..1, on any device; a sequence may hold
                images of different sizes.
            masks_N1HW: of the same sizes: bool, 0 or 1, or uint8 0 or 255.

        Returns:
            Features (N, D), float32, on the encoder's device. Those of a reference do not depend
            on the others.

        Raises:
            DataError: a mask of another size than its image, or without an object.
        """
        device = self.mean.device
        if not len(images_NCHW):
            return torch.empty(0, self.width, device=device)
        cut = [
            object_window(image.to(device), mask.to(device), self.side)
            for image, mask in zip(images_NCHW, masks_N1HW, strict=True)
        ]
        images = torch.stack([image for image, _ in cut])
        masks = torch.stack([mask for _, mask in cut])
        # Full precision whatever surrounds this: features are kept and compared.
        with torch.autocast(device.type, enabled=False), full_precision():
            tokens_NDHW = self._tokens((images - self.mean) / self.std * masks)
            grid = (tokens_NDHW.shape[2], tokens_NDHW.shape[3])
            weights_N1HW = F.adaptive_avg_pool2d(masks, grid)
            total_N1 = weights_N1HW.sum((2, 3))
            features: Tensor = (tokens_NDHW * weights_N1HW).sum((2, 3)) / total_N1
        return features.float()

    def _tokens(self, images_NCHW: Tensor) -> Tensor:
        """Return the last layer's tokens as a map (N, D, H, W)."""
        net: Any = self.net
        tokens: Tensor = net.forward_features(images_NCHW)
        if tokens.ndim == 3:
            tokens = tokens[:, self.prefix :]
            side = round(tokens.shape[1] ** 0.5)
            return tokens.transpose(1, 2).unflatten(2, (side, side))
        return tokens.permute(0, 3, 1, 2) if self.channels_last else tokens


class _TinyEncoder(nn.Module):
    """Two strided convolutions of the test backbone, with fixed random weights."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*TinyBackbone().blocks[:2])

    def forward_features(self, images_NCHW: Tensor) -> Tensor:
        """Return maps at stride 8."""
        return self.blocks(images_NCHW)


def object_window(image_CHW: Tensor, mask_1HW: Tensor, side: int) -> tuple[Tensor, Tensor]:
    """Cut the window of an object out, and resize it to a square.

    Without it a hidden object of 2 % of an image would be less than one token of most networks.

    Args:
        image_CHW: RGB, uint8 in 0..255 or float in 0..1.
        mask_1HW: bool, 0 or 1, or uint8 0 or 255.
        side: pixels.

    Returns:
        image float (3, S, S) in 0..1; mask float (1, S, S) in 0..1, never empty.

    Raises:
        DataError: the sizes differ, or nothing is marked.
    """
    height, width = image_CHW.shape[-2:]
    if mask_1HW.shape[-2:] != (height, width) or image_CHW.shape[0] != 3:
        raise DataError(
            f"A reference needs an RGB image (3, H, W) and a mask (1, H, W) of its size; they are "
            f"{tuple(image_CHW.shape)} and {tuple(mask_1HW.shape)}."
        )
    marked_HW = mask_1HW[0] > (127 if mask_1HW.max() > 1 else 0)
    rows, columns = marked_HW.any(1).nonzero()[:, 0], marked_HW.any(0).nonzero()[:, 0]
    if not len(rows):
        raise DataError("The mask of a reference marks nothing as object.")
    (top, bottom), (left, right) = ((int(line[0]), int(line[-1]) + 1) for line in (rows, columns))
    size = max(round(CONTEXT * max(bottom - top, right - left)), SMALLEST_WINDOW)
    (y, high), (x, wide) = (
        _span(start, end, size, whole)
        for start, end, whole in ((top, bottom, height), (left, right, width))
    )
    image = image_CHW[:, y : y + high, x : x + wide].float()
    if image_CHW.dtype == torch.uint8:
        image = image / 255
    mask = marked_HW[None, y : y + high, x : x + wide].float()
    return _resized(image, side).clamp(0, 1), _resized(mask, side).clamp(0, 1)


def _span(start: int, end: int, size: int, whole: int) -> tuple[int, int]:
    """Return first pixel and length of a window around a span, moved into the image."""
    size = min(size, whole)
    return max(0, min((start + end - size) // 2, whole - size)), size


def _resized(x_CHW: Tensor, side: int) -> Tensor:
    return F.interpolate(
        x_CHW[None], size=(side, side), mode="bilinear", align_corners=False, antialias=True
    )[0]


def weights_digest(net: nn.Module) -> str:
    """Return the sha256 of the names, types, shapes and values of a network's state."""
    digest = hashlib.sha256()
    for name, tensor in sorted(net.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        values = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(values.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def support_width(config: SupportConfig) -> int:
    """Return the number of features of an encoder, without building its weights.

    Raises:
        ConfigError: no such network.
    """
    if config.encoder == TINY:
        return 24
    require_name(config.encoder, option="--support-encoder")
    import timm

    with torch.device("meta"), quiet_timm():
        net: Any = timm.create_model(config.encoder, pretrained=False, num_classes=0)
    return int(net.num_features)


def pretrained_settings(name: str) -> dict[str, Any]:
    """Return what timm knows of a network's pre-training: input size, mean, std."""
    import timm

    known = timm.get_pretrained_cfg(name)
    return {} if known is None else known.to_dict()


def load_support_encoder(
    config: ModelConfig, *, weights: str = "", expected: str = "", device: str = "cpu"
) -> SupportEncoder:
    """Build the support encoder of a model.

    Args:
        config: of the model.
        weights: weights file to read instead of the one in the settings, which may lie on another
            machine.
        expected: digest of the encoder that the model was trained with; "": any.
        device: where it runs.

    Raises:
        ConfigError: the model has none, or its weights cannot be had.
        CheckpointError: the weights do not fit, or are not those of the training.
    """
    support = config.support
    if not support.encoder:
        raise ConfigError(NOT_GUIDED)
    if weights:
        support = SupportConfig(support.encoder, weights, support.side, support.pretrained)
    encoder = SupportEncoder(support)
    if expected and encoder.digest != expected:
        raise CheckpointError(
            f"The support encoder {support.encoder} does not give the features that this model was "
            f"trained with (sha256 of both: {encoder.digest[:12]} and {expected[:12]}): it has "
            f"other weights, or this version describes references differently. Name the file of "
            f"the training with --support-weights; if it is that file, train the model again."
        )
    return encoder.to(device)


NOT_GUIDED = (
    "This model was trained without guidance and takes no references. Train one with "
    "--support-encoder NAME."
)


def _build(config: SupportConfig, side: int) -> Any:
    """Build timm's network with its weights, for inputs of a side."""
    import timm

    download = config.pretrained and not config.weights
    ways: list[dict[str, Any]] = [{}, {"img_size": side}]
    if side == int(pretrained_settings(config.encoder).get("input_size", (3, side))[-1]):
        ways = [{}]
    reasons = []
    for way in ways:
        try:
            if not _takes(config.encoder, side, way):
                continue
        except Exception as error:  # each network has its own way to refuse a size
            reasons.append(" ".join(str(error).split())[:120] or type(error).__name__)
            continue
        try:
            offline = offline_if_unreachable() if download else contextlib.nullcontext()
            with quiet_timm(), offline, torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                net: Any = timm.create_model(
                    config.encoder, pretrained=download, num_classes=0, **way
                )
        except Exception as error:  # timm and the hub raise a dozen unrelated types
            raise ConfigError(_no_weights(config.encoder, error)) from error
        if config.weights:
            # Its decision line is about the backbone.
            with console.muted(), console.remembering():
                load_weights(
                    net,
                    Path(config.weights),
                    name=config.encoder,
                    options={"num_classes": 0, **way},
                    option="--support-weights",
                    what="support encoder",
                )
        return net
    raise ConfigError(
        f"--support-encoder {config.encoder} cannot describe references of {side} px"
        f"{f': {reasons[-1]}' if reasons else ''}. Leave model.support.side unset, or choose a ViT "
        f"or a pyramid, for example vit_small_patch16_dinov3 or tf_efficientnet_lite0."
    )


def _takes(name: str, side: int, options: dict[str, Any]) -> bool:
    """Return whether a network gives tokens of a square grid, or maps; on the meta device."""
    import timm

    with torch.device("meta"), quiet_timm():
        net: Any = timm.create_model(name, pretrained=False, num_classes=0, **options)
        tokens = net.eval().forward_features(torch.zeros(1, 3, side, side))
    if tokens.ndim == 4:
        return True
    number = tokens.shape[1] - int(getattr(net, "num_prefix_tokens", 0)) if tokens.ndim == 3 else 0
    return number > 0 and round(number**0.5) ** 2 == number


def _is_channels_last(net: Any) -> bool:
    written = getattr(net, "output_fmt", None)
    return str(getattr(written, "value", written)).upper() == "NHWC"


def _no_weights(name: str, error: Exception) -> str:
    reason = " ".join(str(error).split())[:200]
    return (
        f"The weights of the support encoder {name} could not be loaded ({type(error).__name__}: "
        f"{reason}). Without internet access give a file with --support-weights FILE. An encoder "
        f"without learned weights tells objects apart by colour and texture alone: "
        f"model.support.pretrained=false is for tests and generated data."
    )
