"""Pictures: overlays and panels of predictions, and the charts of a run.

Charts are made with matplotlib's figure objects, never its global state, on a transparent ground
with mid-grey text, so that they read on a light and on a dark page.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import cv2
import numpy as np

GREY = "#808893"
COLOURS = ("#2f81f7", "#e5834b", "#3fa66b", "#b164c9", "#c9a227", "#d9536f", "#4bb3b8")
# Prediction against truth: found, invented, missed.
TRUE_POSITIVE, FALSE_POSITIVE, FALSE_NEGATIVE = (63, 185, 80), (235, 84, 84), (74, 144, 255)


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
    result = image_HWC.copy()
    tint = np.array(colour, np.float32)
    result[inside] = (image_HWC[inside] * (1 - alpha) + tint * alpha).astype(np.uint8)
    contours, _ = cv2.findContours(inside.astype(np.uint8), cv2.RETR_LIST, cv2.CHAIN_APPROX_NONE)
    cv2.drawContours(result, contours, -1, colour, max(1, round(max(inside.shape) / 300)))
    return result


def cutout(image_HWC: np.ndarray, probability_HW: np.ndarray) -> np.ndarray:
    """Return the image with the probability as its alpha channel, uint8 RGBA (H, W, 4)."""
    alpha = np.round(probability_HW * 255).astype(np.uint8)
    return np.dstack([image_HWC, alpha])


def compare(image_HWC: np.ndarray, predicted: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Show prediction against truth (bool, H, W): green found, red invented, blue missed."""
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
        mask_HW: uint8, 0 or 255.
        probability_HW: float in 0..1.
        stretch: compare the map stretched to its full range, as protocol "pysod" scores it.
        height: of the pictures in the result, pixels.

    Returns:
        uint8 RGB.
    """
    low, high = float(probability_HW.min()), float(probability_HW.max())
    cut = (low + high) / 2 if stretch and high > low else 0.5
    truth, predicted = mask_HW > 127, probability_HW > cut
    grey = np.repeat((probability_HW * 255).astype(np.uint8)[..., None], 3, axis=2)
    pictures = {
        "image": image_HWC,
        "truth": overlay(image_HWC, truth, colour=FALSE_NEGATIVE),
        "probability": grey,
        "prediction": compare(image_HWC, predicted, truth),
    }
    return _side_by_side(pictures, height)


def comparison_panel(
    image_HWC: np.ndarray | None,
    mask_HW: np.ndarray,
    predictions: Mapping[str, np.ndarray],
    *,
    height: int = 150,
) -> np.ndarray:
    """Put image, truth and the comparison of several maps side by side, with captions.

    Args:
        image_HWC: uint8 RGB; None draws on black.
        mask_HW: bool.
        predictions: caption -> what was found, bool, of the mask's size.
        height: of the pictures in the result, pixels.

    Returns:
        uint8 RGB.
    """
    ground = np.zeros((*mask_HW.shape, 3), np.uint8) if image_HWC is None else image_HWC
    pictures = {} if image_HWC is None else {"image": image_HWC}
    pictures["truth"] = overlay(ground, mask_HW, colour=FALSE_NEGATIVE)
    for caption, found_HW in predictions.items():
        pictures[caption] = compare(ground, found_HW, mask_HW)
    return _side_by_side(pictures, height)


def _side_by_side(pictures: Mapping[str, np.ndarray], height: int) -> np.ndarray:
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


def plot_training(records: Sequence[Mapping[str, Any]]) -> bytes:
    """Plot loss, its terms and the learning rate over steps; PNG."""
    train = [r for r in records if r.get("kind") == "train" and r.get("loss") is not None]
    figure, (left, right) = _figure(2)
    steps = [r["step"] for r in train]
    left.plot(steps, [r["loss"] for r in train], color=COLOURS[0], label="loss", linewidth=1.6)
    names = list(dict.fromkeys(name for r in train for name in r.get("terms", {})))
    for colour, name in zip(COLOURS[1:], names, strict=False):
        values = [r.get("terms", {}).get(name) for r in train]
        left.plot(steps, values, color=colour, label=name, linewidth=1)
    left.set(title="training loss", xlabel="optimizer step")
    right.plot(steps, [r["lr"] for r in train], color=COLOURS[0], linewidth=1.6)
    right.set(title="learning rate (decoder)", xlabel="optimizer step")
    _legend(left)
    return _png(figure)


def plot_scores(records: Sequence[Mapping[str, Any]]) -> bytes:
    """Plot the validation scores over epochs; PNG."""
    validation = [r for r in records if r.get("kind") == "validation"]
    figure, (left, right) = _figure(2)
    epochs = [r["epoch"] for r in validation]
    for colour, key in zip(COLOURS, ("Smeasure", "wFmeasure", "meanEm", "IoU"), strict=False):
        values = [r["scores"].get(key) for r in validation]
        left.plot(epochs, values, color=colour, label=key, marker=".", linewidth=1.4)
    mae = [r["scores"].get("MAE") for r in validation]
    right.plot(epochs, mae, color=COLOURS[5], marker=".", linewidth=1.4)
    left.set(title="validation, higher is better", xlabel="epoch")
    right.set(title="validation MAE, lower is better", xlabel="epoch")
    best = [r["epoch"] for r in validation if r.get("best")]
    if best:
        for axis in (left, right):
            axis.axvline(best[-1], color=GREY, linestyle=":", linewidth=1)
    _legend(left)
    return _png(figure)


def plot_routing(record: Mapping[str, Any]) -> bytes:
    """Plot the share of each expert per level as a heat map with numbers; PNG."""
    levels, experts = record["levels"], record["experts"]
    usage = np.array([level["usage"] for level in levels.values()])
    figure, (axis,) = _figure(1, width=max(4.5, 1.05 * len(experts) + 1.6), height=2.7)
    fair = 1 / len(experts)
    axis.imshow(usage, cmap="Blues", vmin=0, vmax=max(2.5 * fair, usage.max()), aspect="auto")
    axis.set_xticks(range(len(experts)), experts, rotation=20, ha="right")
    axis.set_yticks(range(len(levels)), list(levels))
    for (row, column), value in np.ndenumerate(usage):
        dark = value > 0.6 * max(2.5 * fair, usage.max())
        colour = "white" if dark else "#1f2933"
        axis.text(column, row, f"{value:.0%}", ha="center", va="center", color=colour, fontsize=9)
    axis.set_title(f"share of images per expert (fair: {fair:.0%})")
    axis.grid(False)
    return _png(figure)


def plot_curves(curves: Mapping[str, Mapping[str, Sequence[float]]]) -> bytes:
    """Plot precision-recall, F and E curves, one line per data set or method; PNG."""
    figure, axes = _figure(3, width=9.6)
    threshold = np.arange(255, -1, -1)
    for index, (name, curve) in enumerate(curves.items()):
        # Colours come round again with another dash.
        style: dict[str, Any] = {
            "color": COLOURS[index % len(COLOURS)],
            "linestyle": ("-", "--", ":", "-.")[index // len(COLOURS) % 4],
            # "$" starts a formula, and labels that begin with "_" are left out.
            "label": f"{' ' if name.startswith('_') else ''}{name}".replace("$", r"\$"),
            "linewidth": 1.4,
        }
        axes[0].plot(curve["recall"], curve["precision"], **style)
        axes[1].plot(threshold, curve["F"], **style)
        axes[2].plot(threshold, curve["E"], **style)
    axes[0].set(title="precision over recall", xlabel="recall", xlim=(0, 1), ylim=(0, 1.02))
    axes[1].set(title="F-measure", xlabel="threshold, 0 to 255", ylim=(0, 1.02))
    axes[2].set(title="E-measure", xlabel="threshold, 0 to 255", ylim=(0, 1.02))
    _legend(axes[0])
    return _png(figure)


def plot_phases(phases: Mapping[str, float]) -> bytes:
    """Plot the wall time of each phase as bars; PNG."""
    ordered = sorted(phases.items(), key=lambda item: item[1])
    figure, (axis,) = _figure(1, width=6.4, height=0.42 * len(ordered) + 0.9)
    seconds = [value for _, value in ordered]
    axis.barh([name for name, _ in ordered], seconds, color=COLOURS[0], height=0.6)
    total = sum(seconds) or 1.0
    for row, value in enumerate(seconds):
        axis.text(value, row, f" {value:.1f} s, {value / total:.0%}", va="center", color=GREY)
    axis.set_xlim(0, max(seconds, default=1) * 1.25 + 1e-9)
    axis.set(xlabel="seconds")
    return _png(figure)


def plot_counts(histograms: Mapping[str, Mapping[str, int]]) -> bytes:
    """Draw counts by name as bars, one axis per histogram; the 16 largest of each."""
    figure, axes = _figure(len(histograms))
    for axis, (title, counts) in zip(axes, histograms.items(), strict=True):
        names = list(counts)
        if len(names) > 16:
            names = sorted(names, key=lambda name: -counts[name])[:16]
        axis.barh(names[::-1], [counts[name] for name in names][::-1], color=COLOURS[0])
        axis.set_title(title)
    return _png(figure)


def _figure(columns: int, *, width: float = 8.4, height: float = 2.9) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(1, columns, squeeze=False)[0]
    for axis in axes:
        axis.set_facecolor("none")
        axis.grid(True, color=GREY, alpha=0.2, linewidth=0.6)
        axis.tick_params(colors=GREY, labelsize=8)
        axis.title.set(color=GREY, fontsize=10)
        axis.xaxis.label.set(color=GREY, fontsize=8)
        for name, spine in axis.spines.items():
            spine.set_visible(name in ("left", "bottom"))
            spine.set_color(GREY)
    return figure, axes


def _legend(axis: Any) -> None:
    if axis.get_legend_handles_labels()[0]:
        axis.legend(fontsize=8, frameon=False, labelcolor=GREY)


def _png(figure: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130, transparent=True)
    return buffer.getvalue()
