"""``sweep``: search settings on the validation images; every trial is an ordinary run."""

from __future__ import annotations

import argparse
from pathlib import Path

from camoxpert import console, stop
from camoxpert.cli.outputs import check_folder
from camoxpert.cli.train import check_data_given
from camoxpert.config.flags import add_setting_flags, read_config
from camoxpert.errors import ConfigError, Stopped

EXAMPLES = """examples:
  camoxpert sweep --space space.yaml --dataset-path DATA --epochs 30 --trials 20 -o sweep
  camoxpert sweep --space space.yaml --config mine.yaml --data-fraction 0.3 --device cuda:1

space.yaml:
  optim.lr: {low: 3e-4, high: 1e-2, log: true}
  model.top_k: {low: 1, high: 3}
  optim.scheduler: [cosine, poly]"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags of the search and those of all settings of ``train``."""
    parser.epilog = EXAMPLES
    group = parser.add_argument_group("search")
    group.add_argument(
        "--space", metavar="FILE", required=True, help="YAML file: settings with their values"
    )
    group.add_argument(
        "--trials", type=int, default=20, help="trials in all, those done before included [20]"
    )
    group.add_argument(
        "--folds",
        type=int,
        default=1,
        help="1: scores are those of the validation split, the only kind so far [1]",
    )
    group.add_argument(
        "-o",
        "--output",
        metavar="DIR",
        default="sweep",
        help="receives trials, page and best settings; holds those of a sweep that was stopped "
        "[sweep]",
    )
    add_setting_flags(parser)


def run(options: argparse.Namespace, rest: list[str], typed: list[str]) -> int:
    """Run the trials, print their table, and write the best settings and the page."""
    if options.trials < 1:
        raise ConfigError(f"--trials must be at least 1; got {options.trials}.")
    if options.folds != 1:
        raise ConfigError(
            f"--folds {options.folds}: trials are scored on the ordinary validation split for now; "
            f"leave it at 1."
        )
    config = read_config(options, rest)
    from camoxpert.training.sweep.space import read_space

    space = read_space(Path(options.space))
    check_data_given(config)
    check_folder("-o", options.output)
    from camoxpert.training.sweep import results, search

    sweep = search.open_sweep(config, space, Path(options.output), options.trials)
    console.say(
        f"sweep       {sweep.folder}: {options.trials} trials of "
        f"{', '.join(dim.path for dim in space)}, by {config.train.select} on validation images"
    )
    outside = results.outside_of(sweep)
    if outside:
        console.say(
            f"start       drawn: {', '.join(outside)} as set lies outside of the space or is unset"
        )
    try:
        with stop.watch():
            search.search(sweep, max_hours=config.train.max_hours)
    except Stopped:
        results.write_results(sweep)
        results.write_page(sweep)
        raise
    results.write_results(sweep)
    page = results.write_page(sweep)
    console.say(results.table_text(sweep))
    if (sweep.folder / results.BEST).is_file():
        console.say(f"best        camoxpert train --config {sweep.folder / results.BEST}")
    if page is not None:
        console.say(f"page        {page}")
    running = len(sweep.book.trials("RUNNING"))
    if running:
        console.say(f"running     {running} trials in other processes")
    return 0
