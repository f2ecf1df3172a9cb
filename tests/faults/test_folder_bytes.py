"""Folders whose names are not UTF-8, and processes whose encoding is ASCII."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import TINY

from camoxpert.cli import main
from camoxpert.data.files.csv_paths import read_table
from camoxpert.files import path_text

BYTES = os.fsdecode("数据".encode("gbk"))


@pytest.fixture
def place(toy_data: Path, tmp_path: Path) -> Path:
    """Copy the toy data into a folder with such a name; return the folder that holds it."""
    folder = tmp_path / BYTES
    try:
        shutil.copytree(toy_data, folder / BYTES)
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    return folder


def test_every_command(place: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setenv("CAMOXPERT_CACHE", str(place / "cache"))
    data, run = str(place / BYTES), str(place / BYTES / "run")
    words = ["--cache", "disk", "--checkpoint-dir", data, "--run-name", "run", "--epochs", "1"]
    clean = ["--clean-list", str(place / "clean.csv")]
    assert main(["doctor", data, "-o", str(place / "doctor"), "--no-copies", *clean]) == 0
    assert main(["train", "--dataset-path", data, *TINY, *words, *clean]) == 0
    assert main(["evaluate", run, "--data", data, "-o", str(place / "scores")]) == 0
    out = str(place / "out")
    photos = str(place / BYTES / "TestDataset" / "toy" / "Imgs")
    assert main(["predict", run, photos, "-o", out, "--save", "map"]) == 0
    maps = ["--predictions", out, "--gt", data, "-o", str(place / "maps"), "--num-workers", "0"]
    assert main(["evaluate", *maps]) == 0
    assert main(["report", run]) == 0


def test_the_disk_cache_is_found_again(place: Path, train, capsys) -> None:
    words = ("--dry-run", "--cache", "disk", "--cache-dir", str(place / "cache"))
    assert train(*words[1:], "--epochs", "1", data=place / BYTES) == 0
    capsys.readouterr()
    assert train(*words, data=place / BYTES) == 0
    assert "hit: " in capsys.readouterr().out


def test_paths_in_files_fit_an_ascii_file_system(tmp_path: Path) -> None:
    code = (
        "from pathlib import Path; import sys;"
        "from camoxpert.data.files.csv_paths import read_table;"
        "from camoxpert.config import load_config;"
        "[(_, row)] = read_table(Path('list.csv'), ('image',));"
        "config = load_config(file='c.yaml');"
        "print(sys.getfilesystemencoding(), Path(row['image']).is_file(),"
        "      Path(config.data.roots[0]).is_dir())"
    )
    (tmp_path / "数据").mkdir()
    (tmp_path / "数据" / "a.jpg").write_bytes(b"x")
    (tmp_path / "list.csv").write_text("image\n数据/a.jpg\n", encoding="utf-8")
    (tmp_path / "c.yaml").write_text("data: {roots: [数据]}\n", encoding="utf-8")
    ascii_only = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, **ascii_only},
        capture_output=True,
        text=True,
    )
    assert done.stdout.split() == ["ascii", "True", "True"], done.stderr
    assert path_text("a\udcca") == "a\udcca" and path_text("\ud800") == "\ud800"
    assert read_table(tmp_path / "list.csv", ("image",))[0][1]["image"] == "数据/a.jpg"
