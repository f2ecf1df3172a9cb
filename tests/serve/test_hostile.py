"""Hostile requests: foreign sites, slow and endless bodies, bombs, wrong types, odd names."""

from __future__ import annotations

import io
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from camoxpert.data.files import image_io
from camoxpert.data.files.jpeg import _require_whole_scans
from camoxpert.errors import ConfigError
from camoxpert.serve.answers import POLICY, Answer
from camoxpert.serve.connections import MOST_CONNECTIONS, Connections
from camoxpert.serve.handler import Handler, threshold_of
from camoxpert.serve.reading import Patience
from camoxpert.serve.server import Address, Server
from camoxpert.serve.uploads import has_many_scans

MARK = "Zq7marker"


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("127.0.0.1:8765", 200),
        ("127.0.0.1", 200),
        ("localhost:9000", 200),
        ("LOCALHOST", 200),
        ("[::1]:8765", 200),
        ("192.168.1.7:8765", 200),
        (f"{MARK}.example", 403),
        ("localhost.evil.example:8765", 403),
        ("127.0.0.1.evil.example", 403),
        ("2130706433", 403),
        ("localhost@evil.example", 400),
        ("evil.example/127.0.0.1", 400),
        ("", 400),
        (None, 400),
    ],
)
def test_only_addresses_and_its_own_name_reach_it(asked, host: str | None, status: int) -> None:
    """A site whose name leads to 127.0.0.1 sends that name: DNS rebinding."""
    for path in ("/", "/api/model"):
        reply = asked("GET", path, Host=host)
        assert reply.status == status and MARK.encode() not in reply.body


def test_two_hosts_are_refused(asked) -> None:
    request = b"GET / HTTP/1.1\r\nHost: localhost\r\nHost: evil.example\r\n\r\n"
    assert asked.raw(request).startswith(b"HTTP/1.1 400 ")


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "http://evil.example"},
        {"Origin": "null"},
        {"Origin": "http://localhost:3000"},
        {"Origin": "http://127.0.0.1"},
        {"Sec_Fetch_Site": "cross-site"},
        {"Sec_Fetch_Site": "same-site"},
    ],
)
def test_pages_of_other_sites_send_nothing(asked, photo: Path, headers: dict[str, str]) -> None:
    reply = asked.post("/api/predict", photo.read_bytes(), **headers)
    assert reply.status == 403 and asked.server.analyst.done == 0
    # The control: its own page.
    own = {"Origin": f"http://127.0.0.1:{asked.server.port}", "Sec_Fetch_Site": "same-origin"}
    assert asked.post("/api/predict", photo.read_bytes(), **own).status == 200


@pytest.mark.parametrize(
    "kind",
    [
        None,
        "text/plain",
        "application/x-www-form-urlencoded",
        "multipart/form-data; boundary=x",
        "text/plain; image/png",
        "",
    ],
)
def test_what_other_sites_send_without_asking_is_refused(asked, photo, kind: str | None) -> None:
    reply = asked.post("/api/predict", photo.read_bytes(), Content_Type=kind)
    assert reply.status == 415 and "Content-Type" in reply.json["error"]


def test_other_sites_that_ask_are_refused(asked) -> None:
    reply = asked("OPTIONS", "/api/predict", Origin="http://evil.example")
    assert reply.status == 405 and "GET" in reply.headers["Allow"]
    assert not [name for name in reply.headers if name.lower().startswith("access-control")]


@pytest.mark.parametrize("path", ["/", "/page.js", "/api/model", "/nothing"])
def test_every_answer_says_what_may_be_done_with_it(asked, path: str) -> None:
    headers = asked("GET", path).headers
    assert headers["Content-Security-Policy"] == POLICY and "unsafe" not in POLICY
    assert headers["X-Content-Type-Options"] == "nosniff" and headers["X-Frame-Options"] == "DENY"
    assert headers["Cache-Control"] == "no-store" and headers["Connection"] == "close"
    assert headers["Server"] == "camoxpert"


@pytest.mark.parametrize(
    "path",
    [
        "/../../etc/passwd", "/..%2f..%2fetc%2fpasswd", "//etc/passwd", "/page.css/../../x",
        f"/{MARK}", f"/<script>{MARK}</script>", "http://evil.example/", "/%00", "*", "/api/",
        "/api/predict/x", "/PAGE.JS", "/page.js%00",
    ],
)  # fmt: skip
def test_there_are_no_paths(asked, path: str) -> None:
    request = f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode()
    reply = asked.raw(request)
    assert reply.startswith(b"HTTP/1.1 404 ") and MARK.encode() not in reply
    assert asked.raw(request.replace(b"GET", b"POST")).startswith(b"HTTP/1.1 404 ")


