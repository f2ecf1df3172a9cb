"""The API gives what the Python API gives, and one request leaves nothing to the next."""

from __future__ import annotations

import base64
import gc
import io
import shutil
import socket
import threading
import time
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.printed import complained
from PIL import Image

from camoxpert.inference.prediction import Prediction
from camoxpert.models.router import choose
from camoxpert.serve import analysis
from camoxpert.serve.analysis import Analyst, view
from camoxpert.serve.experts import chosen_experts, noted_routing
from camoxpert.serve.worker import MOST_WAITING, Worker


def png(pixels: np.ndarray, **options: object) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG", **options)
    return file.getvalue()


def test_numbers_and_pictures_are_those_of_the_python_api(asked, predictor, photo: Path) -> None:
    body = photo.read_bytes()
    expected = predictor.predict(photo, threshold=0.4)
    found = asked.post("/api/predict?threshold=0.4", body).json
    assert found["seconds"].keys() == {"read", "forward", "total"}
    assert {key: found[key] for key in expected.fields()} == pytest.approx(expected.fields())
    assert found["threshold"] == 0.4 and found["presence"] is None
    mask = asked.post("/api/mask?threshold=0.4", body)
    assert mask.headers["Content-Type"] == "image/png"
    assert np.array_equal(mask.pixels, expected.mask_HW * np.uint8(255))
    assert np.array_equal(
        asked.post("/api/map", body).pixels, (expected.probability_HW * 255).astype(np.uint8)
    )
    cutout = asked.post("/api/cutout", body, Content_Type="application/octet-stream").pixels
    assert np.array_equal(cutout, expected.cutout())


def test_an_image_is_turned_upright_as_predict_does(asked) -> None:
    file = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (40, 24)).save(file, "JPEG", exif=exif)
    found = asked.post("/api/view", file.getvalue()).json
    assert (found["width"], found["height"]) == (24, 40)
    assert (found["view"]["width"], found["view"]["height"]) == (24, 40)


def test_experts_are_those_of_the_routing(asked, predictor, photo: Path) -> None:
    with noted_routing(predictor.model) as noted:
        predictor.predict(photo)
    found = asked.post("/api/predict", photo.read_bytes()).json["experts"]
    assert found == chosen_experts(predictor.model, noted[-1])
    assert [level["level"] for level in found] == ["stride 32", "stride 16", "stride 8", "stride 4"]
    for level in found:
        weights = [expert["weight"] for expert in level["experts"]]
        assert weights == sorted(weights, reverse=True) and len(weights) == 2
        assert sum(weights) == pytest.approx(1)


def test_weights_of_regions_are_averaged(predictor) -> None:
    # Two regions, three experts: 0 and 1 with 3 : 1, then 1 and 2 with 1 : 1.
    logits = torch.log(torch.tensor([[0.6, 0.2, 1e-9], [1e-9, 0.5, 0.5]]))
    (level,) = chosen_experts(predictor.model, [choose(logits, 2)])
    names = [expert["name"] for expert in level["experts"]]
    assert names == ["texture", "attention", "hybrid"]
    weights = [expert["weight"] for expert in level["experts"]]
    assert weights == pytest.approx([0.375, 0.375, 0.25])


@pytest.mark.parametrize("images", [0, 40])
def test_presence_is_the_models_own(judging, photo: Path, start: Callable, images: int) -> None:
    model = judging(images)
    expected, of_black = model.predict([photo, np.zeros((9, 9, 3), np.uint8)], batch_size=1)
    expected = expected.presence
    assert 0 < expected < 1 and abs(expected - of_black.presence) > 1e-4
    asked = start(Analyst(model, 0.5))
    found = asked.post("/api/predict", photo.read_bytes()).json
    assert found["presence"] == pytest.approx(expected)
    kind = "calibrated" if images else "uncalibrated"
    assert asked("GET", "/api/model").json["presence"] == kind
    assert (b"uncalibrated" in asked("GET", "/").body) is (not images)


def test_a_model_without_the_head_says_no_presence(asked) -> None:
    found = asked("GET", "/api/model").json
    assert "presence" in found and found["presence"] is None
    page = asked("GET", "/").body
    assert b"calibrated" not in page and b"anything hides" not in page


def levels_of(shown: dict) -> np.ndarray:
    data = zlib.decompress(base64.b64decode(shown["levels"]))
    return np.frombuffer(data, np.uint8).reshape(shown["height"], shown["width"])


def test_every_step_of_the_slider_cuts_where_the_mask_does() -> None:
    """Also where a probability lies on a step or next to it."""
    steps = np.arange(101) / 100
    near = [np.float32(step) for step in steps]
    near += [np.nextafter(step, np.float32(way)) for step in near for way in (0, 1)]
    probability = np.array(near, np.float32)[None].clip(0, 1)
    image = np.zeros((*probability.shape, 3), np.uint8)
    levels = levels_of(view(Prediction("x", image, probability, 0.0)))
    for step in range(101):
        mask = Prediction("x", image, probability, 0.0, threshold=step / 100).mask_HW
        assert np.array_equal(levels > step, mask), step
    # The control: 8-bit probabilities cannot tell.
    eight = (probability * 255).astype(np.uint8)
    assert not np.array_equal(eight > 0.5 * 255, probability > 0.5)


