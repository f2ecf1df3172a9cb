"""Intervals and tests of scores, against numbers computed another way."""

import numpy as np
import pytest

from camoxpert.errors import DataError
from camoxpert.metrics import RESULT_KEYS, Evaluator
from camoxpert.metrics.groups import count_label, size_label
from camoxpert.metrics.statistics import Scores, breakdown, compare, confidence_intervals


def scored(noise, *, seed=0, count=60, names="image"):
    """Score maps that are wrong in a share ``noise`` of the pixels, on fixed masks."""
    masks, errors = np.random.default_rng(1), np.random.default_rng(seed)
    evaluator = Evaluator()
    for index in range(count):
        mask = np.zeros((24, 24), bool)
        top, left = masks.integers(0, 12, 2)
        mask[top : top + 10, left : left + 10] = True
        wrong = errors.random(mask.shape) < noise * errors.random()
        evaluator.add(f"{names} {index}", np.where(mask ^ wrong, 220, 20).astype(np.uint8), mask)
    return evaluator


def test_even_weights_give_the_results_themselves():
    evaluator = scored(0.3)
    scores = Scores(evaluator)
    values = scores.statistics(np.full((1, 60), 1 / 60))[0]
    assert dict(zip(scores.keys, values, strict=True)) == pytest.approx(evaluator.results())


def test_intervals_agree_with_scipy():
    stats = pytest.importorskip("scipy.stats")
    scores = Scores(scored(0.4))
    ours = confidence_intervals(scores, resamples=6000)
    for key in ("MAE", "wFmeasure", "IoU"):
        column = scores.table_NK[:, scores.keys.index(key)]
        theirs = stats.bootstrap(
            (column,), np.mean, method="percentile", n_resamples=6000, random_state=1
        ).confidence_interval
        spread = theirs.high - theirs.low
        assert ours[key].low == pytest.approx(theirs.low, abs=0.06 * spread)
        assert ours[key].high == pytest.approx(theirs.high, abs=0.06 * spread)


def test_the_interval_holds_the_score_and_shrinks_with_more_images():
    few, many = (scored(0.4, count=count) for count in (20, 180))
    narrow, wide = confidence_intervals(Scores(many)), confidence_intervals(Scores(few))
    for key in RESULT_KEYS:
        assert narrow[key].low <= many.results()[key] <= narrow[key].high
        ratio = (narrow[key].high - narrow[key].low) / (wide[key].high - wide[key].low)
        assert ratio < 0.6, key  # sqrt(20 / 180) = 0.33


def test_the_permutation_test_agrees_with_scipy():
    stats = pytest.importorskip("scipy.stats")
    a, b = Scores(scored(0.30)), Scores(scored(0.34, seed=5))
    ours = compare(a, b, resamples=5000)
    for key in ("MAE", "IoU", "Smeasure"):
        columns = [s.table_NK[:, s.keys.index(key)] for s in (a, b)]
        theirs = stats.permutation_test(
            columns,
            lambda x, y, axis: np.mean(x, axis=axis) - np.mean(y, axis=axis),
            permutation_type="samples",
            vectorized=True,
            n_resamples=5000,
            rng=np.random.default_rng(3),
        )
        assert ours[key].difference == pytest.approx(theirs.statistic)
        assert ours[key].p_value == pytest.approx(theirs.pvalue, abs=0.03)


def test_curve_measures_are_compared_as_they_are_reported():
    a, b = scored(0.2), scored(0.6, seed=5)
    result = compare(Scores(a), Scores(b))
    for key in RESULT_KEYS:
        assert result[key].difference == pytest.approx(a.results()[key] - b.results()[key])
        assert result[key].low <= result[key].difference <= result[key].high
        assert result[key].p_value < 0.01


def test_a_method_does_not_differ_from_itself_nor_from_its_equal():
    """Negative control, and the size of the test: at 5 %, 5 % of equal methods differ."""
    scores = Scores(scored(0.3))
    for value in compare(scores, scores).values():
        assert value == (0, 0, 0, 1)
    p_values = [
        compare(Scores(scored(0.3, seed=2 * i)), Scores(scored(0.3, seed=2 * i + 1)), resamples=200)
        for i in range(40)
    ]
    found = sum(p["IoU"].p_value < 0.05 for p in p_values)
    assert found <= 7  # binomial(40, 0.05): 8 or more once in a thousand


def test_equal_seeds_give_equal_bits():
    scores = Scores(scored(0.3))
    assert confidence_intervals(scores) == confidence_intervals(scores)
    assert confidence_intervals(scores) != confidence_intervals(scores, seed=1)


def test_other_images_cannot_be_compared():
    a = Scores(scored(0.3))
    with pytest.raises(DataError, match="120 images were scored for one"):
        compare(a, Scores(scored(0.3, names="other")))
    with pytest.raises(DataError, match="nothing to resample"):
        Scores(Evaluator())


def test_breakdown_by_label():
    rows = [{"IoU": 0.5}, {"IoU": 1.0}, {"IoU": 0.2}, {"IoU": 0.9}]
    table = breakdown(rows, ["b", "a", "b", ""], ["IoU"])
    assert list(table) == ["a", "b"]
    assert table["b"] == {"images": 2, "IoU": pytest.approx(0.35)}


def test_buckets():
    assert [size_label(f)[0] for f in (0, 0.009, 0.01, 0.05, 0.2, 1)] == list("012344")
    assert [count_label(n) for n in (0, 1, 2, 3, 40)] == ["0", "1", "2", "3 or more", "3 or more"]
