"""``train``: settings in, a trained model with its scores, pictures and report out."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING

from camoxpert.config import Config, to_yaml
from camoxpert.config.flags import add_setting_flags, read_config
from camoxpert.errors import CamoXpertError, ConfigError, DataError, Stopped
from camoxpert.files import why_missing

if TYPE_CHECKING:
    from camoxpert.stages.chain import Chain, Stage

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
    add_stages_flag(parser)
    add_setting_flags(parser)


def add_stages_flag(parser: argparse.ArgumentParser) -> None:
    """Add ``--stages``."""
    parser.add_argument(
        "--stages",
        metavar="FILE",
        help="YAML file of named trainings, each from the weights of the one before; what is kept "
        "in the cache folder is not trained again (see configs/stages.yaml)",
    )


def read_settings(
    options: argparse.Namespace, rest: list[str]
) -> tuple[Config, Chain | None, list[Stage]]:
    """Return the settings, the file of ``--stages``, and its stages; without it None and []."""
    if not options.stages:
        return read_config(options, rest), None, []
    from camoxpert.stages.chain import read_chain

    chain = read_chain(options.stages)
    config = read_config(options, rest, beneath=chain.common)
    return config, chain, chain.resolve(config)


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
        config, _, stages = read_settings(options, rest)
        if stages and config.data.splits:
            raise ConfigError(
                "--splits and --stages: `camoxpert crossval --fold N` trains one fold with its "
                "stages."
            )
        runs = [stage.config for stage in stages] or [config]
        if options.print_config:
            print("---\n".join(to_yaml(one) for one in runs), end="")
            return 0
        for one in runs:
            check_data_given(one)
    except CamoXpertError as error:
        # Every process of torchrun finds the same: one on each machine says it.
        error.quiet = os.environ.get("LOCAL_RANK", "0") != "0"
        raise
    from camoxpert.runtime.processes import restarts_left
    from camoxpert.stages.run import preview, run_chain
    from camoxpert.training import session

    try:
        if stages and options.dry_run:
            preview(stages)
        elif stages:
            run_chain(stages, argv=["camoxpert", *typed])
        elif options.dry_run:
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
