"""Locks and JSON of the lowest layer."""

from __future__ import annotations

import errno
import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest

from camoxpert.files import finite, lock, read_json, read_jsonl, try_lock, write_json


def test_a_lock_has_one_owner(tmp_path: Path) -> None:
    first = try_lock(tmp_path / ".lock")
    assert first is not None and try_lock(tmp_path / ".lock") is None
    first.release()
    second = try_lock(tmp_path / ".lock")
    assert second is not None
    second.release()


def test_waiting_is_said_once(tmp_path: Path) -> None:
    held = try_lock(tmp_path / ".lock")
    assert held is not None
    waited = []

    def waiting() -> None:
        waited.append(1)
        held.release()

    with lock(tmp_path / ".lock", waiting=waiting):
        assert try_lock(tmp_path / ".lock") is None
    assert waited == [1]


def test_a_planted_symlink_is_refused(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("keep")
    (tmp_path / ".lock").symlink_to(tmp_path / "precious")
    with pytest.raises(OSError):
        try_lock(tmp_path / ".lock")
    assert (tmp_path / "precious").read_text() == "keep"


def test_workers_that_outlive_a_killed_process_do_not_keep_its_lock(tmp_path: Path) -> None:
    """They notice its death after seconds; until then the same command would start a new run."""
    path = tmp_path / ".lock"
    (ready, write_ready), (wait, end) = os.pipe(), os.pipe()
    if not (owner := os.fork()):
        held = try_lock(path)
        # The worker itself says when it runs: before that it still holds the lock it inherited.
        if not os.fork() and held is not None:
            os.write(write_ready, b"x")
        os.close(end)
        os.read(wait, 1)
        os._exit(0)
    os.read(ready, 1)
    assert try_lock(path) is None
    os.kill(owner, signal.SIGKILL)
    os.waitpid(owner, 0)
    again = try_lock(path)
    os.close(end)  # Ends the worker.
    assert again is not None and try_lock(path) is None
    again.release()


def test_without_locks_every_process_gets_one(tmp_path: Path, monkeypatch) -> None:
    def flock(*words: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", flock)
    first, second = try_lock(tmp_path / ".lock"), try_lock(tmp_path / ".lock")
    assert first is not None and second is not None


def test_json_holds_no_nan_and_survives_damage(tmp_path: Path) -> None:
    path = write_json(tmp_path / "a.json", {"x": float("nan"), "y": np.float32(2.0), "z": (1,)})
    assert read_json(path) == {"x": None, "y": 2.0, "z": [1]}
    assert finite(np.int64(3)) == 3 and finite([float("inf")]) == [None]
    path.write_text('{"x": ')
    assert read_json(path) == {} and read_json(tmp_path / "none.json") == {}
    path.write_text("[1]")
    assert read_json(path) == {}


def test_a_torn_record_ends_the_file(tmp_path: Path) -> None:
    (tmp_path / "r.jsonl").write_text('{"a": 1}\n{"a": 2}\n{"a"')
    assert read_jsonl(tmp_path / "r.jsonl") == [{"a": 1}, {"a": 2}]


def test_a_failed_write_keeps_the_old_file(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"a": 1})
    with pytest.raises(TypeError):
        write_json(tmp_path / "a.json", {"a": object()})
    assert json.loads((tmp_path / "a.json").read_text()) == {"a": 1}
