"""``evaluate``: the field's scores, of a checkpoint on data sets or of any model's prediction
maps."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from camoxpert.cli import no_overrides
from camoxpert.errors import ConfigError, DataError

EPILOG = """A checkpoint: camoxpert evaluate runs/NAME --data NC4K.
Maps: camoxpert evaluate --predictions maps/ours maps/other --gt NC4K/GT, where a method's folder
holds maps, or one folder of maps per data set. Nothing is matched silently: missing and extra maps,
other sizes, colour pictures and grey masks are errors that name the files."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's flags."""
    parser.epilog = EPILOG
    parser.add_argument(
        "checkpoint", nargs="?", help="a run folder (its best weights) or a .pt file"
    )
    model = parser.add_argument_group("scoring a checkpoint")
    model.add_argument(
        "--data", nargs="+", metavar="DIR", help="data sets to score; default: those of the run"
    )
    model.add_argument("--layout", default="auto", help="name of a known layout [auto]")
    model.add_argument(
        "--split", choices=("test", "train"), default="test", help="which split of DIR [test]"
    )
    model.add_argument(
        "--batch-size", type=int, default=8, help="images read at a time; changes no number [8]"
    )
    model.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N [auto]")
    model.add_argument("--precision", default="auto", help="auto, fp32, bf16 or fp16 [auto]")
    maps = parser.add_argument_group("scoring prediction maps")
    maps.add_argument(
        "--predictions", nargs="+", metavar="DIR", help="folders of maps, or of folders of maps"
    )
    maps.add_argument("--gt", nargs="+", metavar="DIR", help="masks, or data sets with masks")
    maps.add_argument(
        "--images", nargs="+", metavar="DIR", help="images for the pictures, one DIR for each --gt"
    )
    maps.add_argument("--list", metavar="FILE", help="YAML list of methods and data sets instead")
    maps.add_argument(
        "--allow-missing", action="store_true", help="leave out masks that have no map"
    )
    maps.add_argument("--allow-extra", action="store_true", help="leave out maps without a mask")
    maps.add_argument(
        "--resize",
        choices=("error", "bilinear"),
        default="error",
        help="maps of another size than their mask: refuse, or resize [error]",
    )
    maps.add_argument(
        "--gt-threshold",
        type=int,
        metavar="N",
        help="accept grey masks: levels above N (of 255) are the object",
    )
    maps.add_argument(
        "--measures",
        nargs="+",
        metavar="KEY",
        help="default, fast (without weighted F), all, or names: Smeasure BoundaryIoU HCE ...",
    )
    both = parser.add_argument_group("both")
    both.add_argument(
        "--noncam",
        choices=("exclude", "include"),
        default="exclude",
        help="COD10K images without a camouflaged object [exclude]",
    )
    both.add_argument(
        "-o", "--output", metavar="DIR", help="where results go [the run folder; evaluation]"
    )
    both.add_argument(
        "--format",
        choices=("text", "markdown", "latex", "csv", "json"),
        default="text",
        help="what is printed [text]",
    )
    both.add_argument("--json", action="store_true", help="same as --format json")
    both.add_argument(
        "--num-workers", type=int, help="worker processes [0; for maps one per core, at most 8]"
    )
    both.add_argument("--gallery", type=int, default=6, help="images of each kind kept [6]")
    both.add_argument(
        "--protocol",
        choices=("pysod", "raw"),
        default="pysod",
        help="pysod: every map stretched to 0..1 first, as the field does; raw: as predicted",
    )
    both.add_argument(
        "--empty-gt",
        choices=("pysod", "correct", "skip"),
        default="pysod",
        help="images without an object: as the field scores them, correctly, or left out",
    )
    both.add_argument(
        "--no-intervals", action="store_true", help="no confidence intervals, no comparisons"
    )
    both.add_argument(
        "--ledger", metavar="FILE", help="append the scores to this ledger (JSON lines)"
    )
    both.add_argument("--method", metavar="NAME", help="name in the ledger [the run or map folder]")


