"""``synthesize relight``: images in other light, with the masks of their sources."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from camoxpert import stop
from camoxpert.cli import generator, no_overrides
from camoxpert.errors import ConfigError

if TYPE_CHECKING:
    from camoxpert.synthesis.relight.draw import RelightSettings

EXAMPLES = """examples:
  camoxpert synthesize relight --dataset-path data/animals -o data/relit --per-image 4
  camoxpert synthesize relight --csv photos.csv --mask-source runs/NAME -o data/relit \\
      --num-samples 10000 --num-gpus 2 --test-data data/NC4K"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's flags."""
    parser.epilog = EXAMPLES
    sources = generator.add_source_flags(parser)
    sources.add_argument(
        "--depth-maps",
        metavar="DIR",
        help="depth maps of the images, larger is nearer, for their form [from the masks]",
    )
    sources.add_argument(
        "--depth-model",
        metavar="DIR",
        help="a folder with Depth-Anything-V2-Small (camoxpert[depth]), which estimates them",
    )
    images = parser.add_argument_group("images")
    images.add_argument("--per-image", type=int, metavar="K", help="lights of each source [4]")
    images.add_argument(
        "--num-samples", type=int, metavar="N", help="images in total, instead of --per-image"
    )
    images.add_argument(
        "--seed", type=generator.seed, default=0, help="equal seeds, equal images [0]"
    )
    images.add_argument(
        "--size",
        type=int,
        metavar="N",
        help="longer side of the images; larger sources are shrunk [as the sources]",
    )
    images.add_argument(
        "--format", choices=generator.FORMATS, default="jpg", help="of the images [jpg]"
    )
    light = parser.add_argument_group("light")
    light.add_argument(
        "--strength",
        type=float,
        default=1.0,
        help="how far the light departs from the image's own, 0 to 1.5 [1]",
    )
    light.add_argument(
        "--patterns",
        nargs="*",
        metavar="NAME",
        help="shadows of things out of the picture: blinds, leaves, window; none without a name "
        "[all three]",
    )
    light.add_argument(
        "--pattern-probability", type=float, metavar="P", help="of such a shadow [0.3]"
    )
    light.add_argument(
        "--range",
        nargs=3,
        action="append",
        default=[],
        metavar=("NAME", "LOW", "HIGH"),
        help="from where to where a number of the light is drawn, such as azimuth, elevation, key, "
        "temperature, softness, shadow",
    )
    generator.add_speed_flags(parser)
    generator.add_result_flags(parser)


def run(options: argparse.Namespace, rest: list[str], typed: list[str]) -> int:
    """Relight; sources that cannot be read are named at the end and give exit code 3."""
    no_overrides(rest)
    if options.per_image is not None and options.num_samples is not None:
        raise ConfigError("--per-image and --num-samples: give one of them.")
    for flag in ("per_image", "num_samples"):
        number = getattr(options, flag)
        if number is not None and number < 1:
            raise ConfigError(f"--{flag.replace('_', '-')} must be at least 1; {number} is not.")
    if options.depth_maps and options.depth_model:
        raise ConfigError("--depth-maps and --depth-model: give one of them.")
    if options.size is not None and options.size < 32:
        raise ConfigError(f"--size must be at least 32; {options.size} is not.")
    output = generator.check_output(options)
    settings = light_settings(options)
    from camoxpert.synthesis.relit import RelightOptions, relight_sources

    work = generator.work_options(options)
    wanted = RelightOptions(
        settings=settings,
        seed=options.seed,
        per_image=options.per_image or 4,
        num_samples=options.num_samples,
        size=options.size,
        image_format=options.format,
        depth_maps=options.depth_maps,
        depth_model=options.depth_model,
        cache=options.cache,
        cache_folder=generator.cache_folder(options) / "stages",
        strict_cache=options.strict_cache,
        page=options.page,
    )
    outcome = "What is done is written; run the same command again for the rest."
    with stop.watch(options.max_hours), stop.outcome(outcome):
        result = relight_sources(
            generator.source_options(options),
            generator.mask_options(options, work),
            output,
            wanted,
            work,
        )
    return generator.tell_result(result, output)


def light_settings(options: argparse.Namespace) -> RelightSettings:
    """Return what lights are drawn from.

    Raises:
        ConfigError: an unknown name, or a value out of range.
    """
    from camoxpert.synthesis.relight.draw import LIMITS, RelightSettings
    from camoxpert.text import did_you_mean

    values: dict[str, Any] = {"strength": options.strength}
    if options.patterns is not None:
        values["patterns"] = tuple(options.patterns)
        if not options.patterns:
            values["pattern_probability"] = 0.0
    if options.pattern_probability is not None:
        values["pattern_probability"] = options.pattern_probability
    for name, low, high in options.range:
        if name not in LIMITS:
            raise ConfigError(
                f"--range {name}: a light has no such number.{did_you_mean(name, LIMITS)} Choose "
                f"from {', '.join(LIMITS)}."
            )
        try:
            values[name] = (float(low), float(high))
        except ValueError:
            raise ConfigError(f"--range {name} takes two numbers, not {low} {high}.") from None
    return RelightSettings(**values)
