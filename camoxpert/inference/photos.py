"""Predict folders of photos into pictures and a table; repeating a call finishes a stopped one."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from camoxpert import console, stop
from camoxpert.errors import CheckpointError, ConfigError, DataError
from camoxpert.files import write_json
from camoxpert.inference.aligned import planes_of
from camoxpert.inference.annotations import (
    begin_coco,
    join_coco,
    save_annotations,
)
from camoxpert.inference.cluster import RayEngine
from camoxpert.inference.devices import DeviceEngine
from camoxpert.inference.engine import Row
from camoxpert.inference.job import BatchResult, Engine, audit, do_items, joined_row
from camoxpert.inference.ledger import (
    LEDGER,
    RESULTS,
    Ledger,
    Source,
    as_fields,
    open_ledger,
    source_of,
)
from camoxpert.inference.local import LocalEngine
from camoxpert.inference.places import (
    require_no_frames,
    require_other_files,
    require_own_files,
)
from camoxpert.inference.plan import (
    Settings,
    digest_of,
    make_plan,
    merged_ledger,
    model_digest,
    not_merged,
    remove_unfinished,
    state_of,
)
from camoxpert.inference.prediction import (
    KINDS,
    PICTURES,
    PREDICTIONS,
    Prediction,
    emptied,
)
from camoxpert.inference.predictor import Predictor, load_predictor
from camoxpert.inference.references import Target
from camoxpert.inference.shards import Shard
from camoxpert.inference.sources import Photo, read_pixels
from camoxpert.inference.tta import Looked
from camoxpert.inference.values import finite_number
from camoxpert.inference.video import (
    VIDEO_KINDS,
    VideoOptions,
    VideoRun,
    plan_videos,
)
from camoxpert.inference.views import ONE_VIEW, ViewOptions
from camoxpert.text import did_you_mean

SUMMARY = "predict.json"
ORIGINAL = ("cutout", "overlay")
"""Pictures that show the photo."""
LONGEST_JPEG = 65_500
"""Pixels along a side that OpenCV writes."""


@dataclass(frozen=True)
class PhotoOptions:
    """What is written for each photo, and how.

    Attributes:
        kinds: files to write: map (probability, 0..255), mask (0 or 255), cutout (RGBA),
            overlay; annotations: coco, labelme.
        batch_size: images per forward pass; None chooses.
        threshold: probability above which a pixel is object, for mask and table.
        min_presence: maps of images whose presence is lower are empty; None: every map stays.
        overwrite: predict photos whose outputs exist again.
        devices: names of devices for worker processes; empty: the predictor's own device, in this
            process.
        shard: predict a part of the photos, with a ledger of its own; see ``shards``.
        ray: address of a Ray cluster that does the work; empty: this machine does.
        ray_actors: workers on the cluster; None: as many as it has GPUs, or pairs of cores.
        views: tiles and augmentation.
        limit: predict at most this many of the photos and videos that are left to do.
        video: how videos are predicted.
        modalities: names of what the photos come with beside themselves.
    """

    kinds: Sequence[str] = PICTURES
    batch_size: int | None = 8
    threshold: float = 0.5
    min_presence: float | None = None
    overwrite: bool = False
    devices: Sequence[str] = ()
    limit: int | None = None
    shard: Shard | None = None
    ray: str = ""
    ray_actors: int | None = None
    views: ViewOptions = ONE_VIEW
    video: VideoOptions = field(default_factory=VideoOptions)
    modalities: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for kind in self.kinds:
            if kind not in KINDS:
                raise ConfigError(
                    f"Unknown picture {kind!r}.{did_you_mean(kind, KINDS)} Choose from "
                    f"{', '.join(KINDS)}."
                )
        object.__setattr__(self, "threshold", finite_number("The threshold", self.threshold))
        if not 0 <= self.threshold <= 1:
            raise ConfigError(f"The threshold must be between 0 and 1; {self.threshold:g} is not.")
        for name, number in (("batch size", self.batch_size), ("limit", self.limit)):
            if number is not None and number < 1:
                raise ConfigError(f"The {name} must be at least 1; {number} is not.")


@dataclass(frozen=True)
class PhotoSample:
    """A photo that was read: see ``engine.Sample``.

    Attributes:
        inputs: of the network, uint8 (3, s, s): see ``views.Views``.
        size: (height, width) of the photo.
        pixels: uint8 RGB (H, W, 3), or None where no picture shows them.
        source: its file.
        digest: of its content.
        seconds: stage -> seconds.
        view_bytes: memory of inputs, logits and maps.
    """

    inputs: tuple[Tensor, ...]
    size: tuple[int, int]
    pixels: NDArray[np.uint8] | None
    source: Source | None
    digest: str | None
    seconds: dict[str, float]
    view_bytes: int

    @property
    def held_bytes(self) -> int:
        """Memory until it is finished: pixels, inputs, logits, and the map at the photo's size."""
        return self.view_bytes + (0 if self.pixels is None else self.pixels.nbytes)


