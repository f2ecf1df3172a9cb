"""The evaluator's bookkeeping: names, merging of parts, options, directions of measures."""

import itertools
import math
import pickle
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from camoxpert.errors import ConfigError, DataError
from camoxpert.metrics import (
    EXTRA_KEYS,
    FAST_KEYS,
    KNOWN_KEYS,
    RESULT_KEYS,
    Evaluator,
    is_better,
)
from camoxpert.metrics.evaluator import HIGHER_IS_BETTER

KEYS = (
    "Smeasure", "MAE", "wFmeasure", "meanEm", "maxEm", "adpEm", "meanFm", "maxFm", "adpFm", "IoU",
    "Dice",
)  # fmt: skip


def images(count=12):
    """Yield (name, prediction, mask) of each image; every fourth mask is empty."""
    rng = np.random.default_rng(4)
    for index in range(count):
        shape = rng.integers(10, 40, 2)
        mask = rng.random(shape) < (index % 4) * 0.2
        prediction = np.clip(rng.normal(mask * 120 + 60, 60), 0, 255).astype(np.uint8)
        yield f"image {index}", prediction, mask


def filled(items, **options):
    evaluator = Evaluator(**options)
    for item in items:
        evaluator.add(*item, group="a" if item[0] < "image 5" else "b")
    return evaluator


def content(evaluator):
    """Return everything an evaluator reports as text; repr keeps every bit of a float."""
    curves = {key: curve.tobytes() for key, curve in evaluator.curves().items()}
    return repr((evaluator.results(), evaluator.rows(), curves, evaluator.num_skipped))


def test_keys_and_rows():
    evaluator = filled(images())
    assert tuple(evaluator.results()) == RESULT_KEYS == KEYS
    assert all(type(value) is float for value in evaluator.results().values())
    rows = evaluator.rows()
    assert set(rows[0]) == {"name", "group", *KEYS, "object_fraction", "num_objects"}
    assert [row["name"] for row in rows] == sorted(name for name, _, _ in images())
    assert rows[0] == Evaluator().add(*next(images()), group="a")
    assert rows[1]["object_fraction"] == pytest.approx(
        next(itertools.islice(images(), 1, 2))[2].mean()
    )
    assert set(evaluator.curves()) == {"E", "F", "precision", "recall"}
    assert all(curve.shape == (256,) for curve in evaluator.curves().values())
    assert evaluator.num_images == 12


def test_a_returned_row_is_the_callers_own():
    evaluator = filled(images())
    before = content(evaluator)
    evaluator.rows()[0]["MAE"] = 7
    evaluator.add("extra", *next(images())[1:])["MAE"] = 7
    evaluator.state_dict()["rows"][0]["MAE"] = 7
    assert evaluator.results()["MAE"] < 1
    assert content(evaluator) != before  # the extra image counts


@pytest.mark.parametrize("empty_gt", ["pysod", "correct", "skip"])
def test_parts_in_any_order_give_the_same_bits(empty_gt):
    items = list(images())
    whole = content(filled(items, empty_gt=empty_gt))
    rng = np.random.default_rng(1)
    for num_parts in (1, 2, 5):
        shuffled = [items[index] for index in rng.permutation(len(items))]
        merged = Evaluator(empty_gt=empty_gt)
        for part in range(num_parts):
            worker = filled(shuffled[part::num_parts], empty_gt=empty_gt)
            received = Evaluator(empty_gt=empty_gt)
            received.load_state_dict(pickle.loads(pickle.dumps(worker.state_dict())))
            merged.merge(received)
        assert content(merged) == whole
    # Negative control: one image more or less changes the result.
    assert content(filled(items[:-1], empty_gt=empty_gt)) != whole


def test_threads_give_the_same_bits():
    evaluator = Evaluator()
    with ThreadPoolExecutor(4) as pool:
        list(
            pool.map(lambda i: evaluator.add(*i, group="a" if i[0] < "image 5" else "b"), images())
        )
    assert content(evaluator) == content(filled(images()))


def test_state_is_plain_and_survives_without_images():
    state = filled(images()).state_dict()
    assert state["counts"].shape == (12, 2, 256)
    assert all(type(value) in (str, float, int) for row in state["rows"] for value in row.values())
    empty = Evaluator()
    empty.load_state_dict(Evaluator().state_dict())
    assert empty.num_images == 0
    with pytest.raises(DataError, match="no image was scored"):
        empty.results()
    with pytest.raises(DataError, match="no image was scored"):
        empty.curves()


def test_loading_replaces():
    evaluator = filled(itertools.islice(images(), 3))
    evaluator.load_state_dict(filled(images()).state_dict())
    assert content(evaluator) == content(filled(images()))


def test_doubled_names_are_refused_and_nothing_is_taken_over():
    items = list(images())
    evaluator = filled(items[:6])
    with pytest.raises(DataError, match=r"^image 0: already scored"):
        evaluator.add(*items[0])
    before = content(evaluator)
    with pytest.raises(DataError, match="image 4 and 1 more: already scored"):
        evaluator.merge(filled(items[4:]))
    assert content(evaluator) == before


def test_other_options_do_not_mix():
    with pytest.raises(DataError, match="cannot be mixed"):
        Evaluator().merge(Evaluator(protocol="raw"))
    with pytest.raises(DataError, match="cannot be mixed"):
        Evaluator().load_state_dict(Evaluator(empty_gt="skip").state_dict())
    with pytest.raises(DataError, match="version 99"):
        Evaluator().load_state_dict({**Evaluator().state_dict(), "version": 99})


