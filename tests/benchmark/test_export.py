"""``benchmark export``: figures of every variant, and a recommendation that keeps the limits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.printed import complained
from numpy.typing import NDArray

from camoxpert.benchmark import export
from camoxpert.benchmark.export import EAGER, OPENVINO_BF16, Subject, Variant, choose, measure, show
from camoxpert.cli import main
from camoxpert.export.gate import Agreement
from camoxpert.inference.runtimes import Runtime


class Counting:
    title, about = "none", {}

    def __init__(self) -> None:
        self.batches: list[int] = []

    def run(self, inputs: Mapping[str, NDArray[Any]], outputs: Sequence[str]) -> list[NDArray[Any]]:
        self.batches.append(len(inputs["images"]))
        return [np.zeros(1)]


def agreement(change: float) -> Agreement:
    scores = {"Smeasure": (0.8, 0.8 + change), "MAE": (0.1, 0.1)}
    return Agreement(50, "made", scores, 1.0, 1.0, "a")


def test_every_variant_is_timed_at_both_batch_sizes_and_scored(tmp_path: Path) -> None:
    file = tmp_path / "m.onnx"
    file.write_bytes(bytes(2_000_000))
    runtimes = {EAGER: Counting(), OPENVINO_BF16: Counting(), "OpenVINO int8": Counting()}
    variants = {
        EAGER: Variant(runtimes[EAGER], "fp32"),
        OPENVINO_BF16: Variant(runtimes[OPENVINO_BF16], "bf16", [file]),
        "OpenVINO int8": Variant(runtimes["OpenVINO int8"], "int8", [file], {"in_float": ["a"]}),
    }
    changes = {id(runtimes[EAGER]): 0.0, id(runtimes[OPENVINO_BF16]): 0.001}

    def scored(runtime: Runtime) -> Agreement:
        return agreement(changes.get(id(runtime), 0.02))

    inputs = {size: {"images": np.zeros((size, 1))} for size in (1, 8)}
    rows = measure(variants, inputs, scored, rounds=3)
    # Two warm-up calls and three rounds of each batch size.
    assert all(sorted(made.batches) == [1] * 5 + [8] * 5 for made in runtimes.values())
    assert rows[OPENVINO_BF16]["megabytes"] == 2 and rows[EAGER]["megabytes"] is None
    assert rows[OPENVINO_BF16]["broken"] == [] and "Smeasure" in rows["OpenVINO int8"]["broken"][0]
    assert rows[EAGER]["over_eager"]["1"]["ratio"] == 1
    assert choose(rows)["format"] == OPENVINO_BF16
    show(rows, {"compiled fp32": "no compiler"}, choose(rows))


def row(milliseconds: float, over_bf16: float, broken: Sequence[str] = ()) -> dict[str, Any]:
    ratio = {"ratio": 1.0, "low": 1.0, "high": 1.0}
    return {
        "milliseconds": {"1": milliseconds},
        "over_eager": {"1": ratio},
        "over_openvino_bf16": {**ratio, "ratio": over_bf16},
        "megabytes": 1.0,
        "broken": list(broken),
    }


@pytest.mark.parametrize(
    ("int8", "best"),
    [
        (row(8.0, 1.25), "OpenVINO int8"),
        (row(9.0, 1.11), OPENVINO_BF16),
        (row(5.0, 2.0, ["Smeasure changes"]), OPENVINO_BF16),
    ],
)
def test_int8_must_be_faster_by_a_fifth_and_keep_its_limit(int8: dict[str, Any], best: str) -> None:
    rows = {
        EAGER: {**row(30.0, 0.3), "megabytes": None},
        OPENVINO_BF16: row(10.0, 1.0),
        "OpenVINO int8": int8,
    }
    assert choose(rows)["format"] == best


def test_without_a_compiler_the_reason_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export.shutil, "which", lambda word: None)
    graph: Any = None
    assert "no C++ compiler" in str(export.why_not_compiled(graph, {}, Subject(Path())))
    left_out = export.why_not_compiled(graph, {}, Subject(Path(), compiled=False))
    assert left_out == "--no-compile"


def test_the_kind_has_flags_of_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["benchmark", "--rounds", "1", "export"]) == 2
    assert "right behind `benchmark`" in complained(capsys)
    assert main(["benchmark", "export", "nowhere", "--rounds", "0"]) == 2
    assert "--rounds must be at least 1" in complained(capsys)
