"""Experts that no image of a batch uses are not computed in an ONNX file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from camoxpert.export.skip import skip_unused

onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")

EXPERTS = 3
WIDTH = 2


def moe_file(path: Path, *, poisoned: int | None = None, shuffled: bool = False) -> Path:
    """Write three experts, 1x1 filters of 1, 2 and 3, times gates; two read a ReLU that they share.

    Args:
        path: file to write.
        poisoned: expert whose filter is not a number.
        shuffled: the nodes are in reverse order.
    """
    from onnx import TensorProto, helper, numpy_helper

    def node(kind: str, given: list[str], made: str, module: str, **attributes: object) -> object:
        one = helper.make_node(kind, given, [made], f"make_{made}", **attributes)
        entry = one.metadata_props.add()
        entry.key, entry.value = (
            "pkg.torch.onnx.name_scopes",
            f"['', 'network', '{module}', '{made}']",
        )
        return one

    level = "network.levels.0.moe"
    nodes = [node("Relu", ["x"], "shared", f"{level}.experts.1")]
    weights = [numpy_helper.from_array(np.zeros(1, np.float32), "nought")]
    for expert in range(EXPERTS):
        own = f"{level}.experts.{expert}"
        value = np.nan if expert == poisoned else expert + 1.0
        filters = value * np.eye(WIDTH, dtype=np.float32)[:, :, None, None]
        weights.append(numpy_helper.from_array(filters, f"w{expert}"))
        weights.append(numpy_helper.from_array(np.array([expert]), f"n{expert}"))
        read = "x" if expert == 0 else f"kept{expert}"
        if expert:
            # All experts read the features; two of them the shared map as well.
            nodes.append(node("Add", ["x", "shared"], f"both{expert}", own))
            nodes.append(node("Sub", [f"both{expert}", "shared"], read, own))
        nodes.append(node("Conv", [read, f"w{expert}"], f"y{expert}", own))
        nodes.append(node("Gather", ["gates", f"n{expert}"], f"g{expert}", level, axis=1))
        nodes.append(node("Mul", [f"y{expert}", f"g{expert}"], f"m{expert}", level))
    nodes.append(node("Add", ["m0", "m1"], "sum", level))
    nodes.append(node("Add", ["sum", "m2"], "out", level))
    maps = ["batch", WIDTH, "height", "width"]
    graph = helper.make_graph(
        nodes[::-1] if shuffled else nodes,
        "moe",
        [
            helper.make_tensor_value_info("x", TensorProto.FLOAT, maps),
            helper.make_tensor_value_info("gates", TensorProto.FLOAT, ["batch", EXPERTS, 1, 1]),
        ],
        [helper.make_tensor_value_info("out", TensorProto.FLOAT, maps)],
        weights,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)])
    model.ir_version = 9
    onnx.save(model, str(path))
    return path


def run(path: Path, gates: list[list[float]]) -> np.ndarray:
    x = np.random.default_rng(0).normal(size=(len(gates), WIDTH, 4, 6)).astype(np.float32)
    given = {"x": x, "gates": np.array(gates, np.float32)[:, :, None, None]}
    (found,) = ort.InferenceSession(str(path)).run(None, given)
    expected = x * np.array([row @ np.arange(1, 4) for row in np.array(gates)])[:, None, None, None]
    return found / expected.astype(np.float32)


@pytest.mark.parametrize("shuffled", [False, True], ids=["sorted", "shuffled"])
@pytest.mark.parametrize(
    "gates",
    [[[1, 0, 0]], [[0, 0.3, 0.7]], [[0.5, 0.5, 0], [0, 0, 1]], [[0.2, 0.3, 0.5]]],
    ids=["first", "last two", "two images", "all"],
)
def test_results_stay(tmp_path: Path, gates: list[list[float]], shuffled: bool) -> None:
    path = moe_file(tmp_path / "a.onnx", shuffled=shuffled)
    assert skip_unused(path) == EXPERTS
    onnx.checker.check_model(str(path), full_check=True)
    np.testing.assert_allclose(run(path, gates), 1, rtol=1e-5)


def test_what_no_image_uses_is_not_computed(tmp_path: Path) -> None:
    """A filter that is not a number spoils the sum wherever it is computed, also times 0."""
    path = moe_file(tmp_path / "a.onnx", poisoned=1)
    assert np.isnan(run(path, [[1, 0, 0]])).all()
    skip_unused(path)
    np.testing.assert_allclose(run(path, [[1, 0, 0], [0, 0, 1]]), 1, rtol=1e-5)
    assert np.isnan(run(path, [[1, 0, 0], [0, 1, 0]])).any()


def test_what_experts_share_stays_outside(tmp_path: Path) -> None:
    path = moe_file(tmp_path / "a.onnx")
    skip_unused(path)
    graph = onnx.load(str(path)).graph
    outside = [node.op_type for node in graph.node]
    assert outside.count("If") == EXPERTS and outside.count("Relu") == 1
    assert "Conv" not in outside and {w.name for w in graph.initializer} >= {"nought", "n0"}
    assert not {w.name for w in graph.initializer} & {"w0", "w1", "w2"}


def test_other_graphs_stay_as_they_are(tmp_path: Path) -> None:
    """Without an expert there is nothing to put into a branch, and the file is not written."""
    path = moe_file(tmp_path / "a.onnx")
    model = onnx.load(str(path))
    for node in model.graph.node:
        del node.metadata_props[:]
    onnx.save(model, str(path))
    before = path.read_bytes()
    assert skip_unused(path) == 0 and path.read_bytes() == before