def test_unknown_options_are_named_with_the_closest():
    with pytest.raises(ConfigError, match="Did you mean 'pysod'"):
        Evaluator(protocol="pysd")
    with pytest.raises(ConfigError, match="Did you mean 'correct'"):
        Evaluator(empty_gt="corect")
    with pytest.raises(ConfigError, match="Did you mean 'Smeasure'"):
        is_better("smeasure", 1, 0)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_floating_point_maps_score_like_their_saved_form(dtype):
    values = np.random.default_rng(0).random((20, 30)).astype(dtype)
    values[0, :2] = 0, 1
    saved = (values.astype(np.promote_types(dtype, np.float32)) * 255).astype(np.uint8)
    rounded = np.rint(values.astype(np.float64) * 255).astype(np.uint8)
    mask = values > 0.6
    row = Evaluator().add("image", values, mask)
    assert row == Evaluator().add("image", saved, mask)
    assert row != Evaluator().add("image", rounded, mask)


def test_memory_layout_does_not_matter():
    name, prediction, mask = list(images())[3]
    row = Evaluator().add(name, prediction, mask)
    assert Evaluator().add(name, np.asfortranarray(prediction), np.asfortranarray(mask)) == row
    doubled = np.repeat(np.repeat(prediction, 2, 0), 2, 1)[::2, ::2]
    assert Evaluator().add(name, doubled, mask) == row


def test_inputs_are_left_alone():
    name, prediction, mask = list(images())[3]
    prediction.setflags(write=False)
    mask.setflags(write=False)
    Evaluator().add(name, prediction, mask)


def test_direction_of_every_result():
    assert tuple(HIGHER_IS_BETTER) == KNOWN_KEYS == (*KEYS, *EXTRA_KEYS)
    assert [key for key in KNOWN_KEYS if not HIGHER_IS_BETTER[key]] == ["MAE", "BER", "HCE"]
    assert is_better("MAE", 0.1, 0.2) and not is_better("MAE", 0.2, 0.1)
    assert is_better("IoU", 0.2, 0.1) and not is_better("IoU", 0.1, 0.2)
    assert not is_better("IoU", 0.1, 0.1)
    assert not is_better("IoU", math.nan, 0.1) and not is_better("IoU", math.nan, math.nan)
    assert is_better("MAE", 0.9, math.nan)


def test_calling_everything_object_scores_the_share_of_the_object():
    masks = [mask for _, _, mask in images() if mask.any()]
    evaluator = Evaluator()
    for index, mask in enumerate(masks):
        evaluator.add(str(index), np.full(mask.shape, 255, np.uint8), mask)
    scores = evaluator.results()
    assert scores["IoU"] == pytest.approx(np.mean([mask.mean() for mask in masks]))
    assert scores["MAE"] == pytest.approx(1 - scores["IoU"])
    with pytest.raises(DataError):
        Evaluator().results()


def test_only_what_is_asked_for_is_computed(monkeypatch):
    from camoxpert.metrics import scoring

    whole = filled(images())
    monkeypatch.setattr(scoring, "weighted_fmeasure", None)
    fast = filled(images(), keys=reversed(FAST_KEYS))
    assert tuple(fast.results()) == FAST_KEYS
    assert fast.results() == {key: whole.results()[key] for key in FAST_KEYS}
    with pytest.raises(TypeError):
        filled(images())
    with pytest.raises(ConfigError, match="Did you mean 'BoundaryIoU'"):
        Evaluator(keys=("BoundryIoU",))
    with pytest.raises(DataError, match="same measures"):
        whole.merge(fast)


def test_the_data_hash_is_that_of_names_and_masks():
    whole = filled(images()).data_hash()
    as_bytes = [(n, p, m.astype(np.uint8) * 255) for n, p, m in images()]
    other_maps = [(n, 255 - p, m) for n, p, m in reversed(list(images()))]
    assert filled(as_bytes).data_hash() == filled(other_maps).data_hash() == whole
    assert filled(images(), empty_gt="skip").data_hash() == whole
    renamed = [(f"{n}x", p, m) for n, p, m in images()]
    (name, prediction, mask), *rest = images()
    changed = mask.copy()
    changed[0, 0] ^= True
    reshaped = (name, prediction.T.copy(), mask.reshape(mask.T.shape).copy())
    for control in (renamed, rest, [(name, prediction, changed), *rest], [reshaped, *rest]):
        assert filled(control).data_hash() != whole


def test_objects_are_counted():
    mask = np.zeros((120, 120), bool)
    mask[5:30, 5:30] = mask[60:100, 60:100] = mask[30, 30] = True  # a corner touches: one object
    mask[70:90, 70:90] = False
    mask[78:82, 78:82] = True  # an island in the hole
    mask[110, 3] = True  # a speck: 1 pixel of 14 400
    mask[115, 50:52] = True  # 2 pixels: an object
    assert Evaluator().add("a", mask.astype(np.uint8), mask)["num_objects"] == 4
    assert Evaluator().add("a", mask.astype(np.uint8), mask & False)["num_objects"] == 0


def test_a_bool_mask_with_other_bytes_than_one():
    """Pillow's 1-bit pictures become bool arrays that store True as 255."""
    _, prediction, mask = list(images())[3]
    strange = (mask.astype(np.uint8) * 255).view(np.bool_)
    assert strange.view(np.uint8).max() == 255
    plain, odd = Evaluator(), Evaluator()
    assert plain.add("a", prediction, mask) == odd.add("a", prediction, strange)
    assert plain.data_hash() == odd.data_hash()
