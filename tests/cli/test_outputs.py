"""A place that cannot be written is an error before the work, and names the flag to change."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from pathlib import Path

import cv2
import numpy as np
import pytest

from camoxpert.cli import main
from camoxpert.cli.outputs import check_file, check_folder
from camoxpert.errors import ConfigError
from camoxpert.files import require_writable

MAPS = ("evaluate", "--predictions", "maps", "--gt", "gt", "--num-workers", "0")
# Command -> its words, the flag of the output, and where its work begins.
COMMANDS = {
    "evaluate maps": (MAPS, "-o", "camoxpert.evaluation.maps.find.find_tasks"),
    "evaluate a run": (
        ("evaluate", "{run}", "--data", "{data}"),
        "-o",
        "camoxpert.inference.predictor.load_checkpoint",
    ),
    "predict": (
        ("predict", "{run}", "photos"),
        "-o",
        "camoxpert.inference.predictor.load_checkpoint",
    ),
    "doctor": (("doctor", "{data}"), "-o", "camoxpert.doctor.diagnose.check_environment"),
    "doctor, clean list": (
        ("doctor", "{data}"),
        "--clean-list",
        "camoxpert.doctor.diagnose.check_environment",
    ),
    "report": (("report", "{run}"), "-o", "camoxpert.pages.report.read_info"),
    "synthesize": (("synthesize", "toy"), "", "camoxpert.synthesis.toy.generate_toy"),
    "relight": (
        ("synthesize", "relight", "--dataset-path", "{data}"),
        "-o",
        "camoxpert.synthesis.relit.find_sources",
    ),
    "compose": (
        ("synthesize", "compose", "--dataset-path", "{data}"),
        "-o",
        "camoxpert.synthesis.composed.find_sources",
    ),
    "benchmark": (("benchmark", "metrics"), "-o", "camoxpert.benchmark.metrics.run"),
    "quality": (
        ("benchmark", "quality", "--dataset-path", "{data}"),
        "-o",
        "camoxpert.benchmark.quality.build_arms",
    ),
    "crossval": (
        ("crossval", "--dataset-path", "{data}"),
        "-o",
        "camoxpert.crossval.opening.find_pool",
    ),
    "profile": (
        ("profile", "--dataset-path", "{data}"),
        "-o",
        "camoxpert.training.prepare.prepare",
    ),
    "profile, trace": (
        ("profile", "--dataset-path", "{data}"),
        "--trace",
        "camoxpert.training.prepare.prepare",
    ),
    "train": (
        ("train", "--dataset-path", "{data}"),
        "--checkpoint-dir",
        "camoxpert.training.session.prepare_run",
    ),
    "train, dry run": (
        ("train", "--dataset-path", "{data}", "--dry-run"),
        "--checkpoint-dir",
        "camoxpert.training.session.prepare_run",
    ),
}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    mask = np.zeros((16, 16), np.uint8)
    mask[4:9, 4:9] = 255
    for name in ("maps/a.png", "gt/a.png", "photos/a.png"):
        Path(name).parent.mkdir()
        cv2.imwrite(name, mask)
    return tmp_path


def full_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)


def read_only(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Refuse new files below a folder, as a read-only mount does; permissions do not bind root."""
    honest = tempfile.TemporaryFile

    def refusing(*words: object, dir: Path, **more: object) -> object:
        if Path(dir).is_relative_to(folder):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(Path(dir) / "tmp1"))
        return honest(*words, dir=dir, **more)

    monkeypatch.setattr(tempfile, "TemporaryFile", refusing)


