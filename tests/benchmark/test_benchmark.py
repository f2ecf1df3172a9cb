"""The benchmark command: its figures are consistent. No speed is asserted here."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from camoxpert.benchmark import train
from camoxpert.benchmark.common import interleaved, paired_ratio
from camoxpert.benchmark.metrics import bound_by, make_pair
from camoxpert.cli import main
from camoxpert.config import ModelConfig


def test_variants_take_turns() -> None:
    order: list[str] = []
    calls = {name: (lambda name=name: order.append(name)) for name in "ab"}
    seconds = interleaved(calls, rounds=3, warmup=1)
    assert "".join(order) == "ab" + "ab" + "ba" + "ab"
    assert {name: len(values) for name, values in seconds.items()} == {"a": 3, "b": 3}


def test_the_ratio_is_taken_round_by_round() -> None:
    # The machine becomes three times slower half way; the ratio stays the same.
    ratio = paired_ratio([2, 2, 6, 6], [1, 1, 3, 3])
    assert ratio == {"ratio": 2, "low": 2, "high": 2}
    assert paired_ratio([3], [2])["ratio"] == 1.5


def test_generated_pairs_look_like_those_of_a_model() -> None:
    for seed in range(6):
        prediction, mask = make_pair(seed, 96, 128)
        assert prediction.shape == mask.shape == (96, 128)
        assert set(np.unique(mask)) == {0, 255} and 0.005 < (mask > 0).mean() < 0.5
        found = prediction > 127
        assert (found & (mask > 0)).sum() > 0.4 * (mask > 0).sum()
        assert (prediction == 0).mean() > 0.2
        again, _ = make_pair(seed, 96, 128)
        assert np.array_equal(again, prediction)


def test_predict_measures_every_variant(tmp_path: Path, monkeypatch, capsys) -> None:
    from camoxpert.benchmark import predict

    # Two processes would take longer to start than everything else here.
    monkeypatch.setattr(predict, "measure_processes", lambda case, model, rounds: {})
    file = tmp_path / "predict.json"
    words = ["--images", "4", "--rounds", "2", "--size", "64", "80", "--batch-size", "2"]
    small = ["--backbone", "tiny_test", "--img-size", "32", "--width", "16", "--device", "cpu"]
    assert main(["benchmark", "predict", *words, *small, "-o", str(file)]) == 0
    cases = json.loads(file.read_text())["cases"]
    assert set(cases) == {"80x64, all four outputs", "80x64, masks only"}
    for case in cases.values():
        rates = case["images_per_second"]
        assert list(rates) == [
            predict.FORWARD, predict.SCRIPT, predict.SINGLE, predict.BATCHED, predict.ENGINE
        ]  # fmt: skip
        assert case["engine_over"][predict.ENGINE]["ratio"] == 1
        assert sum(case["engine_loop_shares"].values()) == pytest.approx(1, abs=0.05)
    assert "the engine's loop: " in capsys.readouterr().out


def test_the_command_writes_ratios_with_their_machine(tmp_path: Path, capsys) -> None:
    pytest.importorskip("py_sod_metrics")
    file = tmp_path / "metrics.json"
    words = ["--pairs", "2", "--rounds", "2", "--size", "64", "80", "--files", "64"]
    assert main(["benchmark", "metrics", *words, "-o", str(file)]) == 0
    result = json.loads(file.read_text())
    assert all(value > 0 for value in result["one_process"]["milliseconds_per_pair"].values())
    for ratio in result["one_process"]["ratios"].values():
        assert 0 < ratio["low"] <= ratio["ratio"] <= ratio["high"]
    assert result["parts"]["everything"] > 0
    assert set(result["workers"]["images_per_second"]) == {"1", "2"}
    assert {"machine", "versions", "commit", "settings"} <= set(result)
    assert result["settings"]["size"] == [64, 80]
    assert "times as fast" in capsys.readouterr().out


def test_without_the_baseline_the_error_names_it(monkeypatch, capsys) -> None:
    monkeypatch.setitem(sys.modules, "py_sod_metrics", None)
    assert main(["benchmark", "metrics"]) == 2
    assert "pip install pysodmetrics==1.6.2" in " ".join(capsys.readouterr().err.split())
    assert main(["benchmark", "metrics", "--rounds", "0"]) == 2
    for kind in ("train", "data", "predict"):
        assert main(["benchmark", kind, "--batch-size", "0"]) == 2


def test_what_bounds_it_is_computed() -> None:
    parts = {"everything": 20.0, "weighted F in all": 18.0, "distance transform": 10.0}
    line = bound_by({**parts, "count levels": 1.0})
    assert "90% of an image's 20.0 ms" in line and "alone 50%" in line
    assert "50% of the remaining 2.0 ms" in line


def test_moe_counts_and_ratios_are_consistent(tmp_path: Path) -> None:
    from camoxpert.benchmark import moe

    file = tmp_path / "moe.json"
    words = ["--rounds", "2", "--width", "16", "--device", "cpu", "-o", str(file)]
    result = moe.run(device=torch.device("cpu"), sizes=((4, 5),), width=16, rounds=2)
    for row in result["rows"]:
        ends = row["back_ends"]
        assert ends["loop"]["syncs"] == 8 and ends["sorted"]["syncs"] == 1
        assert ends["loop"]["over_loop"]["ratio"] == 1
        assert ends["loop"]["operators"] > ends["sorted"]["operators"]
        if row["family"] == "uniform":
            assert ends["gathered"]["syncs"] == 0
            # Apart from the router two experts do the work of one that is twice as wide.
            assert row["macs_over_one_expert"] == pytest.approx(1, abs=0.01)
    assert main(["benchmark", "moe", *words, "--num-experts", "2", "--top-k", "3"]) == 2


def test_train_times_the_whole_step(tmp_path: Path) -> None:
    file = tmp_path / "train.json"
    words = ["--rounds", "1", "--width", "16", "--device", "cpu", "--backbone", "tiny_test"]
    words += ["--img-size", "32", "--batch-size", "2", "-o", str(file)]
    assert main(["benchmark", "train", *words]) == 0
    result = json.loads(file.read_text())
    assert result["syncs_per_step"] == 1
    assert {
        "full step over backbone", "channels last over full step", "loop over full step"
    } <= set(result["ratios"])  # fmt: skip
    assert result["images_per_second"] > 0
    # Each decoder against the one expert that does its own work; of one round the times are known.
    times = result["milliseconds"]
    assert set(result["macs_of_one_expert"]) == {"decoder", "decoder, all hybrid"}
    for name, macs in result["macs_of_one_expert"].items():
        assert macs == pytest.approx(1, abs=0.1), "at width 16 a step is 10 %"
        ratio = result["ratios"][f"{name} over one expert"]["ratio"]
        assert ratio == pytest.approx(
            times[name] / times[f"{name}: one hybrid expert of equal work"]
        )
    assert main(["benchmark", "train", *words, "--precision", "fp8"]) == 2


@pytest.mark.parametrize("kind", ["hybrid", "texture", "attention"])
def test_one_expert_does_equal_work(kind: str) -> None:
    """As wide as the chosen experts together, a kind with a quadratic part would do more."""
    channels = (8, 16, 24, 32)
    like = ModelConfig(width=64, num_experts=4, top_k=2, experts=(kind,), expert_expansion=1.0)
    single, macs = train.one_expert_of_equal_work(like, channels, 64)
    assert (single.num_experts, single.top_k) == (1, 1) and macs == pytest.approx(1, abs=0.03)
    if kind == "hybrid":
        assert single.expert_expansion < 2


@pytest.mark.slow
def test_train_beside_a_busy_process(tmp_path: Path, capsys, monkeypatch) -> None:
    """Both policies are measured, alone and beside the process; no process is left behind."""
    honest, started = subprocess.Popen, []
    monkeypatch.setattr(
        subprocess, "Popen", lambda *a, **k: started.append(honest(*a, **k)) or started[-1]
    )
    file = tmp_path / "busy.json"
    words = ["--busy", "--rounds", "1", "--width", "16", "--backbone", "edgenext_xx_small"]
    words += ["--img-size", "32", "--batch-size", "2", "--num-experts", "2", "-o", str(file)]
    assert main(["benchmark", "train", *words, "--device", "cpu"]) == 0
    result = json.loads(file.read_text())
    assert set(result["milliseconds"]) == {
        f"{load}, {policy}" for load in ("quiet", "busy") for policy in ("passive", "active")
    }
    assert "busy, active over busy, passive" in capsys.readouterr().out
    assert len(started) >= 3 and all(process.poll() is not None for process in started)


def test_data_measures_every_loader(tmp_path: Path, capsys) -> None:
    words = ["--images", "8", "--size", "64", "96", "--img-size", "32", "--batch-size", "4"]
    words += ["--num-workers", "1", "--rounds", "1", "--backbone", "tiny_test", "--device", "cpu"]
    output = tmp_path / "data.json"
    assert main(["benchmark", "data", *words, "-o", str(output)]) == 0
    found = json.loads(output.read_text())
    rates = found["images_per_second"]
    assert "ours, cache, batch reads" in rates and "plain PIL, 1 workers" in rates
    assert all(rate > 0 for rate in rates.values())
    assert found["over_plain_pil"]["plain PIL, 1 workers"]["ratio"] == 1
    assert found["needed_images_per_second"] > 0
    said = capsys.readouterr().out
    assert "times as many" in said and "decode mask (ours, all encodings)" in said
    assert main(["benchmark", "data", "--images", "2"]) == 2


def test_relight_measures_both_and_shares_add_up(tmp_path: Path) -> None:
    file = tmp_path / "relight.json"
    words = ["--images", "2", "--rounds", "2", "--side", "64", "--retinex-side", "64"]
    assert main(["benchmark", "relight", *words, "--device", "cpu", "-o", str(file)]) == 0
    figures = json.loads(file.read_text())
    assert set(figures["retinex"]["ratios"]) == {"OpenCV, double", "OpenCV, single"}
    assert figures["shadows"]["differences"]["mean IoU"] > 0.8
    assert figures["pipeline"]["differences"]["mean level"] < 0.5
    for name in ("script", "camoxpert"):
        assert sum(figures["pipeline"]["shares"][name].values()) == pytest.approx(1)
    assert main(["benchmark", "relight", "--side", "8"]) == 2
