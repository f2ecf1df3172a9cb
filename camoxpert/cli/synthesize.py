"""``synthesize toy``: pairs from nothing; ``relight`` and ``compose`` have modules of their own."""

from __future__ import annotations

import argparse
from pathlib import Path

from camoxpert import console
from camoxpert.cli import generator, no_overrides
from camoxpert.cli.outputs import check_folder
from camoxpert.errors import ConfigError, DataError

SENSORS = ("depth", "thermal")
KINDS = ("toy", "relight", "compose", "counterfactual")
EXAMPLES = """examples:
  camoxpert synthesize toy data/toy
  camoxpert synthesize toy data/scenes --referring --train 800
  camoxpert synthesize toy data/sensors --modalities depth thermal
  camoxpert synthesize toy data/tiny --train 1000 --size 160 --object-size 0.002 0.01 --seed 1"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's flags."""
    parser.epilog = EXAMPLES
    parser.add_argument(
        "kind",
        choices=KINDS,
        help="toy: generated textures and shapes. relight: your images in other light; compose: "
        "their objects before other backgrounds; counterfactual: your images without their "
        "objects: `camoxpert synthesize relight --help`, `camoxpert synthesize compose --help`, "
        "`camoxpert synthesize counterfactual --help`",
    )
    parser.add_argument("output", help="a new folder; gets TrainDataset/ and TestDataset/")
    parser.add_argument("--train", type=int, default=400, help="training pairs [400]")
    parser.add_argument("--test", type=int, default=80, help="test pairs [80]")
    parser.add_argument(
        "--negatives",
        type=int,
        default=0,
        help="scenes without an object, in Negatives/, for `train --negatives` [0]",
    )
    parser.add_argument("--size", type=int, default=96, help="side of the images in pixels [96]")
    parser.add_argument(
        "--difficulty", type=float, default=0.5, help="0 easy to see, 1 nearly invisible [0.5]"
    )
    parser.add_argument(
        "--object-size",
        type=float,
        nargs=2,
        metavar=("LOW", "HIGH"),
        help="share of the image that the object covers, for example 0.002 0.01 for 0.2 to 1 %%; "
        "unset: one or two objects of 3 to 20 %%",
    )
    parser.add_argument(
        "--referring",
        action="store_true",
        help="two objects of different kinds in every image, and a pair for each of them with the "
        "kind in its name: for models that are told by references which one to find",
    )
    parser.add_argument(
        "--modalities",
        nargs="+",
        choices=SENSORS,
        default=[],
        help="scenes that these sensors saw as well, for `train --modalities rgb ...`: each shows "
        "decoys of its own, so that none alone tells what is hidden",
    )
    parser.add_argument(
        "--seed", type=generator.seed, default=0, help="equal seeds, equal data [0]"
    )


def run(options: argparse.Namespace, rest: list[str], typed: list[str]) -> int:
    """Generate the data set."""
    no_overrides(rest)
    if options.kind != "toy":
        raise ConfigError(
            f"Name the kind before all flags: camoxpert synthesize {options.kind} ..."
        )
    if options.train < 1 or min(options.test, options.negatives) < 0 or options.size < 32:
        raise ConfigError(
            "--train must be at least 1, --test and --negatives at least 0 and --size at least 32."
        )
    if not 0 <= options.difficulty <= 1:
        raise ConfigError(f"--difficulty must be between 0 and 1; got {options.difficulty:g}.")
    if options.referring and (options.object_size or options.negatives):
        raise ConfigError(
            "--object-size and --negatives are of scenes with one object; --referring draws two."
        )
    if options.modalities and (options.object_size or options.negatives or options.referring):
        raise ConfigError(
            "--modalities makes scenes of its own: leave out --object-size, --negatives and "
            "--referring."
        )
    from camoxpert.synthesis.toy import check_object_size, generate_toy
    from camoxpert.synthesis.toy_modalities import generate_views
    from camoxpert.synthesis.toy_scenes import generate_scenes

    object_size = tuple(options.object_size) if options.object_size else None
    if object_size is not None:
        try:
            check_object_size(object_size, options.size)
        except ValueError as error:
            raise ConfigError(f"--object-size: {error}") from error
    output = Path(options.output)
    check_folder("OUTPUT", output)
    if output.exists() and any(output.iterdir()):
        raise DataError(
            f"{output} exists and is not empty; nothing is overwritten. Name a new folder."
        )
    common = {
        "num_train": options.train,
        "num_test": options.test,
        "size": options.size,
        "difficulty": options.difficulty,
        "seed": options.seed,
    }
    if options.modalities:
        # Each once, in a fixed order.
        chosen = [sensor for sensor in SENSORS if sensor in options.modalities]
        generate_views(output, chosen, **common)
    elif options.referring:
        generate_scenes(output, **common)
    else:
        generate_toy(output, object_size=object_size, num_negatives=options.negatives, **common)
    empty = f", {options.negatives} scenes without an object" if options.negatives else ""
    console.say(f"{options.train} training and {options.test} test pairs{empty} in {output}")
    return 0
