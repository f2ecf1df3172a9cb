"""The torch path against the numpy path, on the CPU and on a GPU if there is one."""

import cv2
import numpy as np
import pytest
import torch

from camoxpert.errors import ConfigError, DataError
from camoxpert.metrics import FAST_KEYS, RESULT_KEYS, Evaluator
from camoxpert.metrics.device import CopyWhenRead, DeviceScorer, joint_counts, squared_distance
from camoxpert.metrics.histogram import joint_histogram

DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=[
            pytest.mark.gpu,
            pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
        ],
    ),
]


def pairs(count=40):
    rng = np.random.default_rng(11)
    for index in range(count):
        shape = tuple(rng.integers(1, 90, 2))
        field = cv2.GaussianBlur(rng.standard_normal(shape), (0, 0), rng.uniform(0.5, 6))
        mask = field > np.quantile(field, rng.choice([0.0, 0.5, 0.9, 0.98]))
        mask &= index % 7 != 0  # sometimes empty
        mask |= index % 11 == 5  # sometimes full
        noise = rng.standard_normal(shape) * rng.uniform(0, 1.5)
        prediction = 255 / (1 + np.exp(-6 * (field / (field.std() + 1e-9) + noise - 0.5)))
        prediction = (prediction // rng.choice([1, 40])).astype(np.uint8)
        if index % 9 == 8:
            prediction[:] = 37
        yield f"image {index}", prediction, mask


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("protocol", ["pysod", "raw"])
@pytest.mark.parametrize("empty_gt", ["pysod", "correct", "skip"])
def test_both_paths_agree(device, protocol, empty_gt):
    host = Evaluator(protocol=protocol, empty_gt=empty_gt)
    scorer = DeviceScorer(Evaluator(protocol=protocol, empty_gt=empty_gt))
    rows = []
    for index, (name, prediction, mask) in enumerate(pairs()):
        host.add(name, prediction, mask, group="g")
        scorer.add(name, torch.from_numpy(prediction).to(device), mask, group="g")
        if index % 6 == 5:
            rows += scorer.flush()
    rows += scorer.flush()
    assert [row["name"] for row in rows] == [name for name, _, _ in pairs()]
    assert scorer.evaluator.data_hash() == host.data_hash()
    for ours, theirs in zip(scorer.evaluator.rows(), host.rows(), strict=True):
        assert ours.pop("wFmeasure") == pytest.approx(theirs.pop("wFmeasure"), abs=1e-12)
        assert ours == theirs
    for key, curve in host.curves().items():
        assert np.array_equal(scorer.evaluator.curves()[key], curve)


def test_the_copy_to_the_host_begins_when_the_images_are_queued() -> None:
    """What is launched between that and ``flush`` is not waited for."""
    order = []

    class Noted(CopyWhenRead):
        def __init__(self, values: torch.Tensor) -> None:
            order.append(f"copy of {len(values)}")
            super().__init__(values)

        def read(self) -> torch.Tensor:
            order.append("read")
            return super().read()

    scorer = DeviceScorer(Evaluator(), Noted)
    (name, prediction, mask), (other, *more) = list(pairs())[:2]
    scorer.add(name, torch.from_numpy(prediction), mask)
    scorer.add(other, torch.from_numpy(more[0]), more[1])
    scorer.send()
    order.append("the next forward pass")
    assert [row["name"] for row in scorer.flush()] == [name, other]
    assert scorer.flush() == []
    assert order == ["copy of 2", "the next forward pass", "read"]


def test_a_tie_on_the_adaptive_threshold_is_settled_by_the_pixels():
    """Twice the mean is exactly the grey 128; see the parity tests."""
    prediction = np.repeat(np.array([0, 128, 255], np.uint8), [221, 30, 64]).reshape(5, -1)
    mask = prediction > 200
    scorer = DeviceScorer(Evaluator())
    scorer.add("tie", torch.from_numpy(prediction), mask)
    (row,) = scorer.flush()
    assert row["adpFm"] == Evaluator().add("tie", prediction, mask)["adpFm"]


@pytest.mark.parametrize("device", DEVICES)
def test_distances_are_exact(device, monkeypatch):
    from camoxpert.metrics import device as module

    monkeypatch.setattr(module, "CHUNK_ELEMENTS", 5000)
    for _, _, mask in pairs():
        if not mask.any() or mask.all():
            continue
        theirs = cv2.distanceTransform((~mask).astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
        ours = squared_distance(torch.from_numpy(mask).to(device)).cpu().numpy()
        assert np.array_equal(ours, np.rint(theirs.astype(np.float64) ** 2))


def test_counts_equal_the_numpy_histogram():
    for _, prediction, mask in pairs():
        theirs = joint_histogram(prediction, mask)
        ours = joint_counts(torch.from_numpy(prediction), torch.from_numpy(mask), theirs.split)
        assert np.array_equal(ours.numpy(), theirs.counts)


def test_the_host_is_asked_once_a_batch():
    """``add`` must not read a value back: a fake tensor raises if it does."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    mask = np.zeros((20, 30), bool)
    mask[4:9, 5:20] = True
    with FakeTensorMode(allow_non_fake_inputs=True):
        prediction = torch.zeros(20, 30, dtype=torch.uint8)
        DeviceScorer(Evaluator()).add("a", prediction, mask)
        with pytest.raises(Exception, match="_local_scalar_dense"):
            int(prediction.sum())  # negative control


def test_options_and_faults():
    scorer = DeviceScorer(Evaluator(keys=FAST_KEYS))
    mask = np.ones((4, 5), bool)
    scorer.add("a", torch.zeros(4, 5, dtype=torch.uint8), mask)
    assert set(RESULT_KEYS) - set(scorer.flush()[0]) == {"wFmeasure"}
    assert scorer.flush() == []
    with pytest.raises(DataError, match="5 x 4 and the mask 4 x 5"):
        scorer.add("b", torch.zeros(5, 4, dtype=torch.uint8), mask)
    with pytest.raises(ConfigError, match="BoundaryIoU and HCE cannot"):
        DeviceScorer(Evaluator(keys=("HCE", "BoundaryIoU")))
