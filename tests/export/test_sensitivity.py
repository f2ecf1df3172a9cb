"""int8: the search keeps as few parts in float as the limit asks for, and parts have names."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from camoxpert.errors import ConfigError
from camoxpert.export.images import Calibration, calibration_of
from camoxpert.export.quantize import UNNAMED, short_part
from camoxpert.export.sensitivity import quantise
from camoxpert.export.write import check_format
from camoxpert.inference.predictor import load_predictor


class Made:
    """Quantises nothing: a file lists the parts in int8, and each adds its own error."""

    def __init__(self, errors: Mapping[str, float]) -> None:
        self.errors, self.parts = errors, tuple(errors)
        self.calibration = Calibration(({"images": np.zeros(1)},), "made", "")
        self.written: list[tuple[str, ...]] = []

    def write(self, path: Path, in_float: Sequence[str] = (), images: int | None = None) -> None:
        self.written.append(tuple(in_float))
        path.write_text(json.dumps([part for part in self.parts if part not in in_float]))

    def error(self, path: Path) -> float:
        return sum(self.errors[part] for part in json.loads(path.read_text()))


class Adds:
    """Returns the sum of the errors of a file."""

    title, about = "", {}

    def __init__(self, error: float) -> None:
        self.error = error

    def run(self, inputs: Mapping[str, NDArray[Any]], outputs: Sequence[str]) -> list[NDArray[Any]]:
        return [np.array([self.error])]


def search(errors: Mapping[str, float], limit: float, path: Path) -> tuple[list[str], Made]:
    made = Made(errors)
    found = quantise(
        made,
        path,
        broken=lambda file: ["too far"] if made.error(file) > limit else [],
        open_file=lambda file: Adds(made.error(file)),
        reference=Adds(0.0),
    )
    return found.in_float, made


def test_nothing_stays_in_float_where_all_keeps_the_limit(tmp_path: Path) -> None:
    in_float, made = search({"a": 0.1, "b": 0.1}, 0.5, tmp_path / "m")
    assert in_float == [] and made.written == [()]


@pytest.mark.parametrize("number", [1, 2, 3, 5, 6, 7])
def test_the_worst_stay_and_no_more_than_needed(tmp_path: Path, number: int) -> None:
    # The first parts break the limit, each by itself; the others do nothing.
    errors = {f"p{index}": (1.0 + index if index < number else 0.0) for index in range(8)}
    in_float, _made = search(errors, 0.5, tmp_path / "m")
    assert sorted(in_float) == [f"p{index}" for index in range(number)]
    assert json.loads((tmp_path / "m").read_text()) == [f"p{i}" for i in range(number, 8)]


def test_what_no_choice_mends_is_left_to_the_gate(tmp_path: Path) -> None:
    in_float, made = search({"a": 1.0, "b": 2.0, "c": 3.0}, -1.0, tmp_path / "m")
    assert in_float == ["c", "b", "a"] and made.error(tmp_path / "m") == 0


@pytest.mark.parametrize(
    ("module", "part"),
    [
        ("network.decoder.levels.0.moe.experts.2.enter.0", "decoder.levels.0.experts.2"),
        ("network.decoder.levels.3.fuse.enter", "decoder.levels.3"),
        ("network.decoder.detail.stem.0", "decoder.detail"),
        ("network.decoder.detail.head", "decoder.detail"),
        ("network.backbone.net.blocks.3.1.bn2", "backbone.blocks.3"),
        ("network.backbone.net.stages_1.blocks.0.conv_dw", "backbone.stages_1.blocks.0"),
        ("", UNNAMED),
    ],
)
def test_parts_are_what_a_user_knows(module: str, part: str) -> None:
    assert short_part(module) == part


def test_without_training_images_the_flag_is_named(tiny_run: Path, tmp_path: Path) -> None:
    predictor = load_predictor(tiny_run, device="cpu")
    from camoxpert.data.files.manifest import USUAL
    from camoxpert.export.graph import ExportGraph

    graph = ExportGraph(predictor.network)
    with pytest.raises(ConfigError, match="--calibration"):
        calibration_of(predictor, graph, [str(tmp_path / "nowhere")], USUAL)
    # 40 training images, the same each time.
    first = calibration_of(predictor, graph, [], USUAL)
    assert first.fields() == calibration_of(predictor, graph, [], USUAL).fields()
    assert first.fields()["images"] == 40 and len(first.sha256) == 64
    assert first.inputs[0]["images"].shape == (1, 3, 32, 32)


@pytest.mark.parametrize(
    ("name", "precision", "missing"),
    [
        ("onnx", "fp32", "onnxscript"),
        ("openvino", "bf16", "openvino"),
        ("openvino", "int8", "nncf"),
    ],
)
def test_a_missing_library_is_named_with_its_command(
    name: str, precision: str, missing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from importlib import util

    honest = util.find_spec
    monkeypatch.setattr(util, "find_spec", lambda word: None if word == missing else honest(word))
    with pytest.raises(ConfigError, match=rf"{missing}: pip install 'camoxpert\[export\]'"):
        check_format(name, precision)


def test_torch_has_no_int8() -> None:
    with pytest.raises(ConfigError, match="onnx or openvino"):
        check_format("torch", "int8")
