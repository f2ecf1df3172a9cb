"""Equality with the field's numbers, to 1e-6, on every kind of pair that exposes differences."""

import cv2
import numpy as np
import pytest

from camoxpert.metrics import RESULT_KEYS, Evaluator, measures
from camoxpert.metrics.histogram import joint_histogram, level_values

TOLERANCE = 1e-6
NUM_PER_KIND = 36

SIZES = ((40, 60), (97, 64), (33, 120), (150, 110), (64, 64), (8, 200), (21, 5), (3, 7), (2, 2))
STRIPS = ((1, 30), (30, 1), (1, 2), (2, 1))


def blob(rng, height, width):
    """Return a smooth random field, and the mask of its high values."""
    noise = rng.standard_normal((height, width))
    field = cv2.GaussianBlur(noise, (0, 0), max(rng.uniform(0.02, 0.12) * min(height, width), 0.4))
    field = (field - field.mean()) / (field.std() + 1e-9)
    mask = field > np.quantile(field, rng.uniform(0.5, 0.98))
    return field, np.where(mask, 255, 0).astype(np.uint8)


def to_map(values):
    return (np.clip(values, 0, 1) * 255).astype(np.uint8)


def smooth(rng, height, width):
    field, mask = blob(rng, height, width)
    other, _ = blob(rng, height, width)
    return to_map(1 / (1 + np.exp(-rng.uniform(1, 20) * (field + 0.6 * other - 1)))), mask


def binary(rng, height, width):
    prediction, mask = smooth(rng, height, width)
    return np.where(prediction > 127, 255, 0).astype(np.uint8), mask


