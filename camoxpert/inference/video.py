"""Predict videos: every frame, or every N-th, in order, into pictures or a video with their times.

A video is one item of the ledger: it is done when all of its frames are, and starts again from its
first frame after a stop. ``timestamps/NAME.csv`` is written last; without it nothing of a video
counts.
"""

from __future__ import annotations

import csv
import io
import os
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from camoxpert import console, stop
from camoxpert.errors import ConfigError, DataError
from camoxpert.files import UMASK, file_digest, write_whole
from camoxpert.inference.engine import Row
from camoxpert.inference.frames import BadVideo, Frame, FrameChunks, VideoFile, VideoWriter
from camoxpert.inference.ledger import FAILED, Ledger, as_fields, source_of
from camoxpert.inference.local import device_facts, find_batch_size, run_chunks
from camoxpert.inference.places import frame_files, times_path
from camoxpert.inference.plan import Plan, has_changed
from camoxpert.inference.prediction import PICTURES, Prediction, emptied, output_path
from camoxpert.inference.predictor import Predictor
from camoxpert.inference.score import enlarged
from camoxpert.inference.sources import Photo
from camoxpert.inference.timing import Timing
from camoxpert.inference.tta import Looked
from camoxpert.runs.jobs import ItemRow, JobSummary, WorkerSummary
from camoxpert.text import bullet_list

COLUMNS = ("frame", "pts", "seconds", "object_fraction", "confidence")
VIDEO_KINDS = (*PICTURES, "video")
"""What is written of a video."""


@dataclass(frozen=True)
class VideoOptions:
    """How videos are predicted.

    Attributes:
        every: the first of so many frames is predicted.
        smooth: weight of the past in the average of logits over time, 0 (off) to below 1.
        shows: what ``--save video`` shows: overlay or mask.
    """

    every: int = 1
    smooth: float = 0.0
    shows: str = "overlay"


def plan_videos(
    ledger: Ledger,
    videos: Sequence[Photo],
    kinds: Sequence[str],
    options: VideoOptions,
    *,
    overwrite: bool,
) -> Plan[Photo]:
    """Return which videos are left to do; see ``plan.make_plan``, which is called before.

    Raises:
        ConfigError: the folder holds the results of a video with other settings.
        DataError: it holds results of photos where the frames of a video would be written.
    """
    plan: Plan[Photo] = Plan()
    differing = []
    for video in videos:
        if any(name.startswith(f"{video.name}/") for name in ledger.index):
            raise DataError(
                f"{ledger.folder} holds results of photos in {video.name}/, where the frames of "
                f"{video.path} would be written. Name another folder with -o."
            )
        status = ledger.index.status(video.name)
        if overwrite or not status:
            plan.todo.append(video)
        elif status == FAILED:
            again = ledger.finished or has_changed(ledger, video)
            (plan.todo if again else plan.failed).append(video)
        elif has_changed(ledger, video):
            plan.todo.append(video)
            plan.replaced += 1
        else:
            row = ledger.row(video.name)
            for key in ("every", "smooth"):
                if row.get(key) != getattr(options, key):
                    differing.append(
                        f"{video.path}: --{key} {row.get(key)}, now {getattr(options, key)}"
                    )
            if _is_complete(ledger, video.name, row, kinds, options):
                plan.skipped += 1
            else:
                plan.todo.append(video)
    if differing:
        raise ConfigError(
            f"{ledger.folder} holds results of videos made with other settings:\n"
            f"{bullet_list(differing)}\nName another folder with -o, or add --overwrite to predict "
            "again."
        )
    return plan


def _is_complete(
    ledger: Ledger, name: str, row: ItemRow, kinds: Sequence[str], options: VideoOptions
) -> bool:
    """Return whether everything that a call wants of a video is there."""
    folder = ledger.folder
    if not ledger.index.has_kinds(name).issuperset(kinds):
        return False
    if not times_path(folder, name).is_file():
        return False
    for kind in kinds:
        if kind == "video":
            if row.get("shows") != options.shows or not output_path(folder, kind, name).is_file():
                return False
        else:
            there = {int(path.stem) for path in frame_files(folder, kind, name)}
            if there != _numbers(row["pictures"], options.every):
                return False
    return True


