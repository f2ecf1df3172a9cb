"""Boundary IoU computed by hand, and the correction effort against its oracle."""

import sys

import cv2
import numpy as np
import pytest

from camoxpert.errors import ConfigError
from camoxpert.metrics import EXTRA_KEYS, Evaluator
from camoxpert.metrics.contours import boundary_iou, human_correction_effort


def square(side, start, stop):
    mask = np.zeros((side, side), bool)
    mask[start:stop, start:stop] = True
    return mask


def test_boundary_iou_by_hand():
    # The band of a 20 x 20 square, 1 wide, has 76 pixels; one row shifted down leaves 18 + 18 + ...
    mask = square(30, 5, 25)
    assert boundary_iou(mask, mask) == 1
    ring = 20 * 20 - 18 * 18
    shifted = np.roll(mask, 1, axis=0)
    # Columns left and right overlap on 19 rows; the bottom row of one meets no row of the other.
    common = 2 * 19
    assert boundary_iou(shifted, mask) == pytest.approx(common / (2 * ring - common))
    assert boundary_iou(~mask & False, mask) == 0
    assert boundary_iou(mask & False, mask & False) == 0


def test_boundary_iou_sees_what_iou_forgives():
    mask = square(200, 20, 180)
    ragged = mask.copy()
    ragged[20:26, 20:180:2] = False
    iou = (mask & ragged).sum() / (mask | ragged).sum()
    assert iou > 0.97
    assert boundary_iou(ragged, mask, dilation_ratio=0.01) < 0.9


def test_the_image_border_is_an_outline():
    full = np.ones((50, 50), bool)
    inner = square(50, 1, 49)
    assert boundary_iou(full, full) == 1
    # Band width 1: the two rings are adjacent.
    assert boundary_iou(inner, full) == 0


def stretched(prediction):
    values = prediction / 255
    low, high = values.min(), values.max()
    return (values - low) / (high - low) > 0.5 if high > low else values > 0.5


def test_the_correction_effort_equals_the_oracle():
    oracle = pytest.importorskip("py_sod_metrics")
    rng = np.random.default_rng(7)
    checked = set()
    for number in range(150):
        shape = tuple(rng.integers(2, 120, 2))
        sigma = rng.uniform(0.5, 8)
        fields = [cv2.GaussianBlur(rng.standard_normal(shape), (0, 0), sigma) for _ in range(2)]
        mask = np.where(fields[0] > np.quantile(fields[0], rng.uniform(0, 1)), 255, 0)
        mixed = fields[0] + rng.uniform(0, 2) * fields[1]
        prediction = (255 / (1 + np.exp(-mixed / mixed.std()))).astype(np.uint8)
        mask = mask.astype(np.uint8)
        theirs = oracle.HumanCorrectionEffortMeasure()
        theirs.step(prediction, mask)
        ours = human_correction_effort(stretched(prediction), mask > 128)
        assert ours == theirs.get_results()["hce"], number
        checked.add(ours)
    assert len(checked) > 50


def test_the_correction_effort_by_hand():
    pytest.importorskip("skimage")
    mask = square(100, 20, 80)
    assert human_correction_effort(mask, mask) == 0
    # A rim of 2 pixels is forgiven; an isolated square is one click.
    assert human_correction_effort(square(100, 22, 78), mask) == 0
    assert human_correction_effort(mask | np.roll(square(100, 0, 14), 84, axis=(0, 1)), mask) == 1


def test_without_scikit_image_the_error_names_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "skimage", None)
    monkeypatch.setitem(sys.modules, "skimage.morphology", None)
    mask = square(20, 5, 15)
    with pytest.raises(
        ConfigError, match=r"needs scikit-image: pip install 'camoxpert\[metrics\]'"
    ):
        Evaluator(keys=("HCE",)).add("a", mask.astype(np.uint8), mask)


def test_extra_measures_are_in_the_results():
    pytest.importorskip("skimage")
    mask = square(40, 10, 30)
    found = square(40, 10, 20).astype(np.uint8) * 255
    evaluator = Evaluator(keys=EXTRA_KEYS)
    row = evaluator.add("a", found, mask)
    results = evaluator.results()
    assert tuple(results) == EXTRA_KEYS
    assert results["Precision"] == 1 and results["Recall"] == 0.25
    assert results["Specificity"] == 1 and results["BER"] == pytest.approx(1 - 1.25 / 2)
    assert 0 < results["BoundaryIoU"] < 1 and results["HCE"] >= 1
    assert {key: row[key] for key in EXTRA_KEYS} == results
    nothing = Evaluator(keys=EXTRA_KEYS, empty_gt="correct").add("b", found & 0, mask & False)
    assert [nothing[key] for key in EXTRA_KEYS] == [1, 1, 1, 0, 1, 0]