@pytest.mark.parametrize(
    "request_bytes",
    [
        f"{MARK} / HTTP/1.1\r\nHost: localhost\r\n\r\n",
        f"GET / {MARK}\r\n\r\n",
        f"GET / HTTP/9.9{MARK}\r\n\r\n",
        f"{MARK}\r\n\r\n",
        f"GET / HTTP/1.1\r\nHost: localhost\r\n{MARK * 12000}: x\r\n\r\n",
        "GET / HTTP/1.1\r\nHost: localhost\r\n" + f"X: {MARK}\r\n" * 200 + "\r\n",
        f"GET /{MARK * 9000} HTTP/1.1\r\n\r\n",
        "\x00\x16\x03\x01\x02\x00\x01\x00\r\n\r\n",
    ],
    ids=lambda text: text[:16],
)
def test_nothing_of_a_request_is_in_its_answer(asked, request_bytes: str, capsys) -> None:
    reply = asked.raw(request_bytes.encode("latin-1"))
    assert b" 20" not in reply[:13] and MARK.encode() not in reply
    told = capsys.readouterr()
    assert MARK not in told.out + told.err and "Traceback" not in told.err
    assert asked("GET", "/").status == 200


@pytest.mark.parametrize(
    ("length", "status"),
    [
        (None, 411), ("", 411), ("-1", 411), ("+5", 411), ("1_0", 411), ("0x10", 411), ("²", 411),
        ("5, 5", 411), ("0", 400), ("20000001", 413), ("9" * 5000, 413),
    ],
)  # fmt: skip
def test_lengths_that_are_refused(asked, length: str | None, status: int) -> None:
    line = "" if length is None else f"Content-Length: {length}\r\n"
    head = f"POST /api/map HTTP/1.1\r\nHost: localhost\r\nContent-Type: image/png\r\n{line}\r\n"
    assert asked.raw(head.encode("latin-1") + b"12345").startswith(f"HTTP/1.1 {status} ".encode())


@pytest.mark.parametrize("more", ["Content-Length: 6", "Transfer-Encoding: chunked"])
def test_two_lengths_are_refused(asked, more: str) -> None:
    head = (
        "POST /api/map HTTP/1.1\r\nHost: localhost\r\nContent-Type: image/png\r\n"
        f"Content-Length: 5\r\n{more}\r\n\r\n"
    )
    assert asked.raw(head.encode() + b"12345").startswith(b"HTTP/1.1 411 ")


def test_a_body_that_is_too_large_gets_its_answer(asked) -> None:
    """Also where it is sent whole before the answer is read, as browsers do."""
    reply = asked.post("/api/map", bytes(20_000_001))
    assert reply.status == 413 and "20 MB" in reply.json["error"]
    assert not list(asked.server.uploads.folder.iterdir())


@pytest.mark.parametrize("path", ["/api/map", "/"])
def test_bytes_that_no_length_announced_cost_no_answer(asked, photo: Path, path: str) -> None:
    """A connection that is closed with unread bytes is reset, and the answer lost with it."""
    body = photo.read_bytes() if path != "/" else b""
    head = f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n"
    if body:
        head = (
            f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: image/jpeg\r\n"
            f"Content-Length: {len(body)}\r\n\r\n"
        )
    reply = asked.raw(head.encode() + body + bytes(16_000_000))
    assert reply.startswith(b"HTTP/1.1 200 ")
    headers, _, content = reply.partition(b"\r\n\r\n")
    assert f"Content-Length: {len(content)}".encode() in headers


def test_a_body_is_asked_for_after_its_headers_were_checked(asked, photo: Path) -> None:
    body = photo.read_bytes()
    head = (
        "POST /api/map HTTP/1.1\r\nHost: localhost\r\nContent-Type: {}\r\n"
        f"Content-Length: {len(body)}\r\nExpect: 100-continue\r\n\r\n"
    )
    for kind, first in (("image/jpeg", b"HTTP/1.1 100 "), ("text/plain", b"HTTP/1.1 415 ")):
        with socket.create_connection(("127.0.0.1", asked.server.port), 30) as connection:
            connection.sendall(head.format(kind).encode())
            assert connection.recv(13) == first
            if kind == "image/jpeg":
                connection.sendall(body)
                assert b"HTTP/1.1 200 " in connection.makefile("rb").read()


def test_a_body_that_ends_early(asked, photo: Path) -> None:
    head = "POST /api/map HTTP/1.1\r\nHost: localhost\r\nContent-Type: image/jpeg\r\n"
    reply = asked.raw(f"{head}Content-Length: 5000\r\n\r\n".encode() + b"abc")
    assert reply.startswith(b"HTTP/1.1 400 ") and b"ends before" in reply


