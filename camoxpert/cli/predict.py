"""``predict``: probability maps, masks, cut-outs and overlays of images at their original size."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from camoxpert import console, stop
from camoxpert.cli import no_overrides, print_paragraph
from camoxpert.cli.outputs import check_folder
from camoxpert.config.flags import add_flags
from camoxpert.errors import ConfigError, DataError
from camoxpert.files import why_missing
from camoxpert.text import count

if TYPE_CHECKING:
    from camoxpert.inference.photos import BatchResult
    from camoxpert.inference.predictor import Predictor
    from camoxpert.inference.sources import Photo

PICTURES = ("map", "mask", "cutout", "overlay")
KINDS = (*PICTURES, "coco", "labelme", "video")
EXAMPLES = """examples:
  camoxpert predict runs/NAME photos/ -o out
  camoxpert predict hf:USER/NAME@v1 photos/ -o out
  camoxpert predict runs/NAME 'photos/*.jpg' -o out --save mask overlay --threshold 0.4
  camoxpert predict runs/NAME large/ -o out --tile 1024 --overlap 0.25 --tta flip,scales
  camoxpert predict runs/NAME photos/ -o out --reference crab.jpg crab_mask.png
  camoxpert predict runs/NAME photos/ -o out --modality depth depth/ --modality thermal heat/
  camoxpert predict runs/NAME clip.mp4 -o out --save video --smooth 0.5
  find photos -name '*.jpg' -print0 | camoxpert predict runs/NAME - -o out"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's flags."""
    parser.epilog = EXAMPLES
    parser.add_argument(
        "checkpoint", nargs="?", help="a run folder (its best weights), a .pt file or hf:USER/NAME"
    )
    parser.add_argument(
        "inputs",
        nargs="*",
        help="images, videos, folders, globs, CSV or Parquet files; - for names on standard input",
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
        "annotations for COCO tools or labelme; of videos a video instead of or beside frames",
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
        "--min-presence",
        type=float,
        metavar="P",
        help="images that hold an object with a lower probability than P get an empty map and mask "
        "(models with the presence head) [none]",
    )
    parser.add_argument(
        "--tile",
        type=int,
        metavar="N",
        help="look at images larger than N px in windows of N px as well, for small objects",
    )
    parser.add_argument(
        "--overlap",
        type=float,
        metavar="F",
        help="share of a window of --tile that the next one covers too, 0 to 0.9 [0.25]",
    )
    parser.add_argument(
        "--tta",
        metavar="LIST",
        help="mean of several looks at each image: flip (mirrored too), scales (three sizes), or "
        "flip,scales; takes 2 to 6 times as long",
    )
    parser.add_argument(
        "--zoom",
        action="store_true",
        help="look at each image at 1 and about 1.5 times the model's size and join both; takes "
        "3.1 to 3.3 times the multiply-adds",
    )
    guidance = parser.add_argument_group("guidance, of models trained with --support-encoder")
    guidance.add_argument(
        "--reference",
        nargs=2,
        action="append",
        default=[],
        metavar=("IMG", "MASK"),
        help="an image and the mask of what to look for in it; repeat it for more: training shows "
        "up to data.episodes.shots (5) at a time",
    )
    guidance.add_argument(
        "--reference-class",
        metavar="NAME",
        help="look for a class of the training instead; needs no reference",
    )
    guidance.add_argument(
        "--support-weights",
        default="",
        metavar="FILE",
        help="weights of the support encoder, where the file of the training is not",
    )
    parser.add_argument(
        "--modality",
        nargs=2,
        action="append",
        default=[],
        metavar=("NAME", "DIR"),
        help="a folder of what another sensor saw of the photos, by their names (models trained "
        "with --modalities); a photo without a file is predicted from the rest",
    )
    parser.add_argument(
        "--every", type=int, default=1, metavar="N", help="of a video, predict every N-th frame [1]"
    )
    parser.add_argument(
        "--smooth",
        type=float,
        default=0.0,
        metavar="A",
        help="of a video, average the logits over time: A times the average so far + (1 - A) times "
        "the frame; 0 is off, 1 is not allowed [0]",
    )
    parser.add_argument(
        "--video-shows",
        choices=("overlay", "mask"),
        default="overlay",
        help="what the video of --save video shows [overlay]",
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="predict images again that have results"
    )
    parser.add_argument(
        "--engine",
        choices=("local", "ray"),
        default="local",
        help="ray: the work is done on a Ray cluster whose nodes share the folders [local]",
    )
    parser.add_argument(
        "--ray-address",
        metavar="ADDRESS",
        help="of the cluster; local starts one on this machine [auto]",
    )
    parser.add_argument(
        "--ray-actors",
        type=int,
        metavar="N",
        help="workers on the cluster [one per GPU, or per two cores]",
    )
    parser.add_argument(
        "--shard",
        metavar="I/N",
        help="predict part I of N, for jobs on several machines with a common -o; auto: from the "
        "variables of torchrun or SLURM",
    )
    parser.add_argument(
        "--merge", action="store_true", help="put the finished parts in -o together"
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
    if options.merge:
        return _merge(options)
    if options.checkpoint is None or not options.inputs:
        raise ConfigError("The model and at least one input are required: predict MODEL INPUT ...")
    batch_size = _batch_size(options.batch_size)
    _check_values(options)
    _check_references(options)
    check_folder("-o", options.output)
    from camoxpert.inference.devices import choose_devices
    from camoxpert.inference.frames import load_av, smoothing_weight
    from camoxpert.inference.photos import PhotoOptions, predict_photos
    from camoxpert.inference.predictor import load_for
    from camoxpert.inference.shards import choose_shard
    from camoxpert.inference.sources import look_for_photos
    from camoxpert.inference.video import VIDEO_KINDS, VideoOptions
    from camoxpert.inference.views import choose_views
    from camoxpert.models.modalities import require_known
    from camoxpert.models.zoom import describe_zoom

    views = choose_views(options.tile, options.overlap, options.tta)
    devices = choose_devices(options.devices)
    if devices and options.device != "auto":
        raise ConfigError(
            f"--device {options.device} and --devices {options.devices}: give one of them."
        )
    shard = None if options.shard is None else choose_shard(options.shard)
    _check_ray(options)
    video = VideoOptions(options.every, smoothing_weight(options.smooth), options.video_shows)
    output = Path(options.output)
    found = look_for_photos(
        options.inputs,
        allow_outside=options.allow_outside,
        output=output,
        column=options.column,
    )
    for note in found.notes:
        console.note(note)
    if found.videos:
        load_av()
        _check_videos(found.videos, found.photos, options, VIDEO_KINDS)
    elif "video" in options.save or video != VideoOptions():
        raise ConfigError(
            "--every, --smooth, --video-shows and --save video are for videos, and no input is one."
        )
    photos = [] if options.save == ["video"] else found.photos
    photos = _with_modalities(photos, found.videos, options)
    wanted = PhotoOptions(
        kinds=options.save,
        batch_size=batch_size,
        threshold=options.threshold,
        min_presence=options.min_presence,
        overwrite=options.overwrite,
        devices=devices,
        limit=options.limit,
        shard=shard,
        ray=(options.ray_address or "auto") if options.engine == "ray" else "",
        ray_actors=options.ray_actors,
        views=views,
        video=video,
        modalities=tuple(sorted(name for name, _ in options.modality)),
    )
    outcome = "What is done is written; run the same command again for the rest."
    with stop.watch(options.max_hours), stop.outcome(outcome):
        predictor = load_for(
            Path(options.checkpoint),
            ("cpu",) if wanted.ray else devices,
            device=options.device,
            precision=options.precision,
            max_pixels=options.max_pixels,
            zoom=options.zoom,
        )
        if options.min_presence is not None and predictor.has_presence:
            _note_calibration(predictor)
        if options.zoom:
            console.note(describe_zoom(predictor.config.data.img_size))
        _set_references(predictor, options)
        require_known(wanted.modalities, predictor.modalities)
        result = predict_photos(predictor, photos, output, wanted, found.videos)
    return _tell(result, options.output, "inputs" if found.videos else "images")


def _tell(result: BatchResult, output: str, what: str) -> int:
    """Print what was done and what was not; return the exit code."""
    from camoxpert.inference.timing import describe

    there = f", {result.skipped} were there already" if result.skipped else ""
    if result.replaced:
        there += f"; {result.replaced} photos had changed since"
    console.say(f"{result.done} {what} predicted{there}; results in {output}")
    if result.summary:
        console.say(describe(result.summary))
    if "videos" in result.summary:
        console.say(describe(result.summary["videos"]))
    if result.failed:
        _print_failed(result.failed)
        return 3
    return 0


def _check_references(options: argparse.Namespace) -> None:
    """Refuse references that are not there, before a model is loaded."""
    if options.reference and options.reference_class:
        raise ConfigError("--reference and --reference-class: give one of them.")
    if options.support_weights and not options.reference:
        raise ConfigError("--support-weights is of the encoder of --reference: give both.")
    for path in (path for pair in options.reference for path in pair):
        if not Path(path).is_file():
            raise DataError(f"--reference: {why_missing(path, 'file')}")


def _set_references(predictor: Predictor, options: argparse.Namespace) -> None:
    """Let a predictor search for what the references show, and say so."""
    from camoxpert.inference.references import decide_target

    if options.reference:
        images, masks = zip(*options.reference, strict=True)
        predictor.set_references(list(images), list(masks), weights=options.support_weights)
    elif options.reference_class:
        predictor.set_reference_class(options.reference_class)
    if predictor.target is not None:
        decide_target(predictor.target, predictor.support_cache)


def _with_modalities(
    photos: Sequence[Photo], videos: Sequence[Photo], options: argparse.Namespace
) -> list[Photo]:
    """Return the photos with the files of ``--modality``, and say how many have each."""
    folders = {name: Path(folder) for name, folder in options.modality}
    if len(folders) < len(options.modality):
        raise ConfigError("--modality: each name is given once, with one folder.")
    if not folders:
        return list(photos)
    if videos:
        raise ConfigError("--modality is for photos: predict the videos in another call.")
    from camoxpert.inference.aligned import with_files

    found, notes = with_files(photos, folders)
    for note in notes:
        console.note(note)
    return found


def _check_values(options: argparse.Namespace) -> None:
    """Raise ConfigError for a number out of its range."""
    for flag, value in (("threshold", options.threshold), ("min-presence", options.min_presence)):
        if value is not None and not 0 <= value <= 1:
            raise ConfigError(f"--{flag} must be between 0 and 1; {value:g} is not.")
    if options.limit is not None and options.limit < 1:
        raise ConfigError(f"--limit must be at least 1; {options.limit} is not.")
    if options.every < 1:
        raise ConfigError(f"--every must be at least 1; {options.every} is not.")


def _note_calibration(predictor: Predictor) -> None:
    """Warn of a least presence where the presence was not calibrated."""
    if not predictor.presence_is_calibrated:
        console.warn(
            "--min-presence: no images were set aside to calibrate the presence of this model, so "
            "its probabilities are those of the training data"
        )


def _check_ray(options: argparse.Namespace) -> None:
    """Refuse flags that say nothing together; look for Ray before the model is loaded."""
    if options.engine != "ray":
        if options.ray_address or options.ray_actors is not None:
            raise ConfigError("--ray-address and --ray-actors belong to --engine ray.")
        return
    if options.devices != "auto" or options.device != "auto":
        raise ConfigError(
            "With --engine ray the cluster's devices do the work: leave --device and --devices out."
        )
    if options.ray_actors is not None and options.ray_actors < 1:
        raise ConfigError(f"--ray-actors must be at least 1; {options.ray_actors} is not.")
    from camoxpert.inference.cluster import import_ray

    import_ray()


def _merge(options: argparse.Namespace) -> int:
    """Put the parts of a divided job together."""
    if options.checkpoint is not None or options.shard is not None:
        raise ConfigError("--merge takes only -o: the parts are what is in that folder.")
    from camoxpert.inference.prediction import KINDS as PICTURES
    from camoxpert.inference.shards import merge

    with stop.watch():
        done, failed = merge(Path(options.output), PICTURES)
    console.say(f"{done} images in {options.output}")
    if failed:
        _print_failed(failed)
        return 3
    return 0


def _print_failed(failed: Sequence[tuple[object, str]]) -> None:
    listed = "\n".join(f"  {name}: {reason}" for name, reason in failed)
    print_paragraph(
        f"{count(len(failed), 'image')} could not be predicted:\n{listed}", prefix="error: "
    )


def _check_videos(
    videos: Sequence[Photo],
    photos: Sequence[Photo],
    options: argparse.Namespace,
    video_kinds: Sequence[str],
) -> None:
    """Say or refuse what is not done with videos."""
    elsewhere = {
        "--devices": options.devices != "auto",
        "--engine ray": options.engine == "ray",
        "--shard": options.shard is not None,
    }
    for flag in (flag for flag, given in elsewhere.items() if given):
        raise ConfigError(
            f"{flag}: a video is predicted in order, in one process. Give videos such as "
            f"{videos[0].path} in calls of their own, with --device."
        )
    if options.tile is not None or options.tta:
        raise ConfigError(
            f"--tile and --tta are for images: {videos[0].path} is a video. Give videos in calls "
            "of their own, without them."
        )
    kinds: list[str] = options.save
    left = [kind for kind in kinds if kind not in video_kinds]
    if left == list(kinds):
        raise ConfigError(
            f"--save {' '.join(kinds)}: nothing of this is written for videos. Choose from "
            f"{', '.join(video_kinds)}."
        )
    if left:
        console.warn(f"videos get no {' and no '.join(left)}: these are for images")
    if list(kinds) == ["video"] and photos:
        console.warn(f"{count(len(photos), 'image')} are not predicted: --save video is for videos")


def _batch_size(text: str) -> int | None:
    """Return the value of --batch-size; None for auto."""
    if text == "auto":
        return None
    if not text.isdigit() or int(text) < 1:
        raise ConfigError(f"--batch-size must be auto or at least 1; {text!r} is neither.")
    return int(text)
