"""``benchmark export``: the formats of one model compared on this machine."""

from __future__ import annotations

import argparse
from pathlib import Path

from camoxpert import stop
from camoxpert.cli import no_overrides
from camoxpert.cli.benchmark import write_figures
from camoxpert.cli.outputs import check_file
from camoxpert.config.flags import add_flags
from camoxpert.errors import ConfigError

EXAMPLES = """examples:
  camoxpert benchmark export runs/NAME -o formats.json
  camoxpert benchmark export runs/NAME --data COD10K --no-compile"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's flags."""
    parser.epilog = EXAMPLES
    parser.add_argument("checkpoint", help="a run folder (its best weights) or a .pt file")
    parser.add_argument("-o", "--output", metavar="FILE", help="also write the figures as JSON")
    parser.add_argument("--rounds", type=int, default=15, help="timed rounds, interleaved [15]")
    parser.add_argument(
        "--data",
        nargs="+",
        default=[],
        metavar="DIR",
        help="data sets to score, up to 200 images [the run's test sets, filled up to 50 with "
        "generated images]",
    )
    parser.add_argument(
        "--calibration",
        nargs="+",
        default=[],
        metavar="DIR",
        help="data sets of which up to 300 training images calibrate int8 [the run's]",
    )
    parser.add_argument(
        "--no-compile",
        dest="compiled",
        action="store_false",
        help="leave out torch.compile, which takes minutes",
    )
    add_flags(parser, ("data.layout", "data.noncam", "data.allow_outside"))


def run(options: argparse.Namespace, rest: list[str], typed: list[str]) -> int:
    """Measure, print and write."""
    no_overrides(rest)
    if options.rounds < 1:
        raise ConfigError(f"--rounds must be at least 1; {options.rounds} is not.")
    check_file("-o", options.output)
    from camoxpert.benchmark import export
    from camoxpert.data.files.manifest import Search

    subject = export.Subject(
        Path(options.checkpoint),
        tuple(options.data),
        tuple(options.calibration),
        options.rounds,
        options.compiled,
        Search(options.layout, options.noncam, allow_outside=options.allow_outside),
    )
    with stop.watch(), stop.outcome("No figures were written."):
        write_figures(options.output, export.run(subject))
    return 0
