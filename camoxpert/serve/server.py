"""The server of ``camoxpert serve``: a page and a JSON API for one model."""

from __future__ import annotations

import errno
import ipaddress
import os
import socket
import sys
import tempfile
from collections.abc import Collection
from dataclasses import dataclass
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any

from camoxpert import console, stop
from camoxpert.errors import ConfigError
from camoxpert.inference.predictor import Predictor
from camoxpert.serve.analysis import Analyst
from camoxpert.serve.answers import Answer, Fault, response, warn_of
from camoxpert.serve.checks import MOST_BYTES, is_address
from camoxpert.serve.connections import Connections
from camoxpert.serve.handler import Handler
from camoxpert.serve.page import assets
from camoxpert.serve.reading import Patience
from camoxpert.serve.uploads import Uploads
from camoxpert.serve.worker import MOST_WAITING, Worker
from camoxpert.text import count

LOOK_SECONDS = 0.2
"""Between two looks whether the command was asked to stop."""
BUSY = Fault(503, "Too many connections are open. Try again later.", (("Retry-After", "1"),))


@dataclass(frozen=True)
class Address:
    """Where a server listens.

    Attributes:
        host: a name or an address, as given.
        port: 0: any free one.
    """

    host: str
    port: int


class Server(ThreadingHTTPServer):
    """Listens from the start, and answers from ``answer_for`` on.

    Args:
        address: where to listen.

    Attributes:
        patience: how long senders are waited for.
        public: whether other machines can reach it.
        names: by which browsers may call it, lower case.
        closed: whether it was asked to close.

    Raises:
        ConfigError: the address cannot be used.
    """

    daemon_threads = True
    block_on_close = False
    request_queue_size = 16
    # On Windows it would let two programs listen on one port.
    allow_reuse_address = os.name == "posix"

    def __init__(self, address: Address) -> None:
        self.patience = Patience()
        self.connections = Connections()
        self.closed = False
        try:
            found = socket.getaddrinfo(
                address.host, address.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
            )
            self.address_family, *_, where = found[0]
            host, port = str(where[0]), int(where[1])
            super().__init__((host, port), Handler)
        except (OSError, UnicodeError) as error:
            raise ConfigError(_why(address, error)) from error
        self.host: str = address.host
        self.port: int = self.server_address[1]
        self.public = not _is_loopback(str(where[0]))
        self.names: Collection[str] = {
            *("localhost", address.host.lower()),
            *((socket.gethostname().lower(),) if self.public else ()),
        }

    def server_bind(self) -> None:
        """Bind; the standard library would also ask the network for this machine's name."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, self.allow_reuse_address)
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()
        self.server_name, self.server_port = str(self.server_address[0]), self.server_address[1]

    def answer_for(self, analyst: Analyst, folder: Path) -> None:
        """Get ready to answer.

        Args:
            analyst: works on the images.
            folder: gets each image until it is decoded.
        """
        self.analyst, self.uploads = analyst, Uploads(folder)
        predictor = analyst.predictor
        device = f"{predictor.device}, {predictor.precision.name}"
        self.assets: dict[str, Answer] = assets(analyst.describe(), device=device)
        self.worker = Worker()

    @property
    def url(self) -> str:
        """Address of the page on this machine."""
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.host, self.host)
        return f"http://{f'[{host}]' if ':' in host else host}:{self.port}/"

    def service_actions(self) -> None:
        """Stop if that was asked for; between two requests, so that no answer is cut."""
        self.connections.look()
        asked = stop.current()
        if asked.code():
            raise asked.stopped()

    def process_request(self, request: Any, client_address: Any) -> None:
        """Answer in a thread, unless there are too many."""
        if not self.connections.enter(request):
            self.connections.refuse(request, response(BUSY.answer()))
            return
        try:
            super().process_request(request, client_address)
        except RuntimeError:
            # No thread can be started.
            self.connections.leave(request)
            self.connections.refuse(request, response(BUSY.answer()))
        except BaseException:
            self.connections.leave(request)
            raise

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Answer one connection."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self.connections.leave(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Print what failed, without a traceback; a sender that left is not a failure."""
        error = sys.exc_info()[1]
        if isinstance(error, Exception) and not isinstance(error, OSError):
            warn_of("a request failed", error)

    def close(self) -> None:
        """Close the port, finish the image that is being analysed, and send its answer."""
        self.closed = True
        self.server_close()
        self.uploads.close()
        # Browsers keep connections open on which they send nothing.
        self.connections.end_reading()
        self.worker.close()
        self.connections.wait_until_closed(self.patience.closing)


def serve(server: Server, predictor: Predictor, *, threshold: float) -> None:
    """Answer requests until the command is stopped.

    Args:
        server: listens already.
        predictor: the model.
        threshold: where the slider stands first, and what the API takes by default, 0..1.

    Raises:
        Stopped: Ctrl-C, SIGTERM or SIGHUP.
    """
    analyst = Analyst(predictor, threshold)
    experts = ", " + analyst.network.describe_decoder() if analyst.network.expert_kinds else ""
    console.decide(
        "model",
        f"{predictor.config.model.backbone} at {predictor.img_size} px{experts}; "
        f"{predictor.device}, {predictor.precision.name}; {analyst.warm_up():.2f} s for a first "
        "image",
    )
    console.decide(
        "limits",
        f"images of up to {MOST_BYTES / 1e6:g} MB and {predictor.max_pixels / 1e6:g} million "
        f"pixels; one at a time, {MOST_WAITING} may wait",
    )
    if server.public:
        console.warn(
            f"{server.host} can be reached from other machines: everybody there can send images. "
            "There is no password and no encryption."
        )
    with (
        tempfile.TemporaryDirectory(prefix="camoxpert-serve-") as folder,
        stop.current().deferred(),
    ):
        server.answer_for(analyst, Path(folder))
        try:
            console.say(f"{server.url} is the page; Ctrl-C ends it.")
            server.serve_forever(LOOK_SECONDS)
        finally:
            server.close()
            left = server.worker.cancelled
            gone = f"; {count(left, 'image')} cancelled: the sender left" if left else ""
            console.note(f"{count(analyst.done, 'image')} analysed{gone}.")


def _is_loopback(address: str) -> bool:
    return is_address(address) and ipaddress.ip_address(address).is_loopback


def _why(address: Address, error: OSError | UnicodeError) -> str:
    """Return why an address cannot be listened on, and what to do."""
    code = error.errno if isinstance(error, OSError) else None
    if code == errno.EADDRINUSE:
        return (
            f"Port {address.port} of {address.host} is used by another program, perhaps by another "
            "`camoxpert serve`. Name another with --port, or --port 0 for any free one."
        )
    if code in (errno.EACCES, errno.EPERM):
        return f"--port {address.port}: ports below 1024 need more rights. Name a higher one."
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return (
        f"--host {address.host}: this machine cannot listen there ({reason}). Leave --host out for "
        "this machine alone, or give one of its addresses."
    )
