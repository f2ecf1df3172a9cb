"""Do other sensors show what the photograph shows? Files, and edges against shifted copies."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from camoxpert import stop
from camoxpert.data.files.image_io import read_image
from camoxpert.data.files.modalities import read_plane, require_aligned, resize_known
from camoxpert.data.files.pairing import Pair
from camoxpert.doctor.finding import Finding
from camoxpert.errors import DataError
from camoxpert.text import count

LOOKED_AT = 48
"""Images whose edges are compared, spread over the data."""
SIDE = 128
REACH = 12
"""Largest shift that is tried, pixels of ``SIDE``."""
STEP = 2
FAINT = 0.02
"""Edges that agree less than this, over all images, say nothing about shifts."""
GAIN = 0.02
SURE = 4.0
"""Another shift must fit better by ``GAIN``, and by so many standard errors: the best of 169 shifts
is better than none by chance."""


@dataclass(frozen=True)
class Fit:
    """How the edges of a modality agree with those of the photographs.

    Attributes:
        images: compared.
        still: mean correlation as the files are.
        best: mean correlation at the shift that fits best.
        shift: that shift, (right, down), as shares of the side: so far the modality lies from where
            it belongs.
        sure: whether it fits better than no shift beyond chance.
    """

    images: int
    still: float
    best: float
    shift: tuple[float, float]
    sure: bool


def check_modalities(
    pairs: Sequence[Pair], names: Sequence[str], *, max_pixels: int
) -> list[Finding]:
    """Read the files of modalities and compare their edges with those of the photographs.

    Args:
        pairs: whose images and masks can be read.
        names: of the modalities.
        max_pixels: larger files are faults.

    Returns:
        A finding for each fault, and one for each modality about its registration.

    Raises:
        Stopped: Ctrl-C, SIGTERM or the deadline.
    """
    findings = []
    for name in names:
        having = [(p, path) for p in pairs for key, path in p.modalities if key == name]
        if not having:
            text = f"No image has {name}. Put its files into a folder {name}/ beside the images."
            findings.append(Finding("error", "sensors", text))
            continue
        chosen = {id(pair) for pair, _ in having[:: max(1, len(having) // LOOKED_AT)]}
        compared: list[np.ndarray] = []
        empty: list[Path] = []
        for pair, path in having:
            stop.check()
            try:
                plane = read_plane(path, max_pixels=max_pixels)
                image = read_image(pair.image, max_pixels=max_pixels, at_least=SIDE)
                size = (image.shape[0], image.shape[1])
                require_aligned(plane.shape, size, what=str(path), image=f" {pair.image}")
            except DataError as error:
                findings.append(Finding("error", "sensors", str(error), (str(path),)))
                continue
            if not plane.any():
                empty.append(path)
            elif id(pair) in chosen:
                compared.append(correlations(image, plane))
        if empty:
            text = f"{name}: {count(len(empty), 'file')} without a measured value, seen as missing."
            findings.append(Finding("warning", "sensors", text, tuple(map(str, empty))))
        findings.append(_judged(name, len(having), len(pairs), compared))
    return findings


def correlations(image_HWC: np.ndarray, plane_HW: np.ndarray) -> np.ndarray:
    """Return how the edges of a plane correlate with those of its image, for every shift.

    Args:
        image_HWC: RGB, uint8.
        plane_HW: uint8, 0 where nothing is known.

    Returns:
        (K, K), -1 to 1, for shifts of the plane down and right by -REACH to REACH.
    """
    small = cv2.resize(image_HWC, (SIDE, SIDE), interpolation=cv2.INTER_AREA)
    grey = cv2.cvtColor(small, cv2.COLOR_RGB2GRAY)
    plane = resize_known(plane_HW, (SIDE, SIDE))
    known = cv2.erode((plane > 0).astype(np.uint8), np.ones((3, 3), np.uint8)) > 0
    ours = edges(grey)
    theirs = np.where(known, edges(plane), np.nan)
    inner = slice(REACH, SIDE - REACH)
    fixed = ours[inner, inner]
    shifts = range(-REACH, REACH + 1, STEP)
    found = np.zeros((len(shifts), len(shifts)))
    for row, down in enumerate(shifts):
        for column, right in enumerate(shifts):
            moved = theirs[REACH + down : SIDE - REACH + down, REACH + right : SIDE - REACH + right]
            found[row, column] = _correlation(fixed, moved)
    return found


def edges(grey_HW: np.ndarray) -> np.ndarray:
    """Return the strength of edges, damped so that one strong edge does not decide: (H, W)."""
    smooth = cv2.GaussianBlur(grey_HW.astype(np.float32), (0, 0), 1.5)
    across, down = (cv2.Sobel(smooth, cv2.CV_32F, *way) for way in ((1, 0), (0, 1)))
    strength: np.ndarray = np.sqrt(np.hypot(across, down))
    return strength


def _correlation(a: np.ndarray, b: np.ndarray) -> float:
    known = np.isfinite(b)
    x, y = a[known], b[known]
    if x.size < 2 or x.std() == 0 or y.std() == 0:
        return 0.0
    return float(((x - x.mean()) * (y - y.mean())).mean() / (x.std() * y.std()))


def fit_of(compared: Sequence[np.ndarray]) -> Fit:
    """Return which shift fits best over all images; see ``correlations``."""
    table = np.stack(compared)
    mean = table.mean(0)
    middle = mean.shape[0] // 2
    row, column = (int(place) for place in np.unravel_index(mean.argmax(), mean.shape))
    gain = table[:, row, column] - table[:, middle, middle]
    error = gain.std(ddof=1) / len(gain) ** 0.5 if len(gain) > 1 else 0.0
    shift = ((column - middle) * STEP / SIDE, (row - middle) * STEP / SIDE)
    sure = gain.mean() > max(GAIN, SURE * error) and mean.max() > FAINT
    return Fit(len(table), float(mean[middle, middle]), float(mean.max()), shift, bool(sure))


def _judged(name: str, having: int, pairs: int, compared: Sequence[np.ndarray]) -> Finding:
    """Return what the edges of a modality say."""
    start = f"{name}: {having} of {count(pairs, 'image')} have it"
    if not compared:
        return Finding("note", "sensors", f"{start}.")
    fit = fit_of(compared)
    figures = f"edges of {count(fit.images, 'image')} correlate by {fit.still:.2f}"
    if fit.sure:
        across, down = (f"{abs(share):.1%}" for share in fit.shift)
        sides = ("right" if fit.shift[0] > 0 else "left", "down" if fit.shift[1] > 0 else "up")
        return Finding(
            "warning",
            "sensors",
            f"{start}; {figures}, but by {fit.best:.2f} where it is taken {across} further "
            f"{sides[0]} and {down} further {sides[1]}: it does not lie on the photographs. "
            f"Register the files again, or every pixel will be told about another one.",
        )
    if fit.best <= FAINT:
        return Finding(
            "note",
            "sensors",
            f"{start}; {figures}: too little to say whether it lies on the photographs.",
        )
    return Finding("note", "sensors", f"{start}; {figures}, and no shift fits better.")
