"""``profile``: where a training step goes, what bounds it, and which flag helps."""

from __future__ import annotations

import argparse
from pathlib import Path

from camoxpert.cli.benchmark import write_figures
from camoxpert.cli.outputs import check_file
from camoxpert.cli.train import check_data_given
from camoxpert.config.flags import add_setting_flags, read_config
from camoxpert.errors import ConfigError

EXAMPLES = """examples:
  camoxpert profile --dataset-path DATA --backbone edgenext_base --batch-size 16
  camoxpert profile --config configs/max_speed.yaml --dataset-path DATA --trace trace.json"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of ``train`` and the profile's own."""
    parser.usage = "camoxpert profile --dataset-path DIR [flags of train] [--steps N] [-o FILE]"
    parser.epilog = EXAMPLES
    own = parser.add_argument_group("of the profile")
    own.add_argument("--steps", type=int, default=10, help="timed steps [10]")
    own.add_argument("--trace", metavar="FILE", help="write a trace of three steps (JSON)")
    own.add_argument("-o", "--output", metavar="FILE", help="also write the figures as JSON")
    add_setting_flags(parser)


def run(options: argparse.Namespace, rest: list[str], typed: list[str]) -> int:
    """Profile, print and write."""
    config = read_config(options, rest)
    check_data_given(config)
    if options.steps < 1:
        raise ConfigError("--steps must be at least 1.")
    check_file("--trace", options.trace)
    check_file("-o", options.output)
    from camoxpert.profile import run as profile
    from camoxpert.training.prepare import prepare

    trace = Path(options.trace) if options.trace else None
    report = profile.run(prepare(config), steps=options.steps, trace=trace)
    write_figures(options.output, report)
    return 0
