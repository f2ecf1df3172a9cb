"""Two methods on the same folds, one of which does not score images without an object."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from camoxpert.crossval.collect import Collected, units_of
from camoxpert.crossval.heldout import FoldScores
from camoxpert.crossval.report import compared_words
from camoxpert.crossval.summary import _difference
from camoxpert.data.files.folds import Placed, Splits
from camoxpert.errors import DataError
from camoxpert.metrics import Evaluator
from camoxpert.metrics.statistics import Scores

EMPTY = ("d",)
SPLITS = Splits(
    tuple(
        Placed("x", name, (1, 1), "", "", "", number, (1 + number % 2,))
        for number, name in enumerate("abcdef")
    ),
    folds=2,
    repeats=1,
    seed=0,
)


def collected(empty_gt: str, errors: dict[str, float], left_out: str = "") -> Collected:
    """Return folds whose MAE is known: on a mask of 1 a map of 1 less the error, on an empty one a
    map of the error."""
    folds = []
    for number in (1, 2):
        evaluator = Evaluator(empty_gt=empty_gt, protocol="raw", keys=("MAE", "meanEm"))
        for image in SPLITS.held_out(number):
            if image.name in left_out:
                continue
            mask = np.full((4, 4), 0 if image.name in EMPTY else 255, np.uint8)
            value = errors.get(image.name, 0.0)
            level = value if image.name in EMPTY else 1 - value
            evaluator.add(image.name, np.full((4, 4), round(255 * level), np.uint8), mask)
        folds.append(FoldScores(number, Path(), {}, evaluator, {}))
    whole = Evaluator(empty_gt=empty_gt, protocol="raw", keys=("MAE", "meanEm"))
    for fold in folds:
        whole.merge(fold.evaluator)
    scores = Scores(whole)
    units = units_of(SPLITS, scores.names)
    return Collected(Path(empty_gt), SPLITS, tuple(folds), (whole,), scores, units)


def test_images_with_an_object_are_compared() -> None:
    """By hand: 1 is 0.2 off in image a alone, 2 is all wrong in the empty image alone."""
    ours, theirs = collected("skip", {"a": 0.2}), collected("pysod", {"d": 1.0})
    found = _difference(ours, theirs)
    assert (found["images"], found["left_out"]) == (5, 1)
    assert found["measures"]["MAE"]["difference"] == pytest.approx(0.2 / 5)
    # Fold 1 holds out a, c, e and fold 2 the images b, d, f.
    assert found["folds"]["MAE"]["mean"] == pytest.approx((0.2 / 3 + 0) / 2)
    back = _difference(theirs, ours)
    assert back["measures"]["MAE"]["difference"] == pytest.approx(-0.2 / 5)
    assert "by the 5 images with an object" in compared_words(found)


def test_methods_that_score_all_are_compared_by_all() -> None:
    ours, theirs = collected("pysod", {"a": 0.2}), collected("pysod", {"d": 1.0})
    found = _difference(ours, theirs)
    assert (found["images"], found["left_out"]) == (6, 0)
    assert found["measures"]["MAE"]["difference"] == pytest.approx((0.2 - 1.0) / 6)
    assert compared_words(found).endswith("on the same folds")


def test_an_image_that_one_of_them_lacks() -> None:
    ours, theirs = collected("skip", {}), collected("pysod", {}, left_out="b")
    with pytest.raises(DataError, match=r"not scored in both: 1 image \(b\)"):
        _difference(ours, theirs)
