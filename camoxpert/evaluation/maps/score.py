"""Score prediction maps in worker processes; every map is checked and every error is listed."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import signal
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from camoxpert import console, stop
from camoxpert.data.files.image_io import MAX_PIXELS, read_levels, read_map
from camoxpert.data.files.labels import split_void
from camoxpert.errors import DataError
from camoxpert.evaluation.maps.find import MapJob, MapTask
from camoxpert.evaluation.options import ScoringOptions
from camoxpert.metrics import Evaluator
from camoxpert.metrics.scoring import ImageScore, score_image
from camoxpert.runtime.host import usable_cores
from camoxpert.text import bullet_list

CHUNK = 8
"""Images per message to a worker."""
FEW = 32
"""Up to this many images, starting workers costs more time than it saves."""
FULL_SCALE = (1, 255, 65535)


@dataclass(frozen=True)
class MapOptions(ScoringOptions):
    """How maps are scored.

    Attributes:
        resize: for maps of another size than their mask: "error" or "bilinear".
        gt_threshold: mask levels above it are object; None accepts two-level masks only.
        max_pixels: larger files are refused.
    """

    resize: str = "error"
    gt_threshold: int | None = None
    max_pixels: int = MAX_PIXELS


@dataclass(frozen=True)
class Fault:
    """Why an image could not be scored."""

    kind: str
    name: str


class GreyMaskError(DataError):
    """A mask with ambiguous levels; the text is the file and its levels."""


class Truth(NamedTuple):
    """A mask: where the object is, and where nobody labelled the pixel (None: nowhere)."""

    mask_HW: NDArray[np.bool_]
    void_HW: NDArray[np.bool_] | None = None


def read_truth(job: MapJob, options: MapOptions) -> Truth:
    """Return the mask of a job.

    Raises:
        DataError: the mask is unreadable.
        GreyMaskError: its levels are neither two unambiguous ones nor those of a label map.
    """
    stored = read_levels(job.mask, max_pixels=options.max_pixels)
    labels = stored.labels(job.mask) if options.gt_threshold is None else None
    if labels is not None:
        return Truth(*split_void(labels))
    return Truth(_read_grey(job, stored.levels, options))


def _read_grey(job: MapJob, levels: NDArray[Any], options: MapOptions) -> NDArray[np.bool_]:
    if levels.dtype == bool:
        return levels
    values = np.unique(levels)
    if len(values) <= 2 and set(values.tolist()) <= {0, *FULL_SCALE}:
        if len(values) == 2 and values[0] != 0:
            raise GreyMaskError(f"{job.mask} ({values[0]:g}, {values[1]:g})")
        return np.ascontiguousarray(levels > 0)
    shown = ", ".join(f"{value:g}" for value in values[:6]) + (", ..." if len(values) > 6 else "")
    if options.gt_threshold is None:
        raise GreyMaskError(f"{job.mask} ({shown})")
    cut = options.gt_threshold * (257 if values[-1] > 255 else 1)
    if 0 < values[-1] <= cut:
        raise DataError(
            f"{job.mask}: none of its levels ({shown}) is above --gt-threshold "
            f"{options.gt_threshold}, so no object would be left"
        )
    return np.ascontiguousarray(levels > cut)


def read_prediction(job: MapJob, shape: tuple[int, ...], options: MapOptions) -> NDArray[np.uint8]:
    """Return the map of a job, uint8 (H, W), resized to the mask's shape if the options say so."""
    prediction = read_map(job.map, max_pixels=options.max_pixels)
    if prediction.shape != shape and options.resize == "bilinear":
        size = (shape[1], shape[0])
        prediction = np.asarray(cv2.resize(prediction, size, interpolation=cv2.INTER_LINEAR))
    return prediction


def score_job(job: MapJob, options: MapOptions) -> ImageScore | Fault:
    """Read and score one pair of files; return a fault instead of raising it."""
    try:
        mask, void = read_truth(job, options)
    except GreyMaskError as error:
        return Fault(
            "masks with other levels than 0 and 255, or 0 and 1 (--gt-threshold 128 takes the "
            "levels above 128 as object)",
            str(error),
        )
    except DataError as error:
        return Fault("masks that are not usable", str(error))
    try:
        prediction = read_prediction(job, mask.shape, options)
    except DataError as error:
        return Fault("maps that are not usable", str(error))
    if prediction.shape != mask.shape:
        sizes = f"{prediction.shape[1]}x{prediction.shape[0]}, mask {mask.shape[1]}x{mask.shape[0]}"
        return Fault(
            "maps of another size than their mask (--resize bilinear resizes them)",
            f"{job.name} ({sizes})",
        )
    brightest = prediction.max()
    if options.protocol == "raw" and brightest == 1:
        return Fault(
            "maps that hold 0 and 1, nearly black under --protocol raw; save them as 0 and 255",
            job.name,
        )
    return score_image(
        job.name,
        prediction,
        mask,
        void_HW=void,
        group=job.group,
        protocol=options.protocol,
        empty_gt=options.empty_gt,
        keys=options.keys,
    )