def run(options: argparse.Namespace, rest: list[str], typed: list[str]) -> int:
    """Evaluate, write and print."""
    no_overrides(rest)
    _check(options)
    from camoxpert.observe.ledger import append_rows, ledger_row, read_ledger
    from camoxpert.training.guards import StopFlag, watch

    if options.ledger and Path(options.ledger).exists():
        read_ledger(Path(options.ledger))  # not after an hour of scoring
    stop = StopFlag()

    def check_stop() -> None:
        if stop.code():
            raise stop.stopped("Nothing of the data set in progress was written.")

    with watch(stop):
        of_maps = bool(options.predictions or options.list)
        results, output = (_maps if of_maps else _checkpoint)(options, typed, check_stop)
    if options.ledger:
        rows = [ledger_row(result) for result in results]
        if options.method:
            rows = [{**row, "method": options.method} for row in rows]
        append_rows(Path(options.ledger), rows)
    _print(results, "json" if options.json else options.format)
    if options.format == "text" and not options.json:
        print(f"per image, curves and pictures: {output}")
    return 0


def _check(options: argparse.Namespace) -> None:
    """Raise ConfigError for flags that contradict each other."""
    if options.batch_size < 1 or (options.num_workers or 0) < 0 or options.gallery < 0:
        raise ConfigError(
            "--batch-size must be at least 1, --num-workers and --gallery at least 0."
        )
    of_maps = [f"--{name}" for name in ("predictions", "gt", "list") if getattr(options, name)]
    if options.checkpoint and of_maps:
        raise ConfigError(
            f"A checkpoint and {of_maps[0]} were given: score a checkpoint or prediction maps, "
            "one at a time."
        )
    if not options.checkpoint and not of_maps:
        raise ConfigError(
            "Give a checkpoint or run folder to score, or --predictions DIR with --gt DIR."
        )
    if options.list and (options.predictions or options.gt or options.images):
        raise ConfigError("--list names methods and data sets itself; leave the others out.")
    if bool(options.predictions) != bool(options.gt):
        raise ConfigError("--predictions and --gt belong together: maps and their masks.")
    if options.data and of_maps:
        raise ConfigError("--data belongs to a checkpoint; for maps the masks are --gt DIR.")
    if options.checkpoint and (options.measures or options.images):
        raise ConfigError("--measures and --images belong to prediction maps.")
    if options.gt_threshold is not None and not 0 <= options.gt_threshold <= 254:
        raise ConfigError("--gt-threshold must be in 0..254.")
    for path in options.data or ():
        if not Path(path).exists():
            raise DataError(f"--data: there is no file or folder {path}.")
    if options.method and len(options.predictions or ()) > 1:
        raise ConfigError("--method names one method; several folders are given.")


def _maps(
    options: argparse.Namespace, typed: Sequence[str], check_stop: Callable[[], None]
) -> tuple[list[dict[str, Any]], Path]:
    """Score prediction maps. Nothing in here imports torch."""
    from camoxpert.inference.evaluate_maps import evaluate_maps
    from camoxpert.inference.maps import find_maps, find_masks, pair_maps, read_list
    from camoxpert.inference.score_maps import MapOptions, choose_map_workers
    from camoxpert.observe.runlog import create_run_dir

    keys = _measures(options.measures or ["default"])
    allowed = {"allow_missing": options.allow_missing, "allow_extra": options.allow_extra}
    if options.list:
        sets, methods = read_list(Path(options.list))
        tasks = pair_maps(methods, sets, **allowed)
    else:
        sets = find_masks(
            [Path(path) for path in options.gt],
            images=[Path(path) for path in options.images or ()],
            noncam=options.noncam,
        )
        tasks = find_maps([Path(path) for path in options.predictions], sets, **allowed)
    quiet = options.json or options.format != "text"
    for mask_set in sets.values():
        for note in () if quiet else mask_set.notes:
            print(note)
    settings = MapOptions(
        protocol=options.protocol,
        empty_gt=options.empty_gt,
        keys=keys,
        resize=options.resize,
        gt_threshold=options.gt_threshold,
    )
    work = Path(options.output) if options.output else None
    if work is not None and work.exists() and not work.is_dir():
        raise ConfigError(f"--output {work} is a file.")
    import tempfile

    # Beside the final place, so that it can be moved there whole.
    parent = (work or Path("evaluation")).resolve().parent
    parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=parent, prefix=".evaluation-") as unfinished:
        results = evaluate_maps(
            tasks,
            settings,
            output=Path(unfinished),
            num_workers=choose_map_workers(options.num_workers),
            gallery=options.gallery,
            intervals=not options.no_intervals,
            command=typed,
            check_stop=check_stop,
        )
        output = work or create_run_dir(Path(), "evaluation")
        _move_into(Path(unfinished), output)
    return results, output


