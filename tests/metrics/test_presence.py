"""Is anything hidden at all: measures of the probability and of the masks, against scikit-learn and
numbers worked by hand."""

import numpy as np
import pytest

from camoxpert.metrics import Evaluator
from camoxpert.metrics.presence import (
    BINS,
    PROBABILITY_KEYS,
    bootstrap,
    calibrated_ece,
    presence_scores,
    probability_measures,
    reliability,
    wilson,
)
from camoxpert.metrics.scoring import Claim


def drawn(seed, number=200, *, levels=0):
    """Return probabilities that say something, with ties if there are few levels."""
    rng = np.random.default_rng(seed)
    present = rng.random(number) < 0.6
    value = 1 / (1 + np.exp(-rng.normal(np.where(present, 1.0, -0.7), 1.4)))
    return (np.rint(value * levels) / levels if levels else value), present


@pytest.mark.parametrize("levels", [0, 7, 1])
def test_ranking_measures_equal_those_of_scikit_learn(levels):
    metrics = pytest.importorskip("sklearn.metrics")
    for seed in range(4):
        probability, present = drawn(seed, levels=levels)
        ours = probability_measures(probability, present)
        assert ours["AUROC"] == pytest.approx(metrics.roc_auc_score(present, probability))
        average = metrics.average_precision_score(present, probability)
        assert ours["AveragePrecision"] == pytest.approx(average)
        assert ours["Brier"] == pytest.approx(metrics.brier_score_loss(present, probability))
        false, true, _ = metrics.roc_curve(present, probability, drop_intermediate=False)
        assert ours["FPR95"] == pytest.approx(false[true >= 0.95].min())


def test_by_hand():
    probability = np.array([0.9, 0.8, 0.6, 0.6, 0.3, 0.1])
    present = np.array([True, True, False, True, False, True])
    found = probability_measures(probability, present)
    # Pairs won: 2 of 2, 2 of 2, half and 1, 0: 5.5 of 8.
    assert found["AUROC"] == pytest.approx(5.5 / 8)
    # Precision 1, 1, 3/4 (both at .6) and 4/6, each a quarter of the recall.
    assert found["AveragePrecision"] == pytest.approx((1 + 1 + 3 / 4 + 4 / 6) / 4)
    # All four are found only by marking all: both others are marked too.
    assert found["FPR95"] == 1
    squares = 0.01 + 0.04 + 0.36 + 0.16 + 0.09 + 0.81
    assert found["Brier"] == pytest.approx(squares / 6)
    # Six images, six bins; those of .6 share their labels.
    assert found["ECE"] == pytest.approx((0.1 + 0.2 + 0.1 + 0.1 + 0.3 + 0.9) / 6)


def test_bins_have_equal_mass_and_do_not_depend_on_the_order():
    probability, present = drawn(3, 15 * 8)
    order = np.argsort(probability)
    parts = zip(np.split(probability[order], BINS), np.split(present[order], BINS), strict=True)
    by_hand = np.mean([abs(p.mean() - y.mean()) for p, y in parts])
    assert probability_measures(probability, present)["ECE"] == pytest.approx(by_hand)
    probability, present = drawn(5, 97, levels=6)
    before = probability_measures(probability, present)
    shuffled = np.random.default_rng(0).permutation(97)
    assert probability_measures(probability[shuffled], present[shuffled]) == pytest.approx(before)
    curve = reliability(probability, present)
    assert sum(part.images for part in curve) == pytest.approx(97)
    assert np.mean([p.observed for p in curve]) == pytest.approx(present.mean())
    assert np.mean([p.predicted for p in curve]) == pytest.approx(probability.mean())


def test_calibrated_probabilities_have_a_small_error_and_overconfident_ones_a_large_one():
    rng = np.random.default_rng(0)
    probability = rng.random(20000)
    present = rng.random(20000) < probability
    assert probability_measures(probability, present)["ECE"] < 0.015
    sure = np.where(probability > 0.5, 0.99, 0.01)
    assert probability_measures(sure, present)["ECE"] == pytest.approx(0.24, abs=0.02)


def test_intervals_equal_a_resampling_image_by_image():
    probability, present = drawn(2, 80, levels=20)
    ours = bootstrap(probability, present, resamples=600)
    rng = np.random.default_rng(9)
    values = {key: [] for key in PROBABILITY_KEYS}
    for _ in range(600):
        chosen = rng.integers(0, 80, 80)
        for key, value in probability_measures(probability[chosen], present[chosen]).items():
            values[key].append(value)
    # A resampled ECE has the chance of two draws in it: the interval is moved to the value.
    moved = probability_measures(probability, present)["ECE"] - np.median(values["ECE"])
    values["ECE"] = [value + moved for value in values["ECE"]]
    for key, (low, high) in ours.items():
        spread = high - low
        assert low == pytest.approx(np.quantile(values[key], 0.025), abs=0.15 * spread), key
        assert high == pytest.approx(np.quantile(values[key], 0.975), abs=0.15 * spread), key
    assert bootstrap(probability, present, resamples=600) == ours


