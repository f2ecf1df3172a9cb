"""The timer's arithmetic on a clock of its own, and verdicts on steps whose bound is known."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import torch

from camoxpert.cli import main
from camoxpert.profile import regions as profiler
from camoxpert.profile.regions import ComponentTimer, Workload, advice, diagnose, text_rows


class Clock:
    """A clock that moves only when told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now

    def pass_time(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(monkeypatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(profiler, "time", clock)
    return clock


def test_times_are_exclusive_and_add_up(clock: Clock) -> None:
    timer = ComponentTimer(torch.device("cpu"))
    for _ in range(2):
        with timer.step():
            clock.pass_time(1)
            with timer.region("decoder"):
                clock.pass_time(2)
                with timer.region("expert"):
                    clock.pass_time(4)
                with timer.region("expert"):
                    clock.pass_time(8)
                clock.pass_time(16)
            clock.pass_time(32)
    assert timer.table() == {"decoder": 18, "expert": 12, "other": 33}
    assert sum(timer.table().values()) == 63


def test_a_step_that_misses_a_component_counts_as_nothing(clock: Clock) -> None:
    timer = ComponentTimer(torch.device("cpu"))
    for number in range(4):
        with timer.step():
            clock.pass_time(1)
            if number == 0:
                with timer.region("expert"):
                    clock.pass_time(8)
    assert timer.table() == {"other": 1, "expert": 2}


def test_modules_and_functions_are_charged_and_let_go(clock: Clock) -> None:
    timer = ComponentTimer(torch.device("cpu"))
    inner = torch.nn.Identity()
    outer = torch.nn.Sequential(inner)
    inner.register_forward_hook(lambda *a: clock.pass_time(3))
    timer.watch(outer, "outer")
    timer.watch(inner, "inner")
    work = timer.wrap(lambda: clock.pass_time(5), "work")
    work()  # outside of a step nothing is charged
    with timer.step():
        outer(torch.zeros(1))
        work()
    assert timer.table() == {"inner": 3, "outer": 0, "work": 5, "other": 0}
    timer.close()
    assert not outer._forward_pre_hooks and not outer._forward_hooks


def test_an_error_leaves_the_timer_balanced(clock: Clock) -> None:
    timer = ComponentTimer(torch.device("cpu"))
    with pytest.raises(ValueError), timer.step(), timer.region("x"):
        raise ValueError
    assert not timer.active


def workload(*, data: float, launch: float, per_image: float) -> Workload:
    """A step that sleeps: for its data, for its launches, and for every image."""

    def fetch() -> int:
        time.sleep(data)
        return 4

    def step(images: int) -> None:
        time.sleep(launch + images * per_image)

    return Workload(fetch, step, lambda images: 2 * images)


@pytest.mark.parametrize("repeat", range(10))
def test_verdicts_on_steps_whose_bound_is_known(repeat: int) -> None:
    """Sleeps of many milliseconds: scheduling adds under one."""
    starved = diagnose(workload(data=0.03, launch=0.0, per_image=0.002), rounds=3)
    assert starved.verdict == "data"
    launching = diagnose(workload(data=0.0, launch=0.03, per_image=0.0002), rounds=3)
    assert launching.verdict == "launch"
    assert diagnose(workload(data=0, launch=0.03, per_image=0), rounds=3, syncs=8).verdict == "sync"
    busy = workload(data=0.0, launch=0.0, per_image=0.005)
    assert diagnose(busy, rounds=3).verdict == "compute"
    assert diagnose(busy, rounds=3, utilisation=0.1).verdict == "memory"
    assert diagnose(busy, rounds=3, utilisation=0.6).verdict == "compute"


def test_advice_is_ranked_by_what_the_interventions_gained() -> None:
    diagnosis = profiler.Diagnosis("data", 0.4, 0.2, 0.25, "")
    table = {"backward": 0.2, "EMA": 0.1, "copy": 0.1}
    found = advice(diagnosis, table, batch_size=8, num_workers=2, accelerator=True)
    assert [round(gain, 2) for gain, _ in found] == [2.0, 1.6, 1.33, 1.33]
    assert "--num-workers 4" in found[0][1] and "--batch-size 16" in found[1][1]
    calm = profiler.Diagnosis("compute", 0.2, 0.2, 0.4, "")
    assert advice(calm, {"backward": 1}, batch_size=8, num_workers=2, accelerator=True) == []


def test_the_table_is_laid_out_in_order() -> None:
    lines = text_rows({"b": 0.001, "a": 0.003, "z": 0.0}, ["a", "b", "missing"])
    assert [line.split()[0] for line in lines] == ["a", "b", "z", "step"]
    assert "75.0%" in lines[0] and "4.00 ms" in lines[-1]


@pytest.mark.parametrize("family", ["specialist", "uniform"])
def test_the_command_takes_a_real_step_apart(
    toy_data: Path, tmp_path: Path, capsys, family: str
) -> None:
    file, trace = tmp_path / "profile.json", tmp_path / "trace.json"
    words = [
        "profile", "--dataset-path", str(toy_data), "--backbone", "tiny_test", "--no-pretrained",
        "--img-size", "32", "--batch-size", "8", "--num-workers", "0", "--num-experts", "3",
        "model.width=16", "--steps", "2", "-o", str(file), "--trace", str(trace),
        "--expert-family", family,
    ]  # fmt: skip
    before = set(tmp_path.iterdir())
    assert main(words) == 0
    result = json.loads(file.read_text())
    rows = result["milliseconds"]
    # Whatever no component claims is "other": the rows are the wall time of the step.
    assert sum(rows.values()) == pytest.approx(result["step_milliseconds"], rel=1e-6)
    parts = {"data wait", "copy", "backbone", "router", "decoder", "heads", "loss", "backward"}
    assert parts | {"clip", "optimizer", "EMA", "other"} <= set(rows)
    experts = {name for name in rows if name.startswith("expert")}
    if family == "uniform":
        assert experts == {"experts (gathered)"}
    else:
        assert experts == {"expert texture", "expert attention", "expert hybrid"}
    assert all(value > 0 for name, value in rows.items() if name != "copy")
    assert result["host_syncs"] == (0 if family == "uniform" else 1)
    assert result["verdict"] in ("data", "launch", "sync", "compute", "memory")
    assert 0 < result["model_flops_utilisation"] < 1
    assert "traceEvents" in json.loads(trace.read_text())
    out = capsys.readouterr().out
    assert f"{result['verdict']}-bound: " in out and "of a step" in out
    assert set(tmp_path.iterdir()) - before == {file, trace}


def test_profile_refuses_what_it_cannot_do(toy_data: Path, tmp_path: Path) -> None:
    assert main(["profile"]) == 2
    assert main(["profile", "--dataset-path", str(tmp_path / "none")]) == 3
    assert main(["profile", "--dataset-path", str(toy_data), "--steps", "0"]) == 2
    assert main(["profile", "--dataset-path", str(toy_data), "-o", str(tmp_path)]) == 2
