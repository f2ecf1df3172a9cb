"""Is anything hidden at all? How well a probability, or the mask itself, answers that per image.

Everything is taken from the maps and probabilities as the model gave them, never from maps that
were stretched to their own range: the stretch makes every image without an object light up.

All intervals assume independent images. Frames of one video and copies of a picture are not: with
them, intervals are too narrow.

Suffixes: N images, G groups of equal probability (ascending), R resamples, B bins.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TypedDict

import numpy as np
from numpy.typing import NDArray

from camoxpert.metrics.scoring import Claim
from camoxpert.metrics.statistics import RESAMPLES, Interval, resampled_weights

PROBABILITY_KEYS = ("AUROC", "AveragePrecision", "FPR95", "Brier", "ECE")
"""Measures of the probability that something is hidden."""
MASK_KEYS = ("FalseMasks", "FalseArea", "Missed")
"""Measures of the masks: they need no probability."""
PRESENCE_KEYS = (*PROBABILITY_KEYS, *MASK_KEYS)
BINS = 15
RECALL = 0.95
FEWEST_STRETCHED = 4
"""Images without an object whose map files must all look stretched before we say that they were."""

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class ReliabilityBin:
    """A bin of the reliability curve.

    Attributes:
        predicted: mean probability of its images.
        observed: share of its images that have an object.
        low, high: 95 % interval of ``observed`` (Wilson).
        images: how many it holds; images at its ends count in part.
    """

    predicted: float
    observed: float
    low: float
    high: float
    images: float


class PresenceEntry(TypedDict):
    """``PresenceScores`` in ``scores.json`` and in ``metrics.jsonl``."""

    num_present: int
    num_empty: int
    scores: dict[str, float]
    intervals: dict[str, tuple[float, float]]
    bins: list[dict[str, float]]
    calibrated_ece: float | None
    stretched: bool


@dataclass(frozen=True)
class PresenceScores:
    """How well one method tells images with an object from those without.

    Attributes:
        num_present, num_empty: images with and without an object.
        scores: of PRESENCE_KEYS those that are defined; fractions. AUROC, AveragePrecision, FPR95
            (share of the images without an object at the threshold that finds 95 % of the others),
            Brier and ECE (expected calibration error) judge the probability; FalseMasks (share of
            the images without an object in which some pixel is above one half), FalseArea (share of
            their pixels) and Missed (share of the images with an object in which no pixel is) the
            masks.
        intervals: 95 %; empty where they were not asked for.
        bins: reliability curve; empty without probabilities.
        calibrated_ece: the mean ECE of these probabilities if they were perfectly calibrated: what
            so few images show by chance; None without probabilities.
        stretched: the map files of the images without an object had been stretched to black and
            white when they were saved, so their masks say nothing and MASK_KEYS are missing. Never
            of a model's own maps.
    """

    num_present: int
    num_empty: int
    scores: dict[str, float]
    intervals: dict[str, tuple[float, float]]
    bins: tuple[ReliabilityBin, ...]
    calibrated_ece: float | None = None
    stretched: bool = False

    def entry(self) -> PresenceEntry:
        """Return it as files hold it."""
        return {
            "num_present": self.num_present,
            "num_empty": self.num_empty,
            "scores": self.scores,
            "intervals": self.intervals,
            "bins": [asdict(part) for part in self.bins],
            "calibrated_ece": self.calibrated_ece,
            "stretched": self.stretched,
        }


def presence_scores(
    claims: Mapping[str, Claim],
    probabilities: Mapping[str, float] | None = None,
    *,
    from_files: bool = False,
    intervals: bool = True,
    seed: int = 0,
) -> PresenceScores | None:
    """Return how well a method tells images with an object from those without.

    Args:
        claims: image -> what its map claims, see ``Evaluator.claims``.
        probabilities: image -> probability that something is hidden, 0..1; None: the method gives
            none.
        from_files: the maps were read from files, which some programs stretch one by one. What a
            model itself gives is never stretched: maps from 0 to 255 are then its own false masks.
        intervals: also compute 95 % intervals: percentile bootstrap over images, and Wilson's for
            the shares of masks, which the bootstrap calls certain when it saw none.
        seed: equal seeds give equal intervals.

    Returns:
        None if every image has an object.
    """
    names = sorted(claims)
    present_N = np.array([claims[name].present for name in names], bool)
    num_present, num_empty = int(present_N.sum()), int((~present_N).sum())
    if not num_empty:
        return None
    scores: dict[str, float] = {}
    ends: dict[str, tuple[float, float]] = {}
    bins: tuple[ReliabilityBin, ...] = ()
    by_chance: float | None = None
    if probabilities is not None and num_present:
        probability_N = np.array([probabilities[name] for name in names], np.float64)
        scores |= probability_measures(probability_N, present_N)
        bins = reliability(probability_N, present_N)
        by_chance = calibrated_ece(probability_N, seed=seed)
        if intervals:
            found = bootstrap(probability_N, present_N, seed=seed)
            ends |= {key: (end.low, end.high) for key, end in found.items()}
    stretched = from_files and are_stretched([claims[name] for name in names])
    if not stretched:
        share_N = np.array([claims[name].share for name in names])
        counts = {"FalseMasks": (int((share_N[~present_N] > 0).sum()), num_empty)}
        if num_present:
            counts["Missed"] = (int((share_N[present_N] == 0).sum()), num_present)
        scores |= {key: found / number for key, (found, number) in counts.items()}
        scores["FalseArea"] = float(share_N[~present_N].mean())
        if intervals:
            for key, pair in counts.items():
                low, high = wilson(*pair)
                ends[key] = low, high
    return PresenceScores(
        num_present,
        num_empty,
        {key: scores[key] for key in PRESENCE_KEYS if key in scores},
        {key: ends[key] for key in PRESENCE_KEYS if key in ends},
        bins,
        by_chance,
        stretched,
    )


def are_stretched(claims: list[Claim]) -> bool:
    """Return whether the map files of a method were stretched to 0..255 one by one when saved.

    That is so if every map of an image without an object reaches from 0 to 255 and is not binary.
    """
    empty = [claim for claim in claims if not claim.present]
    return len(empty) >= FEWEST_STRETCHED and all(
        (claim.low, claim.high) == (0, 255) and claim.grey for claim in empty
    )


def probability_measures(probability_N: Floats, present_N: NDArray[np.bool_]) -> dict[str, float]:
    """Return PROBABILITY_KEYS; NaN unless there are images of both kinds.

    Args:
        probability_N: that the image has an object, 0..1.
        present_N: whether it has one.
    """
    level_G, positive_G, negative_G = _grouped(probability_N, present_N)
    return dict(
        zip(
            PROBABILITY_KEYS,
            _measures(level_G, positive_G[None], negative_G[None])[0].tolist(),
            strict=True,
        )
    )


def bootstrap(
    probability_N: Floats,
    present_N: NDArray[np.bool_],
    *,
    level: float = 0.95,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> dict[str, Interval]:
    """Return the percentile bootstrap interval over images of each of PROBABILITY_KEYS.

    Resamples with one kind of image alone have no value and are left out. That of ECE is moved by
    the difference between the value and the median of the resamples: an error of which chance is a
    part grows with every resampling, and the interval might lie above the value.
    """
    rng = np.random.default_rng(seed)
    level_G, group_N = np.unique(probability_N, return_inverse=True)
    order_N = np.argsort(group_N, kind="stable")
    starts_G = np.searchsorted(group_N[order_N], np.arange(len(level_G)))
    probability_N, present_N = probability_N[order_N], present_N[order_N]
    parts = []
    for weights_RN in resampled_weights(rng, len(probability_N), resamples):
        counts_RN = np.rint(weights_RN * len(probability_N))
        positive_RG = np.add.reduceat(counts_RN * present_N, starts_G, axis=1)
        negative_RG = np.add.reduceat(counts_RN * ~present_N, starts_G, axis=1)
        parts.append(_measures(level_G, positive_RG, negative_RG))
    values_RK = np.concatenate(parts)
    values_RK = values_RK[np.isfinite(values_RK).all(1)]
    if not len(values_RK):
        return {}
    ece_R = values_RK[:, PROBABILITY_KEYS.index("ECE")]
    ece_R += probability_measures(probability_N, present_N)["ECE"] - np.median(ece_R)
    np.maximum(ece_R, 0, out=ece_R)
    low_K, high_K = np.quantile(values_RK, [(1 - level) / 2, (1 + level) / 2], axis=0)
    return {
        key: Interval(float(low), float(high))
        for key, low, high in zip(PROBABILITY_KEYS, low_K, high_K, strict=True)
    }


def calibrated_ece(probability_N: Floats, *, draws: int = 200, seed: int = 0) -> float:
    """Return the mean ECE of probabilities that are true, from images drawn by them."""
    rng = np.random.default_rng(seed)
    level_G, count_G = np.unique(probability_N, return_counts=True)
    found = []
    for _ in range(draws):
        positive_G = rng.binomial(count_G, np.clip(level_G, 0, 1)).astype(np.float64)
        _, predicted_B, observed_B = _binned(level_G, positive_G, count_G - positive_G, BINS)
        found.append(np.abs(predicted_B - observed_B).mean())
    return float(np.mean(found))


def reliability(
    probability_N: Floats, present_N: NDArray[np.bool_], bins: int = BINS
) -> tuple[ReliabilityBin, ...]:
    """Return the reliability curve: bins of equal mass, from the least to the most probable."""
    level_G, positive_G, negative_G = _grouped(probability_N, present_N)
    mass, predicted_B, observed_B = _binned(level_G, positive_G, negative_G, bins)
    ends = [wilson(share * mass, mass) for share in observed_B]
    return tuple(
        ReliabilityBin(float(p), float(o), low, high, mass)
        for p, o, (low, high) in zip(predicted_B, observed_B, ends, strict=True)
    )


def wilson(found: float, number: float, z: float = 1.959964) -> Interval:
    """Return the 95 % interval of a share (Wilson, 1927): 0 of 10 is not certainly 0."""
    share = found / number
    middle = share + z * z / (2 * number)
    half = z * math.sqrt(share * (1 - share) / number + z * z / (4 * number**2))
    scale = 1 + z * z / number
    return Interval(max(0.0, (middle - half) / scale), min(1.0, (middle + half) / scale))


def _grouped(probability_N: Floats, present_N: NDArray[np.bool_]) -> tuple[Floats, Floats, Floats]:
    """Return the different probabilities, ascending, and the images of both kinds at each."""
    level_G, group_N = np.unique(probability_N, return_inverse=True)
    positive_G = np.bincount(group_N, weights=present_N, minlength=len(level_G))
    total_G = np.bincount(group_N, minlength=len(level_G)).astype(np.float64)
    return level_G, positive_G.astype(np.float64), total_G - positive_G


def _measures(level_G: Floats, positive_RG: Floats, negative_RG: Floats) -> Floats:
    """Return PROBABILITY_KEYS of each row of counts, (R, 5); NaN without images of both kinds."""
    positives_R1, negatives_R1 = (x.sum(1, keepdims=True) for x in (positive_RG, negative_RG))
    with np.errstate(divide="ignore", invalid="ignore"):
        # A tie counts half (Mann and Whitney, 1947).
        below_RG = negative_RG.cumsum(1) - negative_RG / 2
        auroc_R = (positive_RG * below_RG).sum(1) / (positives_R1 * negatives_R1)[:, 0]
        # At the threshold of each group: images at or above it.
        true_RG = positives_R1 - positive_RG.cumsum(1) + positive_RG
        false_RG = negatives_R1 - negative_RG.cumsum(1) + negative_RG
        precision_RG = true_RG / np.maximum(true_RG + false_RG, 1)
        average_R = (positive_RG * precision_RG).sum(1) / positives_R1[:, 0]
        enough_RG = true_RG >= RECALL * positives_R1 - 1e-9
        false_R = np.where(enough_RG, false_RG, np.inf).min(1) / negatives_R1[:, 0]
        number_R = (positives_R1 + negatives_R1)[:, 0]
        squares_RG = positive_RG * (1 - level_G) ** 2 + negative_RG * level_G**2
        brier_R = squares_RG.sum(1) / number_R
    ece_R = np.empty(len(positive_RG))
    for row, (positive_G, negative_G) in enumerate(zip(positive_RG, negative_RG, strict=True)):
        _, predicted_B, observed_B = _binned(level_G, positive_G, negative_G, BINS)
        ece_R[row] = np.abs(predicted_B - observed_B).mean()
    both_R = (positives_R1 > 0)[:, 0] & (negatives_R1 > 0)[:, 0]
    values_RK = np.stack([auroc_R, average_R, false_R, brier_R, ece_R], 1)
    return np.where(both_R[:, None], values_RK, np.nan)


def _binned(
    level_G: Floats, positive_G: Floats, negative_G: Floats, bins: int
) -> tuple[float, Floats, Floats]:
    """Return the images of a bin, and for each bin the mean probability and the share of images
    with an object.

    All bins have the same mass: an image at the border of two is divided between them, and of
    images of equal probability each bin gets the same mixture, so that the order of images does not
    matter. There are no more bins than images.
    """
    total_G = positive_G + negative_G
    number = float(total_G.sum())
    bins = min(bins, max(1, int(number)))
    reached_G = np.concatenate([[0.0], total_G.cumsum()])
    edges = number * np.arange(bins + 1) / bins
    mass = number / bins
    sums = (np.concatenate([[0.0], x.cumsum()]) for x in (total_G * level_G, positive_G))
    predicted_B, observed_B = (np.diff(np.interp(edges, reached_G, s)) / mass for s in sums)
    return mass, predicted_B, np.clip(observed_B, 0, 1)
