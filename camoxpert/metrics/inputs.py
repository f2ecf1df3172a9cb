"""Checks of predictions and masks, with errors that say what to change.

Strict on purpose: a mask of 0 and 1, thresholded at 128 as published masks are, silently turns into
a mask without an object, and a wrong number in a table looks like any other number.
"""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from camoxpert.errors import DataError


def checked_prediction(name: str, prediction: object) -> NDArray[np.uint8]:
    """Return a prediction as a contiguous uint8 map.

    Args:
        name: of the image, for the message.
        prediction: (H, W), uint8 0..255, or floating point 0..1. The latter becomes trunc(255 * x)
            in the array's precision (float16 in float32): what a map holds after it was saved as
            PNG the usual way.

    Raises:
        DataError: not an array, not (H, W), without pixels, another dtype, NaN, or outside 0..1.
    """
    array = _checked_shape(name, "prediction", prediction)
    if array.dtype == np.uint8:
        return np.ascontiguousarray(array)
    if not np.issubdtype(array.dtype, np.floating):
        raise DataError(
            f"{name}: the prediction is {array.dtype}. Give uint8 grey levels 0..255, or"
            " floating-point values 0..1."
        )
    low, high = float(array.min()), float(array.max())
    if not (low >= 0 and high <= 1):  # written so that NaN fails too
        found = "NaN" if np.isnan(low) else f"values from {low:.6g} to {high:.6g}"
        raise DataError(
            f"{name}: the prediction holds {found}; floating-point predictions must lie in 0..1."
            " Apply the sigmoid to logits, or give grey levels 0..255 as uint8."
        )
    if array.dtype == np.float16:
        array = array.astype(np.float32)
    return np.ascontiguousarray((array * 255).astype(np.uint8))


def checked_mask(name: str, mask: object) -> NDArray[np.bool_]:
    """Return a mask as a contiguous bool array, True on the object.

    Args:
        name: of the image, for the message.
        mask: (H, W), bool, or uint8 holding only {0, 255} or only {0, 1}.

    Raises:
        DataError: not an array, not (H, W), without pixels, another dtype, or other values.
    """
    array = _checked_shape(name, "mask", mask)
    if array.dtype == np.bool_:
        # Some bool arrays (from Pillow's 1-bit pictures) store True as 255.
        array = np.ascontiguousarray(array).view(np.uint8)
        object_HW: NDArray[np.bool_] = array != 0
        return object_HW
    if array.dtype != np.uint8:
        raise DataError(
            f"{name}: the mask is {array.dtype}. Give bool, or uint8 with 0 and 255 (or 0 and 1)."
        )
    array = np.ascontiguousarray(array)
    brightest = int(cv2.minMaxLoc(array)[1])
    num_brightest = cv2.countNonZero(cv2.inRange(array, brightest, brightest))
    if brightest not in (0, 1, 255) or (brightest > 0 and num_brightest != cv2.countNonZero(array)):
        levels = np.unique(array)
        shown = ", ".join(str(level) for level in levels[:6]) + ", ..." * (len(levels) > 6)
        raise DataError(
            f"{name}: the mask has {len(levels)} grey level(s) ({shown}); only 0 and 255, or 0 and"
            " 1, are unambiguous. Was it resized with interpolation, or saved as JPEG? Use the"
            " original, or threshold it yourself."
        )
    object_HW = array != 0
    return object_HW


def checked_void(name: str, void: object, mask_HW: NDArray[np.bool_]) -> NDArray[np.bool_] | None:
    """Return where a mask is void (nobody labelled the pixel), or None if it is so nowhere.

    Args:
        name: of the image, for the message.
        void: bool (H, W), True on void pixels, or None.
        mask_HW: the checked mask.

    Raises:
        DataError: not bool, of another shape, on the object, or everywhere.
    """
    if void is None:
        return None
    array = _checked_shape(name, "void", void)
    if array.dtype != np.bool_ or array.shape != mask_HW.shape:
        raise DataError(
            f"{name}: the void is {array.dtype} of shape {array.shape}. Give bool of the mask's"
            f" shape {mask_HW.shape}, True where the pixel has no label."
        )
    array = np.ascontiguousarray(array)
    if array.all():
        raise DataError(f"{name}: every pixel is void, so there is nothing to score. Leave it out.")
    if (array & mask_HW).any():
        raise DataError(f"{name}: some pixels are object and void. A void pixel has no label.")
    return array if array.any() else None


def check_same_size(name: str, shape: tuple[int, ...], mask_HW: NDArray[np.bool_]) -> None:
    """Raise DataError unless a prediction's shape is the mask's."""
    if shape != mask_HW.shape:
        mask_height, mask_width = mask_HW.shape
        raise DataError(
            f"{name}: the prediction is {shape[0]} x {shape[1]} and the mask {mask_height} x"
            f" {mask_width} (height x width). Resize the prediction to the mask's size yourself:"
            " the choice of interpolation changes the third decimal of the scores."
        )


def _checked_shape(name: str, role: str, array: object) -> NDArray[Any]:
    if not isinstance(array, np.ndarray):
        raise DataError(
            f"{name}: the {role} is a {type(array).__name__}. Give a numpy array of shape (H, W)."
        )
    if array.ndim != 2 or array.size == 0:
        raise DataError(
            f"{name}: the {role} has shape {array.shape}. Give one channel of at least one pixel,"
            " shape (H, W)."
        )
    return array
