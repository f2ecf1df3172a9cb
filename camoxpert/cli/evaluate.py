"""``evaluate``: the field's scores, of a checkpoint on data sets or of any model's prediction
maps."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from camoxpert import console, stop
from camoxpert.cli import no_overrides
from camoxpert.config.flags import add_flags
from camoxpert.errors import ConfigError, DataError
from camoxpert.files import why_missing

if TYPE_CHECKING:
    from camoxpert.evaluation.options import ShotOptions
    from camoxpert.evaluation.results import EvaluationResult

EXAMPLES = """A method's folder holds maps, or one folder of maps per data set. Nothing is matched
silently: missing and extra maps, other sizes, colour pictures and grey masks are errors that name
the files.

examples:
  camoxpert evaluate runs/NAME --data NC4K CHAMELEON --corruptions all --severity 1 3 5
  camoxpert evaluate --predictions maps/ours maps/other --gt NC4K/GT --ledger scores.jsonl"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's flags."""
    parser.epilog = EXAMPLES
    parser.add_argument(
        "checkpoint", nargs="?", help="a run folder (its best weights), a .pt file or hf:USER/NAME"
    )
    model = parser.add_argument_group("scoring a checkpoint")
    model.add_argument(
        "--data", nargs="+", metavar="DIR", help="data sets to score; default: those of the run"
    )
    add_flags(model, ("data.layout", "data.clean_list", "data.allow_outside"))
    model.add_argument(
        "--split",
        choices=("test", "val", "train"),
        default="test",
        help="which split of DIR [test]",
    )
    model.add_argument(
        "--batch-size", type=int, default=8, help="images read at a time; changes no number [8]"
    )
    add_flags(model, ("train.device", "train.precision", "data.unreadable"))
    model.add_argument(
        "--zoom",
        action="store_true",
        help="look at each image at 1 and about 1.5 times the model's size and join both; takes "
        "3.1 to 3.3 times the multiply-adds",
    )
    model.add_argument(
        "--corruptions",
        nargs="+",
        metavar="NAME",
        help="also score corrupted images: all, or noise blur motion fog brightness contrast jpeg "
        "pixelate [none]",
    )
    model.add_argument(
        "--severity",
        nargs="+",
        type=int,
        metavar="N",
        help="severities of the corruptions, 1 (mild) to 5 [all five]",
    )
    model.add_argument(
        "--shots",
        nargs="+",
        type=int,
        metavar="K",
        help="of a model trained with --support-encoder: also score with K references, training "
        "images of the same class, and with those of another class [none]",
    )
    model.add_argument(
        "--reference-data",
        nargs="+",
        metavar="DIR",
        help="data whose training images are the references of --shots [the run's]",
    )
    model.add_argument(
        "--support-weights",
        metavar="FILE",
        help="weights of the support encoder, where the file of the training is not",
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
        "--map-suffix",
        metavar="TEXT",
        help="what map names have behind the image's name, as _sal in 0001_sal.png [found by rule]",
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
    add_flags(both, ("data.noncam",))
    both.add_argument(
        "-o", "--output", metavar="DIR", help="folder of the results [the run folder; evaluation]"
    )
    both.add_argument(
        "--resize",
        choices=("error", "bilinear"),
        default="error",
        help="maps, or images, of another size than their mask: refuse, or resize [error]",
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
    outcome = "Nothing was written: results are put in place after the last image."
    with stop.watch(), stop.outcome(outcome):
        of_maps = bool(options.predictions or options.list)
        results, output = (_maps if of_maps else _checkpoint)(options, typed)
    _print(results, options.format)
    if options.format == "text":
        console.say(f"per image, curves and pictures: {output}")
    if options.ledger:
        append_rows(Path(options.ledger), [ledger_row(result) for result in results])
    return 0


def _print(results: Sequence[EvaluationResult], form: str) -> None:
    """Print the scores, and below them how images with and without an object are told apart where
    there are any without, the retention under corruptions where it was asked for and, of a single
    data set, what each expert was chosen for.

    JSON and CSV have the scores of presence beside the others. CSV is one table: with corruptions
    it has a line for each, the clean scores among them, and no presence. In JSON the retention is
    under ``robustness``.
    """
    from camoxpert.evaluation.published import published_rows
    from camoxpert.evaluation.results import by_method
    from camoxpert.pages.presence import presence_table, with_presence
    from camoxpert.pages.retention import RETENTION_FORMATS
    from camoxpert.pages.shots import SHOT_FORMATS
    from camoxpert.pages.subsets import SUBSET_FORMATS
    from camoxpert.pages.tables import FORMATS

    rows = [result.to_dict() for result in results]
    corrupted = [row for row in rows if "robustness" in row]
    keys = tuple(results[0].scores)
    if form == "json":
        scores: dict[str, Any] = dict(by_method(results))
        parts = {
            key: {row["dataset"]: row[key] for row in rows if row.get(key)}
            for key in ("robustness", "shots", "modalities")
        }
        if any(parts.values()):
            scores = {"scores": scores, **{key: part for key, part in parts.items() if part}}
        console.say(json.dumps(scores, indent=1))
        return
    if form == "csv" and not corrupted:
        rows = [with_presence(row) for row in rows]
        keys = tuple(dict.fromkeys(key for row in rows for key in row["scores"]))
    # For readers; files and the other formats hold what was measured.
    published = published_rows(results) if form == "text" else []
    tables = [] if corrupted and form == "csv" else [FORMATS[form]([*rows, *published], keys)]
    if form != "csv" and (text := presence_table(rows, form)):
        tables.append(text)
    if corrupted:
        tables.append(RETENTION_FORMATS[form](corrupted, keys))
    chosen = [row for row in rows if row.get("experts")] if form == "text" else []
    if len(chosen) == 1:
        from camoxpert.pages.experts import expert_text

        tables.append(expert_text(chosen[0]))
    guided = [row for row in rows if row.get("shots")]
    if guided and form in SHOT_FORMATS:
        tables.append(SHOT_FORMATS[form](guided))
    elif guided:
        console.note("the scores with references are in scores.json")
    sensed = [row for row in rows if row.get("modalities")]
    if sensed and form in SUBSET_FORMATS:
        tables.append(SUBSET_FORMATS[form](sensed))
    elif sensed:
        console.note("the scores of every subset of the modalities are in scores.json")
    console.say("\n\n".join(text.rstrip("\n") for text in tables))


OF_CHECKPOINTS = (
    "--data",
    "--layout",
    "--split",
    "--clean-list",
    "--allow-outside",
    "--no-allow-outside",
    "--batch-size",
    "--device",
    "--precision",
    "--unreadable",
    "--zoom",
    "--corruptions",
    "--severity",
    "--shots",
    "--reference-data",
    "--support-weights",
)
OF_MAPS = (
    *("--images", "--allow-missing", "--allow-extra", "--gt-threshold", "--measures"),
    "--map-suffix",
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
    if options.corruptions is not None or options.severity is not None:
        from camoxpert.evaluation.options import choose_corruptions

        choose_corruptions(options.corruptions or (), options.severity or ())
    _shots(options)
    for path in options.data or ():
        # Here, before torch is imported and a model is built.
        if not Path(path).exists():
            raise DataError(f"--data: {why_missing(path)}")


def _shots(options: argparse.Namespace) -> ShotOptions | None:
    from camoxpert.evaluation.options import choose_shots

    return choose_shots(
        options.shots or (),
        options.reference_data or (),
        options.support_weights or "",
        allow_outside=options.allow_outside,
    )


def _maps(options: argparse.Namespace, typed: Sequence[str]) -> tuple[list[EvaluationResult], Path]:
    """Score prediction maps. Nothing in here imports torch."""
    from camoxpert.evaluation.maps.evaluate import evaluate_maps
    from camoxpert.evaluation.maps.find import PairOptions, find_tasks
    from camoxpert.evaluation.maps.list import list_tasks
    from camoxpert.evaluation.maps.score import MapOptions, choose_map_workers
    from camoxpert.evaluation.options import choose_measures
    from camoxpert.evaluation.output import OutputFolder

    scoring = MapOptions(
        protocol=options.protocol,
        empty_gt=options.empty_gt,
        keys=choose_measures(options.measures or ["default"]),
        intervals=not options.no_intervals,
        gallery=options.gallery,
        resize=options.resize,
        gt_threshold=options.gt_threshold,
    )
    pairing = PairOptions(
        options.noncam,
        options.allow_missing,
        options.allow_extra,
        options.method or "",
        options.map_suffix,
    )
    # First of all: what cannot be written need not be scored.
    with OutputFolder(Path(options.output) if options.output else None, scoring) as folder:
        if options.list:
            tasks = list_tasks(Path(options.list), pairing)
        else:
            tasks = find_tasks(
                [Path(path) for path in options.predictions],
                [Path(path) for path in options.gt],
                pairing,
                images=[Path(path) for path in options.images or ()],
            )
        workers = choose_map_workers(options.num_workers)
        results = evaluate_maps(tasks, scoring, num_workers=workers, output=folder, command=typed)
        return results, folder.finish()


def _checkpoint(
    options: argparse.Namespace, typed: Sequence[str]
) -> tuple[list[EvaluationResult], Path]:
    """Score a checkpoint on data sets."""
    from camoxpert.data.files.manifest import Search, read_clean_list
    from camoxpert.evaluation.model import default_output, evaluate_model, find_sets
    from camoxpert.evaluation.options import ScoringOptions, choose_corruptions
    from camoxpert.evaluation.output import OutputFolder
    from camoxpert.inference.predictor import load_predictor
    from camoxpert.models.zoom import describe_zoom
    from camoxpert.runs.checkpoint import resolve_checkpoint

    file = resolve_checkpoint(Path(options.checkpoint))
    target = Path(options.output) if options.output else default_output(file)
    scoring = ScoringOptions(
        protocol=options.protocol,
        empty_gt=options.empty_gt,
        intervals=not options.no_intervals,
        gallery=options.gallery,
    )
    # First of all: what cannot be written need not be scored.
    with OutputFolder(target, scoring) as folder:
        predictor = load_predictor(
            file, device=options.device, precision=options.precision, zoom=options.zoom
        )
        if options.zoom:
            console.note(describe_zoom(predictor.config.data.img_size))
        search = Search(
            options.layout,
            options.noncam,
            read_clean_list(options.clean_list),
            options.allow_outside,
            any_size=options.resize == "bilinear",
        )
        sets = find_sets(predictor, options.data or (), search, split=options.split)
        results = evaluate_model(
            predictor,
            sets,
            scoring,
            method=options.method or "",
            batch_size=options.batch_size,
            num_workers=options.num_workers or 0,
            unreadable=options.unreadable,
            corruptions=choose_corruptions(options.corruptions or (), options.severity or ()),
            shots=_shots(options),
            output=folder,
            command=typed,
        )
        return results, folder.finish()
