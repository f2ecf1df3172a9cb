"""Measures computed by hand on small maps, the extra measures, and properties that always hold."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from camoxpert.metrics import measures
from camoxpert.metrics.evaluator import Evaluator
from camoxpert.metrics.histogram import joint_histogram, level_values
from camoxpert.metrics.measures import Confusion
from camoxpert.metrics.weighted import weighted_fmeasure

PREDICTION = np.array([[255, 51], [102, 0]], np.uint8)  # 1, 0.2, 0.4, 0
MASK = np.array([[True, False], [True, False]])


def both(prediction=PREDICTION, mask=MASK, *, normalise=True):
    histogram = joint_histogram(prediction, mask)
    return histogram, level_values(histogram, normalise=normalise)


def test_joint_histogram_counts_blocks_classes_and_levels():
    # Centroid (0.5, 0): row 0.5 rounds to 0 (half to even), plus one: split at (1, 1).
    histogram, _ = both()
    assert histogram.split == (1, 1)
    assert histogram.counts.shape == (4, 2, 256)
    assert histogram.counts.dtype == np.int64
    assert histogram.counts.sum() == 4 == histogram.num_pixels
    for block, (label, level) in enumerate([(1, 255), (0, 51), (1, 102), (0, 0)]):
        assert histogram.counts[block, label, level] == 1
    assert histogram.num_foreground == 2


def test_levels_are_stretched_to_the_range_of_the_image():
    prediction = np.array([[100, 150, 200]], np.uint8)
    _, values = both(prediction, np.ones((1, 3), bool))
    assert values[[100, 150, 200]] == pytest.approx([0, 0.5, 1])
    assert values[[0, 255]].tolist() == [0, 1]
    _, raw = both(prediction, np.ones((1, 3), bool), normalise=False)
    assert raw[[0, 51, 255]] == pytest.approx([0, 0.2, 1])
    _, flat = both(np.full((2, 2), 51, np.uint8))
    assert flat[51] == 0.2


def test_mean_absolute_error_by_hand():
    assert measures.mean_absolute_error(*both()) == pytest.approx((0 + 0.2 + 0.6 + 0) / 4)


def test_fixed_thresholds_by_hand():
    confusion = measures.threshold_confusion(measures.quantised_counts(*both()))
    # Index 0 is threshold 255; a pixel of level v is taken from index 255 - v on.
    expected = {0: (1, 0), 152: (1, 0), 153: (2, 0), 203: (2, 0), 204: (2, 1), 255: (2, 2)}
    for index, (tp, fp) in expected.items():
        assert (confusion.tp[index], confusion.fp[index]) == (tp, fp), index
    f = measures.fmeasure(confusion)
    assert f[0] == pytest.approx(1.3 * 1 * 0.5 / (0.3 * 1 + 0.5))
    assert f[153] == 1
    assert f[255] == pytest.approx(1.3 * 0.5 * 1 / (0.3 * 0.5 + 1))


def test_adaptive_and_binary_thresholds_by_hand():
    # Twice the mean is 0.8: only the first pixel is above. At 0.5: the same pixel.
    for confusion in (measures.adaptive_confusion(*both()), measures.binary_confusion(*both())):
        assert (confusion.tp, confusion.fp, confusion.fn, confusion.tn) == (1, 0, 1, 2)
        assert measures.iou(confusion) == 0.5
        assert measures.dice(confusion) == pytest.approx(2 / 3)
        assert measures.specificity(confusion) == 1
        assert measures.balanced_error_rate(confusion) == pytest.approx(0.25)
    # A value exactly on the adaptive threshold counts; a value of exactly one half does not.
    half = np.array([[255, 0], [0, 255]], np.uint8)
    histogram, values = both(half)
    assert measures.adaptive_confusion(histogram, values, pixels=lambda: half).tp == 1
    assert measures.binary_confusion(histogram, np.full(256, 0.5)).tp == 0


def test_emeasure_by_hand():
    # Map takes 1 of 4 pixels, mask 2 of 4: deviations 3/4, -1/4 and +-1/2.
    confusion = measures.binary_confusion(*both())

    def enhanced(a, b):
        return (2 * a * b / (a * a + b * b) + 1) ** 2 / 4

    total = enhanced(0.75, 0.5) + enhanced(-0.25, 0.5) + 2 * enhanced(-0.25, -0.5)
    assert measures.emeasure(confusion) == pytest.approx(total / 3)


def test_smeasure_by_hand():
    """Every block of this 2 x 2 image is one pixel: the region part is 1."""
    on, off = np.array([1, 0.4]), np.array([0.8, 1])
    expected = 0.0
    for values in (on, off):
        mean, deviation = values.mean(), values.std(ddof=1)
        expected += 0.5 * (2 * mean / (mean**2 + 1 + deviation))
    assert measures.smeasure(*both()) == pytest.approx(0.5 * expected + 0.5)


def test_weighted_fmeasure_by_hand():
    """A false alarm at distance 5 has weight 1.5; a missed pixel's error is smoothed."""
    mask = np.zeros((1, 20), bool)
    mask[0, 3] = True
    prediction = mask.astype(np.uint8) * np.uint8(255)
    prediction[0, 8] = 255
    values = np.arange(256) / 255
    assert weighted_fmeasure(prediction, values, mask) == pytest.approx(
        2 * 1 / (1 + 1 / 2.5) * (1 / 2.5)
    )
    # Missed: all neighbours inherit the error 1, but only the 7 of this row are in the image.
    kernel = np.exp(-(np.arange(-3, 4) ** 2) / 50)
    error = kernel[3] / kernel.sum()  # the vertical part; the horizontal one sums to 1
    missed = np.zeros((1, 20), np.uint8)
    assert weighted_fmeasure(missed, values, mask) == pytest.approx(2 * (1 - error) / (2 - error))


