"""Flags and steps that ``synthesize relight`` and ``synthesize compose`` share."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from camoxpert import console
from camoxpert.cli import print_paragraph
from camoxpert.cli.outputs import check_folder
from camoxpert.config.flags import add_flags
from camoxpert.errors import ConfigError
from camoxpert.text import bullet_list, count

if TYPE_CHECKING:
    from camoxpert.inference.job import BatchResult
    from camoxpert.synthesis.job import Work
    from camoxpert.synthesis.masks import MaskOptions
    from camoxpert.synthesis.sources import SourceOptions

CACHES = ("auto", "disk", "none")
FORMATS = ("jpg", "png")


def add_source_flags(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """Declare where images and masks come from, and what keeps test images out."""
    group = parser.add_argument_group("sources")
    group.add_argument(
        "--dataset-path",
        "--csv",
        dest="roots",
        nargs="+",
        action="extend",
        default=[],
        metavar="DIR",
        help="data sets whose training images are used, or CSV files with the columns image and "
        "mask; with --mask-source folders of images will do",
    )
    group.add_argument(
        "--mask-source",
        default="gt",
        metavar="SOURCE",
        help="gt: the masks of the data; a run folder or .pt file: a model's masks; a folder of "
        "maps, cut at one half [gt]",
    )
    group.add_argument(
        "--test-data",
        nargs="+",
        action="extend",
        default=[],
        metavar="DIR",
        help="test sets, beside those of the data: no source may be one of their images",
    )
    group.add_argument(
        "--allow-test-sources",
        action="store_true",
        help="use test images as sources; the provenance says so",
    )
    add_flags(
        group,
        (
            *("data.layout", "data.noncam", "data.clean_list", "data.allow_outside"),
            *("data.resize", "data.max_pixels"),
        ),
    )
    return group


def seed(text: str) -> int:
    """Return the value of ``--seed``: 0 or more, as random generators want it."""
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text}: a seed is 0 or more")
    return value


def add_result_flags(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """Declare what is written."""
    group = parser.add_argument_group("results")
    group.add_argument(
        "-o",
        "--output",
        required=True,
        metavar="DIR",
        help="folder of the results: a data set for train, with its table, provenance and page",
    )
    group.add_argument(
        "--limit", type=int, metavar="N", help="make at most N of the images that are left"
    )
    group.add_argument("--overwrite", action="store_true", help="make images again that are there")
    group.add_argument(
        "--page",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="write synthesis.html, with before and after [on]",
    )
    add_flags(group, ("train.max_hours",))
    return group


def add_speed_flags(parser: argparse.ArgumentParser) -> None:
    """Declare how the work is done; none of it changes an image."""
    group = parser.add_argument_group("speed")
    group.add_argument(
        "--batch-size",
        default="8",
        metavar="N",
        help="images of a pass; auto: as many as fit and make it faster [8]",
    )
    group.add_argument(
        "--devices",
        default="auto",
        metavar="LIST",
        help="auto: --device, in this process; all; or a list such as 0,1 or cpu,cpu with a "
        "process for each [auto]",
    )
    group.add_argument(
        "--num-gpus", type=int, metavar="N", help="the same as --devices 0,1,...; 0: --device cpu"
    )
    group.add_argument(
        "--cache",
        choices=CACHES,
        default="auto",
        help="results of costly stages are kept on disk, by content; auto: where there is room "
        "[auto]",
    )
    add_flags(
        group,
        ("data.cache_dir", "data.strict_cache", "train.device", "train.precision"),
    )


def source_options(options: argparse.Namespace, *, needed: bool = True) -> SourceOptions:
    """Return where images come from.

    Args:
        options: as typed.
        needed: there must be a data set.

    Raises:
        ConfigError: no data set was given.
    """
    from camoxpert.data.files.manifest import Search, read_clean_list
    from camoxpert.synthesis.sources import GROUND_TRUTH, SourceOptions

    if needed and not options.roots:
        raise ConfigError(
            "No images to make others from: --dataset-path DIR names data sets, --csv FILE a table."
        )
    search = Search(
        options.layout,
        options.noncam,
        read_clean_list(options.clean_list),
        options.allow_outside,
        any_size=options.resize == "bilinear",
    )
    return SourceOptions(
        roots=options.roots,
        masks=options.mask_source == GROUND_TRUTH,
        test_roots=options.test_data,
        allow_test=options.allow_test_sources,
        search=search,
        max_pixels=options.max_pixels,
        cache=cache_folder(options) / "leaks",
    )


def mask_options(options: argparse.Namespace, work: Work) -> MaskOptions:
    """Return where masks come from."""
    from camoxpert.synthesis.masks import MaskOptions

    return MaskOptions(
        source=options.mask_source,
        folder=cache_folder(options) / "stages",
        devices=work.devices,
        device=work.device,
        precision=options.precision,
        batch_size=work.batch_size,
        max_pixels=options.max_pixels,
        strict=options.strict_cache,
    )


def work_options(options: argparse.Namespace) -> Work:
    """Return how the work is done.

    Raises:
        ConfigError: flags that contradict each other, or a device that does not exist.
    """
    from camoxpert.inference.devices import choose_devices
    from camoxpert.synthesis.job import Work

    text, device = options.devices, options.device
    if options.num_gpus is not None:
        if text != "auto":
            raise ConfigError(f"--num-gpus {options.num_gpus} and --devices {text}: give one.")
        if options.num_gpus < 0:
            raise ConfigError(f"--num-gpus must be at least 0; {options.num_gpus} is not.")
        text = ",".join(map(str, range(options.num_gpus))) or "auto"
        device = device if options.num_gpus else "cpu"
    devices = choose_devices(text)
    if devices and device != "auto":
        raise ConfigError(f"--device {device} and --devices {text}: give one of them.")
    if options.limit is not None and options.limit < 1:
        raise ConfigError(f"--limit must be at least 1; {options.limit} is not.")
    size = options.batch_size
    if size != "auto" and (not size.isdigit() or int(size) < 1):
        raise ConfigError(f"--batch-size must be auto or at least 1; {size!r} is neither.")
    return Work(
        batch_size=None if size == "auto" else int(size),
        devices=devices,
        device=device,
        overwrite=options.overwrite,
        limit=options.limit,
    )


def cache_folder(options: argparse.Namespace) -> Path:
    """Return the folder of all caches."""
    from camoxpert.data.cache.choice import default_folder

    return Path(options.cache_dir) if options.cache_dir else default_folder()


def check_output(options: argparse.Namespace) -> Path:
    """Return the folder of the results.

    Raises:
        ConfigError: it cannot be written.
    """
    check_folder("-o", options.output)
    return Path(options.output)


def tell_result(
    result: BatchResult, output: Path, broken: Sequence[tuple[object, str]] = ()
) -> int:
    """Print what was made and what was not; return the exit code.

    Args:
        result: of the job.
        output: its folder.
        broken: (source, reason) of sources that were left out before.
    """
    from camoxpert.synthesis.timetable import describe_stages

    there = f", {result.skipped} were there already" if result.skipped else ""
    if result.replaced:
        there += f"; the sources of {count(result.replaced, 'image')} had changed since"
    console.say(
        f"{count(result.done, 'image')} made{there}; `camoxpert train --dataset-path DATA "
        f"--synthetic {output}` mixes them with the real ones"
    )
    if result.summary:
        console.say(describe_stages(result.summary))
    failed = list(dict.fromkeys([*((str(p), r) for p, r in result.failed), *broken]))
    if failed:
        listed = bullet_list([f"{name}: {reason}" for name, reason in failed], 20)
        print_paragraph(
            f"{count(len(failed), 'source')} could not be used:\n{listed}", prefix="error: "
        )
        return 3
    return 0
