"""``predict``: probability maps, masks, cut-outs and overlays of images at their original size."""

from __future__ import annotations

import argparse
from pathlib import Path

from camoxpert import console, stop
from camoxpert.cli import no_overrides, print_paragraph
from camoxpert.cli.outputs import check_folder
from camoxpert.config.flags import add_flags
from camoxpert.errors import ConfigError

PICTURES = ("map", "mask", "cutout", "overlay")
KINDS = (*PICTURES, "coco", "labelme")
EXAMPLES = """examples:
  camoxpert predict runs/NAME photos/ -o out
  camoxpert predict runs/NAME 'photos/*.jpg' -o out --save mask overlay --threshold 0.4
  find photos -name '*.jpg' -print0 | camoxpert predict runs/NAME - -o out"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's flags."""
    parser.epilog = EXAMPLES
    parser.add_argument("checkpoint", help="a run folder (its best weights) or a .pt file")
    parser.add_argument(
        "inputs",
        nargs="+",
        help="images, folders, globs, CSV or Parquet files; - for names on standard input",
    )
    parser.add_argument(
        "--column", metavar="NAME", help="of the images in CSV and Parquet files [image]"
    )
    parser.add_argument(
        "-o", "--output", required=True, metavar="DIR", help="folder of the results"
    )
    parser.add_argument(
        "--save",
        nargs="+",
        choices=KINDS,
        default=list(PICTURES),
        help="what to write: probability map, binary mask, RGBA cut-out, overlay [these four]; "
        "annotations for COCO tools or labelme",
    )
    parser.add_argument(
        "--batch-size",
        default="8",
        metavar="N",
        help="images per forward pass; auto: as many as fit and make it faster [8]",
    )
    parser.add_argument(
        "--devices",
        default="auto",
        metavar="LIST",
        help="auto: --device, in this process; all; or a list such as 0,1 or cpu,cpu with a "
        "process for each [auto]",
    )
    parser.add_argument(
        "--limit", type=int, metavar="N", help="predict at most N of the images, for a trial"
    )
    parser.add_argument(
        "--threshold", type=float, default=0.5, help="probability that counts as object [0.5]"
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="predict images again that have results"
    )
    add_flags(
        parser,
        (
            "data.allow_outside",
            "data.max_pixels",
            "train.device",
            "train.precision",
            "train.max_hours",
        ),
        defaults={"data.max_pixels": None},
    )


def run(options: argparse.Namespace, rest: list[str], typed: list[str]) -> int:
    """Predict; unreadable images are named at the end and give exit code 3."""
    no_overrides(rest)
    batch_size = _batch_size(options.batch_size)
    if not 0 <= options.threshold <= 1:
        raise ConfigError(f"--threshold must be between 0 and 1; {options.threshold:g} is not.")
    if options.limit is not None and options.limit < 1:
        raise ConfigError(f"--limit must be at least 1; {options.limit} is not.")
    check_folder("-o", options.output)
    from camoxpert.inference.devices import choose_devices
    from camoxpert.inference.photos import PhotoOptions, predict_photos
    from camoxpert.inference.predictor import load_predictor
    from camoxpert.inference.sources import look_for_photos
    from camoxpert.inference.timing import describe

    devices = choose_devices(options.devices)
    if devices and options.device != "auto":
        raise ConfigError(
            f"--device {options.device} and --devices {options.devices}: give one of them."
        )
    output = Path(options.output)
    found = look_for_photos(
        options.inputs,
        allow_outside=options.allow_outside,
        output=output,
        column=options.column,
    )
    for note in found.notes:
        console.note(note)
    wanted = PhotoOptions(
        kinds=options.save,
        batch_size=batch_size,
        threshold=options.threshold,
        overwrite=options.overwrite,
        devices=devices,
        limit=options.limit,
    )
    outcome = "What is done is written; run the same command again for the rest."
    with stop.watch(options.max_hours), stop.outcome(outcome):
        predictor = load_predictor(
            Path(options.checkpoint),
            # With a process for each device this one only reads the settings.
            device="cpu" if devices else options.device,
            precision=options.precision,
            max_pixels=options.max_pixels,
        )
        result = predict_photos(predictor, found.photos, output, wanted)
    there = f", {result.skipped} were there already" if result.skipped else ""
    if result.replaced:
        there += f"; {result.replaced} photos had changed since"
    console.say(f"{result.done} images predicted{there}; results in {options.output}")
    if result.summary:
        console.say(describe(result.summary))
    if result.failed:
        listed = "\n".join(f"  {path}: {reason}" for path, reason in result.failed)
        print_paragraph(
            f"{len(result.failed)} images could not be read:\n{listed}", prefix="error: "
        )
        return 3
    return 0


def _batch_size(text: str) -> int | None:
    """Return the value of --batch-size; None for auto."""
    if text == "auto":
        return None
    if not text.isdigit() or int(text) < 1:
        raise ConfigError(f"--batch-size must be auto or at least 1; {text!r} is neither.")
    return int(text)
