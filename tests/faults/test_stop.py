"""Stop requests: the work is saved, the exit code says why, the same command continues."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
from helpers.runs import Runner, command, ending


@pytest.fixture(scope="module")
def undisturbed(runner: Runner, data: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    out = tmp_path_factory.mktemp("undisturbed")
    assert runner.run(command(data, out)) == [0], runner.said()
    return ending(out / "r")


@pytest.mark.parametrize(
    ("patch", "when", "number"),
    [
        ("slow_start", "device", signal.SIGTERM),
        ("slow_decoding", "[decoding]", signal.SIGINT),
        ("slow_steps", "[step 1]", signal.SIGTERM),
        ("slow_steps", "[step 7]", signal.SIGINT),
        ("slow_validation", "[scoring]", signal.SIGTERM),
        ("slow_saves", "epoch   1/3", signal.SIGTERM),
    ],
    ids=["start", "decoding", "first-step", "step", "validation", "save"],
)
def test_a_signal_stops_it_anywhere_and_the_same_command_goes_on(
    runner: Runner, data: Path, tmp_path: Path, undisturbed: str, patch, when, number
) -> None:
    code = 128 + number
    words = command(data, tmp_path)
    assert runner.run(words, signals=[[when, number, None]], patches=[patch]) == [code]
    assert runner.seconds < 5
    why = {143: "Stopped (SIGTERM)", 130: "Stopped (Ctrl-C)"}[code]
    assert runner.said().count(why) == 1 and "Traceback" not in runner.said()
    if patch == "slow_validation":
        assert runner.said().count("[scoring]") < 3, "not even the three images were waited for"
    if patch in ("slow_start", "slow_decoding"):
        assert "Nothing was trained yet" in runner.said() and not (tmp_path / "r").exists()
    assert runner.run(words) == [0], runner.said()
    assert ending(tmp_path / "r") == undisturbed
    status = json.loads((tmp_path / "r" / "run.json").read_text())["status"]
    assert status == "finished" and not (tmp_path / "r-2").exists()


@pytest.mark.parametrize("workers", ["0", "2"])
def test_stopped_in_validation_with_batches_changed_where_the_step_runs(
    runner: Runner, data: Path, tmp_path: Path, workers: str
) -> None:
    """The epoch's last batch is short: the saved position is beyond the last image."""
    words = ("--cache", "disk", "data.augment_on=device", "--epochs", "2")
    a, b = (command(data, tmp_path / x, *words, "--num-workers", workers) for x in "ab")
    assert runner.run(a) == [0], runner.said()
    stop = [["[scoring]", signal.SIGTERM, None]]
    assert runner.run(b, signals=stop, patches=["slow_validation"]) == [143]
    assert runner.run(b) == [0], runner.said()
    assert ending(tmp_path / "a" / "r") == ending(tmp_path / "b" / "r")


def test_a_run_that_stopped_early_is_scored_and_trains_no_more(
    runner: Runner, data: Path, tmp_path: Path
) -> None:
    words = ("train.early_stopping=1", "optim.lr=1e-12", "optim.min_lr=0", "--no-use-ema")
    words = command(data, tmp_path, *words)
    words.remove("--no-test")
    stop = [["early stopping", signal.SIGTERM, None]]
    assert runner.run(words, signals=stop, patches=["slow_validation"]) == [143], runner.said()
    before = ending(tmp_path / "r")
    assert runner.run(words) == [0], runner.said()
    assert ending(tmp_path / "r") == before
    assert json.loads((tmp_path / "r" / "run.json").read_text())["status"] == "finished"


def test_a_second_ctrl_c_leaves_at_once(runner: Runner, data: Path, tmp_path: Path) -> None:
    """The first waits for a step that takes three seconds; the second does not."""
    twice = [["[step 2]", signal.SIGINT, None], [0.3, signal.SIGINT, None]]
    codes = runner.run(command(data, tmp_path), signals=twice, patches=["three_seconds_a_step"])
    assert codes == [130] and runner.seconds < 2
    assert "Stopped" not in runner.said()


def test_a_decoding_that_was_stopped_goes_on_where_it_was(runner, data, tmp_path: Path) -> None:
    words = command(data, tmp_path)
    # Signal 0 does nothing: some rows are decoded until the one that counts arrives.
    stop = [["[decoding]", 0, None], [0.7, signal.SIGTERM, None]]
    assert runner.run(words, signals=stop, patches=["slow_decoding"]) == [143]
    assert not (tmp_path / "r").exists(), "nothing was trained, so there is no run"
    assert runner.run(words, patches=["slow_decoding"]) == [0]
    assert "of 20 pairs are already decoded" in runner.said()
    assert 0 < runner.said().count("[decoding]") < 20


def test_a_signal_to_the_whole_group_finds_deaf_workers(
    runner: Runner, data: Path, tmp_path: Path, undisturbed: str
) -> None:
    """Schedulers also signal the data workers, which must outlive the step that needs them."""
    words = command(data, tmp_path, "--num-workers", "2", "--cache", "none")
    stop = [["[step 2]", signal.SIGTERM, None]]
    codes = runner.run(words, signals=stop, patches=["slow_steps"], whole_group=True)
    assert codes == [143] and "worker" not in runner.said().split("Stopped")[1]
    assert runner.run(words) == [0] and ending(tmp_path / "r") == undisturbed


def test_the_deadline_saves_and_the_next_runs_go_on(
    runner: Runner, data: Path, tmp_path: Path, undisturbed: str
) -> None:
    """Nine steps in sessions of four, with a clock that ticks once per step."""
    words = [*command(data, tmp_path), "--max-hours", str(4 / 3600)]
    codes = [runner.run(words, patches=["clock_of_steps"])[0] for _ in range(3)]
    assert codes == [75, 75, 0], runner.said()
    assert ending(tmp_path / "r") == undisturbed


def test_evaluation_stops_and_goes_on(runner: Runner, data: Path, tmp_path: Path) -> None:
    assert runner.run(command(data, tmp_path, "--epochs", "1")) == [0]
    words = ["evaluate", str(tmp_path / "r"), "--data", str(data), "-o", str(tmp_path / "scores")]
    stop = [["[scoring]", signal.SIGTERM, None]]
    assert runner.run(words, signals=stop, patches=["slow_validation"]) == [143], runner.said()
    assert "Stopped (SIGTERM)" in runner.said()
    assert runner.said().count("[scoring]") < 2, "the second of two images was not waited for"
    assert runner.run(words) == [0], runner.said()
