"""``benchmark``: ours against the baseline, both in one run, as ratios."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from camoxpert import console
from camoxpert.cli import no_overrides
from camoxpert.cli.outputs import check_file
from camoxpert.config.flags import add_flags
from camoxpert.errors import ConfigError

if TYPE_CHECKING:
    from camoxpert.benchmark.common import Report
    from camoxpert.benchmark.train import Subject

KINDS = {
    "metrics": "the metric engine against pysodmetrics",
    "moe": "the dispatch back ends against the per-image loop and one dense expert",
    "train": "the training step against the bare backbone's",
    "data": "loading and augmentation against the plain Dataset",
    "predict": "the inference engine against scripts that do one thing after the other",
    "relight": "relighting against a serial script with OpenCV and a ray march",
    "export": "the formats of one model (`benchmark export --help`)",
    "quality": "our decoder against others on your data (`benchmark quality --help`)",
}
EXAMPLES = """examples:
  camoxpert benchmark metrics -o metrics.json
  camoxpert benchmark train --backbone edgenext_base --batch-size 32 --precision bf16"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's flags."""
    parser.epilog = EXAMPLES
    parser.add_argument(
        "kind", choices=tuple(KINDS), help="; ".join(f"{k}: {v}" for k, v in KINDS.items())
    )
    parser.add_argument("-o", "--output", metavar="FILE", help="also write the figures as JSON")
    parser.add_argument("--rounds", type=int, default=7, help="timed rounds, interleaved [7]")
    metrics = parser.add_argument_group("metrics")
    metrics.add_argument("--pairs", type=int, default=12, help="pairs in memory [12]")
    metrics.add_argument(
        "--size",
        type=int,
        nargs=2,
        default=(768, 1024),
        metavar=("HEIGHT", "WIDTH"),
        help="of the pairs, of the JPEGs of data and predict [768 1024]",
    )
    metrics.add_argument(
        "--files",
        type=int,
        default=160,
        help="PNG pairs for the workers, 0 or at least 64 [160]",
    )
    data = parser.add_argument_group("data")
    data.add_argument(
        "--images", type=int, default=96, help="generated images; relight: at most 8 [96]"
    )
    data.add_argument("--num-workers", type=int, default=2, help="worker processes [2]")
    data.add_argument(
        "--no-step",
        dest="step",
        action="store_false",
        help="do not compare with the training step's need",
    )
    relight = parser.add_argument_group("relight")
    relight.add_argument("--side", type=int, default=512, help="of its square images [512]")
    relight.add_argument(
        "--retinex-side", type=int, default=1024, help="of the image of the Retinex alone [1024]"
    )
    experts = parser.add_argument_group("moe, train, data, predict; relight: --device")
    defaults = {"model.num_experts": 4, "model.backbone": "edgenext_small"}
    paths = ("train.device", "model.num_experts", "model.top_k", "model.width")
    add_flags(experts, paths, defaults=defaults)
    step = parser.add_argument_group("train, data, predict")
    add_flags(step, ("train.precision", "model.backbone", "data.img_size"), defaults=defaults)
    step.add_argument("--batch-size", type=int, default=8, help="images per step [8]")
    step.add_argument(
        "--busy",
        action="store_true",
        help="train on a CPU beside a busy process, with sleeping and with spinning threads",
    )


def run(options: argparse.Namespace, rest: list[str], typed: list[str]) -> int:
    """Measure, print and write."""
    if options.kind in ("export", "quality"):
        raise ConfigError(
            f"Write `{options.kind}` right behind `benchmark`: it has flags of its own."
        )
    no_overrides(rest)
    if options.rounds < 1 or options.pairs < 1 or min(options.size) < 32:
        raise ConfigError("--rounds and --pairs must be at least 1, --size at least 32.")
    if options.batch_size < 1:
        raise ConfigError("--batch-size must be at least 1.")
    if options.files < 0 or 0 < options.files < 64:
        raise ConfigError("--files must be 0 or at least 64: with fewer the start dominates.")
    check_file("-o", options.output)
    measure = {
        "metrics": _metrics,
        "moe": _moe,
        "train": _train,
        "data": _data,
        "predict": _predict,
        "relight": _relight,
    }[options.kind]
    write_figures(options.output, measure(options))
    return 0


