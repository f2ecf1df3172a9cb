"""``synthesize counterfactual``: images without their objects, and controls that keep them."""

from __future__ import annotations

import argparse

from camoxpert import stop
from camoxpert.cli import generator, no_overrides
from camoxpert.errors import ConfigError

EXAMPLES = """examples:
  camoxpert synthesize counterfactual --dataset-path data/animals -o data/counterfactual
  camoxpert synthesize counterfactual --dataset-path COD10K-v3 -o out --size 512 --limit 500
  camoxpert train --dataset-path data/animals --synthetic data/counterfactual"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's flags."""
    parser.epilog = EXAMPLES
    generator.add_source_flags(parser)
    images = parser.add_argument_group("images")
    images.add_argument(
        "--seed", type=generator.seed, default=0, help="equal seeds, equal images [0]"
    )
    images.add_argument(
        "--size",
        type=int,
        metavar="N",
        help="longer side of the images; larger sources are shrunk [as the sources]",
    )
    images.add_argument(
        "--format", choices=generator.FORMATS, default="jpg", help="of the images [jpg]"
    )
    generator.add_speed_flags(parser)
    generator.add_result_flags(parser)


def run(options: argparse.Namespace, rest: list[str], typed: list[str]) -> int:
    """Make counterfactuals; sources that cannot be used are named at the end: exit code 3."""
    no_overrides(rest)
    if options.size is not None and options.size < 32:
        raise ConfigError(f"--size must be at least 32; {options.size} is not.")
    output = generator.check_output(options)
    from camoxpert.synthesis.erased import EraseOptions, erase_sources

    work = generator.work_options(options)
    wanted = EraseOptions(options.seed, options.size, options.format, options.page)
    outcome = "What is done is written; run the same command again for the rest."
    with stop.watch(options.max_hours), stop.outcome(outcome):
        result = erase_sources(
            generator.source_options(options),
            generator.mask_options(options, work),
            output,
            wanted,
            work,
        )
    return generator.tell_result(result, output)
