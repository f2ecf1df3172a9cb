"""The run folder, the bar, the GPU monitor and the pictures; nothing optional can stop a run."""

from __future__ import annotations

import json
import sys
import time
import types
import warnings
from pathlib import Path

import numpy as np
import pytest

from camoxpert.console import TrainingBar
from camoxpert.files import read_jsonl, write_json
from camoxpert.pages import pictures
from camoxpert.runs.folder import create_run_dir
from camoxpert.runs.info import update_run_json, write_run_json
from camoxpert.runs.log import RunLog
from camoxpert.runtime import gpu
from camoxpert.runtime.gpu import GpuMonitor, visible_handle


class TestRunLog:
    def test_a_run_never_overwrites_another(self, tmp_path: Path) -> None:
        made = [create_run_dir(tmp_path / "runs", "x").name for _ in range(3)]
        assert made == ["x", "x-2", "x-3"]

    def test_records_survive_and_nan_becomes_null(self, tmp_path: Path) -> None:
        log = RunLog(tmp_path, tensorboard=False)
        log.write({"step": 1, "loss": float("nan"), "deep": {"a": [float("inf"), np.float32(2)]}})
        assert read_jsonl(tmp_path / "metrics.jsonl") == [
            {"step": 1, "loss": None, "deep": {"a": [None, 2.0]}}
        ]
        log.close()

    def test_a_torn_line_ends_the_file(self, tmp_path: Path) -> None:
        (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n{"st')
        assert [r["step"] for r in read_jsonl(tmp_path / "metrics.jsonl")] == [1, 2]
        assert read_jsonl(tmp_path / "none.jsonl") == []

    def test_truncating_drops_what_comes_again(self, tmp_path: Path) -> None:
        (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"st')
        log = RunLog(tmp_path, tensorboard=False)
        log.truncate_after(2)
        log.write({"step": 3})
        log.close()
        assert [r["step"] for r in read_jsonl(tmp_path / "metrics.jsonl")] == [1, 2, 3]

    def test_truncating_inside_an_epochs_end_drops_its_records(self, tmp_path: Path) -> None:
        log = RunLog(tmp_path, tensorboard=False)
        for kind, step in (("validation", 4), ("train", 8), ("routing", 8), ("validation", 8)):
            log.write({"kind": kind, "step": step})
        log.truncate_after(8, epoch_done=True)
        assert len(read_jsonl(tmp_path / "metrics.jsonl")) == 4
        log.truncate_after(8, epoch_done=False)
        log.close()
        kept = [(r["kind"], r["step"]) for r in read_jsonl(tmp_path / "metrics.jsonl")]
        assert kept == [("validation", 4), ("train", 8)]

    def test_nested_phases_are_counted_once(self, tmp_path: Path, monkeypatch) -> None:
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

    def test_tensorboard_gets_scalars_and_pictures(self, tmp_path: Path) -> None:
        log = RunLog(tmp_path, tensorboard=True)
        log.scalars(1, {"a": 1.0})
        log.image("b", np.zeros((4, 4, 3), np.uint8), 1)
        log.close()
        assert list(tmp_path.glob("events*"))

    def test_without_tensorboard_one_warning(self, tmp_path: Path, monkeypatch, capsys) -> None:
        monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
        log = RunLog(tmp_path, tensorboard=True)
        log.scalars(1, {"a": 1.0})
        log.image("b", np.zeros((4, 4, 3), np.uint8), 1)
        log.close()
        said = capsys.readouterr().err
        assert said.startswith("warning     TensorBoard is not available") and said.count("\n") == 1

    def test_the_log_of_other_ranks_counts_phases_and_writes_nothing(
        self, tmp_path: Path, monkeypatch
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

    def test_run_json_says_what_ran_and_no_name_of_host_or_user(self, tmp_path: Path) -> None:
        import getpass
        import socket

        write_run_json(
            tmp_path, argv=["camoxpert", "train"], device="cpu", data_hash="x", phases={}
        )
        update_run_json(tmp_path, status="finished")
        text = (tmp_path / "run.json").read_text()
        info = json.loads(text)
        assert info["status"] == "finished" and info["versions"]["torch"][0].isdigit()
        assert socket.gethostname() not in text
        assert getpass.getuser() not in json.dumps({**info, "argv": []})

    def test_a_failed_write_keeps_the_old_file(self, tmp_path: Path) -> None:
        write_json(tmp_path / "a.json", {"a": 1})
        with pytest.raises(TypeError):
            write_json(tmp_path / "a.json", {"a": object()})
        assert json.loads((tmp_path / "a.json").read_text()) == {"a": 1}


class TestBar:
    def test_it_reads_as_users_know_it(self, monkeypatch) -> None:
        bar = TrainingBar(total=3000, epoch=1, epochs=30, live=False)
        bar.update(1350, loss=1.234, gpu="gpu=87%", memory=12_300_000_000, data_wait=0.031)
        text = bar.text()
        assert text.startswith("Epoch 1/30: 45%|####")
        assert "| 1350/3000 [" in text
        assert text.endswith("loss=1.2340, gpu=87%, mem=12.3G, data=3%]")
        bar.close()

    def test_unknown_numbers_are_left_out(self) -> None:
        bar = TrainingBar(total=4, epoch=2, epochs=2, stage="stage 2", initial=1, live=False)
        bar.update(loss=None, gpu="gpu=n/a", memory=None, data_wait=None)
        assert bar.text().startswith("Epoch 2/2 (stage 2): 50%|#####")
        assert bar.text().endswith(", gpu=n/a]")
        bar.close()

    def test_a_log_file_gets_lines_not_carriage_returns(self, capsys) -> None:
        with TrainingBar(total=50, epoch=1, epochs=1, live=False) as bar:
            for _ in range(50):
                bar.update(loss=1.0, gpu="gpu=n/a", memory=None, data_wait=0.0)
        err = capsys.readouterr().err
        assert "\r" not in err and err.count("\n") == 1 and "50/50" in err


class FakeNvml(types.ModuleType):
    def __init__(self) -> None:
        super().__init__("pynvml")
        self.asked: list[object] = []

    def nvmlInit(self) -> None: ...

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        self.asked.append(index)
        return index

    def nvmlDeviceGetHandleByUUID(self, name: str) -> str:
        self.asked.append(name)
        return name

    def nvmlDeviceGetUtilizationRates(self, handle: object) -> types.SimpleNamespace:
        return types.SimpleNamespace(gpu=87)

    def nvmlDeviceGetMemoryInfo(self, handle: object) -> types.SimpleNamespace:
        return types.SimpleNamespace(used=1, total=2)


class TestGpuMonitor:
    def test_a_cpu_has_none_and_nothing_is_said(self) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with GpuMonitor("cpu") as monitor:
                assert monitor.utilisation() is None and monitor.memory() is None
                assert monitor.text() == "gpu=n/a"

    def test_a_missing_package_is_one_warning(self, monkeypatch) -> None:
        monkeypatch.setitem(sys.modules, "pynvml", None)
        with pytest.warns(UserWarning, match="not available") as seen:
            monitor = GpuMonitor("cuda:0")
        assert monitor.text() == "gpu=n/a" and monitor.memory() is None and len(seen) == 1

    def test_readings(self, monkeypatch) -> None:
        import time

        monkeypatch.setitem(sys.modules, "pynvml", FakeNvml())
        monkeypatch.setattr(gpu, "PERIOD_SECONDS", 0.01)
        with GpuMonitor("cuda:0") as monitor:
            deadline = time.monotonic() + 5
            while monitor.text() == "gpu=n/a" and time.monotonic() < deadline:
                time.sleep(0.01)
            assert monitor.text() == "gpu=87%" and monitor.utilisation() == 87.0
            assert monitor.memory() == (1, 2)

    @pytest.mark.parametrize(
        ("mask", "index", "asked"), [("", 1, 1), ("3,5", 1, 5), ("GPU-abc", 0, "GPU-abc")]
    )
    def test_masked_devices_are_mapped(self, monkeypatch, mask, index, asked) -> None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", mask)
        nvml = FakeNvml()
        visible_handle(nvml, index)
        assert nvml.asked == [asked]


class TestPictures:
    def test_overlay_tints_inside_only(self) -> None:
        image = np.full((20, 20, 3), 100, np.uint8)
        mask = np.zeros((20, 20), np.uint8)
        mask[5:15, 5:15] = 255
        drawn = pictures.overlay(image, mask, colour=(200, 0, 0), alpha=0.5)
        assert drawn[10, 10].tolist() == [150, 50, 50]
        assert (drawn[:4] == 100).all() and drawn[5, 10].tolist() == [200, 0, 0]
        assert (image == 100).all()

    def test_comparison_has_three_colours(self) -> None:
        image = np.zeros((30, 30, 3), np.uint8)
        truth, predicted = np.zeros((30, 30), bool), np.zeros((30, 30), bool)
        truth[5:25, 2:18] = True
        predicted[5:25, 12:28] = True
        picture = pictures.compare(image, predicted, truth)
        assert picture[15, 15].argmax() == 1  # both: green
        assert picture[15, 24].argmax() == 0  # invented: red
        assert picture[15, 6].argmax() == 2  # missed: blue

    def test_cutout_carries_the_probability(self) -> None:
        cut = pictures.cutout(np.zeros((2, 2, 3), np.uint8), np.array([[0, 0.5], [1, 0.25]]))
        assert cut[..., 3].tolist() == [[0, 128], [255, 64]]

    @pytest.mark.parametrize("size", [(40, 60), (300, 20), (10, 400)])
    def test_panel_has_four_pictures_of_one_height(self, size: tuple[int, int]) -> None:
        mask = np.zeros(size, np.uint8)
        mask[: size[0] // 2] = 255
        picture = pictures.panel(np.zeros((*size, 3), np.uint8), mask, mask / 255.0, height=100)
        assert picture.shape[0] == 120 and (picture.shape[1] + 2) % 4 == 0


def test_a_plain_bar_in_a_log_prints_lines_and_nothing_for_short_work(monkeypatch, capsys) -> None:
    from camoxpert import console as progress

    for _ in progress.bar(range(3), description="short", total=3):
        pass
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(progress, "LOG_EVERY_SECONDS", 0.02)
    with progress.bar(None, description="long", total=20) as bar:
        for _ in range(20):
            time.sleep(0.01)
            bar.update()
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) >= 2 and all(line.startswith("long: ") for line in lines)