class PhotoStages:
    """Reads photos, finds the hidden objects, writes pictures.

    Args:
        predictor: the model.
        output: folder of the results.
        kinds: pictures to write.
        threshold: probability above which a pixel is object.
        views: tiles and augmentation.
        min_presence: maps of images whose presence is lower are empty; None: every map stays.
    """

    def __init__(
        self,
        predictor: Predictor,
        output: Path,
        kinds: Sequence[str],
        threshold: float,
        views: ViewOptions = ONE_VIEW,
        min_presence: float | None = None,
    ) -> None:
        self.predictor, self.output = predictor, output
        self.kinds, self.threshold = tuple(kinds), threshold
        self.min_presence = min_presence
        self.views = predictor.views(views)
        self.device: torch.device = predictor.device
        self.models = 1

    def read(self, photo: Photo) -> PhotoSample:
        """Return the sample of a photo.

        Raises:
            DataError: it cannot be read.
        """
        started = time.monotonic()
        before = state_of(photo.files)
        limit = self.predictor.max_pixels
        pixels = read_pixels(photo, max_pixels=limit)
        if "overlay" in self.kinds and max(pixels.shape[:2]) > LONGEST_JPEG:
            raise DataError(
                f"{photo.path} is {max(pixels.shape[:2])} px long, and its overlay a JPEG, which "
                f"holds {LONGEST_JPEG} at most. Leave overlay out: --save map mask."
            )
        planes = planes_of(photo, self.predictor.modalities, pixels, max_pixels=limit)
        digest = digest_of(photo.files) if before is not None else None
        decoded = time.monotonic()
        inputs, size = self.views.inputs(pixels, planes), (pixels.shape[0], pixels.shape[1])
        return PhotoSample(
            inputs,
            size,
            pixels if set(self.kinds) & set(ORIGINAL) else None,
            # A file that changes while it is read has no known content.
            before if state_of(photo.files) == before else None,
            digest,
            {"read": decoded - started, "resize": time.monotonic() - decoded},
            self.views.held_bytes(inputs, size),
        )

    def forward(self, inputs: Tensor, samples: Sequence[PhotoSample] = ()) -> Looked:
        """Return float32 logits (B, 1, h, w) of prepared images, and with the head the presence."""
        return self.views.logits(inputs)

    def finish(self, photo: Photo, sample: PhotoSample, outputs: list[Any]) -> Row:
        """Write the pictures of a photo and return the fields of its row.

        Raises:
            DataError: they cannot be written.
        """
        started = time.monotonic()
        with torch.inference_mode():
            probability_HW = self.views.probability(outputs, sample.size).numpy()
        pixels = sample.pixels
        if pixels is None:
            pixels = np.empty((0, 0, 3), np.uint8)
        presence = self.views.presence(outputs)
        map_HW = emptied(probability_HW, presence, self.min_presence)
        found = Prediction(photo.name, pixels, map_HW, 0.0, self.threshold, presence)
        enlarging = time.monotonic() - started
        found.save(self.output, [kind for kind in self.kinds if kind in PICTURES])
        save_annotations(found, self.output, self.kinds, photo.path)
        return {
            "status": "ok",
            **as_fields(sample.source),
            "digest": sample.digest,
            "kinds": list(self.kinds),
            **found.fields(),
            "seconds": {
                "enlarge": enlarging,
                "write": time.monotonic() - started - enlarging,
            },
        }

    def failed(self, photo: Photo, reason: str) -> Row:
        """Return the fields of the row of a photo that failed."""
        return _failed(photo, reason)

    def example(self) -> Tensor:
        """Return a grey image."""
        side = max(self.views.sides)
        return torch.full((1, 3, side, side), 128, dtype=torch.uint8, device=self.device)


