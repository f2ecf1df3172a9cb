"""The Ray engine on a cluster of this machine, with two CPUs; only where Ray is installed."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from inference.fakes import FakeSpec, things

from camoxpert.cli import main
from camoxpert.errors import ConfigError, DataError, PeerError
from camoxpert.inference import cluster


@pytest.fixture
def ray(monkeypatch):
    found = pytest.importorskip("ray", reason="Ray is not installed")
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    # Workers of Ray import the stages of these tests.
    paths = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([*paths, os.environ.get("PYTHONPATH", "")]))
    yield found
    found.shutdown()


def engine(folder: Path, *, dies: str = "", actors: int = 2) -> cluster.RayEngine:
    spec = FakeSpec(folder, dies=dies)
    return cluster.RayEngine(spec, "local", batch_size=4, output=folder, actors=actors)


def test_a_killed_actor_loses_nothing_and_a_killing_item_is_named(ray, tmp_path: Path) -> None:
    items = things(20, t5="kills", t13="kills once", t17="unreadable")
    work = engine(tmp_path)
    rows = {row["item"]: row for result in work.results(items) for row in result.rows}
    ok = {f"t{n}" for n in range(20)} - {"t5", "t17"}
    assert {name for name, row in rows.items() if row["status"] == "ok"} == ok
    assert all(rows[name]["found"] == [2.0 * int(name[1:])] for name in ok)
    assert rows["t17"]["reason"] == "t17 is damaged"
    assert "ends whenever it gets it" in rows["t5"]["reason"]
    assert work.summary()["deaths"] >= 4
    assert not list(tmp_path.glob(".shared-*"))


def test_an_error_of_an_actor_is_the_error_of_the_run(ray, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="the model is gone"):
        list(engine(tmp_path, dies="refuses", actors=1).results(things(4)))


def test_too_few_cpus_are_said_instead_of_waited_for(ray, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="actors need 999 CPUs"):
        list(engine(tmp_path, actors=999).results(things(4)))


def test_silence_is_an_error_with_its_cause(ray, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(cluster, "SILENCE_SECONDS", 3.0)
    work = engine(tmp_path, actors=1)
    place = work._place

    def greedy() -> list[str]:
        names = place()
        # More than any node has: Ray would wait without a limit.
        work._needs["num_cpus"] = 4096
        return names

    monkeypatch.setattr(work, "_place", greedy)
    with pytest.raises(PeerError, match="0 of 1 Ray actors are ready, each needs 4096 CPUs"):
        list(work.results(things(4)))


def test_without_ray_the_command_is_named(monkeypatch) -> None:
    def missing(name: str) -> None:
        raise ImportError(name)

    monkeypatch.setattr(cluster.importlib, "import_module", missing)
    with pytest.raises(ConfigError, match=r'pip install "camoxpert\[ray\]"'):
        cluster.import_ray()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--ray-address", "local"], "belong to --engine ray"),
        (["--engine", "ray", "--devices", "cpu"], "leave --device and --devices out"),
        (["--engine", "ray", "--ray-actors", "0"], "--ray-actors must be at least 1"),
    ],
)
def test_flags_that_do_not_go_together(tmp_path: Path, capsys, words, says: str) -> None:
    assert main(["predict", "run", "photos", "-o", str(tmp_path / "out"), *words]) == 2
    assert says in " ".join(capsys.readouterr().err.split())