def test_what_chance_adds_to_the_calibration_error():
    probability = np.full(45, 0.5)
    # Bins of one level share their labels: the error is that of the whole, sqrt(2 / pi) * sd.
    expected = np.sqrt(2 / np.pi) * 0.5 / np.sqrt(45)
    assert calibrated_ece(probability, draws=2000) == pytest.approx(expected, rel=0.05)
    assert calibrated_ece(np.repeat([0.0, 1.0], 20)) < 1e-12


def test_wilson():
    # Brown, Cai, DasGupta, 2001; and 0 of 10 is not certainly 0.
    assert wilson(0, 10) == pytest.approx((0.0, 0.2775), abs=1e-4)
    assert wilson(5, 10) == pytest.approx((0.2366, 0.7634), abs=1e-4)


def claims(present, empty):
    """Return claims of images with these shares of the map above one half."""
    pairs = [(True, share) for share in present] + [(False, share) for share in empty]
    return {
        f"{number:03d}": Claim(has, share, 0, 200 if share else 90, True)
        for number, (has, share) in enumerate(pairs)
    }


def test_masks_are_counted_without_a_probability():
    found = presence_scores(claims([0.2, 0.0, 0.1], [0.0, 0.5, 0.0, 0.0]))
    assert (found.num_present, found.num_empty, found.bins) == (3, 4, ())
    assert found.scores == pytest.approx({"FalseMasks": 0.25, "FalseArea": 0.125, "Missed": 1 / 3})
    assert found.intervals["FalseMasks"] == pytest.approx(wilson(1, 4))
    assert presence_scores(claims([0.2], [])) is None
    alone = presence_scores(claims([], [0.0, 0.3]), {"000": 0.2, "001": 0.9})
    assert alone.scores == pytest.approx({"FalseMasks": 0.5, "FalseArea": 0.15})


def test_with_probabilities_everything_is_reported_in_one_order():
    some = claims([0.2, 0.1, 0.3, 0.1], [0.0, 0.5, 0.0])
    probabilities = dict(zip(some, (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3), strict=True))
    found = presence_scores(some, probabilities)
    order = [*PROBABILITY_KEYS, "FalseMasks", "FalseArea", "Missed"]
    assert list(found.scores) == order and found.scores["AUROC"] == 1
    assert set(found.intervals) == {*PROBABILITY_KEYS, "FalseMasks", "Missed"}
    assert presence_scores(some, probabilities, intervals=False).intervals == {}


def test_maps_that_were_stretched_before_they_were_saved_say_nothing():
    rng = np.random.default_rng(0)
    mask = np.zeros((16, 16), bool)
    faint, stretched, binary = Evaluator(), Evaluator(empty_gt="skip"), Evaluator()
    for number in range(6):
        noise = rng.integers(0, 60, (16, 16)).astype(np.uint8)
        whole = mask.copy()
        whole[4:9, 4:9] = number < 2
        faint.add(f"{number}", noise + 190 * whole.astype(np.uint8), whole)
        scaled = (noise.astype(float) - noise.min()) / (noise.max() - noise.min()) * 255
        stretched.add(f"{number}", scaled.astype(np.uint8), whole)
        binary.add(f"{number}", np.where(noise > 30, 255, 0).astype(np.uint8), whole)
    assert presence_scores(faint.claims(), from_files=True).scores == {
        "FalseMasks": 0.0, "FalseArea": 0.0, "Missed": 0.0
    }  # fmt: skip
    found = presence_scores(stretched.claims(), from_files=True)
    assert found.stretched and found.scores == {} and found.num_empty == 4
    assert presence_scores(binary.claims(), from_files=True).scores["FalseMasks"] == 1
    # The same maps as a model gives them are its own false masks: nothing was stretched.
    live = presence_scores(stretched.claims())
    assert not live.stretched and live.scores["FalseMasks"] == 1


def test_claims_ignore_the_protocol_and_survive_states_and_skipping():
    mask = np.zeros((8, 8), np.uint8)
    prediction = np.full((8, 8), 40, np.uint8)
    prediction[0] = 120
    for protocol in ("pysod", "raw"):
        for empty_gt in ("pysod", "correct", "skip"):
            one = Evaluator(protocol=protocol, empty_gt=empty_gt)
            one.add("faint", prediction, mask)
            one.add("object", prediction + 60, mask + (np.arange(8) < 2))
            assert one.claims()["faint"] == Claim(False, 0.0, 40, 120, False)
            assert one.claims()["object"] == Claim(True, 0.125, 100, 180, False)
            other = Evaluator(protocol=protocol, empty_gt=empty_gt)
            other.load_state_dict(one.state_dict())
            assert other.claims() == one.claims()


def test_void_claims_nothing():
    prediction, mask = np.full((4, 4), 10, np.uint8), np.zeros((4, 4), bool)
    prediction[0, 0] = 255
    void = np.zeros((4, 4), bool)
    void[0, 0] = True
    one = Evaluator()
    one.add("image", prediction, mask, void=void)
    assert one.claims()["image"] == Claim(False, 0.0, 10, 10, False)
