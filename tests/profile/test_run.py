"""The command, on a real training step."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from helpers.sensors import views

from camoxpert.cli import main


@pytest.mark.parametrize("family", ["specialist", "uniform"])
def test_the_command_takes_a_real_step_apart(
    toy_data: Path, tmp_path: Path, capsys, family: str
) -> None:
    file, trace = tmp_path / "profile.json", tmp_path / "trace.json"
    words = [
        "profile", "--dataset-path", str(toy_data), "--backbone", "tiny_test", "--no-pretrained",
        "--img-size", "32", "--batch-size", "8", "--num-workers", "0", "--num-experts", "3",
        "model.width=16", "--steps", "2", "-o", str(file), "--trace", str(trace),
        "--expert-family", family,
    ]  # fmt: skip
    before = set(tmp_path.iterdir())
    assert main(words) == 0
    result = json.loads(file.read_text())
    rows = result["milliseconds"]
    # The rest is "other": the rows add up to the wall time of the step.
    assert sum(rows.values()) == pytest.approx(result["step_milliseconds"], rel=1e-6)
    parts = {"data wait", "copy", "backbone", "router", "decoder", "heads", "loss", "backward"}
    assert parts | {"clip", "optimizer", "EMA", "other"} <= set(rows)
    experts = {name for name in rows if name.startswith("expert")}
    if family == "uniform":
        assert experts == {"experts (gathered)"}
    else:
        assert experts == {"expert texture", "expert attention", "expert hybrid"}
    assert all(value > 0 for name, value in rows.items() if name != "copy")
    assert result["host_syncs"] == (0 if family == "uniform" else 1)
    assert result["verdict"] in ("data", "launch", "sync", "compute", "memory")
    assert 0 < result["model_flops_utilisation"] < 1
    assert "traceEvents" in json.loads(trace.read_text())
    out = capsys.readouterr().out
    assert f"{result['verdict']}-bound: " in out and "of a step" in out
    assert set(tmp_path.iterdir()) - before == {file, trace}


def test_profile_refuses_what_it_cannot_do(toy_data: Path, tmp_path: Path) -> None:
    assert main(["profile"]) == 2
    assert main(["profile", "--dataset-path", str(tmp_path / "none")]) == 3
    assert main(["profile", "--dataset-path", str(toy_data), "--steps", "0"]) == 2
    assert main(["profile", "--dataset-path", str(toy_data), "-o", str(tmp_path)]) == 2


def test_what_references_cost_and_save_adds_up(scenes: Path, tmp_path: Path, capsys) -> None:
    file = tmp_path / "profile.json"
    words = [
        "profile", "--dataset-path", str(scenes), "--backbone", "tiny_test", "--no-pretrained",
        "--img-size", "32", "--batch-size", "4", "--num-workers", "0", "--num-experts", "3",
        "model.width=16", "--steps", "2", "-o", str(file), "--support-encoder", "tiny_test",
        "model.support.pretrained=false",
    ]  # fmt: skip
    assert main(words) == 0
    result = json.loads(file.read_text())
    assert {"references", "guidance"} <= set(result["milliseconds"])
    rows = result["support_milliseconds"]
    assert list(rows) == ["step without references", "support encoder", "support cache", "saved"]
    spent = sum(rows.values()) - rows["saved"]
    # The rows up to what was saved are a step, and what was done before it.
    assert spent >= result["step_milliseconds"]
    out = capsys.readouterr().out.split("a step that encoded")[1]
    lines = [line.split() for line in out.splitlines()[1:6]]
    assert [line[-1] for line in lines if line[0] == "sum"] == ["100.0%"]
    shares = [float(line[-1].rstrip("%")) for line in lines if line[0] != "sum"]
    assert len(shares) == 4 and sum(shares) == pytest.approx(100, abs=0.3)


def test_a_step_on_modalities_and_teachers_is_taken_apart(tmp_path: Path) -> None:
    """Batches are doubled whole: planes of sensors and maps of a teacher, too."""
    data = views(tmp_path / "data", train=8, test=0, size=32)
    maps = tmp_path / "maps"
    shutil.copytree(data / "TrainDataset" / "GT", maps)
    words = [
        "profile", "--dataset-path", str(data), "--backbone", "tiny_test", "--no-pretrained",
        "--img-size", "32", "--batch-size", "2", "--num-workers", "0", "--num-experts", "2",
        "model.width=16", "--steps", "1", "--val-fraction", "0", "--expert-family", "uniform",
    ]  # fmt: skip
    assert main([*words, "--modalities", "rgb", "depth"]) == 0
    assert main([*words, "--teacher", str(maps)]) == 0
