"""``doctor``: check the environment and the data before hours are spent."""

from __future__ import annotations

import argparse
from pathlib import Path

from camoxpert.cli import no_overrides
from camoxpert.config import DataConfig
from camoxpert.errors import ConfigError, DataError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's flags."""
    parser.epilog = "Exit code 3: training should not start with this data."
    parser.add_argument("data", nargs="*", help="data set folders or CSV files")
    parser.add_argument(
        "--dataset-path", nargs="+", default=[], metavar="DIR", help="the same, as train spells it"
    )
    parser.add_argument("-o", "--output", default="doctor", help="folder of the page [doctor]")
    parser.add_argument(
        "--clean-list", metavar="FILE", help="write what to leave out, for train and evaluate"
    )
    parser.add_argument("--layout", default="auto", help="name of a known layout [auto]")
    parser.add_argument(
        "--noncam", choices=("exclude", "include"), default="exclude", help="as for train"
    )
    parser.add_argument(
        "--val-fraction", type=float, default=0.1, help="of the training that is planned [0.1]"
    )
    parser.add_argument("--seed", type=int, default=42, help="of the training planned [42]")
    parser.add_argument(
        "--max-pixels", type=int, default=50_000_000, help="larger images are refused [50000000]"
    )
    parser.add_argument(
        "--no-copies",
        dest="copies",
        action="store_false",
        help="look for identical files only, not for copies by content",
    )
    parser.add_argument(
        "--allow-outside",
        action="store_true",
        help="a CSV may name files outside its own folder, as for train",
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N [auto]")


def run(options: argparse.Namespace, rest: list[str], typed: list[str]) -> int:
    """Check everything; the exit code says whether training should start."""
    no_overrides(rest)
    if not 0 <= options.val_fraction <= 0.5:
        raise ConfigError("--val-fraction must be between 0 and 0.5.")
    data = DataConfig(
        roots=(*options.data, *options.dataset_path),
        layout=options.layout,
        noncam=options.noncam,
        val_fraction=options.val_fraction,
        max_pixels=options.max_pixels,
        allow_outside=options.allow_outside,
    )
    if options.clean_list and not data.roots:
        raise ConfigError("--clean-list needs data to check: camoxpert doctor DIR.")
    from camoxpert.doctor.diagnose import diagnose

    sound = diagnose(
        data,
        seed=options.seed,
        copies=options.copies,
        device=options.device,
        output=Path(options.output),
        clean_list=options.clean_list or "",
    )
    return 0 if sound else DataError.exit_code
