"""The log of a run: its records, TensorBoard, phases; an error of TensorBoard never stops a run."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from camoxpert.files import read_jsonl
from camoxpert.runs.log import RunLog


def test_records_survive_and_nan_becomes_null(tmp_path: Path) -> None:
    log = RunLog(tmp_path, tensorboard=False)
    log.write({"step": 1, "loss": float("nan"), "deep": {"a": [float("inf"), np.float32(2)]}})
    assert read_jsonl(tmp_path / "metrics.jsonl") == [
        {"step": 1, "loss": None, "deep": {"a": [None, 2.0]}}
    ]
    log.close()


def test_a_torn_line_ends_the_file(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n{"st')
    assert [r["step"] for r in read_jsonl(tmp_path / "metrics.jsonl")] == [1, 2]
    assert read_jsonl(tmp_path / "none.jsonl") == []


def test_truncating_drops_what_comes_again(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"st')
    log = RunLog(tmp_path, tensorboard=False)
    log.truncate_after(2)
    log.write({"step": 3})
    log.close()
    assert [r["step"] for r in read_jsonl(tmp_path / "metrics.jsonl")] == [1, 2, 3]


def test_truncating_inside_an_epochs_end_drops_its_records(tmp_path: Path) -> None:
    log = RunLog(tmp_path, tensorboard=False)
    for kind, step in (("validation", 4), ("train", 8), ("routing", 8), ("validation", 8)):
        log.write({"kind": kind, "step": step})
    log.write({"kind": "event", "step": 8, "text": "of the epoch's end", "epoch_end": True})
    log.write({"kind": "event", "step": 8, "text": "of the step"})
    log.truncate_after(8, epoch_done=True)
    assert len(read_jsonl(tmp_path / "metrics.jsonl")) == 6
    log.truncate_after(8, epoch_done=False)
    log.close()
    kept = [(r["kind"], r["step"]) for r in read_jsonl(tmp_path / "metrics.jsonl")]
    assert kept == [("validation", 4), ("train", 8), ("event", 8)]
    assert "of the step" in (tmp_path / "metrics.jsonl").read_text()


def test_nested_phases_are_counted_once(tmp_path: Path, monkeypatch) -> None:
    now = [0.0]
    monkeypatch.setattr("camoxpert.runs.log.time.monotonic", lambda: now[0])
    log = RunLog(tmp_path, tensorboard=False)
    with log.phase("training"):
        now[0] += 5
        with log.phase("checkpoints"):
            now[0] += 2
        now[0] += 1
    assert log.phases == {"checkpoints": 2, "training": 6}
    log.close()


def test_tensorboard_gets_scalars_and_pictures(tmp_path: Path) -> None:
    log = RunLog(tmp_path, tensorboard=True)
    log.scalars(1, {"a": 1.0})
    log.image("b", np.zeros((4, 4, 3), np.uint8), 1)
    log.close()
    assert list(tmp_path.glob("events*"))


def test_without_tensorboard_one_warning(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    log = RunLog(tmp_path, tensorboard=True)
    log.scalars(1, {"a": 1.0})
    log.image("b", np.zeros((4, 4, 3), np.uint8), 1)
    log.close()
    said = capsys.readouterr().err
    assert said.startswith("warning     TensorBoard is not available") and said.count("\n") == 1


def test_the_log_of_other_ranks_counts_phases_and_writes_nothing(
    tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    log = RunLog(None, tensorboard=True)
    log.write({"step": 1})
    log.scalars(1, {"a": 1.0})
    log.image("b", np.zeros((4, 4, 3), np.uint8), 1)
    log.truncate_after(0)
    log.add_phase("training", 2.0)
    log.close()
    assert log.phases == {"training": 2.0} and not list(tmp_path.iterdir())