@pytest.mark.parametrize("part", ["head", "body"])
def test_a_byte_at_a_time_is_not_waited_for(asked, part: str) -> None:
    """A timeout of the socket alone would start again with every byte."""
    asked.server.patience = Patience(head=0.4, body=0.4, rest=1.0)
    head = (
        b"POST /api/map HTTP/1.1\r\nHost: localhost\r\nContent-Type: image/jpeg\r\n"
        b"Content-Length: 5000\r\n\r\n"
    )
    with socket.create_connection(("127.0.0.1", asked.server.port), 30) as connection:
        connection.sendall(head if part == "body" else head[:30])
        sent, ended, answer = 0, threading.Event(), b""
        connection.settimeout(0.05)
        while sent < 400 and not ended.is_set():
            try:
                connection.sendall(b"x")
                sent += 1
                if not (got := connection.recv(65536)):
                    ended.set()
                answer += got
            except TimeoutError:
                continue
            except OSError:
                ended.set()
    assert ended.is_set() and sent < 400
    # A sender that writes on after the end may lose the answer.
    assert not answer or (part == "body" and answer.startswith(b"HTTP/1.1 408 "))
    assert not list(asked.server.uploads.folder.iterdir())


def waits_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_more_connections_than_there_is_room_for(asked, photo: Path) -> None:
    """Twice: every place comes back."""
    place, connections = ("127.0.0.1", asked.server.port), asked.server.connections
    for _ in range(2):
        idle = [socket.create_connection(place, 30) for _ in range(MOST_CONNECTIONS)]
        try:
            waits_until(lambda: len(connections) == MOST_CONNECTIONS)
            # Also where the request is sent whole before the answer is read.
            reply = asked.post("/api/map", photo.read_bytes() + bytes(300_000))
            assert reply.status == 503 and reply.headers["Retry-After"] == "1"
            assert "connections" in reply.json["error"]
        finally:
            for connection in idle:
                connection.close()
        waits_until(lambda: not len(connections))
        assert asked("GET", "/").status == 200


def test_a_thread_that_cannot_start_keeps_no_place(asked, monkeypatch) -> None:
    def fails(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", fails)
        for _ in range(MOST_CONNECTIONS + 1):
            assert asked("GET", "/").status == 503
    assert not len(asked.server.connections) and asked("GET", "/").status == 200


def test_a_place_is_given_back_once() -> None:
    connections = Connections(2)
    first, second = socket.socketpair()
    third, fourth = socket.socketpair()
    with first, second, third, fourth:
        assert connections.enter(first) and connections.enter(second)
        assert not connections.enter(third)
        connections.leave(first)
        connections.leave(first)
        assert connections.enter(third) and not connections.enter(fourth)


def test_a_server_that_closes_does_not_wait_for_silent_connections(asked) -> None:
    server = asked.server
    server.patience = Patience(closing=600.0, head=600.0, rest=600.0)
    with socket.create_connection(("127.0.0.1", server.port), 30) as connection:
        waits_until(lambda: len(server.connections) == 1)
        server.shutdown()
        server.close()
        assert not len(server.connections) and connection.recv(1) == b""


def jpeg(pixels: np.ndarray, **options: object) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", **options)
    return file.getvalue()


def other_format(name: str) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (16, 16)).save(file, name)
    return file.getvalue()


def many_scans(between: bytes = b"") -> bytes:
    """Return a progressive JPEG whose last scan is there a hundred times."""
    data = jpeg(np.zeros((64, 64, 3), np.uint8), progressive=True)
    last = data[data.rindex(b"\xff\xda") : -2]
    return data[:-2] + between + last * 100 + b"\xff\xd9"


NOISE = np.random.default_rng(0).integers(0, 255, (40, 40, 3), np.uint8)
FILES = {
    "a text": (b"hello", "not an image"),
    "a web page": (b"<html><script>alert(1)</script>", "a web page"),
    "zeros": (bytes(5000), "not an image"),
    "a JPEG cut short": (jpeg(NOISE)[:-300], "damaged"),
    "a progressive JPEG of many scans": (many_scans(), "scans"),
    "... behind a comment with an end": (many_scans(b"\xff\xfe\x00\x04\xff\xd9"), "scans"),
    "PostScript": (other_format("EPS"), "not one of JPEG"),
    "an icon": (other_format("ICO"), "not one of JPEG"),
}


