"""Pictures of masks and predictions as arrays: overlays, cut-outs, panels, contact sheets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import cv2
import numpy as np

TRUE_POSITIVE, FALSE_POSITIVE, FALSE_NEGATIVE = (63, 185, 80), (235, 84, 84), (74, 144, 255)
# The contact sheet: side of a cell in pixels, and cells in a row.
CELL = 168
COLUMNS = 8


def overlay(
    image_HWC: np.ndarray,
    mask_HW: np.ndarray,
    *,
    colour: tuple[int, int, int] = TRUE_POSITIVE,
    alpha: float = 0.45,
) -> np.ndarray:
    """Tint the masked pixels and draw the outline.

    Args:
        image_HWC: uint8 RGB (H, W, 3).
        mask_HW: uint8 or bool (H, W); anything above 127, or True, is object.
        colour: RGB of the tint.
        alpha: strength of the tint, 0..1.

    Returns:
        uint8 RGB (H, W, 3).
    """
    inside = mask_HW if mask_HW.dtype == bool else mask_HW > 127
    # A table of all 256 values per channel: 20 times faster than blending the masked pixels.
    values_VC = np.arange(256)[:, None] * (1 - alpha) + np.array(colour, np.float32) * alpha
    tinted = cv2.LUT(image_HWC, values_VC.astype(np.uint8).reshape(256, 1, 3))
    result = cv2.copyTo(tinted, inside.view(np.uint8), image_HWC.copy())
    contours, _ = cv2.findContours(inside.view(np.uint8), cv2.RETR_LIST, cv2.CHAIN_APPROX_NONE)
    cv2.drawContours(result, contours, -1, colour, max(1, round(max(inside.shape) / 300)))
    return result


def cutout(image_HWC: np.ndarray, probability_HW: np.ndarray) -> np.ndarray:
    """Return the image with the probability as its alpha channel, uint8 RGBA (H, W, 4)."""
    alpha = np.round(probability_HW * 255).astype(np.uint8)
    return cv2.merge([*cv2.split(image_HWC), alpha])


def compare(image_HWC: np.ndarray, predicted: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Show prediction against truth (bool, H, W): green found, red false alarm, blue missed."""
    result = overlay(image_HWC, predicted & truth, colour=TRUE_POSITIVE)
    result = overlay(result, predicted & ~truth, colour=FALSE_POSITIVE, alpha=0.6)
    return overlay(result, truth & ~predicted, colour=FALSE_NEGATIVE, alpha=0.6)


def panel(
    image_HWC: np.ndarray,
    mask_HW: np.ndarray,
    probability_HW: np.ndarray,
    *,
    stretch: bool = False,
    height: int = 176,
) -> np.ndarray:
    """Put image, truth, probability map and comparison side by side, with captions.

    Args:
        image_HWC: uint8 RGB.
        mask_HW: uint8, 0 or 255; nothing is right or wrong where it is neither, as nobody knows.
        probability_HW: float in 0..1.
        stretch: compare the map stretched to its full range, as protocol "pysod" scores it.
        height: of the pictures in the result, pixels.

    Returns:
        uint8 RGB.
    """
    low, high = float(probability_HW.min()), float(probability_HW.max())
    cut = (low + high) / 2 if stretch and high > low else 0.5
    truth = mask_HW > 127
    predicted = (probability_HW > cut) & (truth | (mask_HW == 0))
    grey = np.repeat((probability_HW * 255).astype(np.uint8)[..., None], 3, axis=2)
    pictures = {
        "image": image_HWC,
        "truth": overlay(image_HWC, truth, colour=FALSE_NEGATIVE),
        "probability": grey,
        "prediction": compare(image_HWC, predicted, truth),
    }
    return side_by_side(pictures, height)


def comparison_panel(
    image_HWC: np.ndarray | None,
    mask_HW: np.ndarray,
    predictions: Mapping[str, np.ndarray],
    *,
    void_HW: np.ndarray | None = None,
    height: int = 150,
) -> np.ndarray:
    """Put image, truth and the comparison of several maps side by side, with captions.

    Args:
        image_HWC: uint8 RGB; None draws on black.
        mask_HW: bool.
        predictions: caption -> what was found, bool, of the mask's size.
        void_HW: bool, pixels that nobody labelled, where nothing is right or wrong; None: none.
        height: of the pictures in the result, pixels.

    Returns:
        uint8 RGB.
    """
    ground = np.zeros((*mask_HW.shape, 3), np.uint8) if image_HWC is None else image_HWC
    pictures = {} if image_HWC is None else {"image": image_HWC}
    pictures["truth"] = overlay(ground, mask_HW, colour=FALSE_NEGATIVE)
    for caption, found_HW in predictions.items():
        judged_HW = found_HW if void_HW is None else found_HW & ~void_HW
        pictures[caption] = compare(ground, judged_HW, mask_HW)
    return side_by_side(pictures, height)


def contact_sheet(pictures: Sequence[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    """Lay small images with their masks outlined on one sheet, uint8 RGB.

    Args:
        pictures: (image uint8 (H, W, 3), mask uint8 (H, W)) of any small size.
    """
    rows = max(1, -(-len(pictures) // COLUMNS))
    columns = min(COLUMNS, max(1, len(pictures)))
    sheet = np.full((rows * CELL, columns * CELL, 3), 128, np.uint8)
    for index, (image, mask) in enumerate(pictures):
        cell = fit(overlay(image, mask, alpha=0.2), CELL - 4)
        y, x = index // COLUMNS * CELL, index % COLUMNS * CELL
        top, left = y + (CELL - cell.shape[0]) // 2, x + (CELL - cell.shape[1]) // 2
        sheet[top : top + cell.shape[0], left : left + cell.shape[1]] = cell
    return sheet


def fit(image: np.ndarray, side: int) -> np.ndarray:
    """Scale an image so that its longer side is ``side``."""
    scale = side / max(image.shape[:2])
    size = [max(1, round(n * scale)) for n in image.shape[1::-1]]
    how = cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR
    scaled: np.ndarray = cv2.resize(image, size, interpolation=how)
    return scaled


def side_by_side(pictures: Mapping[str, np.ndarray], height: int = 150) -> np.ndarray:
    """Put pictures of one shape side by side at a height in pixels, their captions above."""
    first = next(iter(pictures.values()))
    width = max(1, round(first.shape[1] * height / first.shape[0]))
    # Very long pictures would make unreadable pages.
    width = min(width, height * 3)
    tiles = []
    for caption, picture in pictures.items():
        shrink = picture.shape[0] > height
        tile = cv2.resize(
            picture, (width, height), interpolation=cv2.INTER_AREA if shrink else cv2.INTER_LINEAR
        )
        head = np.full((20, width, 3), 30, np.uint8)
        scale = 0.4 if width >= 80 else 0.3
        cv2.putText(
            head, caption, (4, 14), cv2.FONT_HERSHEY_SIMPLEX, scale, (225,) * 3, 1, cv2.LINE_AA
        )
        tiles += [np.vstack([head, tile]), np.full((height + 20, 2, 3), 30, np.uint8)]
    return np.hstack(tiles[:-1])
