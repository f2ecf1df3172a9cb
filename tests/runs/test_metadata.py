"""Metadata that somebody else wrote: wrong types are one paragraph, whatever they are."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save

import camoxpert
from camoxpert.cli import main
from camoxpert.errors import CheckpointError, ConfigError
from camoxpert.inference.exported import open_exported
from camoxpert.inference.predictor import load_predictor
from camoxpert.inference.runtimes import read_about
from camoxpert.runs.card import card
from camoxpert.runs.checkpoint import load_checkpoint, verified
from camoxpert.runs.metadata import SHARED_SHAPE, check_shape
from camoxpert.runs.share import about_of, read_shared

WRONG = ("x", 3, -1, 1.5, [], ["x"], [None], {}, {"x": 1}, {"x": "y"}, None, True, float("inf"))
Path_ = tuple[Any, ...]


def variants(node: Mapping[str, Any], path: Path_ = ()) -> Iterator[tuple[Path_, Any]]:
    """Yield places in metadata and what to put there; ``...`` removes them."""
    for key, value in node.items():
        yield from (((*path, key), wrong) for wrong in (*WRONG, ...))
        if key == "config":
            continue
        if isinstance(value, dict):
            yield from variants(value, (*path, key))
        if isinstance(value, list) and value and isinstance(value[0], dict):
            yield from variants(value[0], (*path, key, 0))


def changed(about: dict[str, Any], path: Path_, value: Any) -> dict[str, Any]:
    about = copy.deepcopy(about)
    holder: Any = about
    for key in path[:-1]:
        holder = holder[key]
    if value is ...:
        del holder[path[-1]]
    else:
        holder[path[-1]] = value
    return about


@pytest.fixture(scope="module")
def shared(tiny_run: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Return metadata and weights of a shared model."""
    file = tiny_run / "model" / "model.safetensors"
    with safe_open(file, "pt") as opened:
        about = json.loads(opened.metadata()["camoxpert"])
    return about, load_checkpoint(file).evaluated_weights


def put(folder: Path, about: Mapping[str, Any], weights: dict[str, torch.Tensor]) -> Path:
    (folder / "model.safetensors").write_bytes(save(weights, {"camoxpert": json.dumps(about)}))
    return folder / "model.safetensors"


def test_shared_weights_are_read_or_refused_in_words(shared: Any, tmp_path: Path) -> None:
    about, weights = shared
    some = dict(list(weights.items())[:1])
    refused = 0
    for path, value in variants(about):
        file = put(tmp_path, changed(about, path, value), some)
        try:
            assert card(about_of(read_shared(file)))
        except CheckpointError as error:
            refused += 1
            assert str(file) in str(error), (path, value)
    assert refused > 50 and card(about_of(read_shared(put(tmp_path, about, some))))


@pytest.mark.parametrize(
    ("path", "value", "says"),
    [
        (("training", "parameters"), "many", "training.parameters must be a number, and is 'many'"),
        (("state", "step"), "x", "state.step must be a number"),
        (("results",), 3, "results must be a list, and is 3"),
        (("results", 0, "scores"), "x", "results[0].scores must be a mapping"),
        (("config",), ["x"], "Settings are names with values"),
        (("config", "data", "img_size"), "x", "img_size"),
        (("config", "data", "img_size"), 10**6, "data.img_size is 1000000"),
        (("config", "data", "img_size"), 33, "data.img_size is 33"),
        (("config", "data", "max_pixels"), 0, "max_pixels"),
    ],
)
def test_commands_say_what_is_wrong(
    shared: Any, toy_data: Path, tmp_path: Path, path: Path_, value: Any, says: str, capsys
) -> None:
    about, weights = shared
    put(tmp_path, changed(about, path, value), weights)
    photos = str(toy_data / "TestDataset" / "toy" / "Imgs")
    assert main(["predict", str(tmp_path), photos, "-o", str(tmp_path / "out")]) == 4
    text = " ".join(capsys.readouterr().err.split())
    assert says in text and "Traceback" not in text


