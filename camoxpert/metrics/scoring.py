"""Scores of one image: its row, and the small histogram from which its curves are computed."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any, NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from camoxpert.metrics import measures
from camoxpert.metrics.contours import boundary_iou, human_correction_effort
from camoxpert.metrics.histogram import JointHistogram, Slices, joint_histogram, level_values
from camoxpert.metrics.weighted import weighted_fmeasure

RESULT_KEYS = (
    "Smeasure",
    "MAE",
    "wFmeasure",
    "meanEm",
    "maxEm",
    "adpEm",
    "meanFm",
    "maxFm",
    "adpFm",
    "IoU",
    "Dice",
)
"""Measures computed by default, in the order in which papers print them."""

EXTRA_KEYS = ("Precision", "Recall", "Specificity", "BER", "BoundaryIoU", "HCE")
"""Measures computed on request, at the threshold 0.5. BER and HCE are errors; HCE is a count."""

FAST_KEYS = tuple(key for key in RESULT_KEYS if key != "wFmeasure")
"""Measures that need only the histogram: a millisecond per image."""

PROTOCOLS = ("pysod", "raw")
EMPTY_GT = ("pysod", "correct", "skip")

Row = dict[str, Any]


class Claim(NamedTuple):
    """What a map says of the presence of an object, before any stretch.

    Attributes:
        present: the image has an object.
        share: of the labelled pixels that are above one half, 0..1.
        low, high: darkest and brightest level, 0..255.
        grey: there are levels between the two.
    """

    present: bool
    share: float
    low: int
    high: int
    grey: bool


class ImageScore(NamedTuple):
    """What is kept of an image."""

    row: Row
    """name, group, the values of the measures, object_fraction, num_objects."""
    counts_CL: NDArray[np.int64]
    """(2, 256) background and foreground pixels over the quantised levels."""
    rightly_empty: bool
    """There is no object, none was claimed, and the evaluator gives credit for that."""
    mask_digest: str
    """Hash of the mask's shape and pixels, hexadecimal."""
    num_void: int = 0
    """Pixels that nobody labelled; they are in no score."""
    claim: Claim = Claim(True, 0.0, 0, 0, False)
    """What the map claims before the stretch."""


def score_image(
    name: str,
    prediction_HW: NDArray[np.uint8],
    mask_HW: NDArray[np.bool_],
    *,
    void_HW: NDArray[np.bool_] | None = None,
    group: str = "",
    protocol: str = "pysod",
    empty_gt: str = "pysod",
    keys: tuple[str, ...] = RESULT_KEYS,
) -> ImageScore:
    """Score one checked pair of arrays; the options are those of the Evaluator.

    Void pixels, which nobody labelled, are left out. What a histogram gives is that of the other
    pixels alone, the stretch of "pysod" included. The measures that depend on positions (weighted
    F, Boundary IoU, HCE) see background there that the map got right: it adds no error, no
    distance is measured to it, and no label is invented.

    Args:
        name: goes into the row.
        prediction_HW: uint8 0..255, contiguous.
        mask_HW: bool, contiguous, same shape.
        void_HW: bool, same shape, True where nobody labelled the pixel and never on the object;
            None if there is no such pixel.
        group: goes into the row.
        protocol: one of PROTOCOLS.
        empty_gt: one of EMPTY_GT; "skip" scores like "pysod" here, the caller skips.
        keys: measures to compute.
    """
    if void_HW is not None:
        prediction_HW = without_void(prediction_HW, void_HW)
    histogram = joint_histogram(prediction_HW, mask_HW, void_HW)
    values = level_values(histogram, normalise=protocol == "pysod")
    # Measures that need the pixels. Each is a function, so that measures nobody asked for cost
    # nothing.
    of_pixels: dict[str, Callable[[], float]] = {
        "wFmeasure": lambda: weighted_fmeasure(prediction_HW, values, mask_HW),
        "BoundaryIoU": lambda: boundary_iou(np.take(values > 0.5, prediction_HW), mask_HW),
        "HCE": lambda: human_correction_effort(np.take(values > 0.5, prediction_HW), mask_HW),
    }
    return assemble(
        name,
        histogram,
        values,
        {key: float(of_pixels[key]()) for key in keys if key in of_pixels},
        pixels=lambda: prediction_HW if void_HW is None else prediction_HW[~void_HW],
        group=group,
        empty_gt=empty_gt,
        keys=keys,
        mask_digest=digest_mask(mask_HW, histogram.box, void_HW),
        num_objects=count_objects(mask_HW, histogram.box),
    )