def _failed(photo: Photo, reason: str) -> Row:
    return {"status": "failed", **as_fields(source_of(photo.path)), "reason": reason}


@dataclass(frozen=True)
class PhotoSpec:
    """Builds ``PhotoStages`` in a worker process.

    Attributes:
        checkpoint: file of the model.
        model: its hash, so that all workers have the same one.
        precision, max_pixels, zoom: see ``load_predictor``.
        output, kinds, threshold, views, min_presence: see ``PhotoStages``.
        target: what to search for; None: any object.
    """

    checkpoint: str
    model: str
    precision: str
    max_pixels: int
    output: str
    kinds: tuple[str, ...]
    threshold: float
    views: ViewOptions = ONE_VIEW
    zoom: bool = False
    min_presence: float | None = None
    target: Target | None = None

    def build(self, device: str) -> PhotoStages:
        """Load the model on a device.

        Raises:
            CheckpointError: the file is not the model that the parent process read.
        """
        predictor = load_predictor(
            Path(self.checkpoint),
            device=device,
            precision=self.precision,
            max_pixels=self.max_pixels,
            zoom=self.zoom,
        )
        if model_digest(predictor.checkpoint) != self.model:
            raise CheckpointError(f"{self.checkpoint} changed while the run started. Start again.")
        predictor.search_for(self.target)
        return PhotoStages(
            predictor,
            Path(self.output),
            self.kinds,
            self.threshold,
            self.views,
            self.min_presence,
        )

    def failed(self, photo: Photo, reason: str) -> Row:
        """Return the fields of the row of a photo that no process could do."""
        return _failed(photo, reason)


def predict_photos(
    predictor: Predictor,
    photos: Sequence[Photo],
    output: Path,
    options: PhotoOptions,
    videos: Sequence[Photo] = (),
) -> BatchResult:
    """Predict every photo at its original size and write the outputs.

    Photos whose outputs are complete and up to date are skipped, so that the same call finishes a
    stopped one; see ``plan``. An unreadable photo is reported; the others are still predicted.

    Args:
        predictor: the model.
        photos: inputs.
        videos: inputs that are predicted after the photos; see ``video``.
        output: folder for ``maps/``, ``masks/``, ``cutouts/``, ``overlays/``, ``results.csv``,
            ``predictions.jsonl`` (see ``ledger``) and ``predict.json``.
        options: what to write, and how.

    Raises:
        ConfigError: the folder holds pictures made with other settings, or of unknown origin; or a
            tile is smaller than the network's input.
        DataError: an output would be written outside ``output``, or cannot be written; or photos
            have no row in the end.
        Stopped: the command was asked to stop.
    """
    predictor.check_min_presence(options.min_presence)
    settings = Settings(
        model=model_digest(predictor.checkpoint),
        checkpoint=os.path.abspath(predictor.checkpoint.path),
        img_size=predictor.img_size,
        precision=predictor.precision.name,
        threshold=options.threshold,
        zoom=predictor.zoom or None,
        presence=predictor.has_presence or None,
        min_presence=options.min_presence,
        reference=None if predictor.target is None else predictor.target.name,
        modalities=list(options.modalities) or None,
        **asdict(options.views),
    )
    views = predictor.views(options.views)
    shard, merged, whole = options.shard, 0, None
    if shard is not None:
        # All are divided and not what is left: that differs from moment to moment.
        own = photos = shard.part(photos)
        whole = merged_ledger(output, settings)
        if whole is not None and not options.overwrite:
            photos = not_merged(whole, own, options.kinds)
        merged = len(own) - len(photos)
    name = LEDGER if shard is None else shard.ledger
    with open_ledger(output, KINDS, name=name, table=RESULTS if shard is None else None) as ledger:
        if not ledger.finished and shard is None:
            remove_unfinished(output)
        again, kinds = options.overwrite, [kind for kind in options.kinds if kind != "video"]
        video_kinds = [kind for kind in options.kinds if kind in VIDEO_KINDS]
        require_other_files(output, photos, kinds, PREDICTIONS)
        require_no_frames(ledger, photos)
        for video in videos:
            require_own_files(ledger, video, video_kinds, overwrite=again)
        plan = make_plan(
            ledger, settings, photos, kinds, overwrite=again, others=videos, also=whole
        )
        films = plan_videos(ledger, videos, video_kinds, options.video, overwrite=again)
        wanted_items = len(plan.todo) + len(films.todo)
        if options.limit is not None:
            films.todo = films.todo[: max(0, options.limit - len(plan.todo))]
            plan.todo = plan.todo[: options.limit]
        # The annotations of parts are joined when the parts are.
        owed = "coco" in kinds or any("coco" in ledger.index.has_kinds(n) for n in ledger.index)
        joined = shard is None and begin_coco(output, wanted=owed, changes=bool(plan.todo))
        result = BatchResult(
            skipped=plan.skipped + films.skipped + merged,
            replaced=plan.replaced + films.replaced,
        )
        complete = False
        try:
            if plan.todo:
                views.decide()
                engine = _choose_engine(predictor, settings, output, options)
                if options.ray:
                    # Workers on other nodes have another working directory.
                    plan.todo = [anywhere(photo) for photo in plan.todo]
                do_items(engine, plan.todo, ledger, result, "predict")
                result.summary = engine.summary()
                if result.summary.get("deaths") and shard is None:
                    remove_unfinished(output)
            if films.todo:
                _work_on_videos(predictor, films.todo, ledger, video_kinds, options, result)
            # A part that was limited is not one that can be merged.
            complete = shard is None or len(plan.todo) + len(films.todo) == wanted_items
        finally:
            with stop.current().deferred():
                ledger.finish((item.name for item in (*photos, *videos)), complete=complete)
        audit(ledger, plan, result)
        audit(ledger, films, result)
        if joined:
            join_coco(output, ledger.rows())
    if result.summary:
        result.summary["settings"] = asdict(settings) | {"kinds": list(options.kinds)}
        name = SUMMARY if shard is None else f"predict.{shard.number}-of-{shard.of}.json"
        write_json(output / name, result.summary, durable=False)
    return result


