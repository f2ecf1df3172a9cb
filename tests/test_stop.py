"""Stopping: a request raises at once, or waits for the end of a block that defers it."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator

import pytest

from camoxpert import console, stop
from camoxpert.errors import CamoXpertError, Stopped
from camoxpert.stop import Stop


def test_codes_of_signals_and_of_the_deadline() -> None:
    now = [0.0]
    request = Stop(1.0, clock=lambda: now[0])
    assert request.code() == 0
    now[0] = 3599.9
    assert request.code() == 0
    now[0] = 3600.0
    assert request.code() == 75 and request.stopped().exit_code == 75
    with request.deferred():
        request.handle(signal.SIGTERM, None)
    assert request.code() == 143


@pytest.fixture
def hangup() -> Iterator[None]:
    """Undo what nohup may have done to this process."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]
)
def test_a_signal_raises_where_it_arrives_and_the_handlers_come_back(number, code, hangup) -> None:
    before = signal.getsignal(number)
    reached = []
    raises = pytest.raises(Stopped, match="Half of it is there")
    with raises as stopped, stop.watch(), stop.outcome("Half of it is there."):
        signal.raise_signal(number)
        reached.append(1)
    assert stopped.value.exit_code == code and not reached
    assert signal.getsignal(number) is before
    stop.check()  # The request ended with its command.


def test_a_closed_terminal_is_ignored_under_nohup(hangup) -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with stop.watch() as request:
        signal.raise_signal(signal.SIGHUP)
    assert request.code() == 0 and signal.getsignal(signal.SIGHUP) is signal.SIG_IGN


def test_a_deferred_signal_waits_for_the_end_of_the_block() -> None:
    done = []
    with pytest.raises(Stopped), stop.watch() as request:
        with request.deferred():
            signal.raise_signal(signal.SIGTERM)
            done.append("step")
            request.check()
            assert request.code() == 143
            with pytest.raises(Stopped), request.undeferred():
                done.append("never")
        request.check()
    assert done == ["step"]


def test_nothing_that_handles_errors_swallows_it() -> None:
    """Code turns the Exception of a damaged file into another error; Ctrl-C must pass through."""
    assert not issubclass(Stopped, Exception)
    with pytest.raises(Stopped), stop.watch():
        try:
            signal.raise_signal(signal.SIGTERM)
        except Exception:
            pytest.fail("swallowed")


def test_a_swallowed_request_is_raised_by_the_next_look() -> None:
    with pytest.raises(Stopped), stop.watch():
        with contextlib.suppress(BaseException):
            signal.raise_signal(signal.SIGTERM)
        seen = []
        for item in console.track(range(5), "items"):
            seen.append(item)
        pytest.fail(f"went on with {seen}")


def test_a_second_ctrl_c_exits_at_once(monkeypatch) -> None:
    codes = []
    monkeypatch.setattr(stop.os, "_exit", codes.append)
    request = Stop()
    with request.deferred():
        request.handle(signal.SIGINT, None)
        assert codes == []
        request.handle(signal.SIGINT, None)
    assert codes == [130]


def test_a_second_sigterm_does_not_interrupt_the_cleaning_up() -> None:
    with pytest.raises(Stopped), stop.watch():
        try:
            signal.raise_signal(signal.SIGTERM)
        finally:
            signal.raise_signal(signal.SIGTERM)
            cleaned = True
    assert cleaned


def test_what_the_processes_want_together() -> None:
    request = Stop()
    assert request.agree([0, 0]) == 0
    assert request.agree([75, 143, 0]) == 143
    assert request.agree([]) == 143, "what was agreed on stays"
    assert request.stopped("Saved.").exit_code == 143


def test_other_threads_are_left_alone() -> None:
    found = []

    def work() -> None:
        with stop.watch():
            stop.check()
            found.append(signal.getsignal(signal.SIGTERM))

    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [before]


def test_stopped_is_no_fault_of_the_program() -> None:
    assert not issubclass(Stopped, CamoXpertError)