@pytest.mark.parametrize("fault", ["below a file", "full disk", "read-only"])
@pytest.mark.parametrize("name", COMMANDS)
def test_nothing_is_begun_that_could_not_be_written(
    name: str, fault: str, here: Path, tiny_run: Path, toy_data: Path, monkeypatch, capsys
) -> None:
    words, flag, work = COMMANDS[name]
    monkeypatch.setattr(work, lambda *given, **named: pytest.fail("the work began"))
    Path("a file").touch()
    target = {"below a file": "a file/out", "full disk": "new/out", "read-only": "locked/out"}
    before = sorted(here.rglob("*"))
    if fault == "full disk":
        full_disk(monkeypatch)
    elif fault == "read-only":
        Path("locked").mkdir()
        before = sorted(here.rglob("*"))
        read_only(monkeypatch, here / "locked")
    typed = [word.format(run=tiny_run, data=toy_data) for word in words]
    assert main([*typed, *([flag] if flag else []), target[fault]]) == 2
    said = " ".join(capsys.readouterr().err.split())
    why = {
        "below a file": "not a folder",
        "full disk": "No space left",
        "read-only": "Read-only file system",
    }
    assert why[fault] in said and target[fault] in said
    assert f"with {flag}" in said or not flag
    assert sorted(here.rglob("*")) == before


def test_a_run_in_a_read_only_folder(
    tiny_run: Path, toy_data: Path, here: Path, monkeypatch, capsys
) -> None:
    """A shared run is scored into a folder of one's own."""
    run = here / "shared" / "run"
    shutil.copytree(tiny_run, run)
    read_only(monkeypatch, here / "shared")
    before = sorted(path for path in run.rglob("*"))
    with monkeypatch.context() as patch:
        patch.setattr("camoxpert.inference.predictor.load_checkpoint", None)
        assert main(["evaluate", str(run), "--data", str(toy_data)]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert f"cannot be written to {run / 'evaluation'}: Read-only" in said and "with -o" in said
    words = ["--gallery", "0", "--no-intervals", "-o", "mine"]
    assert main(["evaluate", str(run), "--data", str(toy_data), *words]) == 0
    assert main(["report", str(run)]) == 2
    assert "report.html cannot be written: Read-only" in " ".join(capsys.readouterr().err.split())
    assert main(["report", str(run), "-o", "mine.html"]) == 0
    assert Path("mine/scores.json").is_file() and Path("mine.html").is_file()
    assert sorted(path for path in run.rglob("*")) == before


@pytest.mark.parametrize("fault", ["below a file", "full disk", "folder"])
def test_a_ledger_that_cannot_be_written(here: Path, monkeypatch, capsys, fault: str) -> None:
    monkeypatch.setattr("camoxpert.evaluation.maps.find.find_tasks", None)
    Path("a file").touch()
    Path("folder").mkdir()
    ledger = {"below a file": "a file/led", "full disk": "led", "folder": "folder"}[fault]
    if fault == "full disk":
        full_disk(monkeypatch)
    assert main([*MAPS, "--ledger", ledger]) == 3
    assert f"The ledger {ledger} cannot be" in " ".join(capsys.readouterr().err.split())


def test_a_refused_evaluation_leaves_no_folders(here: Path, capsys) -> None:
    assert main([*MAPS[:1], "--predictions", "none", "--gt", "gt", "-o", "deep/er/out"]) == 3
    assert not Path("deep").exists()


def test_a_system_folder_refuses_root_as_well(tmp_path: Path) -> None:
    if not Path("/proc/self").exists():
        pytest.skip("no /proc")
    with pytest.raises(OSError):
        require_writable(Path("/proc/camoxpert/out"))
    with pytest.raises(ConfigError, match=r"with -o\.$"):
        check_folder("-o", "/proc/camoxpert")


def test_nothing_is_left_and_what_is_there_is_named(tmp_path: Path) -> None:
    require_writable(tmp_path / "not" / "there")
    check_file("-o", tmp_path / "new" / "file.json")
    check_folder("-o", tmp_path)
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").touch()
    (tmp_path / "lost").symlink_to(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="is a folder; give a file"):
        check_file("-o", tmp_path)
    with pytest.raises(ConfigError, match="is a file"):
        check_folder("-o", tmp_path / "file")
    with pytest.raises(ConfigError, match="not a folder"):
        check_folder("-o", tmp_path / "lost" / "out")
