"""Decode a pair to one square array: RGB, mask and a plane for each modality."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from camoxpert.data.files.modalities import read_planes
from camoxpert.data.files.pairing import Pair
from camoxpert.data.files.unlabeled import read_files
from camoxpert.data.samples.augment import square_pair


def decode_pair(
    pair: Pair, side: int, modalities: Sequence[str], *, max_pixels: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return a pair as uint8 (S, S, 4 + M), and its mask at the original size.

    Args:
        pair: its files.
        side: S, pixels.
        modalities: names of the M planes, in order; one that the pair lacks is 0.
        max_pixels: larger files are refused.

    Raises:
        DataError: a file cannot be read, or shows another section than the image.
    """
    image, mask = read_files(pair, max_pixels=max_pixels, at_least=side)
    pixels = square_pair(image, mask, side)
    if not modalities:
        return pixels, mask
    size = (image.shape[0], image.shape[1])
    planes = read_planes(pair, modalities, size, side, max_pixels=max_pixels)
    return np.concatenate([pixels, planes], axis=2), mask