@dataclass(frozen=True)
class _FrameSample:
    """A frame that was converted: see ``engine.Sample``."""

    inputs: tuple[Tensor, ...]
    pixels: NDArray[np.uint8]
    seconds: dict[str, float]

    @property
    def held_bytes(self) -> int:
        """Memory until it is finished: pixels, what is shown, and the map at their size."""
        return 4 * self.pixels.nbytes


class FrameStages:
    """Finds the hidden objects in frames, smooths them over time, writes pictures.

    ``forward`` gets the frames in order. With ``smooth`` = a it returns the moving averages
    ``s_t = a s_(t-1) + (1 - a) z_t`` of the logits z; the first frame is its own average.

    Args:
        predictor: the model.
        output: folder of the results.
        kinds: pictures to write, and ``video``.
        threshold: probability above which a pixel is object.
        options: how videos are predicted.
        min_presence: maps of frames whose presence is lower are empty; None: every map stays.
    """

    def __init__(
        self,
        predictor: Predictor,
        output: Path,
        kinds: Sequence[str],
        threshold: float,
        options: VideoOptions,
        min_presence: float | None = None,
    ) -> None:
        self.predictor, self.output, self.threshold = predictor, output, threshold
        self.pictures = [kind for kind in kinds if kind in PICTURES]
        self.shows = options.shows if "video" in kinds else ""
        self.smooth, self.min_presence = options.smooth, min_presence
        self.device: torch.device = predictor.device
        self.models = 1
        self._past: Tensor | None = None
        self._past_presence: Tensor | None = None

    def restart(self) -> None:
        """Forget the frames of the last video."""
        self._past = self._past_presence = None

    def read(self, frame: Frame) -> _FrameSample:
        """Return a frame in the colours and size that the model takes."""
        started = time.monotonic()
        pixels = frame.pixels()
        prepared = self.predictor.prepare(pixels)
        return _FrameSample((prepared,), pixels, {"read": time.monotonic() - started})

    def forward(self, inputs: Tensor, samples: Sequence[_FrameSample] = ()) -> Looked:
        """Return float32 logits (B, 1, h, w) of the next frames, and with the head the presence
        (B,), both smoothed over time."""
        looked = self.predictor.look(inputs)
        if not self.smooth:
            return looked
        logits, presence = looked if isinstance(looked, tuple) else (looked, None)
        averages = self._smoothed(logits, self._past)
        self._past = averages[-1]
        if presence is None:
            return averages
        presences = self._smoothed(presence, self._past_presence)
        self._past_presence = presences[-1]
        return averages, presences

    def _smoothed(self, values: Tensor, past: Tensor | None) -> Tensor:
        """Return the moving averages of values in order, which begin with ``past``."""
        averages = []
        for one in values:
            past = one if past is None else self.smooth * past + (1 - self.smooth) * one
            averages.append(past)
        return torch.stack(averages)

    def finish(self, frame: Frame, sample: _FrameSample, outputs: list[Any]) -> Row:
        """Write the pictures of a frame and return what is known of it."""
        started = time.monotonic()
        height, width = sample.pixels.shape[:2]
        with torch.inference_mode():
            output = outputs[0]
            logits, seen = output if isinstance(output, tuple) else (output, None)
            map_HW = enlarged(logits, (height, width)).numpy()
        presence = None if seen is None else float(seen)
        map_HW = emptied(map_HW, presence, self.min_presence)
        found = Prediction(frame.name, sample.pixels, map_HW, 0.0, self.threshold, presence)
        enlarging = time.monotonic() - started
        found.save(self.output, self.pictures)
        shown = found.overlay() if self.shows == "overlay" else None
        if self.shows == "mask":
            shown = np.repeat(np.where(found.mask_HW, np.uint8(255), np.uint8(0))[..., None], 3, 2)
        return {
            "frame": frame,
            "shown": shown,
            **found.fields(),
            "seconds": {
                "enlarge": enlarging,
                "write": time.monotonic() - started - enlarging,
            },
        }

    def failed(self, frame: Frame, reason: str) -> Row:
        """Return the reason for which a frame, and so its video, failed."""
        return {"frame": frame, "reason": f"frame {frame.number}: {reason}", "seconds": {}}

    def example(self) -> Tensor:
        """Return a grey image."""
        side = self.predictor.img_size
        return torch.full((1, 3, side, side), 128, dtype=torch.uint8, device=self.device)


