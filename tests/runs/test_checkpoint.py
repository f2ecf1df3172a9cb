"""Checkpoints: atomic, verified, retained, and unable to run code."""

import os
from pathlib import Path

import pytest
import torch

from camoxpert.config import Config, to_dict
from camoxpert.errors import CheckpointError
from camoxpert.runs.checkpoint import (
    BEST,
    FORMAT,
    load_checkpoint,
    read_index,
    resolve_checkpoint,
)
from camoxpert.runs.store import CheckpointFolder


def values(number: float = 1.0) -> dict:
    return {
        "format": FORMAT,
        "config": to_dict(Config()),
        "model": {"w": torch.full((100,), number)},
        "ema": None,
    }


def test_keeps_two_and_best(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path)
    for step in (1, 2, 3):
        folder.save(values(step), step=step)
        folder.save_best(values(step), step=step)
    names = sorted(p.name for p in tmp_path.glob("*.pt"))
    assert names == [BEST, "step_00000002.pt", "step_00000003.pt"]
    newest, problems = folder.newest()
    assert newest is not None and not problems
    assert newest.values["model"]["w"][0] == 3
    assert newest.config == Config()
    assert {entry["file"] for entry in read_index(tmp_path)} == set(names)


@pytest.mark.parametrize("damage", ["truncate", "empty", "flip"])
def test_a_damaged_newest_falls_back_to_the_one_before(tmp_path: Path, damage: str) -> None:
    folder = CheckpointFolder(tmp_path)
    folder.save(values(1), step=1)
    path = folder.save(values(2), step=2)
    data = bytearray(path.read_bytes())
    if damage == "truncate":
        data = data[: len(data) // 2]
    elif damage == "empty":
        data = bytearray()
    else:
        data[len(data) // 2] ^= 0xFF
    path.write_bytes(data)
    newest, problems = folder.newest()
    assert newest is not None and newest.values["model"]["w"][0] == 1
    assert len(problems) == 1 and path.name in problems[0]


def test_all_damaged_is_an_error_and_nothing_is_deleted(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path)
    for step in (1, 2):
        folder.save(values(), step=step).write_bytes(b"")
    with pytest.raises(CheckpointError, match="Nothing was deleted"):
        folder.newest()
    assert len(list(tmp_path.glob("step_*.pt"))) == 2


def test_a_failed_write_leaves_the_old_ones_and_no_stub(tmp_path: Path, monkeypatch) -> None:
    folder = CheckpointFolder(tmp_path)
    folder.save(values(1), step=1)

    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CheckpointError, match="No space left"):
        folder.save(values(2), step=2)
    monkeypatch.undo()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["index.json", "step_00000001.pt"]
    newest, _ = folder.newest()
    assert newest is not None and newest.values["model"]["w"][0] == 1


def test_leftovers_of_a_killed_write_are_removed(tmp_path: Path) -> None:
    (tmp_path / "step_00000009.pt.tmp").write_bytes(b"half")
    folder = CheckpointFolder(tmp_path)
    assert folder.newest() == (None, [])
    assert list(tmp_path.glob("*.tmp")), "looking changes nothing: the run may be refused"
    folder.save(values(), step=1)
    assert not list(tmp_path.glob("*.tmp"))


def test_resolving_run_folders(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path / "checkpoints")
    step = folder.save(values(), step=5)
    assert resolve_checkpoint(tmp_path) == step
    best = folder.save_best(values(), step=5)
    assert resolve_checkpoint(tmp_path) == best == resolve_checkpoint(tmp_path / "checkpoints")
    assert resolve_checkpoint(step) == step
    with pytest.raises(CheckpointError, match="There is no checkpoint"):
        resolve_checkpoint(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        resolve_checkpoint(tmp_path / "empty")


def test_other_files_are_named(tmp_path: Path) -> None:
    torch.save({"some": "thing"}, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match="not a CamoXpert checkpoint"):
        load_checkpoint(tmp_path / "a.pt")
    torch.save({**values(), "format": 99}, tmp_path / "b.pt")
    with pytest.raises(CheckpointError, match="format 99"):
        load_checkpoint(tmp_path / "b.pt")
    strange = {**values(), "config": {"optim": {"from_the_future": 1}}}
    torch.save(strange, tmp_path / "c.pt")
    with pytest.raises(CheckpointError, match="another version"):
        load_checkpoint(tmp_path / "c.pt")


def test_code_in_a_pickle_does_not_run(tmp_path: Path) -> None:
    touched = tmp_path / "touched"

    class Payload:
        def __reduce__(self):
            return Path.touch, (touched,)

    torch.save({**values(), "extra": Payload()}, tmp_path / "evil.pt")
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_checkpoint(tmp_path / "evil.pt")
    assert not touched.exists()
