"""``evaluate``: the field's scores, of a checkpoint on data sets or of any model's prediction
maps."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from camoxpert import stop
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
        "--clean-list", default="", metavar="FILE", help="CSV of images to leave out (see doctor)"
    )
    model.add_argument(
        "--split", choices=("test", "train"), default="test", help="which split of DIR [test]"
    )
    model.add_argument(
        "--batch-size", type=int, default=8, help="images read at a time; changes no number [8]"
    )
    model.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N [auto]")
    model.add_argument("--precision", default="auto", help="auto, fp32, bf16 or fp16 [auto]")
    model.add_argument(
        "--allow-outside",
        action="store_true",
        help="a CSV may name files outside its own folder; only for a CSV you trust",
    )
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
    _check(options, typed)
    from camoxpert.evaluation.ledger import append_rows, check_ledger, ledger_row

    if options.ledger:
        check_ledger(Path(options.ledger))  # not after an hour of scoring
    of_maps = bool(options.predictions or options.list)
    with stop.watch(), stop.outcome("Nothing of the data set in progress was written."):
        results, output = (_maps if of_maps else _checkpoint)(options, typed, stop.check)
    _print(results, options.format)
    if options.format == "text":
        print(f"per image, curves and pictures: {output}")
    if options.ledger:
        append_rows(Path(options.ledger), [ledger_row(result) for result in results])
    return 0


OF_CHECKPOINTS = (
    "--data",
    "--layout",
    "--split",
    "--clean-list",
    "--allow-outside",
    "--batch-size",
    "--device",
    "--precision",
)
OF_MAPS = (
    *("--images", "--allow-missing", "--allow-extra", "--resize", "--gt-threshold", "--measures"),
)


def _check(options: argparse.Namespace, typed: Sequence[str]) -> None:
    """Raise ConfigError for flags that contradict each other."""
    if options.json:
        options.format = "json"
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
    flags = {word.partition("=")[0] for word in typed}
    for flag in OF_CHECKPOINTS if of_maps else OF_MAPS:
        if flag in flags:
            raise ConfigError(
                f"{flag} belongs to a checkpoint; here maps are scored."
                if of_maps
                else f"{flag} belongs to prediction maps; here a checkpoint is scored."
            )
    if options.gt_threshold is not None and not 0 <= options.gt_threshold <= 254:
        raise ConfigError("--gt-threshold must be in 0..254.")
    for path in options.data or ():
        if not Path(path).exists():
            raise DataError(f"--data: there is no file or folder {path}.")


def _maps(
    options: argparse.Namespace, typed: Sequence[str], check_stop: Callable[[], None]
) -> tuple[list[dict[str, Any]], Path]:
    """Score prediction maps. Nothing in here imports torch."""
    from camoxpert.evaluation.maps.evaluate import evaluate_maps
    from camoxpert.evaluation.maps.find import find_maps, find_masks, pair_maps
    from camoxpert.evaluation.maps.list import read_list
    from camoxpert.evaluation.maps.score import MapOptions, choose_map_workers
    from camoxpert.evaluation.output import OutputFolder

    keys = _measures(options.measures or ["default"])
    allowed = {"allow_missing": options.allow_missing, "allow_extra": options.allow_extra}
    notes: list[str] = []
    if options.list:
        sets, methods = read_list(Path(options.list), noncam=options.noncam)
        tasks = pair_maps(methods, sets, **allowed)
    else:
        sets = find_masks(
            [Path(path) for path in options.gt],
            images=[Path(path) for path in options.images or ()],
            noncam=options.noncam,
        )
        paths = [Path(path) for path in options.predictions]
        tasks = find_maps(paths, sets, say=notes.append, **allowed)
    if options.method:
        names = sorted({task.method for task in tasks})
        if len(names) > 1:
            raise ConfigError(f"--method names one method; there are {', '.join(names)}.")
        tasks = [replace(task, method=options.method) for task in tasks]
    notes += [note for mask_set in sets.values() for note in mask_set.notes]
    for note in notes:
        # Not on stdout: a table or JSON may be read from there.
        print(note, file=sys.stderr)
    settings = MapOptions(
        protocol=options.protocol,
        empty_gt=options.empty_gt,
        keys=keys,
        resize=options.resize,
        gt_threshold=options.gt_threshold,
    )
    with OutputFolder(Path(options.output) if options.output else None) as folder:
        results = evaluate_maps(
            tasks,
            settings,
            output=folder,
            num_workers=choose_map_workers(options.num_workers),
            gallery=options.gallery,
            intervals=not options.no_intervals,
            command=typed,
            check_stop=check_stop,
        )
        return results, folder.finish()


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
    if not wanted:
        raise ConfigError("--measures names none. Leave it out for the usual ones.")
    return tuple(key for key in KNOWN_KEYS if key in wanted)


def _checkpoint(
    options: argparse.Namespace, typed: Sequence[str], check_stop: Callable[[], None]
) -> tuple[list[dict[str, Any]], Path]:
    """Score a checkpoint on data sets."""
    from camoxpert.data.files.manifest import (
        Manifest,
        Search,
        find_test_sets,
        load_eval,
        read_clean_list,
    )
    from camoxpert.evaluation.model import evaluate_set
    from camoxpert.evaluation.results import write_tables
    from camoxpert.inference.predictor import load_predictor
    from camoxpert.metrics import RESULT_KEYS

    predictor = load_predictor(
        Path(options.checkpoint), device=options.device, precision=options.precision
    )
    clean = read_clean_list(options.clean_list)
    sets: dict[str, Manifest]
    if options.data:
        sets = {}
        for path in options.data:
            found = load_eval(
                path,
                Search(options.layout, options.noncam, clean, options.allow_outside),
                split=options.split,
            )
            for name, manifest in found.items():
                if name in sets:
                    raise DataError(
                        f"Two data sets are called {name}; score them in separate calls."
                    )
                sets[name] = manifest
    else:
        data = predictor.config.data
        # What the run was allowed counts for nothing: a checkpoint may come from anybody.
        sets = find_test_sets(
            data.roots, Search(data.layout, data.noncam, clean, options.allow_outside)
        )
        if not sets:
            raise DataError("The run's data has no test set beside it. Give one with --data DIR.")
    file = predictor.checkpoint.path
    # Of a run folder, or a checkpoint that somebody sent.
    run_dir = file.parent.parent if (file.parent.parent / "config.yaml").is_file() else None
    method = options.method or (run_dir.resolve().name if run_dir is not None else file.stem)
    output = Path(options.output) if options.output else run_dir or Path("evaluation", file.stem)
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
            method=method,
        )
        for name, manifest in sets.items()
    ]
    write_tables(output / "evaluation", results, RESULT_KEYS)
    return results, output / "evaluation"


def _print(results: Sequence[dict[str, Any]], form: str) -> None:
    from camoxpert.pages import tables

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
