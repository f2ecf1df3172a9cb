"""Scoring any model's prediction maps: methods x data sets, tables, comparisons and one page."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from camoxpert import stop
from camoxpert.data.files.image_io import read_image, write_jpeg
from camoxpert.errors import DataError
from camoxpert.evaluation.gallery import FALSE_ALARM, MASK_SHARE, MISSED
from camoxpert.evaluation.maps.find import MapJob, MapTask
from camoxpert.evaluation.maps.score import MapOptions, read_prediction, read_truth, score_task
from camoxpert.evaluation.output import OutputFolder, write_evaluation
from camoxpert.evaluation.results import (
    EvaluationResult,
    MapSource,
    by_dataset,
    deciding_key,
    note_presence,
    note_void,
    ranked,
    summarise,
)
from camoxpert.metrics import HIGHER_IS_BETTER, Evaluator
from camoxpert.metrics.presence import are_stretched
from camoxpert.pages.pictures import comparison_panel
from camoxpert.runs.scores import GalleryEntry

METHODS_SHOWN = 5


def evaluate_maps(
    tasks: Sequence[MapTask],
    options: MapOptions,
    *,
    num_workers: int,
    output: OutputFolder | None = None,
    command: Sequence[str] = (),
) -> list[EvaluationResult]:
    """Score all tasks, then write everything into the unfinished ``output``.

    Nothing is written until the last image is scored.

    Args:
        tasks: methods and data sets.
        options: how to score them.
        num_workers: worker processes; 0 scores in this process.
        output: see ``evaluation.output``; None writes nothing.
        command: the command line, for the page.

    Returns:
        One result per method and data set.

    Raises:
        DataError: images cannot be scored; all of them are listed.
        Stopped: the command was asked to stop.
    """
    refuse_other_images(tasks)
    scored = []
    for number, task in enumerate(tasks, 1):
        started = time.monotonic()
        label = f"[{number}/{len(tasks)}] {task.method} on {task.dataset}"
        evaluator = score_task(task, options, num_workers=num_workers, label=label)
        source = MapSource(len(task.missing), len(task.extra), options.resize, options.gt_threshold)
        scored.append(
            summarise(
                evaluator,
                options,
                method=task.method,
                dataset=task.dataset,
                seconds=time.monotonic() - started,
                source=source,
            )
        )
        stop.check()
    for dataset, methods in by_dataset(scored).items():
        note_void(dataset, next(iter(methods.values())))
    note_presence(scored)
    if output is not None:
        gallery = write_gallery(output, tasks, by_dataset(scored), options)
        write_evaluation(output, scored, gallery, intervals=options.intervals, command=command)
    return [item.result for item in scored]


def refuse_other_images(tasks: Sequence[MapTask]) -> None:
    """Raise DataError if two methods have maps of different images of one data set.

    Possible only with ``--allow-missing``; the means would not be comparable.
    """
    for dataset in {task.dataset for task in tasks}:
        own = [task for task in tasks if task.dataset == dataset]
        if len({tuple(job.name for job in task.jobs) for task in own}) > 1:
            shown = ", ".join(f"{task.method} {len(task.jobs)}" for task in own)
            raise DataError(
                f"{dataset}: the methods have maps of different images ({shown}), so their scores "
                "are not comparable. Score each method in a separate call, or add the missing maps."
            )


def write_gallery(
    output: OutputFolder,
    tasks: Sequence[MapTask],
    scored: Mapping[str, Mapping[str, Evaluator]],
    options: MapOptions,
) -> list[GalleryEntry]:
    """Write panels of the best, worst and most disputed images of each data set.

    Best and worst are by the mean over methods; disputed by the spread between them. Images without
    an object, which many maps score alike, are none of these.
    """
    entries: list[GalleryEntry] = []
    files = output.picture_names(scored)
    for dataset, methods in scored.items() if options.gallery else ():
        key = deciding_key(options.keys)
        rows = [
            rows
            for rows in zip(*(e.rows() for e in methods.values()), strict=True)
            if rows[0]["object_fraction"] and not any(math.isnan(row[key]) for row in rows)
        ]
        names = [own[0]["name"] for own in rows]
        values_MN = np.array([[row[key] for row in own] for own in rows]).T
        shown = ranked(methods)[:METHODS_SHOWN]
        jobs = {
            task.method: {job.name: job for job in task.jobs}
            for task in tasks
            if task.dataset == dataset
        }
        chosen = [
            Shown(
                kind,
                names[index],
                key,
                dict(zip(methods, values_MN[:, index].tolist(), strict=True)),
            )
            for kind, indices in (_choose(values_MN, key, options.gallery) if names else {}).items()
            for index in indices
        ]
        ranks: Counter[str] = Counter()
        for one in [*chosen, *_of_the_other_kind(methods, options.gallery)]:
            ranks[one.kind] += 1
            own_jobs = {method: jobs[method][one.name] for method in shown}
            place = f"images/{files[dataset]}_{one.kind}_{ranks[one.kind]}.jpg"
            write_jpeg(output.unfinished / place, _panel(own_jobs, one, options))
            entries.append(
                {
                    "dataset": dataset,
                    "kind": one.kind,
                    "name": one.name,
                    "measure": one.measure,
                    "values": one.values,
                    "panel": place,
                }
            )
    return entries


def _column(
    methods: Iterable[str], values_MN: NDArray[np.float64], index: int | np.intp
) -> dict[str, float]:
    return dict(zip(methods, values_MN[:, index].tolist(), strict=True))


class Shown(NamedTuple):
    """An image of the gallery: why it is shown, and the value of each method in a measure."""

    kind: str
    name: str
    measure: str
    values: dict[str, float]


def _of_the_other_kind(methods: Mapping[str, Evaluator], size: int) -> list[Shown]:
    """Return the images without an object that have the largest masks, and the largest objects of
    which some method found nothing; none where every image has an object."""
    claims = {method: evaluator.claims() for method, evaluator in methods.items()}
    first = next(iter(claims.values()))
    if all(claim.present for claim in first.values()):
        return []
    if any(are_stretched(list(own.values())) for own in claims.values()):
        return []
    fractions = {row["name"]: row["object_fraction"] for row in next(iter(methods.values())).rows()}
    ranked_names: dict[str, list[tuple[float, str]]] = {FALSE_ALARM: [], MISSED: []}
    for name, claim in first.items():
        shares = [own[name].share for own in claims.values()]
        if claim.present and min(shares) == 0:
            ranked_names[MISSED].append((-fractions[name], name))
        elif not claim.present and max(shares) > 0:
            ranked_names[FALSE_ALARM].append((-sum(shares), name))
    return [
        Shown(kind, name, MASK_SHARE, {method: own[name].share for method, own in claims.items()})
        for kind, found in ranked_names.items()
        for _, name in sorted(found)[:size]
    ]


def _choose(values_MN: NDArray[np.float64], key: str, size: int) -> dict[str, NDArray[np.intp]]:
    """Return the positions of the images to show, by kind, from the scores of M methods."""
    order = np.argsort(values_MN.mean(0), kind="stable")
    order = order[::-1] if HIGHER_IS_BETTER[key] else order
    chosen = {"best": order[:size], "worst": order[::-1][:size]}
    if len(values_MN) > 1:
        chosen["disputed"] = np.argsort(-values_MN.std(0), kind="stable")[:size]
    return chosen


def _panel(jobs: Mapping[str, MapJob], shown: Shown, options: MapOptions) -> NDArray[np.uint8]:
    stretch = options.protocol == "pysod" and shown.measure != MASK_SHARE
    first = next(iter(jobs.values()))
    truth = read_truth(first, options)
    mask, image = truth.mask_HW, None
    if first.image is not None:
        try:
            image = read_image(first.image, apply_orientation=False)
        except DataError:
            image = None
        if image is not None and image.shape[:2] != mask.shape:
            image = None
    found = {}
    for method, job in jobs.items():
        prediction = read_prediction(job, mask.shape, options)
        low, high = int(prediction.min()), int(prediction.max())
        # As in the scores: above one half, of the stretched map under "pysod".
        cut = (low + high) / 2 if stretch and high > low else 127.5
        found[f"{method} {shown.values[method]:.2f}"] = prediction > cut
    return comparison_panel(image, mask, found, void_HW=truth.void_HW)