@dataclass
class _Totals:
    """Sums over the frames of a video."""

    pictures: int = 0
    height: int = 0
    width: int = 0
    object_fraction: float = 0.0
    confidence: float = 0.0
    presence: float | None = None
    seconds: dict[str, float] = field(default_factory=dict)

    def add(self, row: Row) -> None:
        """Add a frame."""
        self.pictures += 1
        self.height, self.width = row["height"], row["width"]
        self.object_fraction += row["object_fraction"]
        self.confidence += row["confidence"]
        if "presence" in row:
            self.presence = (self.presence or 0.0) + row["presence"]
        for stage, value in row["seconds"].items():
            self.seconds[stage] = self.seconds.get(stage, 0.0) + value


class VideoRun:
    """Predicts videos one after the other, on the predictor's device; see the module.

    Args:
        predictor: the model.
        output: folder of the results.
        kinds: pictures, and ``video``.
        threshold: probability above which a pixel is object.
        options: how videos are predicted.
        batch_size: frames of a forward pass; None chooses.
        min_presence: see ``FrameStages``.
    """

    def __init__(
        self,
        predictor: Predictor,
        output: Path,
        kinds: Sequence[str],
        threshold: float,
        options: VideoOptions,
        *,
        batch_size: int | None,
        min_presence: float | None = None,
    ) -> None:
        self.output, self.kinds, self.options = output, tuple(kinds), options
        self.max_pixels = predictor.max_pixels
        self.columns = (*COLUMNS, "presence") if predictor.has_presence else COLUMNS
        self.stages = FrameStages(predictor, output, kinds, threshold, options, min_presence)
        self._size, self._reason = find_batch_size(self.stages, batch_size)
        self._timing = Timing()

    def rows(self, videos: Sequence[Photo]) -> Iterator[Row]:
        """Yield the row of each video, with its files in place.

        Raises:
            DataError: outputs cannot be written.
            Stopped: the command was asked to stop.
        """
        for video in videos:
            before = source_of(video.path)
            head = {"item": video.name, "worker": str(self.stages.device)}
            try:
                digest = _digest_of(video.path) if before is not None else None
                facts = self._predict(video)
            except BadVideo as error:
                self._remove(video.name, keep=0)
                yield head | {"status": "failed", **as_fields(before), "reason": str(error)}
                continue
            unchanged = before if source_of(video.path) == before else None
            options: Row = {"every": self.options.every, "smooth": self.options.smooth}
            if "video" in self.kinds:
                options["shows"] = self.options.shows
            known = {"status": "ok", **as_fields(unchanged), "digest": digest}
            yield head | known | {"kinds": list(self.kinds)} | options | facts

    def summary(self) -> JobSummary:
        """Return where the time went, as plain values; images are frames."""
        self._timing.end()
        facts = device_facts(self.stages.device, self._size, self._reason)
        worker: WorkerSummary = {
            "worker": f"{self.stages.device}, frames of videos",
            **facts,
            **self._timing.summary(),
        }
        return {
            "engine": "local",
            "wall_seconds": worker["wall_seconds"],
            "model_loads": 1,
            "workers": [worker],
        }

    def _predict(self, video: Photo) -> Row:
        """Predict a video; return what its row says of it."""
        times = times_path(self.output, video.name)
        times.unlink(missing_ok=True)
        self.stages.restart()
        file, totals = VideoFile(video.path, max_pixels=self.max_pixels), _Totals()
        target = output_path(self.output, "video", video.name)
        writer = _open_writer(target, file) if "video" in self.kinds else None
        try:
            with closing(file):
                write_whole(times, lambda out: self._frames(video, file, out, totals, writer))
        except OSError as error:
            raise DataError(
                f"{times} could not be written: {error.strerror or error}. Make room; the same "
                "call does what is missing."
            ) from error
        finally:
            if writer is not None:
                writer.discard()
                writer.path.unlink(missing_ok=True)
        self._remove(video.name, keep=totals.pictures)
        count = totals.pictures
        return {
            "pictures": count,
            "height": totals.height,
            "width": totals.width,
            "object_fraction": totals.object_fraction / count,
            "confidence": totals.confidence / count,
            **({} if totals.presence is None else {"presence": totals.presence / count}),
            "seconds": {stage: value / count for stage, value in totals.seconds.items()},
        }

    def _frames(
        self,
        video: Photo,
        file: VideoFile,
        out: IO[bytes],
        totals: _Totals,
        writer: VideoWriter | None,
    ) -> None:
        """Predict all frames, and write their times into ``out``."""
        table = io.TextIOWrapper(out, encoding="utf-8", newline="", write_through=True)
        lines = csv.writer(table, lineterminator="\n")
        lines.writerow(self.columns)
        chunks = FrameChunks(file.frames(video.name, self.options.every), self._size)
        name = str(self.stages.device)
        expected = file.expected(self.options.every)
        with (
            closing(chunks),
            closing(run_chunks(self.stages, chunks, self._size, self._timing, name)) as results,
            console.progress(f"predict {video.path.name}", total=expected) as bar,
        ):
            for result in results:
                for row in result.rows:
                    if "reason" in row:
                        raise BadVideo(f"{video.path}: {row['reason']}")
                    totals.add(row)
                    lines.writerow(_cells(row))
                    if writer is not None:
                        writer.add(row["shown"], row["frame"].pts)
                bar.update(len(result.rows))
                stop.check()
        if writer is not None:
            writer.finish(totals.pictures)
            with stop.current().deferred():
                writer.path.chmod(0o666 & ~UMASK)
                writer.path.replace(output_path(self.output, "video", video.name))
        table.detach()

    def _remove(self, name: str, *, keep: int) -> None:
        """Remove frames that are not of the present run, or all; of a failed video everything."""
        numbers = _numbers(keep, self.options.every)
        for kind in (*PICTURES, "video"):
            if kind == "video":
                if not keep:
                    output_path(self.output, kind, name).unlink(missing_ok=True)
                continue
            if keep and kind not in self.kinds:
                continue
            for path in frame_files(self.output, kind, name):
                if int(path.stem) not in numbers:
                    path.unlink()


def _digest_of(path: Path) -> str:
    try:
        return file_digest(path)
    except OSError as error:
        raise BadVideo(f"{path} cannot be read: {error.strerror or error}.") from error


def _numbers(pictures: int, every: int) -> set[int]:
    """Return the numbers of the first frames that are predicted."""
    return {1 + n * every for n in range(pictures)}


def _open_writer(target: Path, file: VideoFile) -> VideoWriter:
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, path = tempfile.mkstemp(dir=target.parent, prefix=".", suffix=".tmp")
    os.close(handle)
    return VideoWriter(Path(path), rate=file.rate, time_base=file.time_base)


def _cells(row: Mapping[str, Any]) -> list[str]:
    frame: Frame = row["frame"]
    return [
        str(frame.number),
        "" if frame.pts is None else str(frame.pts),
        "" if frame.seconds is None else f"{frame.seconds:.6f}",
        f"{row['object_fraction']:.6f}",
        f"{row['confidence']:.4f}",
        *([f"{row['presence']:.4f}"] if "presence" in row else []),
    ]
