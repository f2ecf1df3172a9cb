"""Degenerate images: where the scores follow the field's code, and the few exceptions."""

import math

import numpy as np
import pytest

from camoxpert.errors import DataError
from camoxpert.metrics import RESULT_KEYS, Evaluator, measures
from camoxpert.metrics.histogram import joint_histogram

FULL_SCALE = 4096 / 4095  # full marks in E on 64 x 64 pixels: the reference divides by N - 1


def score(prediction, mask, **options):
    return Evaluator(**options).add("image", prediction, mask)


def expect(row, abs_tolerance=1e-3, **scores):
    for key, value in scores.items():
        assert row[key] == pytest.approx(value, abs=abs_tolerance), key


def blank(level=0):
    return np.full((64, 64), level, np.uint8)


def test_perfect_prediction(square):
    row = score(square, square)
    expect(row, 1e-9, Smeasure=1, MAE=0, wFmeasure=1, adpFm=1, maxFm=1, IoU=1, Dice=1)
    expect(row, 5e-5, adpEm=FULL_SCALE, maxEm=FULL_SCALE, meanEm=0.9973, meanFm=0.9967)
    assert row["meanFm"] < 1  # threshold 0 always takes the whole image


def test_stretching_hides_how_sure_a_map_is(square):
    faint = np.where(square > 0, 3, 0).astype(np.uint8)
    assert score(faint, square) == score(square, square)
    assert score(faint, square, protocol="raw")["MAE"] == pytest.approx(
        0.1172 * 252 / 255, abs=1e-4
    )
    assert score(faint, square, protocol="raw")["IoU"] == 0


def test_all_zero_prediction(square):
    # The adaptive threshold is 0 too: every pixel is called foreground.
    row = score(blank(), square)
    expect(row, Smeasure=0.441, MAE=0.117, wFmeasure=0, adpEm=0.25, adpFm=0.147, maxFm=0.147)
    expect(row, 1e-4, meanFm=0.0006, IoU=0)


def test_all_foreground_prediction(square):
    row = score(blank(255), square)
    expect(row, Smeasure=0.059, MAE=0.883, adpEm=0.25, adpFm=0.147, IoU=0.117)


@pytest.mark.parametrize("empty_gt", ["pysod", "correct"])
def test_empty_mask_and_empty_prediction(empty_gt):
    row = score(blank(), blank(), empty_gt=empty_gt)
    expect(row, 0, Smeasure=1, MAE=0)
    others = {key: row[key] for key in RESULT_KEYS if key not in ("Smeasure", "MAE")}
    if empty_gt == "correct":
        assert set(others.values()) == {1.0}
    else:
        expect(row, 0, wFmeasure=0, adpEm=0, adpFm=0, maxFm=0, meanFm=0, IoU=0, Dice=0)
        expect(row, 1e-4, meanEm=0.9963, maxEm=1.0002)


def test_empty_mask_and_one_faint_pixel(oracle):
    faint = blank()
    faint[5, 7] = 1
    row = score(faint, blank())
    expect(row, 1e-4, Smeasure=0.9998, MAE=2e-4, wFmeasure=0, adpEm=1, meanEm=0.9961, maxFm=0)
    assert row["adpEm"] == pytest.approx(oracle(faint, blank())[0]["adpEm"], abs=1e-12)
    generous = score(faint, blank(), empty_gt="correct")
    assert generous["wFmeasure"] == generous["maxEm"] == generous["meanFm"] == generous["IoU"] == 1
    assert (generous["MAE"], generous["Smeasure"]) == (row["MAE"], row["Smeasure"])


def test_false_claim_on_an_empty_mask_gets_no_credit():
    claim = blank()
    claim[5, 7] = 128
    assert score(claim, blank(), empty_gt="correct") == score(claim, blank(), empty_gt="pysod")
    claim[5, 7] = 127
    assert score(claim, blank(), empty_gt="correct")["IoU"] == 1


def test_empty_gt_option_leaves_other_images_alone(square):
    prediction = np.roll(square, 3)
    rows = [score(prediction, square, empty_gt=option) for option in ("pysod", "correct", "skip")]
    assert rows[0] == rows[1] == rows[2]


def test_skipped_images_are_counted_and_cost_nothing(square):
    evaluator = Evaluator(empty_gt="skip")
    row = evaluator.add("nothing", blank(), blank(), group="sky")
    assert all(math.isnan(row[key]) for key in RESULT_KEYS)
    assert (row["name"], row["group"], row["object_fraction"]) == ("nothing", "sky", 0)
    with pytest.raises(DataError, match="1 without an object were skipped"):
        evaluator.results()
    evaluator.add("square", square, square)
    assert (evaluator.num_images, evaluator.num_skipped) == (1, 1)
    assert evaluator.results()["wFmeasure"] == pytest.approx(1)
    assert [row["name"] for row in evaluator.rows()] == ["square"]
    with pytest.raises(DataError, match="already scored"):
        evaluator.add("nothing", square, square)


