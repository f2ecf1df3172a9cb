"""The folder of a run: the same settings always find the same name."""

from __future__ import annotations

from pathlib import Path

import pytest

from camoxpert.config import load_config
from camoxpert.runs.folder import find_run, run_name


@pytest.mark.parametrize(
    ("overrides", "name"),
    [
        # Its rate, which is unset today: a run with another rate is another run.
        (["optim.lr=2.5e-4"], "edgenext_base-352-67078a96"),
        (["optim.lr=2.5e-4", "model.backbone=resnet18"], "resnet18-352-0adb673b"),
        (["optim.lr=2.5e-4", "train.precision=fp32"], "edgenext_base-352-318339d5"),
        (["optim.lr=2.5e-4", "train.stage1_epochs=0"], "edgenext_base-352-f38d4426"),
        (
            ["model.backbone=resnet18", "optim.lr=3e-4", "data.roots=[a,b]"],
            "resnet18-352-1495edba",
        ),
    ],
)
def test_names_are_those_of_the_first_version(overrides: list[str], name: str) -> None:
    """Names computed by its code, which had three more settings: a stopped run is found again."""
    assert run_name(load_config(overrides=overrides)) == name


def test_how_long_and_where_do_not_name_a_run() -> None:
    moved = load_config(overrides=["train.resume_from=x", "data.num_workers=3", "run.dir=other"])
    assert run_name(moved) == run_name(load_config())
    assert run_name(load_config(overrides=["train.seed=1"])) != run_name(load_config())


@pytest.mark.parametrize(
    "files",
    [
        (),
        (".lock",),
        (".lock", ".k3_x.tmp"),
        (".lock", "config.yaml", ".k3_x.tmp"),
        (".lock", "config.yaml", "samples.csv"),
        (".lock", "config.yaml", "samples.csv", ".k3_x.tmp"),
    ],
)
@pytest.mark.parametrize(("foreign", "taken"), [((), True), (("notes.txt",), False)])
def test_a_run_killed_at_its_start_is_found_again(
    tmp_path: Path, files: tuple[str, ...], foreign: tuple[str, ...], taken: bool
) -> None:
    """It left no run.json yet; a folder with anything else in it is somebody's."""
    folder = tmp_path / "r"
    folder.mkdir()
    for name in files + foreign:
        (folder / name).touch()
    config = load_config(overrides=[f"run.dir={tmp_path}", "run.name=r"])
    found = find_run(config, data_hash=lambda: "")
    assert found.path == (folder if taken else None)
    found.close()
