"""A server in this process, and ways to ask it."""

from __future__ import annotations

import dataclasses
import http.client
import io
import json
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image

import camoxpert
from camoxpert.models.camoxpert import build_model
from camoxpert.serve.analysis import Analyst
from camoxpert.serve.server import Address, Server

JPEG = {"Content-Type": "image/jpeg"}


class Reply(NamedTuple):
    status: int
    headers: http.client.HTTPMessage
    body: bytes

    @property
    def json(self) -> dict[str, Any]:
        return json.loads(self.body)

    @property
    def pixels(self) -> np.ndarray:
        return np.array(Image.open(io.BytesIO(self.body)))


class Asked:
    """A running server and what tests do with it."""

    def __init__(self, server: Server) -> None:
        self.server = server

    def __call__(
        self, method: str, path: str, body: bytes | None = None, **headers: str | None
    ) -> Reply:
        """Send a request; a header that is None is left out, _ in its name stands for -."""
        connection = http.client.HTTPConnection("127.0.0.1", self.server.port, timeout=30)
        given = {"Host": f"127.0.0.1:{self.server.port}", "Content-Length": str(len(body or b""))}
        if body is None:
            del given["Content-Length"]
        given |= {name.replace("_", "-"): value for name, value in headers.items()}
        connection.putrequest(method, path, skip_host=True, skip_accept_encoding=True)
        for name, value in given.items():
            if value is not None:
                connection.putheader(name, value)
        connection.endheaders(body)
        with connection.getresponse() as answer:
            reply = Reply(answer.status, answer.headers, answer.read())
        connection.close()
        return reply

    def post(self, path: str, body: bytes, **headers: str | None) -> Reply:
        return self("POST", path, body, **{"Content_Type": "image/jpeg", **headers})

    def raw(self, data: bytes) -> bytes:
        """Send bytes as they are and return all that comes back."""
        with socket.create_connection(("127.0.0.1", self.server.port), 30) as connection:
            connection.sendall(data)
            connection.shutdown(socket.SHUT_WR)
            return connection.makefile("rb").read()


@pytest.fixture(scope="package")
def predictor(tiny_run: Path) -> camoxpert.Predictor:
    return camoxpert.load(tiny_run, device="cpu")


@pytest.fixture
def judging(predictor: camoxpert.Predictor, tmp_path: Path) -> Callable[[int], Any]:
    """Return a function that loads the tiny model with a presence head of drawn weights.

    It takes the number of images that calibrated the head; 0: none did.
    """

    def load(images: int) -> camoxpert.Predictor:
        checkpoint = predictor.checkpoint
        config = dataclasses.replace(checkpoint.model_config, presence="on")
        torch.manual_seed(0)
        head = build_model(config).presence
        head.calibration.set(1.5 if images else 1.0, 0.2 if images else 0.0, images)
        values = dict(checkpoint.values)
        added = {f"presence.{name}": tensor for name, tensor in head.state_dict().items()}
        values["model"] = {**checkpoint.evaluated_weights, **added}
        torch.save(values, tmp_path / "judging.pt")
        return camoxpert.load(tmp_path / "judging.pt", device="cpu")

    return load


@pytest.fixture(scope="package")
def photo(toy_data: Path) -> Path:
    return sorted((toy_data / "TestDataset" / "toy" / "Imgs").iterdir())[0]


@pytest.fixture
def start(predictor: camoxpert.Predictor, tmp_path: Path) -> Iterator[Callable[..., Asked]]:
    """Return a function that starts a server of the tiny model, or of another analyst."""
    running: list[tuple[Server, threading.Thread]] = []

    def begin(analyst: Analyst | None = None) -> Asked:
        server = Server(Address("127.0.0.1", 0))
        folder = tmp_path / f"served-{len(running)}"
        folder.mkdir()
        server.answer_for(analyst or Analyst(predictor, 0.5), folder)
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        running.append((server, thread))
        return Asked(server)

    yield begin
    for server, thread in running:
        server.shutdown()
        thread.join()
        server.close()


@pytest.fixture
def asked(start: Callable[..., Asked]) -> Asked:
    return start()
