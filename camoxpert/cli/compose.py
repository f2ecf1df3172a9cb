"""``synthesize compose``: objects before backgrounds that resemble them, with exact masks."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from camoxpert import stop
from camoxpert.cli import generator, no_overrides
from camoxpert.errors import ConfigError

if TYPE_CHECKING:
    from camoxpert.synthesis.compose.records import ComposeSettings

EXAMPLES = """examples:
  camoxpert synthesize compose --dataset-path data/animals -o data/composed --num-samples 600
  camoxpert synthesize compose --csv objects.csv --backgrounds photos/ -o data/composed \\
      --num-samples 10000 --difficulty 0.4 0.9 --decoys 0.15"""
RANGES = {
    "object_size": (0.0005, 0.6),
    "colour": (0.0, 1.0),
    "noise": (0.0, 50.0),
    "jpeg": (10.0, 100.0),
}
SHARES = ("gradient", "occluders", "distractors", "decoys")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's flags."""
    parser.epilog = EXAMPLES
    sources = generator.add_source_flags(parser)
    sources.add_argument(
        "--cutouts",
        nargs="+",
        action="extend",
        default=[],
        metavar="DIR",
        help="folders of RGBA pictures that give objects, beside or instead of data sets",
    )
    sources.add_argument(
        "--backgrounds",
        nargs="+",
        action="extend",
        default=[],
        metavar="DIR",
        help="folders of images, or data sets, whose objects are then left alone [the sources]",
    )
    images = parser.add_argument_group("images")
    images.add_argument(
        "--num-samples", type=int, metavar="N", help="images to make [one for each object]"
    )
    images.add_argument(
        "--seed", type=generator.seed, default=0, help="equal seeds, equal images [0]"
    )
    images.add_argument(
        "--size",
        type=int,
        default=352,
        metavar="N",
        help="longer side of the images; nothing is enlarged [352]",
    )
    images.add_argument(
        "--format", choices=generator.FORMATS, default="jpg", help="of the images [jpg]"
    )
    _add_composition_flags(parser)
    generator.add_speed_flags(parser)
    generator.add_result_flags(parser)


def _add_composition_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("composition")
    group.add_argument(
        "--difficulty",
        type=float,
        nargs="+",
        metavar="Q",
        help="distribution to come near to, as equally spaced quantiles: 0.7 is 0.7 always, "
        "0.4 0.9 is uniform between them; 0 easy to see, 1 like the surroundings [none]",
    )
    group.add_argument(
        "--object-size",
        type=float,
        nargs=2,
        metavar=("LOW", "HIGH"),
        help="share of the image that the object covers [half to 1.2 times what it covers in its "
        "own image; without one 0.01 0.2]",
    )
    group.add_argument(
        "--colour",
        type=float,
        nargs=2,
        default=[0.2, 1.0],
        metavar=("LOW", "HIGH"),
        help="how far the object takes the colours of its surroundings, 0 to 1 [0.2 1]",
    )
    group.add_argument(
        "--gradient", type=float, default=0.5, help="share blended in the gradient domain [0.5]"
    )
    group.add_argument(
        "--angle", type=float, default=15.0, help="largest rotation of an object, degrees [15]"
    )
    group.add_argument(
        "--occluders", type=float, default=0.3, help="share with something before the object [0.3]"
    )
    group.add_argument(
        "--distractors",
        type=float,
        default=0.1,
        help="share with a salient thing that is labelled background [0.1]",
    )
    group.add_argument(
        "--decoys",
        type=float,
        default=0.1,
        help="share without an object, where only the traces of an edit remain [0.1]",
    )
    group.add_argument(
        "--noise",
        type=float,
        nargs=2,
        default=[0.0, 4.0],
        metavar=("LOW", "HIGH"),
        help="of the sensor, grey levels, the same on object and background [0 4]",
    )
    group.add_argument(
        "--jpeg",
        type=int,
        nargs=2,
        default=[75, 96],
        metavar=("LOW", "HIGH"),
        help="quality of the compression, the same on both [75 96]",
    )
    group.add_argument(
        "--others",
        choices=("avoid", "keep"),
        default="avoid",
        help="objects that a background shows: cut a part without them, or keep and label them "
        "[avoid]",
    )


def run(options: argparse.Namespace, rest: list[str], typed: list[str]) -> int:
    """Compose; sources that cannot be read are named at the end and give exit code 3."""
    no_overrides(rest)
    _check(options)
    output = generator.check_output(options)
    from camoxpert.synthesis.composed import ComposeOptions, compose_sources

    work = generator.work_options(options)
    wanted = ComposeOptions(
        settings=composition_settings(options),
        seed=options.seed,
        num_samples=options.num_samples,
        image_format=options.format,
        cutouts=options.cutouts,
        backgrounds=options.backgrounds,
        cache_folder=cache_folder(options),
        strict_cache=options.strict_cache,
        page=options.page,
    )
    sources = generator.source_options(options, needed=not options.cutouts)
    outcome = "What is done is written; run the same command again for the rest."
    with stop.watch(options.max_hours), stop.outcome(outcome):
        result = compose_sources(
            sources, generator.mask_options(options, work), output, wanted, work
        )
    return generator.tell_result(result.images, output, result.broken)


def cache_folder(options: argparse.Namespace) -> Path | None:
    """Return the folder of the descriptions of sources."""
    return None if options.cache == "none" else generator.cache_folder(options) / "compose"


def composition_settings(options: argparse.Namespace) -> ComposeSettings:
    """Return what compositions are drawn from."""
    from camoxpert.synthesis.compose.records import ComposeSettings

    return ComposeSettings(
        size=options.size,
        object_size=tuple(options.object_size) if options.object_size else None,
        angle=options.angle,
        colour=tuple(options.colour),
        gradient=options.gradient,
        occluders=options.occluders,
        distractors=options.distractors,
        edits=options.decoys,
        noise=tuple(options.noise),
        jpeg=tuple(options.jpeg),
        difficulty=None if options.difficulty is None else tuple(options.difficulty),
        others=options.others,
    )


def _check(options: argparse.Namespace) -> None:
    """Raise ConfigError for a value out of range."""
    if options.num_samples is not None and options.num_samples < 1:
        raise ConfigError(f"--num-samples must be at least 1; {options.num_samples} is not.")
    if options.size < 32:
        raise ConfigError(f"--size must be at least 32; {options.size} is not.")
    if not 0 <= options.angle <= 180:
        raise ConfigError(f"--angle must be in 0 to 180; {options.angle:g} is not.")
    for name in SHARES:
        value = getattr(options, name)
        if not 0 <= value <= 1:
            raise ConfigError(f"--{name} must be between 0 and 1; {value:g} is not.")
    for name, (least, most) in RANGES.items():
        if getattr(options, name) is None:
            continue
        low, high = getattr(options, name)
        if not least <= low <= high <= most:
            raise ConfigError(
                f"--{name.replace('_', '-')} takes two numbers in {least:g} to {most:g}, the "
                f"smaller one first; got {low:g} {high:g}."
            )
    wanted = options.difficulty or []
    if any(not 0 <= value <= 1 for value in wanted) or sorted(wanted) != wanted:
        shown = " ".join(f"{value:g}" for value in wanted)
        raise ConfigError(f"--difficulty takes rising numbers between 0 and 1; got {shown}.")
