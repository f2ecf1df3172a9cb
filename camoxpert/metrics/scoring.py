"""One image: its row of scores, and the small histogram that its curves follow from."""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import cv2
import numpy as np
from numpy.typing import NDArray

from camoxpert.metrics import measures
from camoxpert.metrics.histogram import joint_histogram, level_values
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
"""Keys of a score row and of the results, in the order in which papers print them."""

PROTOCOLS = ("pysod", "raw")
EMPTY_GT = ("pysod", "correct", "skip")

Row = dict[str, Any]


class ImageScore(NamedTuple):
    """All that is kept of an image."""

    row: Row
    """name, group, the values of RESULT_KEYS, object_fraction."""
    counts_CL: NDArray[np.int64]
    """(2, 256) background and foreground pixels over the quantised levels."""
    rightly_empty: bool
    """There is no object, none was claimed, and the evaluator gives credit for that."""


def score_image(
    name: str,
    prediction_HW: NDArray[np.uint8],
    mask_HW: NDArray[np.bool_],
    *,
    group: str = "",
    protocol: str = "pysod",
    empty_gt: str = "pysod",
) -> ImageScore:
    """Score one checked pair of arrays; the options are those of the Evaluator.

    Args:
        name: goes into the row.
        prediction_HW: uint8 0..255, contiguous.
        mask_HW: bool, contiguous, same shape.
        group: goes into the row.
        protocol: one of PROTOCOLS.
        empty_gt: one of EMPTY_GT; "skip" scores like "pysod" here, the caller skips.
    """
    histogram = joint_histogram(prediction_HW, mask_HW)
    values = level_values(histogram, normalise=protocol == "pysod")
    saliency_HW = cast(NDArray[np.float64], cv2.LUT(prediction_HW, values))
    counts_CL = measures.quantised_counts(histogram, values)
    no_claim = not (prediction_HW > 127).any()  # 127 / 255 < 0.5 < 128 / 255
    rightly_empty = empty_gt == "correct" and histogram.num_foreground == 0 and no_claim
    curves = score_curves(counts_CL, rightly_empty=rightly_empty)
    adaptive = measures.adaptive_confusion(histogram, values, mean=float(saliency_HW.mean()))
    binary = measures.binary_confusion(histogram, values)
    scores = {
        "Smeasure": measures.smeasure(histogram, values),
        "MAE": measures.mean_absolute_error(histogram, values),
        "wFmeasure": weighted_fmeasure(saliency_HW, mask_HW),
        "meanEm": float(curves["E"].mean()),
        "maxEm": float(curves["E"].max()),
        "adpEm": float(measures.emeasure(adaptive)),
        "meanFm": float(curves["F"].mean()),
        "maxFm": float(curves["F"].max()),
        "adpFm": float(measures.fmeasure(adaptive)),
        "IoU": float(measures.iou(binary)),
        "Dice": float(measures.dice(binary)),
    }
    if rightly_empty:
        scores.update(dict.fromkeys(("wFmeasure", "adpEm", "adpFm", "IoU", "Dice"), 1.0))
    row: Row = {"name": name, "group": group, **scores}
    row["object_fraction"] = histogram.num_foreground / histogram.num_pixels
    return ImageScore(row, counts_CL, rightly_empty)


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
