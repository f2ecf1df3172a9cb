"""The settings of augmentation."""

from __future__ import annotations

from dataclasses import dataclass

from camoxpert.config.schema import setting


@dataclass(frozen=True)
class AugmentConfig:
    """Augmentation of training samples: probabilities and strengths; 0 switches one off."""

    strength: float | None = setting(
        None,
        "share of all strengths and probabilities below but those of flips, corrupt, relight and "
        "compose; unset: by --preset",
        minimum=0,
        maximum=1,
    )
    hflip: float = setting(0.5, "probability of a left-right flip", minimum=0, maximum=1)
    vflip: float = setting(0.0, "probability of an up-down flip", minimum=0, maximum=1)
    rotate: float = setting(15.0, "largest rotation, degrees either way", minimum=0, maximum=180)
    scale: float = setting(
        0.2, "largest relative change of size, 0.2 = 0.8x to 1.2x", minimum=0, maximum=0.9
    )
    translate: float = setting(0.08, "largest shift, fraction of the side", minimum=0, maximum=0.5)
    brightness: float = setting(0.2, "largest relative brightness change", minimum=0, maximum=1)
    contrast: float = setting(0.2, "largest relative contrast change", minimum=0, maximum=1)
    saturation: float = setting(0.2, "largest relative saturation change", minimum=0, maximum=1)
    hue: float = setting(0.02, "largest hue shift, fraction of the circle", minimum=0, maximum=0.5)
    blur: float = setting(0.05, "probability of a slight Gaussian blur", minimum=0, maximum=1)
    noise: float = setting(0.05, "probability of slight Gaussian noise", minimum=0, maximum=1)
    corrupt: float = setting(
        0.0,
        "probability of one of the eight corruptions of `evaluate --corruptions`, at a severity of "
        "1 to 3; on the CPU only",
        minimum=0,
        maximum=1,
    )
    relight: float = setting(
        0.0,
        "probability of another light on the objects of an image, with their shadows, drawn anew "
        "in each epoch",
        minimum=0,
        maximum=1,
    )
    compose: float = setting(
        0.0,
        "probability of an object of another training image, pasted where the image resembles it "
        "and labelled; some are hidden in part, and some leave the traces of an edit alone",
        minimum=0,
        maximum=1,
    )
