"""``report``: one self-contained HTML page about a run, several runs, folds or predictions; a
ledger as a table."""

from __future__ import annotations

import argparse
from pathlib import Path

from camoxpert import console
from camoxpert.cli import no_overrides
from camoxpert.cli.outputs import check_file
from camoxpert.errors import CheckpointError, ConfigError, DataError
from camoxpert.files import why_missing

EXAMPLES = """examples:
  camoxpert report runs/NAME
  camoxpert report runs/BASE runs/OTHER runs/OTHER-seed2 -o compared.html
  camoxpert report predictions/
  camoxpert report cv/ours
  camoxpert report scores.jsonl --dataset NC4K --format latex"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's flags."""
    parser.epilog = EXAMPLES
    parser.add_argument(
        "run",
        nargs="+",
        help="a run folder, a folder of `predict -o` or `crossval -o`, or a ledger of "
        "`evaluate --ledger`; several run folders are compared with the first",
    )
    parser.add_argument(
        "-o",
        "--output",
        metavar="FILE",
        help="the page [FOLDER/report.html; of several runs comparison.html]",
    )
    ledger = parser.add_argument_group("of a ledger")
    ledger.add_argument("--dataset", nargs="+", metavar="NAME", help="only these data sets")
    ledger.add_argument("--method", nargs="+", metavar="NAME", help="only these methods")
    ledger.add_argument("--measures", nargs="+", metavar="KEY", help="only these measures")
    ledger.add_argument(
        "--format",
        choices=("text", "markdown", "latex", "csv"),
        help="of the table [text]",
    )


def run(options: argparse.Namespace, rest: list[str], typed: list[str]) -> int:
    """Write the page of a folder or of several, or print the ledger's table."""
    no_overrides(rest)
    if len(options.run) > 1:
        return _comparison([Path(run) for run in options.run], options)
    path = Path(options.run[0])
    if path.is_file():
        if options.output:
            raise ConfigError("-o belongs to the page of a folder; a ledger's table is printed.")
        return _ledger(path, options)
    page = Path(options.output or path / "report.html")
    if (path / "config.yaml").is_file():
        check_file("-o", page)
        from camoxpert.pages.report import write_report

        console.say(str(write_report(path, page)))
        return 0
    if (path / "splits.json").is_file():
        return _crossval(path, options)
    from camoxpert.inference.ledger import LEDGER

    if not (path / LEDGER).is_file():
        raise CheckpointError(
            f"{path} is neither a run folder (it holds no config.yaml) nor a folder of predictions "
            f"(no {LEDGER}) nor one of a cross-validation (no splits.json) nor a ledger file."
        )
    check_file("-o", page)
    _predictions(path, page)
    return 0


def _crossval(folder: Path, options: argparse.Namespace) -> int:
    if options.output:
        raise ConfigError(
            f"-o: the page of a cross-validation is in its folder, with its tables and maps. Leave "
            f"-o out; the page is {folder / 'report.html'}."
        )
    from camoxpert.crossval.report import rewrite

    console.say(f"report      {rewrite(folder)}")
    return 0


def _comparison(paths: list[Path], options: argparse.Namespace) -> int:
    for flag in ("dataset", "method", "measures", "format"):
        if getattr(options, flag) is not None:
            raise ConfigError(f"--{flag} is of a ledger; a comparison of runs shows everything.")
    for path in paths:
        if not (path / "config.yaml").is_file():
            missing = "" if path.exists() else f" {why_missing(path)}"
            if (path / "splits.json").is_file():
                missing = (
                    " It is a cross-validation: compare it with another by `camoxpert crossval -o "
                    "DIR --summary-only --compare-with OTHER` and the flags of its data."
                )
            raise CheckpointError(
                f"{path} is not a run folder (it holds no config.yaml); only runs are compared."
                f"{missing}"
            )
    # Compared with itself a run would count as two seeds.
    places = [path.resolve() for path in paths]
    twice = next((path for path in paths if places.count(path.resolve()) > 1), None)
    if twice is not None:
        raise ConfigError(f"{twice} is given twice. Leave one out.")
    file = Path(options.output or "comparison.html")
    check_file("-o", file)
    from camoxpert.pages.comparison import compare_runs, comparison_text, write_comparison

    page = compare_runs(paths)
    for sentence in page.warnings:
        console.warn(sentence)
    console.say(comparison_text(page))
    console.say(f"\n{write_comparison(page, file)}")
    return 0


def _predictions(folder: Path, page: Path) -> None:
    from camoxpert.inference.ledger import Ledger
    from camoxpert.inference.photos import SUMMARY
    from camoxpert.inference.prediction import KINDS
    from camoxpert.pages.predictions import write_predictions_page
    from camoxpert.runs.jobs import read_summary

    ledger = Ledger(folder, KINDS)
    rows = console.track(ledger.rows(), "report", total=len(ledger.index))
    write_predictions_page(
        page,
        rows,
        folder=folder,
        settings=ledger.earlier or {},
        summary=read_summary(folder / SUMMARY),
        finished=ledger.finished,
    )
    console.say(str(page))


def _ledger(path: Path, options: argparse.Namespace) -> int:
    from camoxpert.evaluation.ledger import comparable, read_ledger
    from camoxpert.pages import tables

    rows = [
        row
        for row in read_ledger(path)
        if (not options.dataset or row["dataset"] in options.dataset)
        and (not options.method or row["method"] in options.method)
    ]
    if not rows:
        raise DataError(f"The ledger {path} has no such rows.")
    rows = comparable(rows)
    keys = tuple(dict.fromkeys(key for row in rows for key in row["scores"]))
    unknown = [key for key in options.measures or () if key not in keys]
    if unknown:
        raise ConfigError(f"--measures: no row has {unknown[0]}; there are {', '.join(keys)}.")
    lines: list[tables.Row] = [
        {
            "dataset": row["dataset"],
            "method": row["method"],
            "num_images": row["num_images"],
            "scores": row["scores"],
        }
        for row in rows
    ]
    make = tables.FORMATS[options.format or "text"]
    console.say(make(lines, tuple(options.measures or keys)).rstrip("\n"))
    return 0
