"""The settings of guidance: the encoder of reference images, and how training shows them."""

from __future__ import annotations

from dataclasses import dataclass

from camoxpert.config.schema import setting


@dataclass(frozen=True)
class SupportConfig:
    """The frozen network that describes reference images; without one there is no guidance."""

    encoder: str = setting(
        "",
        "guide the search by reference images that show what to look for, described by this frozen "
        "timm network, a ViT or a pyramid; empty: no guidance",
        flag="--support-encoder",
    )
    weights: str = setting(
        "",
        "weights file of the support encoder (.pth, .pt, .safetensors); empty: timm's (downloads)",
        flag="--support-weights",
    )
    side: int | None = setting(
        None,
        "side to which the support encoder's inputs are resized, in pixels; unset: that of its "
        "pre-training",
        minimum=32,
    )
    pretrained: bool = setting(
        True,
        "give the support encoder learned weights; false: random ones, for tests and generated "
        "data alone",
    )


@dataclass(frozen=True)
class EpisodeConfig:
    """Which references a training image is shown with: others of its class."""

    references: str = setting(
        "",
        "more references, beside the training images: a data set folder or a CSV with the same "
        "classes",
        flag="--reference-data",
    )
    dropout: float = setting(
        0.5,
        "share of the images that are shown without references, so that the model also works "
        "without",
        minimum=0,
        maximum=1,
    )
    shots: int = setting(
        5, "most references of an image; each image draws from 1 to this many", minimum=1
    )