@pytest.mark.parametrize("name", FILES)
def test_files_that_are_refused(asked, name: str) -> None:
    body, says = FILES[name]
    reply = asked.post("/api/view", body)
    text = reply.json["error"]
    assert reply.status == 422 and says in text and text.endswith(".")
    assert str(asked.server.uploads.folder) not in text and "despite its name" not in text
    assert not list(asked.server.uploads.folder.iterdir()) and asked.server.analyst.done == 0


def test_sound_progressive_jpegs_are_taken(asked) -> None:
    sound = jpeg(NOISE, progressive=True)
    assert asked.post("/api/view", sound).status == 200
    # A phone's moving picture: a video behind the end, which holds any bytes.
    assert not has_many_scans(sound + b"\xff\xda" * 500)
    # Nor do scans behind the end of the image replace scans that are missing in it.
    cut = sound[: sound.rindex(b"\xff\xda")] + b"\xff\xd9"
    behind = sound[sound.index(b"\xff\xda") :]
    with pytest.raises(ValueError, match="last scans are missing"):
        _require_whole_scans(cut + behind)
    _require_whole_scans(sound + behind)
    # Markers without end, which would keep this count busy.
    assert has_many_scans(sound[:2] + b"\xff\x01" * 20_000 + sound[2:])


def test_a_bomb_is_refused_from_its_header(asked, monkeypatch) -> None:
    file = io.BytesIO()
    Image.new("1", (30_000, 3_000)).save(file, "PNG")
    assert len(file.getvalue()) < 200_000
    decoded = []
    monkeypatch.setattr(image_io, "_load", lambda *given: decoded.append(given))
    reply = asked.post("/api/view", file.getvalue())
    assert not list(asked.server.uploads.folder.iterdir())
    assert reply.status == 422 and "30000x3000 pixels" in reply.json["error"] and not decoded


def test_a_decoder_that_breaks_is_a_refused_file(asked, photo: Path, monkeypatch) -> None:
    def breaks(*given: object, **named: object) -> None:
        raise IndexError(f"/secret/{MARK}")

    monkeypatch.setattr("camoxpert.serve.uploads.read_image", breaks)
    reply = asked.post("/api/view", photo.read_bytes())
    assert reply.status == 422 and MARK.encode() not in reply.body


@pytest.mark.parametrize(
    "query",
    [
        "threshold=nan", "threshold=2", "threshold=-0.1", "threshold=", "threshold",
        "threshold=0.5&threshold=0.4", f"{MARK}=1", "path=/etc/passwd", "threshold=0.5&path=x",
        "threshold=1e999", "threshold=0.5_0", "threshold=+0.5", "threshold=%20.5", "threshold=0x1",
        "threshold=%D9%A0", "&" * 5000,
    ],
)  # fmt: skip
def test_parameters_that_are_refused(asked, photo: Path, query: str) -> None:
    reply = asked.post(f"/api/mask?{query}", photo.read_bytes())
    assert reply.status == 400 and MARK.encode() not in reply.body
    assert threshold_of("threshold=0.25") == 0.25 and threshold_of("") is None
    assert threshold_of("threshold=5e-2") == 0.05 and threshold_of("threshold=1") == 1.0


def test_no_room_on_the_disk(asked, photo: Path, monkeypatch) -> None:
    def full(*given: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("camoxpert.serve.handler.receive", full)
    assert asked.post("/api/map", photo.read_bytes()).status == 507


def test_an_address_that_cannot_be_listened_on() -> None:
    with Server(Address("127.0.0.1", 0)) as first:
        assert not first.public
        with pytest.raises(ConfigError, match="is used by another program"):
            Server(Address("127.0.0.1", first.port))
    with pytest.raises(ConfigError, match="cannot listen there"):
        Server(Address("no-such-host.invalid", 0))
    with pytest.raises(ConfigError, match="cannot listen there"):
        Server(Address("a" * 70, 0))


def test_a_larger_answer_may_take_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    """The limit is for the whole answer, which can be several times as large as the image sent."""
    limits: list[float] = []
    handler = object.__new__(Handler)
    handler.connection = SimpleNamespace(settimeout=limits.append)
    handler.server = SimpleNamespace(patience=Patience(send=60.0))
    handler.command, handler.wfile = "GET", io.BytesIO()
    for name in ("send_response", "send_header", "end_headers"):
        monkeypatch.setattr(handler, name, lambda *_: None)
    for size in (0, 20_000_000, 70_000_000):
        handler._send(Answer(b"x" * size, "image/png"))
    # As an image of 20 MB may take 60 s to come: 270 s for 70 MB are 2 Mbit/s.
    assert limits == [60.0, 120.0, 270.0]
