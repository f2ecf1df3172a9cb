"""The maintainers' scripts run and report what they measured."""

import importlib.util
import json
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from camoxpert.errors import DataError

TOOLS = Path(__file__).parents[2] / "tools"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, TOOLS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def test_results_page_holds_the_scores_of_its_runs(tiny_run: Path) -> None:
    tool = load("results_table")
    runs = [tool.read_run(tiny_run)]
    page = tool.page(runs)
    scores = json.loads((tiny_run / "evaluation" / "scores.json").read_text())["results"][0][
        "scores"
    ]
    assert f"{scores['wFmeasure']:.3f}" in page and "camoxpert train" in page
    twins = [{**runs[0], "name": f"tiny-seed{n}"} for n in (1, 2)]
    twins[1] = json.loads(json.dumps(twins[1]))
    twins[1]["tests"]["toy"]["scores"]["MAE"] = scores["MAE"] + 0.2
    row = tool.means(twins, "toy")[0]
    assert "tiny, mean of 2 seeds" in row and f"{scores['MAE'] + 0.1:.3f}" in row


def test_sharper_maps_keep_their_masks(tiny_run: Path, toy_data: Path) -> None:
    tool = load("sharpness")
    values = np.float32([0.0, 0.2, 0.5, 0.8, 1.0])
    # 1 / (1 + 4^2) for twice the logit of .2.
    assert tool.sharper(values, 2) == pytest.approx([0, 1 / 17, 0.5, 16 / 17, 1], abs=1e-5)
    assert np.array_equal(tool.sharper(values, 16) > 0.5, values > 0.5)
    test = next((toy_data / "TestDataset").iterdir())
    found = tool.measure(test / "Imgs", test / "GT", {"a": [tiny_run], "b": [tiny_run]})
    first, second = found["arms"]["a"], found["arms"]["b"]
    own = json.loads((tiny_run / "evaluation" / "scores.json").read_text())["results"][0]["scores"]
    for key in tool.MEASURES:
        assert first["mean"]["1"][key] == pytest.approx(own[key], abs=1e-3)
    assert first["mean"] == second["mean"]
    assert second["a better by, as trained"] == second["a better by, at its best"] == [0, 0, 0]
    with pytest.raises(DataError, match="has no mask for"):
        tool.measure(test / "Imgs", tiny_run, {"a": [tiny_run]})


def test_gpu_check_measures_or_says_that_it_cannot(tmp_path: Path, capsys) -> None:
    import torch

    tool = load("gpu_check")
    if not torch.cuda.is_available():
        assert tool.check(tmp_path, smoke=False, tests_exit_code=None, only=None) == 1
        assert "nothing measured" in capsys.readouterr().out
    assert tool.check(tmp_path, smoke=True, tests_exit_code=0, only=None) == 0
    result = json.loads(next(tmp_path.glob("cpu-smoke-*.json")).read_text())
    assert {"full step", "backbone alone", "full step, loop"} <= set(result["step"]["milliseconds"])
    assert {row["family"] for row in result["moe"]["rows"]} == {"specialist", "uniform"}
    assert result["decoders"]["dense-active"]["moe"]["step_ms"] > 0
    assert result["options"]["bf16"]["images_per_second"] > 0
    assert (
        set(result["seconds"]) == set(tool.contents(tmp_path, smoke=True)) and not result["failed"]
    )
    assert result["relight"]["pipeline"]["ratios"]
    assert result["profile"]["verdict"]
    assert result["training"]["exit_code"] == 0 and result["training"]["scores"]["MAE"] < 1


def test_a_gpu_check_keeps_what_it_measured_before_a_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tool = load("gpu_check")

    def fail(found: dict[str, Any]) -> None:
        assert found["first"] == 1
        found.setdefault("second", {})["measured before"] = 2
        raise IndexError("as on another version of a library")

    sections = {"first": lambda found: 1, "second": fail, "third": lambda found: 3}
    monkeypatch.setattr(tool, "contents", lambda folder, *, smoke: sections)
    for only in (None, ["first", "third"]):
        code = tool.check(tmp_path, smoke=True, tests_exit_code=0, only=only)
        result = json.loads(next(tmp_path.glob("cpu-smoke-*.json")).read_text())
        assert (result["first"], result["third"], code) == (1, 3, 1 if only is None else 0)
        assert result.get("second") == ({"measured before": 2} if only is None else None)
        assert ("IndexError: as on another" in result["failed"].get("second", "")) is (only is None)


def test_a_section_of_a_gpu_check_that_takes_too_long_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Handlers of errors on the way, as that around the compiler, must not keep the alarm."""
    import signal

    import torch

    tool = load("gpu_check")

    def endless(found: dict[str, object]) -> None:
        try:
            while True:
                torch.ones(100).sum()
        except Exception:
            pytest.fail("taken for an error of the section's own")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(tool, "device_name", lambda device: "a GPU")
    monkeypatch.setattr(tool, "LONGER", {"first": 1})
    monkeypatch.setattr(
        tool, "contents", lambda folder, *, smoke: {"first": endless, "next": lambda found: 2}
    )
    timer, handler = signal.getitimer(signal.ITIMER_REAL), signal.getsignal(signal.SIGALRM)
    try:
        assert tool.check(tmp_path, smoke=False, tests_exit_code=0, only=None) == 1
    finally:
        # pytest-timeout has the same alarm.
        signal.signal(signal.SIGALRM, handler)
        signal.setitimer(signal.ITIMER_REAL, *timer)
    result = json.loads(next(tmp_path.glob("a-gpu-*.json")).read_text())
    assert "longer than it may" in result["failed"]["first"] and result["next"] == 2


@pytest.mark.slow
def test_the_demo_ends_with_its_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It read a score of the floor that evaluations no longer hold, and ended in a traceback."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "data: {img_size: 32, num_workers: 0, val_fraction: 0.2}\n"
        "model: {backbone: tiny_test, pretrained: false, num_experts: 2, width: 16}\n"
        "train: {epochs: 1, batch_size: 8}\n"
    )
    tool = load("demo")
    monkeypatch.setattr(tool, "RECIPE", str(recipe))
    monkeypatch.setattr(tool, "SIZE", ("--train", "16", "--test", "4", "--size", "32"))
    assert tool.demo(tmp_path / "demo") in (0, 1)
    said = capsys.readouterr().out
    found = re.search(r"weighted F [\d.]+, IoU [\d.]+ on 4 test images; marking", said)
    assert found and Path(re.search(r"Open (\S+) and", said)[1]).is_file()
