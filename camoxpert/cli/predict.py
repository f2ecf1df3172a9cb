"""``predict``: probability maps, masks, cut-outs and overlays of images at their original size."""

from __future__ import annotations

import argparse
from pathlib import Path

from camoxpert import console, stop
from camoxpert.cli import no_overrides, print_paragraph
from camoxpert.cli.outputs import check_folder
from camoxpert.config.flags import add_flags
from camoxpert.errors import ConfigError

KINDS = ("map", "mask", "cutout", "overlay")
EXAMPLES = """examples:
  camoxpert predict runs/NAME photos/ -o out
  camoxpert predict runs/NAME 'photos/*.jpg' -o out --save mask overlay --threshold 0.4"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's flags."""
    parser.epilog = EXAMPLES
    parser.add_argument("checkpoint", help="a run folder (its best weights) or a .pt file")
    parser.add_argument("inputs", nargs="+", help="images, folders, globs or CSV (column image)")
    parser.add_argument(
        "-o", "--output", required=True, metavar="DIR", help="folder of the results"
    )
    parser.add_argument(
        "--save",
        nargs="+",
        choices=KINDS,
        default=list(KINDS),
        help="what to write: probability map, binary mask, RGBA cut-out, overlay [all]",
    )
    parser.add_argument("--batch-size", type=int, default=8, help="images per forward pass [8]")
    parser.add_argument(
        "--threshold", type=float, default=0.5, help="probability that counts as object [0.5]"
    )
    parser.add_argument(
        "--zoom",
        action="store_true",
        help="look at each image at 1 and about 1.5 times the model's size and join both; takes "
        "3.1 to 3.3 times the multiply-adds",
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="predict images again that have results"
    )
    add_flags(
        parser,
        ("data.allow_outside", "data.max_pixels", "train.device", "train.precision"),
        defaults={"data.max_pixels": None},
    )


def run(options: argparse.Namespace, rest: list[str], typed: list[str]) -> int:
    """Predict; unreadable images are named at the end and give exit code 3."""
    no_overrides(rest)
    if options.batch_size < 1 or not 0 <= options.threshold <= 1:
        raise ConfigError("--batch-size must be at least 1 and --threshold between 0 and 1.")
    check_folder("-o", options.output)
    from camoxpert.inference.photos import PhotoOptions, predict_photos
    from camoxpert.inference.predictor import load_predictor
    from camoxpert.inference.sources import look_for_photos
    from camoxpert.models.zoom import describe_zoom

    output = Path(options.output)
    found = look_for_photos(options.inputs, allow_outside=options.allow_outside, output=output)
    for note in found.notes:
        console.note(note)
    wanted = PhotoOptions(options.save, options.batch_size, options.threshold, options.overwrite)
    outcome = "What is done is written; run the same command again for the rest."
    with stop.watch(), stop.outcome(outcome):
        predictor = load_predictor(
            Path(options.checkpoint),
            device=options.device,
            precision=options.precision,
            max_pixels=options.max_pixels,
            zoom=options.zoom,
        )
        if options.zoom:
            console.note(describe_zoom(predictor.config.data.img_size))
        result = predict_photos(predictor, found.photos, output, wanted)
    there = f", {result.skipped} were there already" if result.skipped else ""
    if result.replaced:
        there += f"; {result.replaced} photos had changed since"
    console.say(f"{result.done} images predicted{there}; results in {options.output}")
    if result.failed:
        listed = "\n".join(f"  {path}: {reason}" for path, reason in result.failed)
        print_paragraph(
            f"{len(result.failed)} images could not be read:\n{listed}", prefix="error: "
        )
        return 3
    return 0
