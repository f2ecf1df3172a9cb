"""``evaluate``: a checkpoint's scores on data sets, as a table and as JSON."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from camoxpert.cli import no_overrides
from camoxpert.errors import ConfigError, DataError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's flags."""
    parser.add_argument("checkpoint", help="a run folder (its best weights) or a .pt file")
    parser.add_argument(
        "--data", nargs="+", metavar="DIR", help="data sets to score; default: those of the run"
    )
    parser.add_argument("--layout", default="auto", help="name of a known layout [auto]")
    parser.add_argument(
        "--noncam",
        choices=("exclude", "include"),
        default="exclude",
        help="COD10K images without a camouflaged object [exclude]",
    )
    parser.add_argument(
        "--split", choices=("test", "train"), default="test", help="which split of DIR [test]"
    )
    parser.add_argument("-o", "--output", metavar="DIR", help="where results go [the run folder]")
    parser.add_argument("--json", action="store_true", help="print JSON instead of the table")
    parser.add_argument("--batch-size", type=int, default=8, help="images per forward pass [8]")
    parser.add_argument("--num-workers", type=int, default=0, help="data worker processes [0]")
    parser.add_argument("--gallery", type=int, default=6, help="best and worst images kept [6]")
    parser.add_argument(
        "--protocol",
        choices=("pysod", "raw"),
        default="pysod",
        help="pysod: every map stretched to 0..1 first, as the field does; raw: as predicted",
    )
    parser.add_argument(
        "--empty-gt",
        choices=("pysod", "correct", "skip"),
        default="pysod",
        help="images without an object: as the field scores them, correctly, or left out",
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N [auto]")
    parser.add_argument("--precision", default="auto", help="auto, fp32, bf16 or fp16 [auto]")


def run(options: argparse.Namespace, rest: list[str], typed: list[str]) -> int:
    """Evaluate and print."""
    no_overrides(rest)
    if options.batch_size < 1 or options.num_workers < 0 or options.gallery < 0:
        raise ConfigError(
            "--batch-size must be at least 1, --num-workers and --gallery at least 0."
        )
    for path in options.data or ():
        if not Path(path).exists():
            raise DataError(f"--data: there is no file or folder {path}.")
    from camoxpert.data.manifest import find_test_sets, load_eval
    from camoxpert.inference.evaluate import evaluate_set, score_table
    from camoxpert.inference.predictor import load_predictor
    from camoxpert.metrics import RESULT_KEYS
    from camoxpert.training.guards import StopFlag, watch

    predictor = load_predictor(
        Path(options.checkpoint), device=options.device, precision=options.precision
    )
    if options.data:
        sets = {}
        for path in options.data:
            found = load_eval(
                path, layout=options.layout, noncam=options.noncam, split=options.split
            )
            for name, manifest in found.items():
                if name in sets:
                    raise DataError(
                        f"Two data sets are called {name}; score them in separate calls."
                    )
                sets[name] = manifest
    else:
        data = predictor.config.data
        sets = find_test_sets(data.roots, layout=data.layout, noncam=data.noncam)
        if not sets:
            raise DataError("The run's data has no test set beside it. Give one with --data DIR.")
    file = predictor.checkpoint.path
    output = Path(options.output) if options.output else file.parent.parent
    stop = StopFlag()

    def check_stop() -> None:
        if stop.code():
            raise stop.stopped("Finished data sets are written, the one in progress is not.")

    with watch(stop):
        results = [
            evaluate_set(
                predictor,
                name,
                manifest,
                output=output,
                batch_size=options.batch_size,
                num_workers=options.num_workers,
                gallery=options.gallery,
                protocol=options.protocol,
                empty_gt=options.empty_gt,
                checkpoint_name=file.stem,
                check_stop=check_stop,
            )
            for name, manifest in sets.items()
        ]
    if options.json:
        print(json.dumps({r["dataset"]: r["scores"] for r in results}, indent=1))
    else:
        print(score_table(results, RESULT_KEYS))
        print(f"per image, curves and pictures: {output / 'evaluation'}")
    return 0
