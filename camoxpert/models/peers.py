"""Decoders of segmentation-models-pytorch behind the interface of ours, to compare with.

They are that library's own modules with its defaults, on the same backbone; a run with one of them
is an ordinary run.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from camoxpert.config import ModelConfig
from camoxpert.errors import ConfigError
from camoxpert.models.backbone import Backbone, allow_single_values
from camoxpert.models.layers import resize

if TYPE_CHECKING:
    from camoxpert.models.router import Routing

PEERS = {
    "unet": ("Unet", "U-Net"),
    "fpn": ("FPN", "FPN"),
    "deeplabv3plus": ("DeepLabV3Plus", "DeepLabV3+"),
    "upernet": ("UPerNet", "UPerNet"),
    "segformer": ("Segformer", "Segformer"),
}
"""Name of a setting -> class in segmentation-models-pytorch, title."""
_NAME = "camoxpert"
DILATED = ("deeplabv3plus",)
"""Decoders whose backbone keeps stride 16 at the last level."""


class PeerDecoder(nn.Module):
    """A decoder and its head, from five backbone levels to logits.

    Args:
        backbone: with ``from_stride_2``.
        config: names the decoder.

    Raises:
        ConfigError: the library is not installed.
    """

    def __init__(self, backbone: Backbone, config: ModelConfig) -> None:
        super().__init__()
        kind, title = PEERS[config.decoder]
        self.title = f"SMP {title}"
        network = _build(kind, backbone)
        self.decoder: nn.Module = network.decoder
        self.head: nn.Module = network.segmentation_head
        allow_single_values(self)

    def forward(
        self, images_BCHW: Tensor, features: Sequence[Tensor]
    ) -> tuple[Tensor, tuple[Tensor, ...], tuple[Routing, ...]]:
        """Decode.

        Args:
            images_BCHW: normalised images (B, 3, H, W).
            features: maps at strides 2, 4, 8, 16, 32 (the last at 16 too if dilated).

        Returns:
            logits (B, 1, H, W); no side logits; no routing.
        """
        logits: Tensor = self.head(self.decoder([images_BCHW, *features]))
        return resize(logits, images_BCHW.shape[-2:]), (), ()


class _Channels(nn.Module):
    """Stands for an encoder while the library builds a decoder: it reads these attributes alone."""

    def __init__(self, out_channels: list[int], depth: int, output_stride: int) -> None:
        super().__init__()
        self.out_channels, self.depth, self.output_stride = out_channels, depth, output_stride

    def set_in_channels(self, in_channels: int, pretrained: bool) -> None:
        """Take RGB, as every backbone does."""

    def make_dilated(self, output_stride: int) -> None:
        """Nothing to do: the backbone was built dilated."""


def _build(kind: str, backbone: Backbone) -> Any:
    """Return the library's network of a kind, with its defaults, for the backbone's channels."""
    try:
        import segmentation_models_pytorch as smp
    except ImportError as error:
        raise ConfigError(
            f"--decoder {kind.lower()} needs segmentation-models-pytorch: pip install "
            f"'camoxpert[peers]' ({error})."
        ) from error
    # Its documented way to bring an encoder of one's own.
    known = smp.encoders.encoders
    params = {"out_channels": [3, *backbone.channels]}
    known[_NAME] = {"encoder": _Channels, "params": params, "pretrained_settings": {}}
    try:
        return getattr(smp, kind)(_NAME, encoder_weights=None, classes=1)
    finally:
        del known[_NAME]
