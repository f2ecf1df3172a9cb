"""Void pixels are in no measure, on either path, and images without them are not touched."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch

from camoxpert.errors import DataError
from camoxpert.metrics import KNOWN_KEYS, Evaluator
from camoxpert.metrics.device import DeviceScorer

ON_DEVICE = tuple(key for key in KNOWN_KEYS if key not in ("BoundaryIoU", "HCE"))
Triple = tuple[np.ndarray, np.ndarray, np.ndarray]


def case(seed: int = 0) -> Triple:
    """A map, a mask and its void: an outline, a corner and some pixels within the object."""
    generator = np.random.default_rng(seed)
    y, x = np.mgrid[:48, :64]
    radius = (y - 22) ** 2 + (x - 30) ** 2
    mask = radius < 100
    void = ((radius >= 100) & (radius < 170)) | ((y < 8) & (x > 40))
    void |= mask & (y == 22) & (x < 34)
    mask &= ~void
    prediction = np.clip(mask * 190 + generator.integers(0, 90, mask.shape), 0, 250)
    prediction[30:36, 10:20] = 200
    return prediction.astype(np.uint8), mask, void


def scored(prediction: np.ndarray, mask: np.ndarray, void: np.ndarray | None, **options: str):
    evaluator = Evaluator(keys=KNOWN_KEYS, **options)
    row = evaluator.add("a", prediction, mask, void=void)
    return row, evaluator


@pytest.mark.parametrize("protocol", ["pysod", "raw"])
@pytest.mark.parametrize("fill", ["white", "black", "noise"])
def test_what_is_predicted_in_void_changes_no_score(protocol: str, fill: str) -> None:
    prediction, mask, void = case()
    changed = prediction.copy()
    noise = np.random.default_rng(1).integers(0, 256, int(void.sum()))
    changed[void] = {"white": 255, "black": 0, "noise": noise}[fill]
    row, evaluator = scored(prediction, mask, void, protocol=protocol)
    other, altered = scored(changed, mask, void, protocol=protocol)
    assert row == other
    for key, curve in evaluator.curves().items():
        assert np.array_equal(curve, altered.curves()[key])
    # Control: the same change counts where the pixels are labelled.
    counted, _ = scored(changed, mask, None, protocol=protocol)
    plain, _ = scored(prediction, mask, None, protocol=protocol)
    differing = {key for key in KNOWN_KEYS if counted[key] != plain[key]}
    assert {"MAE", "Smeasure", "wFmeasure", "meanEm", "meanFm"} <= differing


def test_by_hand() -> None:
    """Three labelled pixels of four: an object found, one missed, a background pixel, one void."""
    prediction = np.array([[255, 0], [0, 255]], np.uint8)
    mask = np.array([[True, True], [False, False]])
    void = np.array([[False, False], [False, True]])
    row, evaluator = scored(prediction, mask, void)
    assert row["MAE"] == pytest.approx(1 / 3)
    assert (row["IoU"], row["Precision"], row["Recall"]) == (0.5, 1.0, 0.5)
    assert row["Dice"] == pytest.approx(2 / 3)
    assert row["Specificity"] == 1.0 and row["BER"] == 0.25
    assert row["object_fraction"] == pytest.approx(2 / 3)
    # At threshold 255 one of three pixels is taken; the mean of the map is 1/3, so 2/3 is adaptive.
    tp, fn, tn = 1, 1, 1
    taken, of_object = 1 / 3, 2 / 3

    def aligned(a: float, b: float) -> float:
        return (2 * a * b / (a * a + b * b) + 1) ** 2 / 4

    by_hand = (
        tp * aligned(1 - taken, 1 - of_object)
        + fn * aligned(-taken, 1 - of_object)
        + tn * aligned(-taken, -of_object)
    ) / 2
    assert row["adpEm"] == pytest.approx(by_hand)
    assert evaluator.curves()["E"][0] == pytest.approx(by_hand)
    assert evaluator.num_with_void == 1


def test_a_strip_of_void_is_as_if_it_were_cut_off() -> None:
    """Below the image, away from the object: the measures of the labelled part alone."""
    prediction, mask, _ = case()
    void = np.zeros_like(mask)
    void[40:] = True
    row, _ = scored(prediction, mask, void)
    alone, _ = scored(prediction[:40], mask[:40], None)
    assert {key: row[key] for key in KNOWN_KEYS if key != "BoundaryIoU"} == pytest.approx(
        {key: alone[key] for key in KNOWN_KEYS if key != "BoundaryIoU"}, rel=1e-9
    )


def test_a_map_that_is_right_on_the_labelled_pixels_is_perfect() -> None:
    _, mask, void = case()
    row, _ = scored(((mask | void) * 255).astype(np.uint8), mask, void)
    for key in ("Smeasure", "wFmeasure", "IoU", "Dice", "maxFm", "BoundaryIoU"):
        assert row[key] == pytest.approx(1.0), key
    assert row["MAE"] == row["HCE"] == 0
    # Control: with the outline counted, as before, the same map is wrong.
    counted, _ = scored(((mask | void) * 255).astype(np.uint8), mask, None)
    assert counted["IoU"] < 0.7 and counted["MAE"] > 0.05


@pytest.mark.parametrize("protocol", ["pysod", "raw"])
def test_the_device_path_agrees(protocol: str) -> None:
    ours = Evaluator(keys=ON_DEVICE, protocol=protocol)
    theirs = Evaluator(keys=ON_DEVICE, protocol=protocol)
    scorer = DeviceScorer(theirs)
    for seed in range(3):
        prediction, mask, void = case(seed)
        prediction[void] = 255 if seed else 0
        ours.add(f"{seed}", prediction, mask, void=void)
        scorer.add(f"{seed}", torch.from_numpy(prediction), mask, void=void)
    scorer.flush()
    expected, found = ours.rows(), theirs.rows()
    for mine, other in zip(expected, found, strict=True):
        assert other.pop("wFmeasure") == pytest.approx(mine.pop("wFmeasure"), abs=1e-12)
        assert other == mine
    assert ours.data_hash() == theirs.data_hash()


def test_void_travels_with_the_state_and_changes_the_hash() -> None:
    prediction, mask, void = case()
    whole = Evaluator()
    for name, part in (("a", void), ("b", None)):
        whole.add(name, prediction, mask, void=part)
    merged = Evaluator()
    for name, part in (("b", None), ("a", void)):
        one, received = Evaluator(), Evaluator()
        one.add(name, prediction, mask, void=part)
        received.load_state_dict(pickle.loads(pickle.dumps(one.state_dict())))
        merged.merge(received)
    assert merged.results() == whole.results() and merged.num_with_void == 1
    without = Evaluator()
    for name in "ab":
        without.add(name, prediction, mask)
    assert whole.data_hash() == merged.data_hash() != without.data_hash()


def test_void_without_a_pixel_is_no_void() -> None:
    prediction, mask, void = case()
    plain, evaluator = scored(prediction, mask, np.zeros_like(void))
    assert plain == scored(prediction, mask, None)[0] and evaluator.num_with_void == 0


def test_an_image_without_an_object_but_with_void() -> None:
    _, mask, void = case()
    claim = (void * 255).astype(np.uint8)
    row, _ = scored(claim, np.zeros_like(mask), void, empty_gt="correct")
    assert row["IoU"] == row["wFmeasure"] == 1.0 and row["MAE"] == 0
    _, skipping = scored(claim, np.zeros_like(mask), void, empty_gt="skip")
    assert skipping.num_skipped == 1


@pytest.mark.parametrize("kind", ["everywhere", "object", "shape", "dtype"])
def test_impossible_void_is_refused(kind: str) -> None:
    prediction, mask, void = case()
    wrong = {
        "everywhere": np.ones_like(void),
        "object": mask,
        "shape": void[:-1],
        "dtype": void.astype(np.uint8),
    }[kind]
    mask = np.zeros_like(mask) if kind == "everywhere" else mask
    with pytest.raises(DataError, match=r"^a: "):
        Evaluator().add("a", prediction, mask, void=wrong)
