"""``benchmark quality``: the decoders on your own data, each at its own best learning rate."""

from __future__ import annotations

import argparse
from pathlib import Path

from camoxpert import console, stop
from camoxpert.cli.outputs import check_folder
from camoxpert.cli.train import check_data_given
from camoxpert.config.flags import add_setting_flags, read_config
from camoxpert.errors import ConfigError

EXAMPLES = """examples:
  camoxpert benchmark quality --dataset-path DATA --epochs 20 --img-size 224 -o which_decoder
  camoxpert benchmark quality --dataset-path DATA --arms moe unet --seeds 3 \\
      --arm wide model.width=128 --rates 1e-3 3e-3"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags of the contest and those of all settings of ``train``."""
    parser.epilog = EXAMPLES
    group = parser.add_argument_group("contest")
    group.add_argument(
        "-o",
        "--output",
        metavar="DIR",
        default="quality",
        help="receives runs and tables [quality]",
    )
    group.add_argument(
        "--arms",
        nargs="+",
        metavar="NAME",
        help="decoders that take part, the first is compared with the others [all of moe, "
        "dense-active, dense-total, unet, fpn, deeplabv3plus, upernet, segformer]",
    )
    group.add_argument(
        "--arm",
        nargs="+",
        action="append",
        default=[],
        metavar=("NAME", "SETTING=VALUE"),
        help="one more arm: other settings than the rest",
    )
    group.add_argument(
        "--rates",
        nargs="+",
        type=float,
        metavar="RATE",
        help="peak learning rates each arm chooses from, on the validation split "
        "[3e-4 1e-3 3e-3 1e-2]",
    )
    group.add_argument("--seeds", type=int, default=5, help="final runs of each arm [5]")
    group.add_argument(
        "--search-seeds",
        type=int,
        default=1,
        help="runs with each rate; their mean chooses, where one may be a coin flip [1]",
    )
    group.add_argument(
        "--rounds", type=int, default=5, help="timed rounds of steps and inference [5]"
    )
    add_setting_flags(parser)


def run(options: argparse.Namespace, rest: list[str], typed: list[str]) -> int:
    """Train all arms, score them, print and write the tables."""
    if options.seeds < 1 or options.rounds < 1:
        raise ConfigError("--seeds and --rounds must be at least 1.")
    if not 1 <= options.search_seeds <= options.seeds:
        raise ConfigError("--search-seeds must be at least 1 and at most --seeds.")
    if options.rates is not None and min(options.rates) <= 0:
        raise ConfigError(f"--rates must be above 0; got {min(options.rates):g}.")
    arms = list(options.arms or [])
    settings = list(rest)
    # `--arms moe unet optim.betas=...`: the list swallows overrides.
    settings += [word for word in arms if "=" in word]
    config = read_config(options, settings)
    check_data_given(config)
    check_folder("-o", options.output)
    own = {name: overrides for name, *overrides in options.arm}
    from camoxpert.benchmark import quality, quality_report

    names = [word for word in arms if "=" not in word] or None
    rates = tuple(dict.fromkeys(options.rates or quality.RATES))
    seeds = range(config.train.seed, config.train.seed + options.seeds)
    contestants = quality.build_arms(config, names, own)
    for arm in contestants:
        console.say(
            f"{arm.name}: {arm.parameters / 1e6:.2f} M parameters, "
            f"{arm.cost.active / 1e9:.3f} GMACs an image"
        )
    folder = Path(options.output)
    folder.mkdir(parents=True, exist_ok=True)
    with stop.watch():
        results = quality.contest(
            contestants,
            folder / "runs",
            rates=rates,
            seeds=seeds,
            search_seeds=options.search_seeds,
            max_hours=config.train.max_hours,
        )
        console.say("timing steps and inference")
        costs = quality_report.measure_costs(contestants, rounds=options.rounds)
    entries = quality_report.summarise(results, costs)
    quality_report.write_quality(
        folder,
        entries,
        {
            "command": ["camoxpert", *typed],
            "backbone": config.model.backbone,
            "img_size": config.data.img_size,
            "epochs": config.train.epochs,
            "batch_size": config.train.batch_size,
            "rates": list(rates),
            "seeds": list(seeds),
            "search_seeds": options.search_seeds,
        },
    )
    console.say(f"tables and pictures: {folder}")
    return 0
