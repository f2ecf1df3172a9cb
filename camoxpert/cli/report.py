"""``report``: one self-contained HTML page about a run."""

from __future__ import annotations

import argparse
from pathlib import Path

from camoxpert.cli import no_overrides
from camoxpert.errors import CheckpointError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's flags."""
    parser.add_argument("run", help="a run folder")


def run(options: argparse.Namespace, rest: list[str], typed: list[str]) -> int:
    """Write ``report.html`` into the run folder."""
    no_overrides(rest)
    folder = Path(options.run)
    if not (folder / "config.yaml").is_file():
        raise CheckpointError(f"{folder} is not a run folder: it holds no config.yaml.")
    from camoxpert.observe.report import write_report

    print(write_report(folder))
    return 0