EXPORTED: dict[str, Any] = {
    **{"layout": 1, "format": "onnx", "precision": "fp32", "static": None, "img_size": 32},
    **{"inputs": ["images"], "outputs": ["probability", "logits"], "presence": {"images": 1}},
    **{"guidance": None, "scores": {}, "state": {}},
}


class Graph:
    """Stands for a runtime."""

    title = "none"

    def __init__(self, path: Path, about: Mapping[str, Any]) -> None:
        self.about = read_about(path, json.dumps(about))

    def run(self, inputs: Mapping[str, Any], outputs: list[str]) -> list[Any]:
        shape = inputs["images"].shape
        return [np.zeros((shape[0], 1, *shape[-2:]), np.float32) for _ in outputs]


def test_exported_files_are_read_or_refused_in_words(
    shared: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "m.onnx"
    file.write_bytes(b"graph")
    good = {**EXPORTED, "config": shared[0]["config"]}
    given: list[dict[str, Any]] = []
    monkeypatch.setattr(
        "camoxpert.inference.exported.open_runtime", lambda path, *more: Graph(path, given[-1])
    )
    other = [
        *((("static",), value) for value in ([1, 32], [0, 32, 32], [-1, 32, 32], ["a", 1, 1])),
        *((("outputs",), value) for value in (["probability"], ["logits", "x"])),
        *((("guidance",), value) for value in ({"features": 4}, {"features": 4, "class_text": 1})),
        (("config", "data", "img_size"), 10**6),
    ]
    refused = []
    for path, value in [*variants(good), *other]:
        given.append(changed(good, path, value))
        try:
            model = load_predictor(file, device="cpu")
            model.network(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))
            assert model.presence_is_calibrated in (True, False)
            assert "exported (" in model.network.describe_decoder()
        except CheckpointError as error:
            refused.append((path, value))
            assert str(file) in str(error), (path, value)
    assert set(map(str, other)) <= set(map(str, refused))
    given.append(good)
    assert open_exported(file, torch.device("cpu"))[0].config.data.img_size == 32


@pytest.mark.parametrize(
    "values",
    [
        {"model": "x"},
        {"model": {"a": 1}},
        {"model": {}, "ema": "x"},
        {"model": {}, "ema": {"weights": 3}},
        {"model": {}, "ema": {"x": 1}},
    ],
)
def test_weights_that_are_none(values: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match="its weights are not tensors"):
        verified(Path("a.pt"), {"format": 1, "config": {}, **values})


def test_what_is_missing_or_more_is_no_fault() -> None:
    check_shape(Path("m"), {"state": None, "of a later version": [1]}, SHARED_SHAPE)


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        *(("batch_size", value) for value in (0, "x", 1.5, True, None)),
        *(("threshold", value) for value in ("x", float("nan"), 1.1, None)),
        *(("tile", "x"), ("tile", 64.5), ("overlap", "x"), ("tta", 3), ("min_presence", "x")),
    ],
)
def test_values_of_the_python_api(tiny_run: Path, flag: str, value: Any) -> None:
    more = {"tile": 64} if flag == "overlap" else {}
    with pytest.raises(ConfigError):
        camoxpert.load(tiny_run, device="cpu").stream([], **{flag: value, **more})


@pytest.mark.parametrize("value", [0, -1, "x", 1.5, True])
def test_max_pixels_is_a_number_of_pixels(tiny_run: Path, value: Any) -> None:
    with pytest.raises(ConfigError, match="max_pixels must be"):
        load_predictor(tiny_run, device="cpu", max_pixels=value)


def test_numbers_of_numpy_are_numbers(tiny_run: Path) -> None:
    model = load_predictor(tiny_run, device="cpu", max_pixels=np.int64(2000))
    image = np.zeros((40, 50, 3), np.uint8)
    found = model.predict(image, batch_size=np.int64(2), threshold=np.float32(0.5))
    assert found.probability_HW.shape == (40, 50) and model.max_pixels == 2000
