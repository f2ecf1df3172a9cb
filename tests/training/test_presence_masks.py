"""On the same images a run with the presence head learns the masks that it learns without it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from helpers.runs import records

from camoxpert.runs.checkpoint import load_checkpoint
from camoxpert.synthesis.toy import generate_toy


def test_the_head_changes_no_mask(train: Callable[..., int], tmp_path: Path, capsys) -> None:
    generate_toy(tmp_path / "d", num_train=1, num_test=0, size=48, num_negatives=24, seed=3)
    words = ["data.calibration_fraction=0", "--negatives", str(tmp_path / "d" / "Negatives")]
    words += ["--epochs", "1", "--no-test", "--run-name"]
    weights = {}
    for presence in ("on", "off"):
        assert train(*words, presence, "--presence", presence) == 0
        best = load_checkpoint(tmp_path / presence / "checkpoints" / "best.pt")
        weights[presence] = best.evaluated_weights
    assert any(name.startswith("presence.") for name in weights["on"])
    for name, weight in weights["off"].items():
        assert torch.equal(weight, weights["on"][name]), name
    on, off = (records(tmp_path / name, "validation")[0] for name in ("on", "off"))
    assert on["scores"] == off["scores"]
    assert {"AUROC", "ECE", "FalseMasks"} <= on["presence"]["scores"].keys()
    assert off["presence"]["scores"].keys() == {"FalseMasks", "FalseArea", "Missed"}
    out = capsys.readouterr().out
    assert f"AUROC {on['presence']['scores']['AUROC']:.3f}  false masks" in out
    report = (tmp_path / "on" / "report.html").read_text()
    assert "Is anything hidden?" in report and "validation, best: epoch 1" in report
