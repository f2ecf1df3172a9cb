"""``crossval``: train K folds, score every image by a model that never saw it, sum it up."""

from __future__ import annotations

import argparse
from pathlib import Path

from camoxpert import console, stop
from camoxpert.cli.outputs import check_folder
from camoxpert.cli.train import add_stages_flag, check_data_given, read_settings
from camoxpert.config.flags import OVERRIDE, add_setting_flags
from camoxpert.errors import ConfigError

EXAMPLES = """examples:
  camoxpert crossval --dataset-path DATA --folds 5 --epochs 60 -o cv/ours
  camoxpert crossval --dataset-path DATA --folds 5 --epochs 60 -o cv/ours --fold 2
  camoxpert crossval --dataset-path DATA --splits cv/ours/splits.json model.experts=hybrid \\
      -o cv/hybrid --compare-with cv/ours"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags of the folds and those of all settings of ``train``."""
    parser.epilog = EXAMPLES
    group = parser.add_argument_group("folds")
    group.add_argument(
        "-o",
        "--output",
        metavar="DIR",
        default="crossval",
        help="receives splits.json, a run folder for each fold, the summary and the maps "
        "[crossval]",
    )
    group.add_argument(
        "--folds",
        type=int,
        metavar="K",
        help="parts into which the images are divided; each is held out once [5]",
    )
    group.add_argument(
        "--repeats", type=int, metavar="R", help="divide R times, each time in another way [1]"
    )
    group.add_argument(
        "--leave-class-out",
        action="store_true",
        help="a fold for each class, which holds out all its images",
    )
    group.add_argument(
        "--compare-with",
        nargs="+",
        metavar="DIR",
        default=[],
        help="other methods that were cross-validated on the same splits: paired differences",
    )
    group.add_argument(
        "--summary-only",
        action="store_true",
        help="sum up the folds in the folder, train nothing; a missing fold is an error",
    )
    group.add_argument(
        "--dry-run", action="store_true", help="show the folds; train and write nothing"
    )
    add_stages_flag(parser)
    add_setting_flags(parser)


def run(options: argparse.Namespace, rest: list[str], typed: list[str]) -> int:
    """Train the folds that are not done, and write the summary when all are."""
    for flag, value, least in (("--folds", options.folds, 2), ("--repeats", options.repeats, 1)):
        if value is not None and value < least:
            raise ConfigError(f"{flag} must be at least {least}; got {value}.")
    if options.leave_class_out and (options.folds or options.repeats):
        given = "--folds" if options.folds else "--repeats"
        raise ConfigError(f"{given}: --leave-class-out has one fold for each class. Give one.")
    if options.summary_only and options.dry_run:
        raise ConfigError("--dry-run shows the folds and --summary-only their scores. Give one.")
    # `--compare-with A B optim.lr=1e-3`: the list of folders swallows the override.
    compared = [word for word in options.compare_with if not OVERRIDE.fullmatch(word)]
    rest = [*rest, *(word for word in options.compare_with if OVERRIDE.fullmatch(word))]
    config, chain, stages = read_settings(options, rest)
    for one in [stage.config for stage in stages] or [config]:
        check_data_given(one)
    check_folder("-o", options.output)
    from camoxpert.crossval import run as folds
    from camoxpert.crossval.collect import collect, missing_folds
    from camoxpert.crossval.opening import Division, describe, open_folder
    from camoxpert.crossval.report import write_summary
    from camoxpert.crossval.summary import summarise

    folder = Path(options.output)
    division = Division(options.folds, options.repeats, options.leave_class_out, config.data.splits)
    command = ["camoxpert", *typed]
    with stop.watch():
        found = open_folder(
            folder,
            config,
            division,
            chain=chain,
            write=not options.dry_run,
            train=not options.summary_only,
        )
        console.say(describe(found.splits))
        if options.dry_run:
            console.say("dry run     nothing was trained or written")
            return 0
        # Before hours of training: methods on other folds are refused at once.
        others = [collect(Path(other)) for other in compared]
        folds.require_same_splits(found, others)
        wanted = config.data.fold
        if not options.summary_only:
            every = range(1, found.splits.total + 1)
            folds.train_folds(found, every if wanted is None else [wanted], command)
        missing = missing_folds(folder, found.splits)
        if missing and wanted is not None and not options.summary_only:
            names = ", ".join(map(found.splits.name_of, missing))
            console.say(f"no summary yet: folds still to train: {names}")
            return 0
        collected = collect(folder)
        summary = summarise(collected, others, command=command)
        page = write_summary(folder, summary, collected, found.pool, several=found.several)
    console.say(f"report      {page}")
    return 0