def score_chunk(jobs: Sequence[MapJob], options: MapOptions) -> list[ImageScore | Fault]:
    """Score a few jobs; this is what a worker process runs."""
    return [score_job(job, options) for job in jobs]


def score_chunks(
    task: MapTask, options: MapOptions, num_workers: int
) -> Iterator[list[ImageScore | Fault]]:
    """Yield the scores of a task's images in order, chunk by chunk.

    Args:
        task: what to score.
        options: how to score it.
        num_workers: worker processes; 0 scores in this process, as does any number for few images.
    """
    work = partial(score_chunk, options=options)
    chunks = [task.jobs[i : i + CHUNK] for i in range(0, len(task.jobs), CHUNK)]
    parallel = num_workers > 0 and len(task.jobs) > FEW
    yield from _in_workers(work, chunks, num_workers) if parallel else map(work, chunks)


def score_task(
    task: MapTask, options: MapOptions, *, num_workers: int, label: str = "", max_faults: int = 100
) -> Evaluator:
    """Score one method on one data set.

    Args:
        task: what to score.
        options: how to score it.
        num_workers: worker processes; 0 scores in this process.
        label: shown before the progress bar.
        max_faults: number of faults after which the remaining images are not read.

    Raises:
        DataError: all faults found, by kind.
        Stopped: the command was asked to stop.
    """
    evaluator = options.evaluator()
    faults: list[Fault] = []
    results = score_chunks(task, options, num_workers)
    with console.progress(label or task.method, total=len(task.jobs)) as bar:
        for scores in results:
            stop.check()
            for score in scores:
                if isinstance(score, Fault):
                    faults.append(score)
                elif score.row["object_fraction"] == 0 and options.empty_gt == "skip":
                    evaluator.skip(score)
                else:
                    evaluator.add_score(score)
            bar.update(len(scores))
            if len(faults) >= max_faults:
                break
    if faults:
        raise DataError(_fault_list(task, faults, stopped=len(faults) >= max_faults))
    return evaluator


def _in_workers(
    work: Callable[[Sequence[MapJob]], list[ImageScore | Fault]],
    chunks: Sequence[Sequence[MapJob]],
    num_workers: int,
) -> Iterator[list[ImageScore | Fault]]:
    """Yield results in order; only a few chunks are queued, so that memory use stays constant."""
    # Not fork: the progress bar has a thread, and a lock held during the fork is never released.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(num_workers, mp_context=context, initializer=_start_worker)
    waiting: list[Future[list[ImageScore | Fault]]] = []
    todo = iter(chunks)
    try:
        # Workers inherit the blocked SIGINT until they ignore it themselves. A Ctrl-C during this
        # time is not lost: this process receives it after unblocking.
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            first = itertools.islice(todo, 4 * num_workers)
            waiting += [pool.submit(work, chunk) for chunk in first]
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        while waiting:
            result = waiting.pop(0).result()
            waiting += [pool.submit(work, chunk) for chunk in itertools.islice(todo, 1)]
            yield result
    except BrokenProcessPool as error:
        raise DataError(
            "A scoring process died, most likely out of memory. Use fewer --num-workers."
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _start_worker() -> None:
    # The terminal sends Ctrl-C to every process; only the main one handles it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    cv2.setNumThreads(1)
    threading.Thread(target=_follow_parent, daemon=True).start()


def _follow_parent() -> None:
    """Exit when the main process has exited, for whatever reason: nobody reads the results."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def choose_map_workers(asked: int | None) -> int:
    """Return the number of worker processes: as asked, or one per usable core, at most 8."""
    if asked is not None:
        return asked
    cores = usable_cores()
    return min(cores, 8) if cores > 1 else 0


def _fault_list(task: MapTask, faults: Sequence[Fault], *, stopped: bool) -> str:
    kinds: dict[str, list[str]] = defaultdict(list)
    for fault in faults:
        kinds[fault.kind].append(fault.name)
    lines = [
        f"{task.method} on {task.dataset} cannot be scored"
        + (f" (stopped after {len(faults)} faults):" if stopped else ":")
    ]
    for kind, names in kinds.items():
        lines.append(f"{len(names)} {kind}:")
        lines.append(bullet_list(names))
    return "\n".join(lines)
