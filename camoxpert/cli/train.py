"""``train``: settings in, a trained model with its scores, pictures and report out."""

from __future__ import annotations

import argparse
import os
import re
from pathlib import Path
from typing import Any

from camoxpert.config import Config, Leaf, leaves, load_config, parse_text, to_yaml
from camoxpert.errors import CamoXpertError, ConfigError, DataError, Stopped

OVERRIDE = re.compile(r"(data|model|loss|optim|train|run)\.[\w.]+=.*", re.DOTALL)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add ``--config`` and one flag for every setting that declares one."""
    parser.usage = "camoxpert train --dataset-path DIR [DIR ...] [flags] [group.name=value ...]"
    parser.add_argument(
        "--print-config", action="store_true", help="print the whole settings tree and leave"
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="check settings and data, build everything, take one step, write nothing",
    )
    add_setting_flags(parser)


def add_setting_flags(parser: argparse.ArgumentParser) -> None:
    """Add ``--config`` and the flags of all settings."""
    parser.add_argument("--config", metavar="FILE", help="YAML file of settings (see configs/)")
    for leaf in leaves():
        if leaf.metadata["flag"]:
            add_flag(parser, leaf)


def add_flag(parser: argparse.ArgumentParser, leaf: Leaf) -> None:
    """Add one setting's flag; its value arrives under the dotted path, only if typed."""
    shown = "unset" if leaf.default is None else leaf.default
    shown = {True: "on", False: "off", "": "none", (): "none"}.get(shown, shown)
    options: dict[str, Any] = {
        "dest": leaf.path,
        "default": argparse.SUPPRESS,
        "help": f"{leaf.metadata['help']} [{shown}]".replace("%", "%%"),
    }
    flag = leaf.metadata["flag"]
    if leaf.type is bool:
        parser.add_argument(flag, action=argparse.BooleanOptionalAction, **options)
        return
    if leaf.path == "train.gradient_checkpointing":
        options |= {"nargs": "?", "const": "on"}
    if leaf.path == "data.multi_scale":
        options |= {"nargs": "+"}
    if leaf.path == "data.roots":
        options |= {"nargs": "+", "action": "extend"}
    choices = leaf.metadata["choices"]
    name = "{" + ",".join(choices) + "}" if choices else flag.removeprefix("--").upper()
    parser.add_argument(flag, metavar=name.replace("-", "_") if not choices else name, **options)


def read_config(options: argparse.Namespace, rest: list[str]) -> Config:
    """Merge defaults, file, flags and overrides of one command line."""
    table = {leaf.path: leaf for leaf in leaves()}
    typed = {path: value for path, value in vars(options).items() if path in table}
    if "data.roots" in typed:
        # `--dataset-path A B optim.lr=3e-4`: the list of folders swallows the override.
        roots = typed["data.roots"]
        rest = [*rest, *(root for root in roots if OVERRIDE.fullmatch(root))]
        typed["data.roots"] = [root for root in roots if not OVERRIDE.fullmatch(root)]
    flags = {
        path: parse_text(value, table[path]) if isinstance(value, str) else value
        for path, value in typed.items()
    }
    return load_config(file=options.config, flags=flags, overrides=rest)


def check_data_given(config: Config) -> None:
    """Raise ConfigError or DataError unless every data root is named and exists."""
    if not config.data.roots:
        raise ConfigError(
            "No training data: give a data set folder with --dataset-path. "
            "`camoxpert synthesize toy DIR` generates one to try things out."
        )
    for root in config.data.roots:
        if not Path(root).exists():
            raise DataError(f"--dataset-path: there is no file or folder {root}.")


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
