"""The command: it ends with the codes of the house, and says what is wrong in one paragraph."""

from __future__ import annotations

import http.client
import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from camoxpert import stop
from camoxpert.cli import main
from camoxpert.serve.server import Address, Server


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def answers(port: int) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", "/api/model")
        return connection.getresponse().status == 200
    except OSError:
        return False
    finally:
        connection.close()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_it_with_its_code(tiny_run: Path, number: int, code: int, capsys) -> None:
    port, ended = free_port(), threading.Event()

    def send() -> None:
        while not ended.wait(0.05):
            if answers(port):
                os.kill(os.getpid(), number)
                return

    sender = threading.Thread(target=send)
    sender.start()
    try:
        words = ["--port", str(port), "--device", "cpu", "--threshold", "0.4"]
        assert main(["serve", str(tiny_run), *words]) == code
    finally:
        ended.set()
        sender.join()
    told = capsys.readouterr()
    assert f"http://127.0.0.1:{port}/" in told.out and "million pixels" in told.out
    assert "Nothing that was sent is kept." in told.err and "Traceback" not in told.err
    assert "warning" not in told.err
    # The port is free again.
    socket.create_server(("127.0.0.1", port)).close()


SLOW = """
import sys, time, torch
from camoxpert.cli import main
from camoxpert.serve import analysis, server
from camoxpert.serve.reading import Patience

server.Patience = lambda: Patience(closing={closing})
honest = analysis.Analyst.answer

def slow(*given):
    print("begun", flush=True)
    values, end = torch.rand(400, 400), time.monotonic() + 2
    while time.monotonic() < end:
        values = (values @ values).clamp(0, 1)
    return honest(*given)

analysis.Analyst.answer = slow
sys.exit(main(["serve", *sys.argv[1:], "--device", "cpu"]))
"""


@pytest.mark.parametrize(
    ("number", "code", "closing"), [(signal.SIGTERM, 143, 30), (signal.SIGINT, 130, 0.1)]
)
def test_a_signal_during_an_analysis_waits_for_it(
    tiny_run: Path, photo: Path, number: int, code: int, closing: float
) -> None:
    """A thread that is inside torch when the interpreter exits aborts the process: code 134."""
    port, statuses = free_port(), []
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW.format(closing=closing), str(tiny_run), "--port", str(port)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )

    def send() -> None:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        connection.request("POST", "/api/map", photo.read_bytes(), {"Content-Type": "image/jpeg"})
        statuses.append(connection.getresponse().status)
        connection.close()

    sender = threading.Thread(target=send)
    try:
        for line in process.stdout:
            if "is the page" in line:
                sender.start()
            if line == "begun\n":
                break
        process.send_signal(number)
        _, told = process.communicate(timeout=120)
    finally:
        process.kill()
        process.wait()
        if sender.ident:
            sender.join()
    assert process.returncode == code, told
    assert "1 image analysed" in told and "terminate" not in told
    # The image that is being analysed is also answered, where there is time to send it.
    assert statuses == [200] or closing < 1


def test_a_signal_waits_for_the_loop() -> None:
    """Raised in the middle of accepting a request it would cut its answer."""
    with stop.watch() as asked, Server(Address("127.0.0.1", 0)) as server, asked.deferred():
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(stop.Stopped) as stopped:
            server.serve_forever(0.01)
    assert stopped.value.exit_code == 143


def test_a_port_in_use_is_a_paragraph_before_the_model_is_loaded(monkeypatch, capsys) -> None:
    monkeypatch.setattr(
        "camoxpert.inference.predictor.load_predictor", lambda *a, **b: pytest.fail("was loaded")
    )
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        assert main(["serve", "runs/x", "--port", str(port)]) == 2
    text = " ".join(capsys.readouterr().err.split())
    assert f"Port {port} of 127.0.0.1 is used by another program" in text and "--port 0" in text


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--threshold", "1.5"], "--threshold must be between 0 and 1"),
        (["--port", "70000"], "--port must be between 0 and 65535"),
        (["--host", "no-such-host.invalid"], "this machine cannot listen there"),
        (["more"], "Unexpected argument 'more'"),
    ],
)
def test_mistakes(words: list[str], says: str, capsys) -> None:
    assert main(["serve", "runs/x", *words]) == 2
    assert says in " ".join(capsys.readouterr().err.split())


def test_no_model_there(tmp_path: Path, capsys) -> None:
    assert main(["serve", str(tmp_path / "nothing"), "--port", "0"]) == 4


def test_listening_to_others_is_warned_of(predictor, monkeypatch, capsys) -> None:
    from camoxpert.serve.server import serve

    def stopped(server: Server, seconds: float) -> None:
        raise stop.Stopped("enough")

    monkeypatch.setattr(Server, "serve_forever", stopped)
    for host, warned in (("0.0.0.0", True), ("127.0.0.1", False), ("localhost", False)):
        with Server(Address(host, 0)) as server, pytest.raises(stop.Stopped):
            serve(server, predictor, threshold=0.5)
        assert server.public is warned
        assert ("no password" in capsys.readouterr().err) is warned
        assert socket.gethostname().lower() in server.names or not warned
