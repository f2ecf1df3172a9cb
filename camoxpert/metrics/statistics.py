"""Bootstrap intervals of scores, and paired tests of two methods on the same images.

Both resample images. A measure taken from averaged curves (mean and max of E and F) is recomputed
from the resampled curves, not averaged over images: the statistic is the one in the table.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from camoxpert.errors import DataError
from camoxpert.metrics.evaluator import Evaluator

Floats = NDArray[np.float64]
RESAMPLES = 2000
CHUNK = 200
"""Resamples held in memory at a time."""


class Interval(NamedTuple):
    """A percentile interval."""

    low: float
    high: float


class Comparison(NamedTuple):
    """Methods a and b compared in one measure."""

    difference: float
    """Score of a minus score of b."""
    low: float
    """Lower end of the difference's bootstrap interval."""
    high: float
    """Upper end."""
    p_value: float
    """Two-sided p-value of the hypothesis that the methods can be swapped on any image."""


class Scores:
    """The scores of one evaluation as arrays, ready to be resampled.

    Args:
        evaluator: with at least one image.
    """

    def __init__(self, evaluator: Evaluator) -> None:
        rows = evaluator.rows()
        if not rows:
            raise DataError("There is nothing to resample: no image was scored.")
        self.names = tuple(row["name"] for row in rows)
        self.keys = evaluator.keys
        self.table_NK = np.array([[row[key] for key in self.keys] for row in rows], np.float64)
        curves = evaluator.image_curves()
        wanted = [letter for letter in "EF" if any(key in self.keys for key in _of_curve(letter))]
        self.curves_NL = {letter: curves[letter] for letter in wanted}

    @classmethod
    def averaged(cls, parts: Sequence[Scores]) -> Scores:
        """Return the mean of several scores of the same images, such as those of repeats.

        Raises:
            DataError: the images or measures differ.
        """
        for part in parts[1:]:
            _require_same_images(parts[0], part)
        mean = cls.__new__(cls)
        mean.names, mean.keys = parts[0].names, parts[0].keys
        mean.table_NK = np.mean([part.table_NK for part in parts], axis=0)
        mean.curves_NL = {
            letter: np.mean([part.curves_NL[letter] for part in parts], axis=0)
            for letter in parts[0].curves_NL
        }
        return mean

    def part(self, names: Collection[str]) -> Scores:
        """Return the scores of some of the images, in the same order."""
        kept = np.array([name in names for name in self.names], bool)
        found = Scores.__new__(Scores)
        found.names = tuple(name for name in self.names if name in names)
        found.keys, found.table_NK = self.keys, self.table_NK[kept]
        found.curves_NL = {letter: curve[kept] for letter, curve in self.curves_NL.items()}
        return found

    def means(self) -> dict[str, float]:
        """Return the measures of all images; {} of none."""
        number = len(self.names)
        if not number:
            return {}
        values_K = self.statistics(np.full((1, number), 1 / number))[0]
        return dict(zip(self.keys, map(float, values_K), strict=True))

    def statistics(self, weights_RN: Floats) -> Floats:
        """Return the measures of weighted images, (R, K): one row for each row of weights.

        Args:
            weights_RN: weights of the images; each row sums to 1.
        """
        values_RK = weights_RN @ self.table_NK
        for letter, curves_NL in self.curves_NL.items():
            averaged_RL = weights_RN @ curves_NL
            for key, value_R in zip(
                _of_curve(letter), (averaged_RL.mean(1), averaged_RL.max(1)), strict=True
            ):
                if key in self.keys:
                    values_RK[:, self.keys.index(key)] = value_R
        return values_RK


def _of_curve(letter: str) -> tuple[str, str]:
    return f"mean{letter}m", f"max{letter}m"


def confidence_intervals(
    scores: Scores,
    *,
    level: float = 0.95,
    resamples: int = RESAMPLES,
    seed: int = 0,
    units_N: NDArray[np.int64] | None = None,
) -> dict[str, Interval]:
    """Return the percentile bootstrap interval of every measure (Efron, 1979).

    The interval shows how much the score would vary with other images of the same kind. It says
    nothing about other training seeds.

    Args:
        scores: of one method on one data set.
        level: coverage, 0..1.
        resamples: how often the images are drawn, with replacement.
        seed: equal seeds give equal intervals.
        units_N: number of each image's group, from 0: groups are drawn as a whole, because frames
            of one video say little more than one of them. None: every image is drawn by itself.
    """
    rng = np.random.default_rng(seed)
    drawn = unit_weights(rng, len(scores.names), resamples, units_N)
    values_RK = np.concatenate([scores.statistics(weights) for weights in drawn])
    low_K, high_K = np.quantile(values_RK, [(1 - level) / 2, (1 + level) / 2], axis=0)
    return {
        key: Interval(float(low), float(high))
        for key, low, high in zip(scores.keys, low_K, high_K, strict=True)
    }


