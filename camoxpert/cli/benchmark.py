"""``benchmark``: ours against the baseline, both in one run, as ratios."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from camoxpert.cli import no_overrides
from camoxpert.errors import ConfigError

KINDS = {"metrics": "the metric engine against pysodmetrics"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's flags."""
    parser.add_argument(
        "kind", choices=tuple(KINDS), help="; ".join(f"{k}: {v}" for k, v in KINDS.items())
    )
    parser.add_argument("-o", "--output", metavar="FILE", help="also write the figures as JSON")
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds, interleaved [5]")
    parser.add_argument("--pairs", type=int, default=12, help="metrics: pairs in memory [12]")
    parser.add_argument(
        "--size",
        type=int,
        nargs=2,
        default=(768, 1024),
        metavar=("HEIGHT", "WIDTH"),
        help="metrics: of the pairs [768 1024]",
    )
    parser.add_argument(
        "--files",
        type=int,
        default=160,
        help="metrics: PNG pairs for the workers, 0 or at least 64 [160]",
    )


def run(options: argparse.Namespace, rest: list[str], typed: list[str]) -> int:
    """Measure, print and write."""
    no_overrides(rest)
    if options.rounds < 1 or options.pairs < 1 or min(options.size) < 32:
        raise ConfigError("--rounds and --pairs must be at least 1, --size at least 32.")
    if options.files < 0 or 0 < options.files < 64:
        raise ConfigError("--files must be 0 or at least 64: fewer say nothing about processes.")
    if options.output and Path(options.output).is_dir():
        raise ConfigError(f"--output {options.output} is a folder; give a file.")
    from camoxpert.benchmark import metrics
    from camoxpert.observe.runlog import write_json

    height, width = options.size
    result: dict[str, Any] = metrics.run(
        pairs=options.pairs,
        rounds=options.rounds,
        height=height,
        width=width,
        files=options.files,
        say=lambda line: print(line, flush=True),
    )
    if options.output:
        write_json(Path(options.output), result)
        print(f"figures: {options.output}")
    return 0
