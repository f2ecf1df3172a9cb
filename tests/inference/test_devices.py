"""A process per device: chunks on demand, deaths, the one image that kills."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
from inference.fakes import FakeSpec, names, things

from camoxpert.errors import ConfigError, DataError, PeerError
from camoxpert.inference.devices import DeviceEngine, choose_devices, describe_exit
from camoxpert.inference.predictor import load_for


@pytest.mark.parametrize(
    ("text", "found"),
    [("auto", ()), ("cpu", ("cpu",)), ("cpu,cpu", ("cpu", "cpu"))],
)
def test_devices_of_this_machine(text: str, found: tuple[str, ...]) -> None:
    assert choose_devices(text) == found


@pytest.mark.parametrize("precision", ["auto", "fp16"])
def test_the_precision_is_that_of_the_worker_processes(
    tiny_run: Path, monkeypatch: pytest.MonkeyPatch, precision: str
) -> None:
    """A GPU with tensor cores and no bf16, as a T4: this process loads the settings on its CPU."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda device=None: "T4")
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device=None: (7, 5))
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda including_emulation=True: False)
    predictor = load_for(tiny_run, ("cuda:0", "cuda:1"), precision=precision)
    assert (predictor.precision.name, predictor.device.type) == ("fp16", "cpu")
    with pytest.raises(ConfigError, match="fp16 trains on CUDA only"):
        load_for(tiny_run, ("cpu",), precision="fp16")


def test_devices_of_other_machines(monkeypatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert choose_devices("all") == ("cuda:0", "cuda:1")
    assert choose_devices("0, cuda:1") == ("cuda:0", "cuda:1")
    with pytest.raises(ConfigError, match="no CUDA device 2; this machine has 0 to 1"):
        choose_devices("0,2")
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert choose_devices("all") == ("cpu",)
    with pytest.raises(ConfigError, match="torch finds none"):
        choose_devices("0")


@pytest.mark.parametrize("text", ["gpu", "cuda", "0;1", ""])
def test_words_that_are_no_devices(text: str) -> None:
    with pytest.raises(ConfigError, match="is not a device"):
        choose_devices(text)


def test_two_processes_share_the_work_and_lose_nothing(tmp_path: Path, capfd) -> None:
    """One image kills whoever reads it, one killed a process once; all others are done."""
    items = things(20, t5="kills", t13="kills once", t17="unreadable")
    engine = DeviceEngine(FakeSpec(tmp_path), ("cpu", "cpu"), batch_size=4)
    results = list(engine.results(items))
    rows = {row["item"]: row for result in results for row in result.rows}
    assert sum(len(result.rows) for result in results) == 20 == len(rows)
    for result in results:
        assert names(result.rows) == [f"t{4 * result.number + n}" for n in range(4)]
    ok = {f"t{n}" for n in range(20)} - {"t5", "t17"}
    assert {name for name, row in rows.items() if row["status"] == "ok"} == ok
    assert all(rows[name]["found"] == [2.0 * int(name[1:])] for name in ok)
    assert all((tmp_path / name).is_file() for name in ok)
    assert "ends whenever it gets it: SIGKILL" in rows["t5"]["reason"]
    assert rows["t17"]["reason"] == "t17 is damaged"
    summary = engine.summary()
    # Two deaths with the chunk of t5, then its halves: 2, 1, 1; and one with t13.
    assert 4 <= summary["deaths"] <= 7
    # Those that took a place at the very end may not have been needed.
    assert summary["deaths"] <= summary["model_loads"] <= 2 + summary["deaths"]
    assert {worker["worker"] for worker in summary["workers"]} <= {"cpu#1", "cpu#2"}
    assert capfd.readouterr().err.count("ended: SIGKILL") == summary["deaths"]


def test_few_chunks_are_shared_out(tmp_path: Path) -> None:
    engine = DeviceEngine(FakeSpec(tmp_path), ("cpu", "cpu"), batch_size=4)
    assert {result.worker for result in engine.results(things(8))} == {"cpu#1", "cpu#2"}


def test_an_error_of_a_process_is_the_error_of_the_run(tmp_path: Path) -> None:
    engine = DeviceEngine(FakeSpec(tmp_path, dies="refuses"), ("cpu",), batch_size=2)
    with pytest.raises(DataError, match="the model is gone"):
        list(engine.results(things(4)))


def test_a_device_that_never_loads_ends_the_run(tmp_path: Path) -> None:
    engine = DeviceEngine(FakeSpec(tmp_path, dies="loading"), ("cpu",), batch_size=2)
    with pytest.raises(PeerError, match="while it loaded the model: exit code 7"):
        list(engine.results(things(4)))


def test_how_a_process_ended() -> None:
    assert describe_exit(3) == "exit code 3"
    assert describe_exit(-signal.SIGSEGV) == "SIGSEGV"
    assert "ran out of memory" in describe_exit(-signal.SIGKILL)
    assert describe_exit(None) == "it does not answer"