def assemble(
    name: str,
    histogram: JointHistogram,
    values: NDArray[np.float64],
    of_pixels: dict[str, float],
    *,
    pixels: Callable[[], NDArray[np.uint8]] | None,
    group: str,
    empty_gt: str,
    keys: tuple[str, ...],
    mask_digest: str,
    num_objects: int,
) -> ImageScore:
    """Derive an image's row from its histogram and the measures computed from its pixels.

    Args:
        name: goes into the row.
        histogram: of the image.
        values: (256,) value of each grey level.
        of_pixels: the measures that a histogram cannot give.
        pixels: returns the map's labelled pixels, for the last bit of adaptive measures; see
            ``adaptive_confusion``.
        group: goes into the row.
        empty_gt: one of EMPTY_GT.
        keys: measures to compute.
        mask_digest: see ``digest_mask``.
        num_objects: goes into the row.
    """
    counts_CL = measures.quantised_counts(histogram, values)
    claim = claim_of(histogram)
    rightly_empty = empty_gt == "correct" and not claim.present and claim.share == 0
    curves = score_curves(counts_CL, rightly_empty=rightly_empty)
    adaptive = measures.adaptive_confusion(histogram, values, pixels=pixels)
    binary = measures.binary_confusion(histogram, values)
    derive: dict[str, Callable[[], Any]] = {
        "Smeasure": lambda: measures.smeasure(histogram, values),
        "MAE": lambda: measures.mean_absolute_error(histogram, values),
        "meanEm": lambda: curves["E"].mean(),
        "maxEm": lambda: curves["E"].max(),
        "adpEm": lambda: measures.emeasure(adaptive),
        "meanFm": lambda: curves["F"].mean(),
        "maxFm": lambda: curves["F"].max(),
        "adpFm": lambda: measures.fmeasure(adaptive),
        "IoU": lambda: measures.iou(binary),
        "Dice": lambda: measures.dice(binary),
        "Precision": lambda: measures.precision(binary),
        "Recall": lambda: measures.recall(binary),
        "Specificity": lambda: measures.specificity(binary),
        "BER": lambda: measures.balanced_error_rate(binary),
    }
    scores = {key: of_pixels[key] if key in of_pixels else float(derive[key]()) for key in keys}
    if rightly_empty:
        earned = {key: 0.0 if key in ("BER", "HCE") else 1.0 for key in scores}
        scores |= {k: v for k, v in earned.items() if k not in ("Smeasure", "MAE")}
    row: Row = {"name": name, "group": group, **scores}
    row["object_fraction"] = histogram.num_foreground / histogram.num_pixels
    row["num_objects"] = num_objects
    return ImageScore(row, counts_CL, rightly_empty, mask_digest, histogram.num_void, claim)


def claim_of(histogram: JointHistogram) -> Claim:
    """Return what a map claims before the stretch."""
    counts_L = histogram.totals.sum(0)
    seen = np.flatnonzero(counts_L)
    # 127 / 255 < 0.5 < 128 / 255
    share = float(counts_L[128:].sum() / histogram.num_pixels)
    low, high = int(seen[0]), int(seen[-1])
    return Claim(histogram.num_foreground > 0, share, low, high, len(seen) > 2)


def without_void(prediction_HW: NDArray[np.uint8], void_HW: NDArray[np.bool_]) -> NDArray[np.uint8]:
    """Return a copy of a map that is 0 on void pixels."""
    cleared_HW = prediction_HW.copy()
    cleared_HW[void_HW] = 0
    return cleared_HW


def count_objects(mask_HW: NDArray[np.bool_], box: Slices | None = None) -> int:
    """Return the number of 8-connected objects that cover at least 0.01 % of the image.

    Specks of a few pixels are annotation errors.

    Args:
        mask_HW: True on the objects.
        box: their bounding box; only this part is searched.
    """
    contours, hierarchy = cv2.findContours(
        mask_HW[box or ...].view(np.uint8), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE
    )
    if not contours:
        return 0
    outer = hierarchy[0, :, 3] < 0
    # Pick's theorem gives the number of pixels that an outline encloses, itself included; the
    # outline of a single pixel is not a polygon.
    areas = [
        cv2.contourArea(contour) + (len(contour) / 2 if len(contour) > 1 else 0) + 1
        for contour, is_outer in zip(contours, outer, strict=True)
        if is_outer
    ]
    return sum(area >= 1e-4 * mask_HW.size for area in areas)


def digest_mask(
    mask_HW: NDArray[np.bool_],
    box: Slices | None = None,
    void_HW: NDArray[np.bool_] | None = None,
) -> str:
    """Return a hash of a mask's shape and pixels: equal for 0/1 and 0/255, PNG and BMP.

    Args:
        mask_HW: True on the objects.
        box: their bounding box, where it is known; the rest of the mask is empty.
        void_HW: True on void pixels; None if there are none.
    """
    if box is None:
        x, y, width, height = cv2.boundingRect(np.ascontiguousarray(mask_HW).view(np.uint8))
        box = (slice(y, y + height), slice(x, x + width))
    place = [(part.start, part.stop) for part in box]
    digest = hashlib.sha256(repr((mask_HW.shape, place)).encode())
    digest.update(np.packbits(mask_HW[box]).tobytes())
    if void_HW is not None:
        digest.update(b"void" + np.packbits(void_HW).tobytes())
    return digest.hexdigest()[:32]


def score_curves(
    counts_CL: NDArray[np.int64], *, rightly_empty: bool = False
) -> dict[str, NDArray[np.float64]]:
    """Return the curves E, F, precision and recall of one image over the thresholds 255 ... 0.

    Args:
        counts_CL: (2, 256) from ``ImageScore``.
        rightly_empty: give full marks at every threshold.

    Returns:
        Four float64 arrays (256,).
    """
    if rightly_empty:
        return {key: np.ones(256) for key in ("E", "F", "precision", "recall")}
    confusion = measures.threshold_confusion(counts_CL)
    return {
        "E": measures.emeasure(confusion),
        "F": measures.fmeasure(confusion),
        "precision": measures.precision(confusion),
        "recall": measures.recall(confusion),
    }
