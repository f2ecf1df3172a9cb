"""Scores of a data set, gathered image by image, in any order and from any number of processes.

The evaluator keeps one row of scores and one small histogram per image, nothing else. Results are
computed from the images sorted by name, so one process, eight workers or two GPUs give the same
number to the last bit.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Set
from typing import Any

import numpy as np
from numpy.typing import NDArray

from camoxpert.errors import ConfigError, DataError
from camoxpert.metrics.inputs import (
    check_same_size,
    checked_mask,
    checked_prediction,
    checked_void,
)
from camoxpert.metrics.scoring import (
    EMPTY_GT,
    EXTRA_KEYS,
    PROTOCOLS,
    RESULT_KEYS,
    Claim,
    ImageScore,
    Row,
    score_curves,
    score_image,
)
from camoxpert.text import closest

KNOWN_KEYS = (*RESULT_KEYS, *EXTRA_KEYS)
HIGHER_IS_BETTER = {key: key not in ("MAE", "BER", "HCE") for key in KNOWN_KEYS}
"""Direction of each result."""

STATE_VERSION = 4


def is_better(key: str, a: float, b: float) -> bool:
    """Return whether value ``a`` of result ``key`` is strictly better than ``b``.

    NaN is worse than any number.

    Raises:
        ConfigError: ``key`` is not a known measure.
    """
    _check_choice("measure", key, KNOWN_KEYS)
    if math.isnan(a) or math.isnan(b):
        return math.isnan(b) and not math.isnan(a)
    return a > b if HIGHER_IS_BETTER[key] else a < b


def _check_choice(what: str, value: str, options: tuple[str, ...]) -> None:
    if value not in options:
        near = closest(str(value), options)
        hint = f" Did you mean {near!r}?" if near else ""
        raise ConfigError(f"Unknown {what} {value!r}; choose from {', '.join(options)}.{hint}")


class Evaluator:
    """Collects the scores of a data set's images.

    Args:
        protocol: "pysod" stretches every map to its own full range first, as the field's evaluation
            code does: these are the numbers of the papers. "raw" takes the values as they are, and
            a model that is unsure looks unsure.
        empty_gt: how an image without an object is scored. "pysod": as in the papers' code, 0 in F,
            weighted F, IoU and Dice even where nothing was predicted. "correct": a map that claims
            no object scores 1 in these and in E; a false claim scores as in "pysod"; MAE and
            S-measure are the same in both. A claim is a value above one half before the stretch,
            because the stretch would turn even faint noise into certainty. "skip": left out, and
            counted in ``num_skipped``.
        keys: measures to compute, from RESULT_KEYS and EXTRA_KEYS. Without wFmeasure, BoundaryIoU
            and HCE an image costs a millisecond, because only its histogram is used.

    Raises:
        ConfigError: an unknown option or measure.
    """

    def __init__(
        self,
        *,
        protocol: str = "pysod",
        empty_gt: str = "pysod",
        keys: Iterable[str] = RESULT_KEYS,
    ) -> None:
        _check_choice("protocol", protocol, PROTOCOLS)
        _check_choice("empty_gt", empty_gt, EMPTY_GT)
        asked = tuple(keys)
        for key in asked:
            _check_choice("measure", key, KNOWN_KEYS)
        self.protocol = protocol
        self.empty_gt = empty_gt
        self.keys = tuple(key for key in KNOWN_KEYS if key in asked)
        self._scores: dict[str, ImageScore] = {}
        # Name -> digest of the empty mask, and what the map claims.
        self._skipped: dict[str, tuple[str, Claim]] = {}

    @property
    def num_images(self) -> int:
        """Number of images in the results."""
        return len(self._scores)

    @property
    def num_with_void(self) -> int:
        """Number of images with void pixels, which are left out of every measure."""
        return sum(score.num_void > 0 for score in self._scores.values())

    @property
    def num_skipped(self) -> int:
        """Number of images left out because they have no object."""
        return len(self._skipped)

    def add(
        self,
        name: str,
        prediction: NDArray[Any],
        mask: NDArray[Any],
        *,
        void: NDArray[Any] | None = None,
        group: str = "",
    ) -> Row:
        """Score one image. Threads may call this concurrently, with different names.

        Args:
            name: unique within the data set; goes into the row and into every error.
            prediction: (H, W), uint8 0..255 or floating point 0..1. The latter becomes
                trunc(255 * x), what a map holds after it was saved as PNG the usual way.
            mask: (H, W), bool, or uint8 with only {0, 255} or only {0, 1}.
            void: bool (H, W), True where nobody labelled the pixel, which is then left out of every
                measure (see ``score_image``); never on the object. None: every pixel counts.
            group: free label of the row: class, source, size.

        Returns:
            The row of this image: name, group, the values of ``keys``, object_fraction in 0..1 and
            num_objects. The scores of a skipped image are NaN.

        Raises:
            DataError: the name was already added, or an array is not as above.
        """
        self._check_new({name})
        prediction_HW = checked_prediction(name, prediction)
        mask_HW = checked_mask(name, mask)
        void_HW = checked_void(name, void, mask_HW)
        check_same_size(name, prediction_HW.shape, mask_HW)
        skipped = self.empty_gt == "skip" and not mask_HW.any()
        score = score_image(
            name,
            prediction_HW,
            mask_HW,
            void_HW=void_HW,
            group=group,
            protocol=self.protocol,
            empty_gt=self.empty_gt,
            keys=() if skipped else self.keys,
        )
        return self.skip(score) if skipped else self.add_score(score)

    def add_score(self, score: ImageScore) -> Row:
        """Add an image that was scored elsewhere with the same options; return its row.

        Raises:
            DataError: the name was already added.
        """
        self._check_new({score.row["name"]})
        self._scores[score.row["name"]] = score
        return dict(score.row)

    def skip(self, score: ImageScore) -> Row:
        """Record an image without an object that was scored elsewhere and is left out; return its
        row, whose scores are NaN."""
        self._check_new({score.row["name"]})
        self._skipped[score.row["name"]] = score.mask_digest, score.claim
        start = {"name": score.row["name"], "group": score.row["group"]}
        nothing = dict.fromkeys(self.keys, math.nan)
        return {**start, **nothing, "object_fraction": 0.0, "num_objects": 0}

    def merge(self, other: Evaluator) -> None:
        """Add the images of another evaluator, which is not changed.

        Raises:
            DataError: the options differ, or an image is in both; nothing is added then.
        """
        self._check_options(other.protocol, other.empty_gt, other.keys)
        self._check_new(other._scores.keys() | other._skipped.keys())
        self._scores.update(other._scores)
        self._skipped |= other._skipped

    def results(self) -> dict[str, float]:
        """Return the mean over images of every measure, as fractions (HCE: as a count).

        Curves are averaged over images before their mean and maximum are taken: one threshold for
        the whole data set, not the best one for each image.

        Raises:
            DataError: no image was added.
        """
        curves = self.curves()
        rows = self.rows()
        results = {key: math.fsum(row[key] for row in rows) / len(rows) for key in self.keys}
        for letter in "EF":
            summary = {
                f"mean{letter}m": float(curves[letter].mean()),
                f"max{letter}m": float(curves[letter].max()),
            }
            results.update({key: value for key, value in summary.items() if key in results})
        return results

    def curves(self) -> dict[str, NDArray[np.float64]]:
        """Return E, F, precision and recall over the thresholds 255 ... 0, averaged over images.

        Returns:
            Four float64 arrays (256,) under "E", "F", "precision", "recall".

        Raises:
            DataError: no image was added.
        """
        if not self._scores:
            skipped = f" ({self.num_skipped} without an object were skipped)" * bool(self._skipped)
            raise DataError(f"There is nothing to evaluate: no image was scored{skipped}.")
        totals: dict[str, NDArray[np.float64]] = {}
        for score in self._sorted():
            curves = score_curves(score.counts_CL, rightly_empty=score.rightly_empty)
            for key, curve in curves.items():
                totals[key] = totals.get(key, 0.0) + curve
        return {key: total / self.num_images for key, total in totals.items()}

    def image_curves(self) -> dict[str, NDArray[np.float64]]:
        """Return every image's own curves "E" and "F", (images, 256), in the order of ``rows``."""
        scores = [score_curves(s.counts_CL, rightly_empty=s.rightly_empty) for s in self._sorted()]
        return {key: np.array([s[key] for s in scores]).reshape(-1, 256) for key in "EF"}

    def data_hash(self) -> str:
        """Return a sha256 over the names and masks of all images, skipped ones included.

        Two evaluations with equal hashes used the same images and masks, whatever file format the
        masks were stored in.
        """
        digests = {name: score.mask_digest for name, score in self._scores.items()}
        digests |= {name: mask_digest for name, (mask_digest, _) in self._skipped.items()}
        digest = hashlib.sha256()
        for name in sorted(digests):
            digest.update(f"{name}\t{digests[name]}\n".encode("utf-8", "surrogateescape"))
        return digest.hexdigest()

    def claim(self, name: str) -> Claim:
        """Return what the map of one image claims before any stretch."""
        return self._scores[name].claim if name in self._scores else self._skipped[name][1]

    def claims(self) -> dict[str, Claim]:
        """Return what the map of each image claims before any stretch, skipped images included."""
        found = {name: score.claim for name, score in self._scores.items()}
        return found | {name: claim for name, (_, claim) in self._skipped.items()}

    def rows(self) -> list[Row]:
        """Return one row per scored image, sorted by name; see ``add``.

        maxEm and maxFm are an image's own best: their mean is not the data set's maxEm and maxFm.
        """
        return [dict(score.row) for score in self._sorted()]

    def state_dict(self) -> dict[str, Any]:
        """Return the state as plain Python and numpy objects, to pickle or to gather from ranks."""
        scores = self._sorted()
        counts = np.array([score.counts_CL for score in scores], np.int64)
        return {
            "version": STATE_VERSION,
            "protocol": self.protocol,
            "empty_gt": self.empty_gt,
            "keys": list(self.keys),
            "rows": [dict(score.row) for score in scores],
            "counts": counts.reshape(-1, 2, 256),
            "rightly_empty": [score.rightly_empty for score in scores],
            "digests": [score.mask_digest for score in scores],
            "num_void": [score.num_void for score in scores],
            "claims": [score.claim for score in scores],
            "skipped": dict(sorted(self._skipped.items())),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Replace the state with one that ``state_dict`` returned.

        Raises:
            DataError: the state has another version or other options.
        """
        if state.get("version") != STATE_VERSION:
            raise DataError(
                f"The evaluator's state has version {state.get('version')!r}, this release reads"
                f" {STATE_VERSION}. Evaluate again."
            )
        self._check_options(state["protocol"], state["empty_gt"], tuple(state["keys"]))
        columns = ("rows", "counts", "rightly_empty", "digests", "num_void", "claims")
        parts = zip(*(state[column] for column in columns), strict=True)
        self._scores = {
            row["name"]: ImageScore(dict(row), np.array(counts), *rest)
            for row, counts, *rest in parts
        }
        self._skipped = dict(state["skipped"])

    def _sorted(self) -> list[ImageScore]:
        return [self._scores[name] for name in sorted(self._scores)]

    def _check_options(self, protocol: str, empty_gt: str, keys: tuple[str, ...]) -> None:
        if keys != self.keys:
            raise DataError(
                f"Scores of the measures {', '.join(keys)} cannot be mixed with those of"
                f" {', '.join(self.keys)}. Evaluate both parts with the same measures."
            )
        if (protocol, empty_gt) != (self.protocol, self.empty_gt):
            raise DataError(
                f"Scores made with protocol={protocol}, empty_gt={empty_gt} cannot be mixed with"
                f" protocol={self.protocol}, empty_gt={self.empty_gt}. Evaluate both parts with the"
                " same options."
            )

    def _check_new(self, names: Set[str]) -> None:
        doubled = sorted(names & (self._scores.keys() | self._skipped.keys()))
        if doubled:
            more = f" and {len(doubled) - 1} more" if len(doubled) > 1 else ""
            raise DataError(
                f"{doubled[0]}{more}: already scored. Every image counts once: prefix repeated"
                " names with their data set or folder, and give each image to one rank only."
            )
