"""``train``: settings in, a trained model with its scores, pictures and report out."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from camoxpert.config import Config, to_yaml
from camoxpert.config.flags import add_setting_flags, read_config
from camoxpert.errors import CamoXpertError, ConfigError, DataError, Stopped
from camoxpert.files import why_missing

EXAMPLES = """examples:
  camoxpert train --dataset-path COD10K-v3 --backbone edgenext_base --epochs 120 --lr 0.00025
  camoxpert train --config configs/steel.yaml --dataset-path DATA optim.lr=1e-3 --dry-run"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add ``--config`` and one flag for every setting that declares one."""
    parser.usage = "camoxpert train --dataset-path DIR [DIR ...] [flags] [group.name=value ...]"
    parser.epilog = EXAMPLES
    parser.add_argument(
        "--print-config", action="store_true", help="print the whole settings tree and exit"
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="check settings and the headers of the data, build everything, take one step, write "
        "nothing",
    )
    add_setting_flags(parser)


def check_data_given(config: Config) -> None:
    """Raise ConfigError or DataError unless every data root is named and exists."""
    if not config.data.roots:
        raise ConfigError(
            "No training data: give a data set folder with --dataset-path. "
            "`camoxpert synthesize toy DIR` generates one to try things out."
        )
    for flag, roots in (
        ("--dataset-path", config.data.roots),
        ("--test-data", config.data.test_roots),
        ("--synthetic", config.data.synthetic),
        ("--negatives", config.data.negatives),
        ("--unlabeled", (config.data.unlabeled,) if config.data.unlabeled else ()),
    ):
        for root in roots:
            if not Path(root).exists():
                raise DataError(f"{flag}: {why_missing(root)}")


def run(options: argparse.Namespace, rest: list[str], typed: list[str]) -> int:
    """Train; see ``training.session`` for the life of a run."""
    try:
        config = read_config(options, rest)
        if options.print_config:
            print(to_yaml(config), end="")
            return 0
        check_data_given(config)
    except CamoXpertError as error:
        # Every process of torchrun finds the same: one on each machine says it.
        error.quiet = os.environ.get("LOCAL_RANK", "0") != "0"
        raise
    from camoxpert.runtime.processes import restarts_left
    from camoxpert.training import session

    try:
        if options.dry_run:
            session.dry_run(config)
        else:
            session.run(config, argv=["camoxpert", *typed])
    except Stopped as stopped:
        if not restarts_left():
            raise
        # For torchrun any other code is a fault, after which it restarts everything.
        if not stopped.quiet:
            print(stopped)
    return 0
