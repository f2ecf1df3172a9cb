"""Read images with their masks, no larger than they are needed."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np

from camoxpert.data.files.image_io import UNLIMITED, read_image, read_pair
from camoxpert.data.files.labels import VOID


def read_masked(
    source: str | Path, mask: str | Path = "", *, at_least: int | None = None
) -> tuple[np.ndarray, np.ndarray | None]:
    """Read an image and its mask at the size of the image as it was decoded.

    Of any size: sources that are too large are left out before, see ``composed``.

    Args:
        source, mask: files; mask "": None is returned for it.
        at_least: a JPEG may be decoded smaller, its sides no shorter than this.

    Returns:
        uint8 (H, W, 3) RGB; uint8 (H, W), 0, VOID and 255, or None.

    Raises:
        DataError: a file is missing or damaged.
    """
    if not mask:
        return read_image(source, at_least=at_least, max_pixels=UNLIMITED), None
    image, found = read_pair(source, mask, at_least=at_least, any_size=True, max_pixels=UNLIMITED)
    return image, resized_mask(found, image.shape[:2])


def resized_mask(mask: np.ndarray, size: tuple[int, ...]) -> np.ndarray:
    """Resize a mask: object where it covers more than half of a pixel, void where void touches it.

    Args:
        mask: uint8 (H, W), 0, VOID and 255.
        size: new height and width.
    """
    if mask.shape == tuple(size):
        return mask
    objects = _share(mask == 255, size) > 0.5
    void = _share(mask == VOID, size) > 0
    return np.where(objects, np.uint8(255), np.where(void, np.uint8(VOID), np.uint8(0)))


def _share(part: np.ndarray, size: tuple[int, ...]) -> np.ndarray:
    return cv2.resize(part.astype(np.float32), (size[1], size[0]), interpolation=cv2.INTER_AREA)
