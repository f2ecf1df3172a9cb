"""A data worker that is killed in the middle of a run costs neither a batch nor the result."""

from __future__ import annotations

from pathlib import Path

from helpers.runs import Runner, command, ending, events


def test_it_costs_nothing(runner: Runner, data: Path, tmp_path: Path) -> None:
    words = ("--num-workers", "2", "--cache", "none", "data.prefetch_factor=1", "--epochs", "2")
    assert runner.run(command(data, tmp_path / "a", *words)) == [0]
    assert runner.run(command(data, tmp_path / "b", *words), patches=["a_worker_dies"]) == [0]
    assert ending(tmp_path / "a" / "r") == ending(tmp_path / "b" / "r")
    assert runner.said().count("warning") == 1
    assert len([text for text in events(tmp_path / "b" / "r") if "worker" in text]) == 1


def test_twice_in_an_epoch_is_a_fault_and_the_same_command_goes_on(
    runner: Runner, data: Path, tmp_path: Path
) -> None:
    words = ("--num-workers", "2", "--cache", "none", "data.prefetch_factor=1", "--epochs", "2")
    words = (*words, "--accumulation-steps", "1")
    killed = command(data, tmp_path / "a", *words, batch=2)
    assert runner.run(killed, patches=["workers_die_again_and_again"]) == [3], runner.said()
    assert "--num-workers" in runner.said() and "Traceback" not in runner.said()
    assert runner.run(killed) == [0] and "resumed" in runner.said()
    assert runner.run(command(data, tmp_path / "b", *words, batch=2)) == [0]
    assert ending(tmp_path / "a" / "r") == ending(tmp_path / "b" / "r")
