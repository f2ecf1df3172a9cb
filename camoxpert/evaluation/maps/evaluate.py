"""Scoring any model's prediction maps: methods x data sets, tables, comparisons and one page."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from camoxpert.console import bar
from camoxpert.data.files.image_io import read_image, write_jpeg
from camoxpert.errors import DataError
from camoxpert.evaluation import results as reporting
from camoxpert.evaluation.maps.find import MapTask
from camoxpert.evaluation.maps.score import MapOptions, read_prediction, read_truth, score_task
from camoxpert.evaluation.output import MARKER, OutputFolder
from camoxpert.files import write_json
from camoxpert.metrics import HIGHER_IS_BETTER, Evaluator
from camoxpert.pages.evaluation import write_page
from camoxpert.pages.pictures import comparison_panel
from camoxpert.runs.info import versions

METHODS_SHOWN = 5


def evaluate_maps(
    tasks: Sequence[MapTask],
    options: MapOptions,
    *,
    output: OutputFolder,
    num_workers: int,
    gallery: int,
    intervals: bool,
    command: Sequence[str],
    check_stop: Callable[[], None] = lambda: None,
) -> list[dict[str, Any]]:
    """Score all tasks, then write everything into the unfinished ``output``.

    It gets scores.json, scores.csv, scores.md, scores.tex, per_image/, curves/, gallery/
    and report.html. Nothing is written before the last image was scored.

    Returns:
        One result per method and data set.

    Raises:
        DataError: an image cannot be scored; all faults are listed.
    """
    refuse_other_images(tasks)
    scored: dict[str, dict[str, Evaluator]] = {}
    found = []
    for number, task in enumerate(tasks, 1):
        started = time.monotonic()
        label = f"[{number}/{len(tasks)}] {task.method} on {task.dataset}"
        with bar(None, description=label, total=len(task.jobs)) as progress:
            evaluator = score_task(
                task,
                options,
                num_workers=num_workers,
                done=progress.update,
                check_stop=check_stop,
            )
        if not evaluator.num_images:
            raise DataError(
                f"{task.method} on {task.dataset}: none of the {evaluator.num_skipped} images has "
                f"an object, and --empty-gt skip leaves them all out. Score this data set with "
                f"another --empty-gt, or leave it out."
            )
        scored.setdefault(task.dataset, {})[task.method] = evaluator
        found.append((task, evaluator, time.monotonic() - started))
    results = []
    for task, evaluator, seconds in found:
        check_stop()
        result = reporting.summarise(
            evaluator, method=task.method, dataset=task.dataset, intervals=intervals
        )
        result |= {
            "num_missing": len(task.missing),
            "num_extra": len(task.extra),
            "resize": options.resize,
            "gt_threshold": options.gt_threshold,
            "seconds": seconds,
        }
        results.append(result)
    comparisons = reporting.compare_all(scored, check_stop=check_stop) if intervals else []
    check_stop()

    folder = output.unfinished
    method_files = reporting.file_names([task.method for task in tasks])
    dataset_files = reporting.file_names([task.dataset for task in tasks])
    for task, evaluator, _ in found:
        name = f"{dataset_files[task.dataset]}.csv"
        path = folder / "per_image" / method_files[task.method] / name
        reporting.write_rows(path, evaluator.rows())
    reporting.write_curves(folder / "curves", results, dataset_files)
    pictures = write_gallery(folder, tasks, scored, options, gallery, dataset_files)
    keys = found[0][1].keys
    reporting.write_tables(folder, results, keys)
    summary = {
        "command": list(command),
        "versions": versions(),
        "results": results,
        "comparisons": comparisons,
        "gallery": pictures,
    }
    write_page(folder / "report.html", summary, keys)
    summary["files"] = sorted([*output.files(), MARKER])
    write_json(folder / MARKER, summary)
    return results


def refuse_other_images(tasks: Sequence[MapTask]) -> None:
    """Raise DataError if two methods have maps of other images of one data set.

    It can happen only with ``--allow-missing``: the means would not be comparable.
    """
    for dataset in {task.dataset for task in tasks}:
        own = [task for task in tasks if task.dataset == dataset]
        if len({tuple(job.name for job in task.jobs) for task in own}) > 1:
            shown = ", ".join(f"{task.method} {len(task.jobs)}" for task in own)
            raise DataError(
                f"{dataset}: the methods have maps of different images ({shown}), so that their "
                "scores do not belong in one table. Score each in a call of its own, or complete "
                "the maps."
            )


def write_gallery(
    output: Path,
    tasks: Sequence[MapTask],
    scored: Mapping[str, Mapping[str, Evaluator]],
    options: MapOptions,
    size: int,
    files: Mapping[str, str],
) -> list[dict[str, Any]]:
    """Write panels of the best, worst and most disputed images of each data set.

    Best and worst are by the mean over methods; disputed by the spread between them.
    """
    entries = []
    for dataset, methods in scored.items():
        if not size:
            continue
        names = [row["name"] for row in next(iter(methods.values())).rows()]
        key = reporting.deciding_key(next(iter(methods.values())).keys)
        values_MN = np.array([[row[key] for row in e.rows()] for e in methods.values()])
        order = np.argsort(values_MN.mean(0), kind="stable")
        order = order[::-1] if HIGHER_IS_BETTER[key] else order
        chosen = {"best": order[:size], "worst": order[::-1][:size]}
        if len(methods) > 1:
            chosen["disputed"] = np.argsort(-values_MN.std(0), kind="stable")[:size]
        shown = reporting.ranked(methods)[:METHODS_SHOWN]
        jobs = {
            task.method: {job.name: job for job in task.jobs}
            for task in tasks
            if task.dataset == dataset
        }
        for kind, indices in chosen.items():
            for rank, index in enumerate(indices, 1):
                name = names[index]
                own = {m: float(values_MN[i, index]) for i, m in enumerate(methods)}
                own_jobs = {method: jobs[method][name] for method in shown}
                picture = _panel(own_jobs, own, options)
                path = output / "gallery" / f"{files[dataset]}_{kind}_{rank}.jpg"
                write_jpeg(path, picture)
                entries.append(
                    {
                        "dataset": dataset,
                        "kind": kind,
                        "name": name,
                        "measure": key,
                        "values": own,
                        "panel": path.relative_to(output).as_posix(),
                    }
                )
    return entries


def _panel(jobs: Mapping[str, Any], values: Mapping[str, float], options: MapOptions) -> np.ndarray:
    first = next(iter(jobs.values()))
    mask = read_truth(first, options)
    image = None
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
        # What the scores call found: above one half, of the stretched map under "pysod".
        cut = (low + high) / 2 if options.protocol == "pysod" and high > low else 127.5
        found[f"{method} {values[method]:.2f}"] = prediction > cut
    return comparison_panel(image, mask, found)