def write_figures(file: str | None, figures: Report) -> None:
    """Write a report to ``-o FILE``, if given."""
    if file:
        from camoxpert.files import write_json

        write_json(Path(file), figures)
        console.say(f"figures: {file}")


def _metrics(options: argparse.Namespace) -> Report:
    from camoxpert.benchmark import metrics

    height, width = options.size
    return metrics.run(
        pairs=options.pairs,
        rounds=options.rounds,
        height=height,
        width=width,
        files=options.files,
    )


def _moe(options: argparse.Namespace) -> Report:
    from camoxpert.benchmark import moe
    from camoxpert.runtime.device import choose_device

    if not 1 <= options.top_k <= options.num_experts:
        raise ConfigError("--top-k must be between 1 and --num-experts.")
    return moe.run(
        device=choose_device(options.device),
        num_experts=options.num_experts,
        top_k=options.top_k,
        width=options.width,
        rounds=options.rounds,
    )


def _train(options: argparse.Namespace) -> Report:
    from camoxpert.benchmark import busy, train

    if options.busy:
        return busy.run(_subject(options), rounds=options.rounds)
    # On larger batches the loop takes minutes.
    with_loop = options.batch_size <= 64
    return train.run(_subject(options), rounds=options.rounds, with_loop=with_loop)


def _data(options: argparse.Namespace) -> Report:
    from camoxpert.benchmark import data, train

    if options.images < options.batch_size or options.num_workers < 0:
        raise ConfigError("--images must be at least --batch-size, --num-workers at least 0.")
    subject = _subject(options)
    height, width = options.size
    sizes = data.Sizes(
        images=options.images,
        height=height,
        width=width,
        img_size=options.img_size,
        batch_size=options.batch_size,
        num_workers=options.num_workers,
        rounds=options.rounds,
    )
    needed = train.images_per_second(subject, rounds=options.rounds) if options.step else None
    return data.run(sizes, device=subject.device, needed=needed)


def _predict(options: argparse.Namespace) -> Report:
    from camoxpert.benchmark import predict

    if options.images < options.batch_size:
        raise ConfigError("--images must be at least --batch-size.")
    subject = _subject(options)
    sizes = predict.Sizes(
        images=options.images,
        sizes=(tuple(options.size),),
        batch_size=options.batch_size,
        rounds=options.rounds,
    )
    return predict.run(
        subject.config,
        sizes,
        device=subject.device,
        precision=subject.precision,
        processes=subject.device.type == "cpu",
    )


def _relight(options: argparse.Namespace) -> Report:
    from camoxpert.benchmark import relight
    from camoxpert.runtime.device import choose_device

    if min(options.side, options.retinex_side) < 32:
        raise ConfigError("--side and --retinex-side must be at least 32.")
    sizes = relight.Sizes(
        images=min(options.images, 8),
        size=options.side,
        retinex_size=options.retinex_side,
        rounds=options.rounds,
    )
    return relight.run(sizes, device=choose_device(options.device))


def _subject(options: argparse.Namespace) -> Subject:
    """Return the step that is measured."""
    from camoxpert.benchmark.train import Subject
    from camoxpert.config import TrainConfig, load_config
    from camoxpert.runtime.device import choose_device, choose_precision

    config = load_config(
        overrides=[
            f"model.backbone={options.backbone}",
            "model.pretrained=false",
            f"model.num_experts={options.num_experts}",
            f"model.top_k={options.top_k}",
            f"model.width={options.width}",
            f"data.img_size={options.img_size}",
        ]
    )
    device = choose_device(options.device)
    precision = choose_precision(TrainConfig(precision=options.precision), device)
    return Subject(config, device, precision, options.batch_size)