def _move_into(source: Path, target: Path) -> None:
    """Put finished results in place; files of an earlier evaluation with the same names go."""
    import shutil

    target.mkdir(parents=True, exist_ok=True)
    for path in sorted(source.iterdir()):
        old = target / path.name
        if old.is_dir():
            shutil.rmtree(old)
        path.replace(old)
    target.chmod(0o755)


def _measures(asked: Sequence[str]) -> tuple[str, ...]:
    from difflib import get_close_matches

    from camoxpert.metrics import FAST_KEYS, KNOWN_KEYS, RESULT_KEYS

    sets = {"default": RESULT_KEYS, "fast": FAST_KEYS, "all": KNOWN_KEYS}
    wanted: list[str] = []
    known = {name.lower(): name for name in KNOWN_KEYS}
    for name in (part for text in asked for part in text.split(",") if part):
        if name in sets:
            wanted += sets[name]
        elif name.lower() in known:
            wanted.append(known[name.lower()])
        else:
            close = get_close_matches(name.lower(), [*sets, *known], n=1)
            hint = f" Did you mean {known.get(close[0], close[0])}?" if close else ""
            raise ConfigError(
                f"--measures: unknown measure {name!r}.{hint} Known: default, fast, all, "
                f"{', '.join(KNOWN_KEYS)}."
            )
    return tuple(key for key in KNOWN_KEYS if key in wanted)


def _checkpoint(
    options: argparse.Namespace, typed: Sequence[str], check_stop: Callable[[], None]
) -> tuple[list[dict[str, Any]], Path]:
    """Score a checkpoint on data sets."""
    from camoxpert.data.manifest import find_test_sets, load_eval
    from camoxpert.inference.evaluate import evaluate_set
    from camoxpert.inference.predictor import load_predictor
    from camoxpert.inference.results import write_tables
    from camoxpert.metrics import RESULT_KEYS

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
    results = [
        evaluate_set(
            predictor,
            name,
            manifest,
            output=output,
            batch_size=options.batch_size,
            num_workers=options.num_workers or 0,
            gallery=options.gallery,
            protocol=options.protocol,
            empty_gt=options.empty_gt,
            intervals=not options.no_intervals,
            checkpoint_name=file.stem,
            check_stop=check_stop,
        )
        for name, manifest in sets.items()
    ]
    write_tables(output / "evaluation", results, RESULT_KEYS)
    return results, output / "evaluation"


def _print(results: Sequence[dict[str, Any]], form: str) -> None:
    from camoxpert.observe import tables

    keys = tuple(results[0]["scores"])
    if form == "json":
        by_method: dict[str, dict[str, Any]] = {}
        for result in results:
            by_method.setdefault(result["method"], {})[result["dataset"]] = result["scores"]
        only = next(iter(by_method.values()))
        print(json.dumps(only if len(by_method) == 1 else by_method, indent=1))
        return
    make = {
        "text": tables.text_table,
        "markdown": tables.markdown_table,
        "latex": tables.latex_table,
        "csv": tables.csv_table,
    }[form]
    print(make(results, keys).rstrip("\n"))