@pytest.mark.parametrize("block", [np.s_[-1:, :], np.s_[:, -1:], np.s_[-1:, -1:]])
def test_exception_centroid_in_the_last_row_or_column(oracle, block):
    """The oracle divides by the size of an empty block, so the data set's mean is NaN."""
    mask = blank()
    mask[block] = 255
    assert math.isnan(oracle(mask, mask)[0]["Smeasure"])
    # For a single pixel the 2**-52 in the formula's denominator is visible.
    assert score(mask, mask)["Smeasure"] == pytest.approx(1, abs=1e-5)
    assert 0 < score(255 - mask, mask)["Smeasure"] + 0.1 < 0.2
    half = mask // 2 + 100
    half[:32] = 0
    assert 0 < score(half, mask)["Smeasure"] < 1


def test_exception_zero_one_mask_is_recognised(oracle, square):
    """The oracle thresholds at 128 and sees an image without an object."""
    ones = square // 255
    assert oracle(square, ones)[0]["wFmeasure"] == 0
    assert score(square, ones) == score(square, square) == score(square, square > 0)


@pytest.mark.parametrize("grey", [128, 2, 254])
def test_exception_grey_mask_is_refused(square, grey):
    mask = np.where(square > 0, grey, 0).astype(np.uint8)
    with pytest.raises(DataError, match=rf"^image: the mask has 2 grey level.*\(0, {grey}\)"):
        score(square, mask)


def test_exception_mixed_zero_one_255_mask_is_refused(square):
    mask = square.copy()
    mask[0, 0] = 1
    with pytest.raises(DataError, match="3 grey level"):
        score(square, mask)


def test_exception_one_pixel_image_has_a_finite_emeasure(oracle):
    """The oracle divides by 2**-52."""
    pixel = np.full((1, 1), 255, np.uint8)
    assert oracle(pixel, pixel)[0]["maxEm"] > 1e15
    row = score(pixel, pixel)
    expect(row, 1e-12, maxEm=1, adpEm=1, Smeasure=1, wFmeasure=1, IoU=1)


def test_flat_grey_blocks_follow_the_rounding_of_the_oracle(oracle):
    """If map and mask are constant in a block, S depends on the rounding of a sum."""
    mask = np.zeros((61, 67), np.uint8)
    mask[5:15, 5:15] = mask[45:55, 50:60] = 255  # only background on the other diagonal
    jumps = set()
    for level in range(60, 140, 4):
        flat = np.full_like(mask, level)
        row = score(flat, mask)
        assert row["Smeasure"] == pytest.approx(oracle(flat, mask)[0]["Smeasure"], abs=1e-9)
        histogram = joint_histogram(flat, mask > 0)
        jumps.add(measures._flat_similarity(histogram, 1, level / 255))
    assert jumps == {0.0, 1.0}


@pytest.mark.parametrize(
    ("prediction", "mask", "message"),
    [
        (np.zeros((4, 4)), np.zeros((4, 5), bool), "4 x 4 and the mask 4 x 5"),
        (np.full((4, 4), np.nan), np.zeros((4, 4), bool), "holds NaN"),
        (np.full((4, 4), 1.5), np.zeros((4, 4), bool), "Apply the sigmoid"),
        (np.full((4, 4), -0.1, np.float32), np.zeros((4, 4), bool), "must lie in 0..1"),
        (np.full((4, 4), np.inf), np.zeros((4, 4), bool), "must lie in 0..1"),
        (np.zeros((4, 4), np.int64), np.zeros((4, 4), bool), "prediction is int64"),
        (np.zeros((4, 4), bool), np.zeros((4, 4), bool), "prediction is bool"),
        (np.zeros((4, 4, 1)), np.zeros((4, 4), bool), r"shape \(4, 4, 1\)"),
        (np.zeros((0, 4)), np.zeros((0, 4), bool), "at least one pixel"),
        ([[0.0]], np.zeros((1, 1), bool), "prediction is a list"),
        (np.zeros((4, 4)), np.zeros((4, 4)), "mask is float64"),
        (np.zeros((4, 4)), np.zeros((4, 4, 3), np.uint8), r"the mask has shape \(4, 4, 3\)"),
    ],
)
def test_unusable_input_is_one_readable_paragraph(prediction, mask, message):
    evaluator = Evaluator()
    with pytest.raises(DataError, match=message) as caught:
        evaluator.add("cod/frog 7.png", prediction, mask)
    text = str(caught.value)
    assert text.startswith("cod/frog 7.png: ")
    assert "\n" not in text
    assert evaluator.num_images == 0