def test_a_large_image_is_shown_smaller(monkeypatch) -> None:
    monkeypatch.setattr(analysis, "VIEW_SIDE", 20)
    probability = np.zeros((30, 60), np.float32)
    shown = view(Prediction("x", np.zeros((30, 60, 3), np.uint8), probability, 0.0))
    assert (shown["height"], shown["width"]) == levels_of(shown).shape == (10, 20)
    assert Image.open(io.BytesIO(base64.b64decode(shown["image"]))).size == (20, 10)


@pytest.mark.parametrize("size", [(1, 1), (1, 400), (400, 1)])
def test_extreme_sizes(asked, size: tuple[int, int]) -> None:
    body = png(np.zeros((*size, 3), np.uint8))
    for kind in ("view", "map", "mask", "cutout"):
        assert asked.post(f"/api/{kind}", body).status == 200


def test_what_the_server_says_of_itself(asked) -> None:
    found = asked("GET", "/api/model").json
    assert found["experts"] == ["texture", "attention", "hybrid"] and found["img_size"] == 32
    assert found["limits"] == {"bytes": 20_000_000, "pixels": 50_000_000}


class Held:
    """Stands for an analyst that works until it is let go."""

    def __init__(self, analyst: Analyst) -> None:
        self.analyst, self.go = analyst, threading.Event()
        self.begun = threading.Semaphore(0)

    def __getattr__(self, name: str) -> object:
        return getattr(self.analyst, name)

    def answer(self, *given: object) -> object:
        self.begun.release()
        assert self.go.wait(30)
        return self.analyst.answer(*given)


def test_one_is_worked_on_four_wait_and_the_next_is_turned_away(
    start: Callable, predictor, photo: Path
) -> None:
    held = Held(Analyst(predictor, 0.5))
    asked = start(held)
    body, statuses = photo.read_bytes(), []

    def send() -> None:
        statuses.append(asked.post("/api/predict", body).status)

    threads = [threading.Thread(target=send) for _ in range(1 + MOST_WAITING)]
    try:
        threads[0].start()
        assert held.begun.acquire(timeout=30)
        for thread in threads[1:]:
            thread.start()
        worker = asked.server.worker
        while len(worker._waiting) < MOST_WAITING:
            threading.Event().wait(0.01)
        refused = asked.post("/api/predict", body)
        assert refused.status == 503 and 1 <= int(refused.headers["Retry-After"]) <= 60
        assert "waiting" in refused.json["error"]
    finally:
        held.go.set()
        for thread in threads:
            if thread.ident:
                thread.join()
    assert statuses == [200] * (1 + MOST_WAITING)
    assert asked.post("/api/predict", body).status == 200


def waits_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_waiting_image_whose_sender_left_is_never_analysed(
    start: Callable, predictor, photo: Path
) -> None:
    """And its place in the queue is free at once."""
    held = Held(Analyst(predictor, 0.5))
    asked = start(held)
    worker, body = asked.server.worker, photo.read_bytes()
    head = b"POST /api/map HTTP/1.1\r\nHost: localhost\r\nContent-Type: image/jpeg\r\n"
    request = head + f"Content-Length: {len(body)}\r\n\r\n".encode() + body
    place = ("127.0.0.1", asked.server.port)
    senders = [socket.create_connection(place, 30) for _ in range(1 + MOST_WAITING)]
    try:
        senders[0].sendall(request)
        assert held.begun.acquire(timeout=30)
        for sender in senders[1:]:
            sender.sendall(request)
        waits_until(lambda: len(worker._waiting) == MOST_WAITING)
        assert len(list(asked.server.uploads.folder.iterdir())) == 1 + MOST_WAITING
        for sender in senders[1:3]:
            sender.close()
        waits_until(lambda: worker.cancelled == 2)
        assert len(worker._waiting) == MOST_WAITING - 2
        worker.check_free()
        held.go.set()
        for sender in (senders[0], *senders[3:]):
            assert sender.makefile("rb").read().startswith(b"HTTP/1.1 200 ")
    finally:
        held.go.set()
        for sender in senders:
            sender.close()
    assert held.analyst.done == 1 + MOST_WAITING - 2
    waits_until(lambda: not len(asked.server.connections))
    assert not list(asked.server.uploads.folder.iterdir())


def test_a_file_is_deleted_before_its_image_is_analysed(start: Callable, predictor, photo) -> None:
    left: list[int] = []
    asked = start(analyst := Analyst(predictor, 0.5))
    analyst.predictor = Spied(predictor, lambda: left.append(len(files())))

    def files() -> list[Path]:
        return list(asked.server.uploads.folder.iterdir())

    assert asked.post("/api/map", photo.read_bytes()).status == 200 and left == [0]