def anywhere(photo: Photo) -> Photo:
    """Return a photo whose files are found from any working directory."""
    more = tuple((name, Path(os.path.abspath(path))) for name, path in photo.modalities)
    return Photo(Path(os.path.abspath(photo.path)), photo.name, more)


def _choose_engine(
    predictor: Predictor, settings: Settings, output: Path, options: PhotoOptions
) -> Engine:
    kinds = tuple(kind for kind in options.kinds if kind != "video")
    if not options.devices and not options.ray:
        stages = PhotoStages(
            predictor, output, kinds, options.threshold, options.views, options.min_presence
        )
        return LocalEngine(stages, batch_size=options.batch_size)
    spec = PhotoSpec(
        checkpoint=settings.checkpoint,
        model=settings.model,
        precision=settings.precision,
        max_pixels=predictor.max_pixels,
        output=os.path.abspath(output),
        kinds=kinds,
        threshold=options.threshold,
        views=options.views,
        zoom=predictor.zoom,
        min_presence=options.min_presence,
        target=predictor.target,
    )
    if options.ray:
        console.decide(
            "precision",
            f"{settings.precision} for all actors, as this machine's device decides; --precision "
            f"names another",
        )
        return RayEngine(
            spec,
            options.ray,
            batch_size=options.batch_size,
            output=output,
            actors=options.ray_actors,
        )
    return DeviceEngine(spec, options.devices, batch_size=options.batch_size)


def _work_on_videos(
    predictor: Predictor,
    videos: Sequence[Photo],
    ledger: Ledger,
    kinds: Sequence[str],
    options: PhotoOptions,
    result: BatchResult,
) -> None:
    """Predict videos; append the row of each when its files are in place."""
    run = VideoRun(
        predictor,
        ledger.folder,
        kinds,
        options.threshold,
        options.video,
        batch_size=options.batch_size,
        min_presence=options.min_presence,
    )
    for row in run.rows(videos):
        with stop.current().deferred():
            ledger.append([joined_row(row, ledger)])
        result.done += row["status"] == "ok"
        stop.check()
    summary = run.summary()
    result.summary = result.summary | {"videos": summary} if result.summary else summary
