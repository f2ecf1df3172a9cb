"""``doctor``: check the environment and the data before hours are spent."""

from __future__ import annotations

import argparse
from pathlib import Path

from camoxpert.cli import no_overrides
from camoxpert.cli.outputs import check_folder, check_table
from camoxpert.config import Config, DataConfig, check_conflicts
from camoxpert.config.flags import add_flags
from camoxpert.doctor.tables import CLEAN, COLUMNS, PAIRS
from camoxpert.errors import ConfigError, DataError

EXAMPLES = """Exit code 3: training should not start with this data.

examples:
  camoxpert doctor COD10K-v3 --clean-list clean.csv
  camoxpert doctor TrainDataset TestDataset --no-copies -o pages/doctor
  camoxpert doctor data/sensors --modalities rgb depth thermal"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's flags."""
    parser.epilog = EXAMPLES
    parser.add_argument("data", nargs="*", help="data set folders or CSV files")
    parser.add_argument(
        "--dataset-path", nargs="+", default=[], metavar="DIR", help="the same, as train spells it"
    )
    parser.add_argument("-o", "--output", default="doctor", help="folder of the page [doctor]")
    parser.add_argument(
        "--clean-list", metavar="FILE", help="write what to leave out, for train and evaluate"
    )
    parser.add_argument(
        "--no-copies",
        dest="copies",
        action="store_false",
        help="look for identical files only, not for copies by content",
    )
    parser.add_argument(
        "--modalities",
        nargs="+",
        default=[],
        metavar="NAME",
        help="what other sensors saw, as train spells it: read every file, and compare its edges "
        "with those of the photograph",
    )
    planned = parser.add_argument_group("of the training that is planned")
    add_flags(
        planned,
        (
            *(
                "data.layout",
                "data.noncam",
                "data.allow_outside",
                "data.val_fraction",
                "data.resize",
            ),
            *("data.max_pixels", "train.seed", "train.device"),
        ),
    )


def run(options: argparse.Namespace, rest: list[str], typed: list[str]) -> int:
    """Check everything; the exit code says whether training should start."""
    no_overrides(rest)
    data = DataConfig(
        roots=(*options.data, *options.dataset_path),
        layout=options.layout,
        noncam=options.noncam,
        val_fraction=options.val_fraction,
        max_pixels=options.max_pixels,
        allow_outside=options.allow_outside,
        resize=options.resize,
        modalities=tuple(options.modalities),
    )
    check_conflicts(Config(data=data))
    if options.clean_list and not data.roots:
        raise ConfigError("--clean-list needs data to check: camoxpert doctor DIR.")
    check_table("--clean-list", options.clean_list, CLEAN)
    if data.roots:
        check_folder("-o", options.output)
        check_table("-o", Path(options.output) / PAIRS, COLUMNS)
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
