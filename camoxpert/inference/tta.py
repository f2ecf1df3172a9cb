"""Test-time augmentation: an image is passed through the network mirrored and at several sizes, and
the mean of the logits is taken in one frame."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from camoxpert.errors import ConfigError
from camoxpert.text import did_you_mean

Looked = Tensor | tuple[Tensor, Tensor]
"""What the network says of inputs: float32 logits (B, 1, s, s), and of a model with the presence
head also the probabilities (B,) that they hold any object."""
FLIP, SCALES = "flip", "scales"
WORDS = (FLIP, SCALES)
SCALE_STEP = 0.25
"""The sizes of ``scales`` lie this share of the network's size below and above it."""
MULTIPLE = 32
"""Sides that the network takes are multiples of this."""


def parse_tta(text: str | None) -> tuple[str, ...]:
    """Return the words of ``--tta``, each once, in the order of WORDS.

    Args:
        text: words with commas; None or empty: none.

    Raises:
        ConfigError: an unknown word.
    """
    words = [word.strip() for word in (text or "").split(",")] if text else []
    for word in words:
        if word not in WORDS:
            raise ConfigError(
                f"--tta {text}: {word!r} is unknown.{did_you_mean(word, WORDS)} Give one or both "
                f"of {', '.join(WORDS)}, with a comma."
            )
    return tuple(word for word in WORDS if word in words)


def sides_of(side: int, words: Sequence[str]) -> tuple[int, ...]:
    """Return the sides of the network's inputs, pixels, smallest first.

    Args:
        side: of the network, a multiple of MULTIPLE.
        words: see ``parse_tta``.
    """
    if SCALES not in words:
        return (side,)
    step = MULTIPLE * max(1, round(SCALE_STEP * side / MULTIPLE))
    return tuple(one for one in (side - step, side, side + step) if one > 0)


def mirrored_too(logits: Callable[[Tensor], Looked], images_BCHW: Tensor) -> Looked:
    """Return the mean of the logits of images and of their mirror images, mirrored back.

    Mirrored images have exactly the mirrored result. Of a network that gives presence as well, its
    mean.

    Args:
        logits: the network, (B, C, H, W) to (B, 1, H, W), or to that and (B,).
        images_BCHW: inputs.
    """
    seen, mirrored = logits(images_BCHW), logits(images_BCHW.flip(-1))
    if isinstance(seen, tuple) and isinstance(mirrored, tuple):
        return (seen[0] + mirrored[0].flip(-1)) / 2, (seen[1] + mirrored[1]) / 2
    assert isinstance(seen, Tensor) and isinstance(mirrored, Tensor)
    return (seen + mirrored.flip(-1)) / 2


def averaged(logits: Sequence[Tensor]) -> Tensor:
    """Return the mean of the logits (1, s, s) of one image at several sizes, at the largest size.

    Those of a single size are returned as they are.
    """
    if len(logits) == 1:
        return logits[0]
    frame = max((tuple(found.shape[-2:]) for found in logits), key=lambda size: size[0])
    enlarged = [
        F.interpolate(found[None], size=frame, mode="bilinear", align_corners=False)[0]
        for found in logits
    ]
    return torch.stack(enlarged).mean(0)