class Spied:
    """A predictor that calls a function before it predicts."""

    def __init__(self, predictor: object, before: Callable) -> None:
        self._predictor, self._before = predictor, before

    def __getattr__(self, name: str) -> object:
        return getattr(self._predictor, name)

    def predict(self, *given: object, **named: object) -> object:
        self._before()
        return self._predictor.predict(*given, **named)


def test_a_server_that_closes_finishes_one_and_turns_the_others_away() -> None:
    worker, go, begun = Worker(), threading.Event(), threading.Event()
    order: list[int] = []

    def work(number: int) -> Callable:
        def do() -> object:
            begun.set()
            go.wait(30)
            order.append(number)
            return analysis.json_answer(number)

        return do

    first, second, third = (worker.submit(work(number)) for number in range(3))
    assert begun.wait(30)
    second.cancel()
    threading.Timer(0.05, go.set).start()
    worker.close()
    assert first.result(0).body == b"0" and order == [0]
    for future in (second, third):
        with pytest.raises(BaseException) as fault:
            future.result(0)
        assert future.cancelled() or "closing" in str(fault.value)
    with pytest.raises(analysis.Fault, match="closing"):
        worker.submit(work(3))


def test_a_failure_is_an_answer_and_the_next_image_is_worked_on(
    start: Callable, predictor, photo: Path, capsys
) -> None:
    analyst = Analyst(predictor, 0.5)
    asked, honest = start(analyst), analyst.answer

    def fail(*given: object) -> None:
        raise RuntimeError("the device is gone")

    analyst.answer = fail
    reply = asked.post("/api/map", photo.read_bytes())
    assert reply.status == 500 and b"device" not in reply.body
    assert "the device is gone" in complained(capsys)
    analyst.answer = honest
    assert asked.post("/api/map", photo.read_bytes()).status == 200


@pytest.mark.parametrize("where", ["check_type", "body_length", "threshold_of", "check_host"])
def test_an_unexpected_error_is_an_answer_and_is_printed(
    asked, photo: Path, monkeypatch, capsys, where: str
) -> None:
    def breaks(*given: object) -> None:
        raise KeyError("\x1b[31mbroken")

    with monkeypatch.context() as patch:
        patch.setattr(f"camoxpert.serve.handler.{where}", breaks)
        reply = asked.post("/api/map", photo.read_bytes())
    assert reply.status == 500 and reply.json["error"].endswith("Try again.")
    told = capsys.readouterr().err
    assert "KeyError" in told and "broken" in told and "\x1b[31m" not in told
    assert asked.post("/api/map", photo.read_bytes()).status == 200


def test_a_folder_that_was_removed_is_an_error_that_is_printed(asked, photo, capsys) -> None:
    asked.server.uploads.folder.rmdir()
    assert asked.post("/api/map", photo.read_bytes()).status == 500
    assert "FileNotFoundError" in capsys.readouterr().err


def held_by_process() -> tuple[int, int, int]:
    """Return numbers of Python objects, open files and threads."""
    gc.collect()
    return len(gc.get_objects()), len([*Path("/proc/self/fd").iterdir()]), threading.active_count()


def growth(asked, requests: int, bodies: list[bytes], *, first: int = 20) -> tuple[int, int, int]:
    """Return what a number of requests of all kinds left behind."""
    kinds = ("predict", "view", "map", "mask", "cutout")
    for number in range(first):
        asked.post(f"/api/{kinds[number % 5]}", bodies[number % len(bodies)])
    before = held_by_process()
    for number in range(requests):
        asked.post(f"/api/{kinds[number % 5]}", bodies[number % len(bodies)])
    after = held_by_process()
    return tuple(then - now for then, now in zip(after, before, strict=True))


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="open files are counted in /proc")
def test_five_hundred_requests_leave_nothing(asked, photo: Path) -> None:
    objects, files, threads = growth(asked, 500, [photo.read_bytes(), b"not an image"])
    assert objects < 100 and files <= 1 and threads <= 2
    assert not list(asked.server.uploads.folder.iterdir())


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="open files are counted in /proc")
def test_a_server_that_hoards_is_noticed(start: Callable, predictor, photo: Path) -> None:
    analyst = Analyst(predictor, 0.5)
    honest, kept = analyst.answer, []

    def hoard(*given: object) -> object:
        kept.append([honest(*given), *([] for _ in range(9))])
        return kept[-1][0]

    analyst.answer = hoard
    assert growth(start(analyst), 12, [photo.read_bytes()], first=5)[0] > 100


def test_freed_memory_is_returned_now_and_then(
    predictor, photo: Path, tmp_path: Path, monkeypatch
) -> None:
    analysis.trim_memory()
    trimmed: list[int] = []
    analyst = Analyst(predictor, 0.5)
    monkeypatch.setattr(analysis, "trim_memory", lambda: trimmed.append(analyst.done))
    analyst.done = analysis.TRIM_EVERY - 2
    for _ in range(3):
        analyst.answer(Path(shutil.copy(photo, tmp_path)), "predict", None)
    assert not list(tmp_path.iterdir())
    assert trimmed == [analysis.TRIM_EVERY]