def test_extra_measures_equal_the_oracle():
    oracle = pytest.importorskip("py_sod_metrics")
    rng = np.random.default_rng(2)
    handlers = {
        measures.balanced_error_rate: oracle.BERHandler,
        measures.specificity: oracle.SpecificityHandler,
        measures.iou: oracle.IOUHandler,
        measures.dice: oracle.DICEHandler,
        measures.recall: oracle.RecallHandler,
        measures.precision: oracle.PrecisionHandler,
    }
    for share in (0, 0.02, 0.4, 1):
        prediction = rng.integers(0, 256, (30, 41), np.uint8)
        mask = rng.random((30, 41)) < share
        theirs = oracle.FmeasureV2(
            {f: h(True, True, with_binary=True) for f, h in handlers.items()}
        )
        theirs.step(prediction, np.where(mask, 255, 0).astype(np.uint8))
        histogram, values = both(prediction, mask)
        curve = measures.threshold_confusion(measures.quantised_counts(histogram, values))
        for function, result in theirs.get_results().items():
            adaptive = function(measures.adaptive_confusion(histogram, values))
            np.testing.assert_allclose(function(curve), result["dynamic"], atol=1e-12)
            np.testing.assert_allclose(adaptive, result["adaptive"], atol=1e-12)
            binary = function(measures.binary_confusion(histogram, values))
            np.testing.assert_allclose(binary, result["binary"], atol=1e-12)


def test_no_division_by_zero_without_pixels_of_a_class():
    nothing = Confusion(np.array([0, 0]), np.array([0, 3]), 0, 3)
    with np.errstate(all="raise"):
        for function in (measures.precision, measures.recall, measures.fmeasure, measures.iou):
            assert function(nothing).tolist() == [0, 0]
        assert measures.balanced_error_rate(nothing).tolist() == [0.5, 1]


shapes = hnp.array_shapes(min_dims=2, max_dims=2, max_side=12)
image_pairs = shapes.flatmap(
    lambda shape: st.tuples(hnp.arrays(np.uint8, shape), hnp.arrays(np.bool_, shape))
)


@settings(max_examples=60, deadline=None)
@given(image_pairs, st.sampled_from(["pysod", "raw"]), st.sampled_from(["pysod", "correct"]))
def test_scores_are_finite_and_in_range(pair, protocol, empty_gt):
    prediction, mask = pair
    row = Evaluator(protocol=protocol, empty_gt=empty_gt).add("image", prediction, mask)
    limit = prediction.size / max(prediction.size - 1, 1) + 1e-12
    for key in ("meanEm", "maxEm", "adpEm"):
        assert 0 <= row.pop(key) <= limit, key
    for key in set(row) - {"name", "group", "num_objects"}:
        assert -1e-12 <= row[key] <= 1 + 1e-12, key
    assert row["meanFm"] <= row["maxFm"]
    assert row["IoU"] <= row["Dice"]


@settings(max_examples=40, deadline=None)
@given(image_pairs)
def test_only_the_counts_matter_outside_smeasure_and_weighted_f(pair):
    """Reading the pixels in another order changes no histogram measure."""
    prediction, mask = pair
    order = np.random.default_rng(0).permutation(mask.size)
    mixed = [array.ravel()[order].reshape(mask.shape) for array in pair]
    a, b = Evaluator().add("image", prediction, mask), Evaluator().add("image", *mixed)
    for key in ("MAE", "meanEm", "maxEm", "meanFm", "maxFm", "IoU", "Dice"):
        assert a[key] == b[key], key


@settings(max_examples=40, deadline=None)
@given(image_pairs)
def test_a_perfect_map_beats_every_other(pair):
    prediction, mask = pair
    best = Evaluator(protocol="raw").add("best", mask.astype(np.uint8) * 255, mask)
    row = Evaluator(protocol="raw").add("other", prediction, mask)
    assert best["MAE"] == 0 <= row["MAE"]
    for key in ("Smeasure", "wFmeasure", "maxEm", "maxFm", "IoU", "Dice"):
        assert row[key] <= best[key] + 1e-12, key
