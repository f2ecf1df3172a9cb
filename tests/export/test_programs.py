"""Traced programs of the kinds of networks agree with them at every shape, and torch files are
read without running what they hold."""

from __future__ import annotations

import json
import pickle
import warnings
import zipfile
from pathlib import Path

import pytest
import torch
from helpers.drawn import SIDE, drawn_network

from camoxpert.benchmark.export import InTorch
from camoxpert.errors import CheckpointError
from camoxpert.export.forced import force, forced_copy
from camoxpert.export.gate import compare, shapes_for
from camoxpert.export.graph import ExportGraph
from camoxpert.export.write import put_about, trace, write_torch
from camoxpert.inference.runtimes import open_runtime, refuse_code

GUIDED = ("model.support.encoder=tiny_test", "model.support.pretrained=false")
KINDS = {
    "tiny, specialists, detail, presence, guidance": (
        *("model.backbone=tiny_test", "model.num_experts=3", "model.presence=on"),
        *GUIDED,
    ),
    "all seven kinds": ("model.backbone=tiny_test", "model.num_experts=7"),
    "tiny, uniform, no detail": (
        *("model.backbone=tiny_test", "model.num_experts=4", "model.expert_family=uniform"),
        "model.detail_width=0",
    ),
    "lite0, specialists": (
        *("model.backbone=tf_efficientnet_lite0", "model.num_experts=2", "model.presence=on"),
        "model.top_k=1",
    ),
    "EdgeNeXt, uniform, guidance": (
        *("model.backbone=edgenext_xx_small", "model.num_experts=2", "model.top_k=1"),
        *("model.expert_family=uniform", *GUIDED),
    ),
}


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    "settings",
    [
        # Real backbones take minutes to trace, and every further expert seconds.
        pytest.param(words, marks=() if "tiny" in name else pytest.mark.exhaustive, id=name)
        for name, words in KINDS.items()
    ],
)
def test_a_traced_program_is_the_network_at_every_shape(settings: tuple[str, ...]) -> None:
    graph = ExportGraph(drawn_network(*settings))
    program = trace(graph, None)
    call = program.module(check_guards=False)
    runtime = InTorch(call, {"outputs": list(graph.output_names)})
    found = compare(graph, graph, runtime, shapes_for(SIDE, None))
    assert found.spread > 1 and found.difference <= 1e-4
    assert (found.presence_difference is None) == (graph.network.presence is None)
    assert (found.presence_difference or 0) <= 1e-4


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_torch_file_can_be_made_to_use_any_expert(tmp_path: Path) -> None:
    graph = ExportGraph(drawn_network("model.backbone=tiny_test", "model.num_experts=3"))
    file, copy = tmp_path / "m.pt2", tmp_path / "copy.pt2"
    write_torch(trace(graph, (1, SIDE, SIDE)), file)
    about = {"layout": 1, "format": "torch", "precision": "fp32", "config": {}}
    put_about(file, {**about, "outputs": list(graph.output_names)})
    made, biases = force(graph, [[2], [1], [0], [2]])
    forced_copy(file, copy, biases, {})
    images = graph.example(1, SIDE, SIDE)
    cpu = torch.device("cpu")
    for path, wanted in ((file, graph), (copy, made)):
        (given,) = open_runtime(path, cpu).run({"images": images[0].numpy()}, ["logits"])
        with torch.no_grad():
            expected = wanted(*images)[1].numpy()
        assert abs(given - expected).max() < 1e-4
        assert abs(given - graph(*images)[1].detach().numpy()).max() < 1e-4 or path == copy


def archive(path: Path, member: bytes, *, use_pickle: bool) -> Path:
    index = {"config": {"w": {"path_name": "weight_0", "use_pickle": use_pickle}}}
    with zipfile.ZipFile(path, "w") as written:
        written.writestr("m/data/weights/model_weights_config.json", json.dumps(index))
        written.writestr("m/data/weights/weight_0", member)
    return path


def test_raw_weights_are_not_read_as_pickles(tmp_path: Path) -> None:
    # Numbers may begin like a pickle of any protocol.
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        refuse_code(archive(tmp_path / "m.pt2", b"\x80\xc9\x00\x01", use_pickle=False))


class Runs:
    def __reduce__(self) -> object:
        return print, ("ran",)


@pytest.mark.parametrize("protocol", [0, 2, 5])
def test_pickles_with_code_are_refused(tmp_path: Path, protocol: int) -> None:
    path = archive(tmp_path / "m.pt2", pickle.dumps(Runs(), protocol), use_pickle=True)
    with pytest.raises(CheckpointError, match="could run code"):
        refuse_code(path)


@pytest.mark.parametrize(
    "member",
    [
        "m/data/aotinductor/model/model.so",
        "m/data/constants/custom_obj_0",
        "m/data/constants/opaque_obj_0",
        "m/data/constants/model.pt",
        "m/x_config.json",
        "other/data/weights/weight_0",
        "m/data/sample_inputs/model.pt",
    ],
)
def test_members_that_export_does_not_write_are_refused(tmp_path: Path, member: str) -> None:
    path = archive(tmp_path / "m.pt2", b"1234", use_pickle=False)
    refuse_code(path)
    with zipfile.ZipFile(path, "a") as more:
        more.writestr(member, pickle.dumps(Runs(), 0))
    with pytest.raises(CheckpointError):
        refuse_code(path)
