"""The folder of a run and its ``run.json``."""

from __future__ import annotations

import getpass
import json
import socket
from pathlib import Path

from camoxpert.runs.folder import create_run_dir
from camoxpert.runs.info import update_run_json, write_run_json


def test_a_run_never_overwrites_another(tmp_path: Path) -> None:
    made = [create_run_dir(tmp_path / "runs", "x").name for _ in range(3)]
    assert made == ["x", "x-2", "x-3"]


def test_run_json_says_what_ran_and_no_name_of_host_or_user(tmp_path: Path) -> None:
    write_run_json(tmp_path, argv=["camoxpert", "train"], device="cpu", data_hash="x", phases={})
    update_run_json(tmp_path, status="finished")
    text = (tmp_path / "run.json").read_text()
    info = json.loads(text)
    assert info["status"] == "finished" and info["versions"]["torch"][0].isdigit()
    assert socket.gethostname() not in text
    assert getpass.getuser() not in json.dumps({**info, "argv": []})