def low_contrast(rng, height, width):
    prediction, mask = smooth(rng, height, width)
    return (prediction // 16 + rng.integers(0, 200)).astype(np.uint8), mask


def constant(rng, height, width):
    _, mask = blob(rng, height, width)
    return np.full_like(mask, rng.integers(0, 256)), mask


def noise(rng, height, width):
    mask = rng.random((height, width)) < rng.choice([0.02, 0.3, 0.9])
    return rng.integers(0, 256, mask.shape, np.uint8), np.where(mask, 255, 0).astype(np.uint8)


def few_levels(rng, height, width):
    prediction, mask = noise(rng, height, width)
    return np.array([0, 64, 128, 255], np.uint8)[prediction % 4], mask


def one_pixel(rng, height, width):
    prediction, mask = smooth(rng, height, width)
    mask[:] = 0
    mask[rng.integers(height), rng.integers(width)] = 255
    return prediction, mask


def full(rng, height, width):
    prediction, mask = smooth(rng, height, width)
    return prediction, np.full_like(mask, 255)


def empty(rng, height, width):
    prediction, mask = smooth(rng, height, width)
    return prediction, np.zeros_like(mask)


def thin(rng, height, width):
    prediction, mask = smooth(rng, height, width)
    mask[:] = 0
    for _ in range(4):
        ends = rng.integers(0, (width, height), (2, 2)).tolist()
        cv2.line(mask, ends[0], ends[1], 255, 1)
    return prediction, mask


def perfect(rng, height, width):
    _, mask = blob(rng, height, width)
    return mask.copy(), mask


def inverted(rng, height, width):
    _, mask = blob(rng, height, width)
    return 255 - mask, mask


def strip(rng, height, width):
    """Return a pair one pixel high or wide, whatever the size given."""
    return noise(rng, *STRIPS[rng.integers(len(STRIPS))])


KINDS = (
    smooth, binary, low_contrast, constant, noise, few_levels, one_pixel, full, empty, thin,
    perfect, inverted, strip, smooth,
)  # fmt: skip


def pairs():
    rng = np.random.default_rng(20)
    for number, kind in enumerate(KINDS):
        for index in range(NUM_PER_KIND):
            yield f"{kind.__name__}-{number}-{index}", *kind(rng, *SIZES[index % len(SIZES)])


PAIRS = {name: (prediction, mask) for name, prediction, mask in pairs()}


def worst_deviation(ours, theirs):
    """Return the largest difference over the keys where the oracle is not NaN."""
    return max(abs(ours[key] - theirs[key]) for key in RESULT_KEYS if not np.isnan(theirs[key]))


@pytest.mark.parametrize("protocol", ["pysod", "raw"])
def test_every_pair_and_curve_equals_the_oracle(oracle, protocol):
    assert len(PAIRS) >= 500
    differing = {}
    for name, (prediction, mask) in PAIRS.items():
        theirs, their_curves = oracle(prediction, mask, normalise=protocol == "pysod")
        evaluator = Evaluator(protocol=protocol)
        row = evaluator.add(name, prediction, mask)
        deviation = max(worst_deviation(row, theirs), worst_deviation(evaluator.results(), theirs))
        curves = evaluator.curves()
        for key, curve in their_curves.items():
            deviation = max(deviation, np.abs(curves[key] - curve).max())
        if not deviation <= TOLERANCE:
            differing[name] = deviation
        assert np.isfinite(row["Smeasure"])
    assert not differing


def test_dataset_results_equal_the_oracle(oracle):
    """Curves are averaged over images before their maximum is taken: not the mean of the maxima."""
    names = [name for name in PAIRS if name.startswith(("smooth", "binary", "thin"))]
    evaluator = Evaluator()
    scores, curves = [], []
    for name in names:
        evaluator.add(name, *PAIRS[name])
        theirs, their_curves = oracle(*PAIRS[name])
        if not np.isnan(theirs["Smeasure"]):
            scores.append(theirs)
            curves.append(their_curves)
        else:
            evaluator = drop(evaluator, name)
    results = evaluator.results()
    for key in ("Smeasure", "MAE", "wFmeasure", "adpEm", "adpFm", "IoU", "Dice"):
        assert results[key] == pytest.approx(np.mean([s[key] for s in scores]), abs=TOLERANCE)
    for letter in "EF":
        mean_curve = np.mean([curve[letter] for curve in curves], axis=0)
        assert results[f"mean{letter}m"] == pytest.approx(mean_curve.mean(), abs=TOLERANCE)
        assert results[f"max{letter}m"] == pytest.approx(mean_curve.max(), abs=TOLERANCE)
    mean_of_maxima = np.mean([s["maxFm"] for s in scores])
    assert results["maxFm"] < mean_of_maxima - 0.01


def drop(evaluator, name):
    """Return the same evaluator without one image."""
    state = evaluator.state_dict()
    keep = [index for index, row in enumerate(state["rows"]) if row["name"] != name]
    for key in ("rows", "rightly_empty", "digests", "num_void", "claims"):
        state[key] = [state[key][index] for index in keep]
    state["counts"] = state["counts"][keep]
    evaluator.load_state_dict(state)
    return evaluator


def test_a_level_on_the_adaptive_threshold_follows_the_oracle(oracle):
    """Twice the mean is exactly the grey 128 here: the last bit of the summed mean decides."""
    rng = np.random.default_rng(0)
    decided_by_rounding = 0
    for num_grey in range(10, 200, 10):
        counts = [num_grey + 191, num_grey, 64]  # sum = 64 * number of pixels
        prediction = rng.permutation(np.repeat(np.array([0, 128, 255], np.uint8), counts))
        prediction = prediction.reshape(5, -1)
        mask = np.where(rng.random(prediction.shape) < 0.3, 255, 0).astype(np.uint8)
        theirs, _ = oracle(prediction, mask)
        assert worst_deviation(Evaluator().add("tie", prediction, mask), theirs) <= TOLERANCE
        histogram = joint_histogram(prediction, mask > 0)
        values = level_values(histogram, normalise=True)
        plain = measures.fmeasure(measures.adaptive_confusion(histogram, values))
        decided_by_rounding += abs(plain - theirs["adpFm"]) > TOLERANCE
    assert decided_by_rounding > 0


def test_false_alarms_far_from_the_object_equal_the_oracle(oracle):
    mask = np.zeros((3, 700), np.uint8)
    mask[:, :4] = 255
    prediction = np.random.default_rng(0).integers(0, 256, mask.shape, np.uint8)
    theirs, _ = oracle(prediction, mask)
    assert worst_deviation(Evaluator().add("far", prediction, mask), theirs) <= 1e-12


@pytest.mark.parametrize("seed", range(3))
def test_a_perturbed_prediction_breaks_parity(oracle, seed):
    """Negative control: the check above fails if one row of pixels is off by a few levels."""
    rng = np.random.default_rng(seed)
    prediction, mask = smooth(rng, 60, 80)
    theirs, _ = oracle(prediction, mask)
    perturbed = prediction.copy()
    perturbed[30] ^= 8
    assert worst_deviation(Evaluator().add("same", prediction, mask), theirs) <= TOLERANCE
    row = Evaluator().add("perturbed", perturbed, mask)
    assert worst_deviation(row, theirs) > 100 * TOLERANCE


def test_a_shifted_prediction_scores_lower():
    rng = np.random.default_rng(5)
    _, mask = blob(rng, 90, 120)
    good = Evaluator().add("good", mask, mask)
    shifted = Evaluator().add("shifted", np.roll(mask, 6, axis=1), mask)
    for key in RESULT_KEYS:
        assert shifted[key] > good[key] if key == "MAE" else shifted[key] < good[key], key


def test_the_tie_rule_of_the_nearest_object_pixel_matters(oracle, monkeypatch):
    """Negative control: breaking ties by row first gives another weighted F."""
    from camoxpert.metrics import weighted

    prediction, mask = thin(np.random.default_rng(8), 97, 64)
    theirs, _ = oracle(prediction, mask)
    assert Evaluator().add("a", prediction, mask)["wFmeasure"] == pytest.approx(
        theirs["wFmeasure"], abs=1e-12
    )
    by_row = {
        distance: np.array(sorted(offsets.tolist()))
        for distance, offsets in weighted.NEIGHBOURS.items()
    }
    monkeypatch.setattr(weighted, "NEIGHBOURS", by_row)
    changed = Evaluator().add("a", prediction, mask)["wFmeasure"]
    assert abs(changed - theirs["wFmeasure"]) > TOLERANCE
