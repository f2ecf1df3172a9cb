"""``serve``: a page in the browser, and a JSON API, for one model on this machine."""

from __future__ import annotations

import argparse
from pathlib import Path

from camoxpert import stop
from camoxpert.cli import no_overrides
from camoxpert.config.flags import add_flags
from camoxpert.errors import ConfigError

HOST, PORT = "127.0.0.1", 8765
EXAMPLES = """The page takes an image by drop, paste or choice, and needs no internet. The API is in
docs/serve.md.

examples:
  camoxpert serve runs/NAME
  camoxpert serve runs/NAME --port 0 --threshold 0.4 --device cpu"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's flags."""
    parser.epilog = EXAMPLES
    parser.add_argument(
        "checkpoint", help="a run folder (its best weights), a .pt file or hf:USER/NAME"
    )
    parser.add_argument(
        "--host",
        default=HOST,
        metavar="NAME",
        help="name or address to listen on; another one than this machine's own lets others send "
        f"images, without a password [{HOST}]",
    )
    parser.add_argument(
        "--port", type=int, default=PORT, metavar="N", help=f"0: any free one [{PORT}]"
    )
    parser.add_argument(
        "--threshold",
        type=float,
        default=0.5,
        help="probability that counts as object, where the slider stands first [0.5]",
    )
    parser.add_argument(
        "--zoom",
        action="store_true",
        help="look at each image at 1 and about 1.5 times the model's size and join both; takes "
        "3.1 to 3.3 times the multiply-adds",
    )
    add_flags(
        parser,
        ("data.max_pixels", "train.device", "train.precision"),
        defaults={"data.max_pixels": None},
    )


def run(options: argparse.Namespace, rest: list[str], typed: list[str]) -> int:
    """Serve until the command is stopped, with that exit code."""
    no_overrides(rest)
    if not 0 <= options.threshold <= 1:
        raise ConfigError(f"--threshold must be between 0 and 1; {options.threshold:g} is not.")
    if not 0 <= options.port <= 65535:
        raise ConfigError(f"--port must be between 0 and 65535; {options.port} is not.")
    from camoxpert.inference.aligned import say_photographs_alone
    from camoxpert.inference.predictor import load_predictor
    from camoxpert.serve.server import Address, Server, serve

    # Before the model is loaded: a port in use is known at once.
    address = Address(options.host, options.port)
    outcome = "Nothing that was sent is kept."
    with stop.watch(), stop.outcome(outcome), Server(address) as server:
        predictor = load_predictor(
            Path(options.checkpoint),
            device=options.device,
            precision=options.precision,
            max_pixels=options.max_pixels,
            zoom=options.zoom,
        )
        say_photographs_alone(predictor.modalities, "serve")
        serve(server, predictor, threshold=options.threshold)
    return 0