def ratio_intervals(
    values_NC: Floats,
    base_N: Floats,
    *,
    level: float = 0.95,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> list[Interval]:
    """Return the percentile bootstrap interval of each column's mean over the mean of a base.

    Args:
        values_NC: C values of each image.
        base_N: value of each image by whose mean they are divided; resampled together with them.
        level, resamples, seed: see ``confidence_intervals``.
    """
    rng = np.random.default_rng(seed)
    parts = []
    for weights_RN in resampled_weights(rng, len(base_N), resamples):
        base_R1 = (weights_RN @ base_N)[:, None]
        values_RC = weights_RN @ values_NC
        # A resample whose base is 0 has no ratio.
        parts.append((values_RC / np.where(base_R1 > 0, base_R1, 1))[base_R1[:, 0] > 0])
    ratios_RC = np.concatenate(parts)
    low_C, high_C = np.quantile(ratios_RC, [(1 - level) / 2, (1 + level) / 2], axis=0)
    return [Interval(float(low), float(high)) for low, high in zip(low_C, high_C, strict=True)]


def compare(
    a: Scores,
    b: Scores,
    *,
    level: float = 0.95,
    resamples: int = RESAMPLES,
    seed: int = 0,
    units_N: NDArray[np.int64] | None = None,
) -> dict[str, Comparison]:
    """Compare two methods on the same images, measure by measure.

    The interval is a paired bootstrap, the p-value a permutation test: on every image the two
    methods are swapped by a coin toss, and the test counts how often the difference is at least as
    large as the observed one (Fisher, 1935; (1 + count) / (1 + tosses), never 0). Many measures or
    methods need a correction such as Holm's, which is not applied here.

    Args:
        a, b: scores of the two methods; the same images and measures.
        level: coverage of the interval.
        resamples: number of bootstrap resamples, and of coin tosses.
        seed: equal seeds give equal results.
        units_N: see ``confidence_intervals``; the images of a group are swapped together.

    Raises:
        DataError: the images or measures differ.
    """
    _require_same_images(a, b)
    number = len(a.names)
    even = np.full((1, number), 1 / number)
    observed_K = (a.statistics(even) - b.statistics(even))[0]

    rng = np.random.default_rng(seed)
    differences_RK = np.concatenate(
        [
            a.statistics(weights) - b.statistics(weights)
            for weights in unit_weights(rng, number, resamples, units_N)
        ]
    )
    low_K, high_K = np.quantile(differences_RK, [(1 - level) / 2, (1 + level) / 2], axis=0)

    at_least_K = np.zeros(len(a.keys), np.int64)
    # Sums in another order differ in the last bits; equal differences must count as equal.
    threshold_K = np.abs(observed_K) - 1e-12
    for kept_RN in _coin_tosses(rng, number, resamples, units_N):
        swapped_RN = 1 / number - kept_RN
        first = _mixed(a, b, kept_RN, swapped_RN)
        second = _mixed(a, b, swapped_RN, kept_RN)
        at_least_K += (np.abs(first - second) >= threshold_K).sum(0)
    p_K = (1 + at_least_K) / (1 + resamples)
    columns = zip(a.keys, observed_K, low_K, high_K, p_K, strict=True)
    return {key: Comparison(*(float(v) for v in values)) for key, *values in columns}


def _require_same_images(a: Scores, b: Scores) -> None:
    if a.names != b.names:
        only = sorted(set(a.names) ^ set(b.names))
        raise DataError(
            f"Two methods can be compared only on the same images; {len(only)} images were scored"
            f" for one of them, for example {only[0] if only else a.names[0]}."
        )
    if a.keys != b.keys:
        raise DataError(
            f"Two methods can be compared only in the same measures; a has {', '.join(a.keys)} and"
            f" b has {', '.join(b.keys)}."
        )


def compare_seeds(
    a_SN: Floats, b_SN: Floats, *, level: float = 0.95, resamples: int = RESAMPLES, seed: int = 0
) -> Interval:
    """Return the interval of the difference between two methods over seeds and images.

    A hierarchical bootstrap: each resample draws the seeds of either method and the images, all
    with replacement; the images are the same for both. Scores of one image with several seeds are
    not independent, and scores of several images with one seed are not either: an interval over
    images alone says nothing about other seeds.

    Args:
        a_SN, b_SN: score of every image with every seed, (seeds, images); equal images in equal
            columns. The numbers of seeds may differ.
        level: coverage, 0..1. With few seeds it is lower in truth: the spread over n seeds is drawn
            too small by about sqrt(1 - 1/n).
        resamples: how often.
        seed: equal seeds give equal intervals.

    Raises:
        ValueError: the numbers of images differ, or there is nothing to resample.
    """
    if a_SN.shape[1] != b_SN.shape[1] or 0 in (*a_SN.shape, *b_SN.shape):
        raise ValueError(f"Scores of shapes {a_SN.shape} and {b_SN.shape} cannot be compared.")
    rng = np.random.default_rng(seed)
    weights_a_RS, weights_b_RS, weights_RN = (
        np.concatenate(list(resampled_weights(rng, number, resamples)))
        for number in (a_SN.shape[0], b_SN.shape[0], a_SN.shape[1])
    )
    difference_RN = weights_a_RS @ a_SN - weights_b_RS @ b_SN
    values_R = (weights_RN * difference_RN).sum(1)
    low, high = np.quantile(values_R, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(low), float(high))


def group_p_value(
    labels_N: NDArray[np.int64], values_N: Floats, *, resamples: int = RESAMPLES, seed: int = 0
) -> float:
    """Return the p-value of the hypothesis that labels say nothing about values: a permutation
    test of the variance between the labels' means ((1 + count) / (1 + permutations), never 0).

    Args:
        labels_N: group of each value, from 0.
        values_N: without NaN.
        resamples: number of permutations.
        seed: equal seeds give equal results.
    """
    rng = np.random.default_rng(seed)
    centred_N = values_N - values_N.mean()
    groups = [index for index in range(int(labels_N.max()) + 1) if (labels_N == index).any()]

    def between(labels_RN: NDArray[np.int64]) -> Floats:
        own = [labels_RN == index for index in groups]
        return sum((o @ centred_N) ** 2 / o[0].sum() for o in own)

    # As in `compare`: equal sums in another order must count as equal.
    threshold = between(labels_N[None])[0] * (1 - 1e-9) - 1e-12
    at_least = 0
    for start in range(0, resamples, CHUNK):
        size = min(CHUNK, resamples - start)
        shuffled_RN = rng.permuted(np.tile(labels_N, (size, 1)), axis=1)
        at_least += int((between(shuffled_RN) >= threshold).sum())
    return (1 + at_least) / (1 + resamples)


def _mixed(a: Scores, b: Scores, weights_a_RN: Floats, weights_b_RN: Floats) -> Floats:
    """Return the statistics of a method that takes some images from a and the others from b."""
    values_RK = weights_a_RN @ a.table_NK + weights_b_RN @ b.table_NK
    for letter in a.curves_NL:
        averaged_RL = weights_a_RN @ a.curves_NL[letter] + weights_b_RN @ b.curves_NL[letter]
        for key, value_R in zip(
            _of_curve(letter), (averaged_RL.mean(1), averaged_RL.max(1)), strict=True
        ):
            if key in a.keys:
                values_RK[:, a.keys.index(key)] = value_R
    return values_RK


def resampled_weights(rng: np.random.Generator, number: int, resamples: int) -> Iterator[Floats]:
    """Yield chunks (R, N) of weights: how often each image was drawn, over N."""
    for start in range(0, resamples, CHUNK):
        size = min(CHUNK, resamples - start)
        yield rng.multinomial(number, np.full(number, 1 / number), size=size) / number


def unit_weights(
    rng: np.random.Generator, number: int, resamples: int, units_N: NDArray[np.int64] | None
) -> Iterator[Floats]:
    """Yield chunks (R, N) of weights that sum to 1 in each row, groups being drawn as a whole.

    Args:
        rng: source of the draws.
        number: of images.
        resamples: number of rows in all.
        units_N: number of each image's group, from 0; None: every image is its own.
    """
    if units_N is None:
        yield from resampled_weights(rng, number, resamples)
        return
    for weights_RU in resampled_weights(rng, int(units_N.max()) + 1, resamples):
        drawn_RN = weights_RU[:, units_N]
        yield drawn_RN / drawn_RN.sum(1, keepdims=True)


def _coin_tosses(
    rng: np.random.Generator, number: int, tosses: int, units_N: NDArray[np.int64] | None = None
) -> Iterator[Floats]:
    """Yield chunks (R, N) of weights, 1 / N or 0 by a coin toss for each image or group."""
    units = number if units_N is None else int(units_N.max()) + 1
    for start in range(0, tosses, CHUNK):
        size = min(CHUNK, tosses - start)
        tossed_RU = rng.integers(0, 2, (size, units)) / number
        yield tossed_RU if units_N is None else tossed_RU[:, units_N]


def breakdown(
    rows: Sequence[Mapping[str, Any]], labels: Sequence[str], keys: Sequence[str]
) -> dict[str, dict[str, float]]:
    """Return the mean of every measure over the images of each label, with their number.

    Curve measures here are means of each image's value, at that image's best threshold.

    Args:
        rows: from ``Evaluator.rows``.
        labels: one for each row; "" leaves the row out.
        keys: measures.

    Returns:
        Label -> {"images": count, key: mean}; labels in sorted order.
    """
    table: dict[str, dict[str, float]] = {}
    for label in sorted(set(labels) - {""}):
        chosen = [row for row, own in zip(rows, labels, strict=True) if own == label]
        means = {key: float(np.mean([float(row[key]) for row in chosen])) for key in keys}
        table[label] = {"images": float(len(chosen)), **means}
    return table
