"""Scoring a checkpoint on whole data sets."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from camoxpert import console
from camoxpert.config import DataConfig
from camoxpert.data.files.headers import other_sizes
from camoxpert.data.files.image_io import write_jpeg
from camoxpert.data.files.labels import split_void
from camoxpert.data.files.manifest import Manifest, Search, find_test_sets, load_eval
from camoxpert.data.loader import build_eval_loader
from camoxpert.data.samples.batches import EvalBatch
from camoxpert.errors import DataError
from camoxpert.evaluation.chosen import expert_meter
from camoxpert.evaluation.corrupted import note_corruptions, score_corrupted
from camoxpert.evaluation.gallery import Gallery
from camoxpert.evaluation.guided import prepare_shots, score_shots
from camoxpert.evaluation.options import CorruptionOptions, ScoringOptions, ShotOptions
from camoxpert.evaluation.output import OutputFolder, write_evaluation
from camoxpert.evaluation.presence import PresenceMeter
from camoxpert.evaluation.results import (
    EvaluationResult,
    ModelSource,
    Scored,
    note_void,
    summarise,
)
from camoxpert.evaluation.subsets import score_subsets
from camoxpert.files import file_digest, leads_outside, why_missing
from camoxpert.inference.predictor import Predictor
from camoxpert.inference.runtimes import is_exported
from camoxpert.inference.score import Item, score
from camoxpert.metrics import Evaluator
from camoxpert.metrics.scoring import FAST_KEYS, Row
from camoxpert.pages.pictures import panel, side_by_side
from camoxpert.runs.hub import repo_of
from camoxpert.runs.scores import GalleryEntry
from camoxpert.text import count, file_names, shorten


def find_sets(
    predictor: Predictor, paths: Sequence[str | Path], search: Search, *, split: str = "test"
) -> dict[str, Manifest]:
    """Return the data sets to score, by name.

    Args:
        predictor: the test sets of its run are used if no path is given.
        paths: data sets.
        search: how to find their pairs.
        split: test, val or train, where a data set has splits.

    Raises:
        DataError: nothing found, two data sets with the same name, or an unusable data set.
    """
    for path in paths:
        if not Path(path).exists():
            raise DataError(f"--data: {why_missing(path)}")
    search = replace(search, modalities=predictor.modalities)
    if paths:
        sets = load_eval(paths, search, split=split)
        for note in dict.fromkeys(note for manifest in sets.values() for note in manifest.notes):
            console.note(note)
        _note_other_sizes(sets)
        return sets
    data = predictor.config.data
    # Not data.allow_outside: the checkpoint may come from an untrusted source.
    any_size = search.any_size or data.resize == "bilinear"
    own = replace(search, layout=data.layout, noncam=data.noncam, any_size=any_size)
    sets = find_test_sets(data.roots, own)
    if not sets:
        raise DataError(
            f"No test set found for the run's data ({', '.join(data.roots) or 'not recorded'}). "
            "Name one with --data DIR."
        )
    _note_other_sizes(sets)
    return sets


def _note_other_sizes(sets: Mapping[str, Manifest]) -> None:
    for name, manifest in sets.items():
        found = other_sizes(manifest)
        if found:
            console.note(
                f"{name}: {count(len(found), 'mask')} of another size than the image; predictions "
                f"are resized to the mask (--resize bilinear): {shorten(found)}"
            )


def run_folder(checkpoint: Path) -> Path | None:
    """Return the run folder that holds a checkpoint's file, or None for a file on its own."""
    if is_exported(checkpoint):
        return None
    folder = checkpoint.parent.parent
    return folder if (folder / "config.yaml").is_file() else None


def method_name(predictor: Predictor) -> str:
    """Return the name of a model in tables: its run's, its repository's on the Hub, or its file's;
    ``-zoom`` at two sizes."""
    folder = run_folder(predictor.checkpoint.path)
    name = _own_name(predictor.checkpoint.path) if folder is None else folder.resolve().name
    return f"{name}-zoom" if predictor.zoom else name


def _own_name(checkpoint: Path) -> str:
    return repo_of(checkpoint).rpartition("/")[2] or checkpoint.stem


def default_output(checkpoint: Path) -> Path:
    """Return where results go: ``evaluation`` in the run folder, else ``evaluation/FILE``, or
    ``evaluation/NAME`` of a model on the Hub.

    Raises:
        DataError: the run, which may come from somebody else, has a symlink there.
    """
    folder = run_folder(checkpoint)
    if folder is None:
        return Path("evaluation", _own_name(checkpoint))
    if leads_outside(folder, folder / "evaluation" / "file"):
        raise DataError(
            f"{folder / 'evaluation'} is a symlink that leads out of {folder}. Remove it, or name "
            f"another folder with -o."
        )
    return folder / "evaluation"


def evaluate_model(
    predictor: Predictor,
    sets: Mapping[str, Manifest],
    options: ScoringOptions,
    *,
    method: str = "",
    batch_size: int = 8,
    num_workers: int = 0,
    unreadable: str = "error",
    corruptions: CorruptionOptions | None = None,
    shots: ShotOptions | None = None,
    output: OutputFolder | None = None,
    command: Sequence[str] = (),
) -> list[EvaluationResult]:
    """Score a model on data sets, then write everything into the unfinished ``output``.

    Args:
        predictor: the model.
        sets: data sets by name.
        options: how to score them.
        method: the model's name in tables and in the ledger; "": the name of its run.
        batch_size: images the loader reads at a time; it does not change the scores.
        num_workers: data worker processes.
        unreadable: images that cannot be read: ``error``, or ``skip``: left out of the scores,
            named in a warning and in the result. A data set without a readable image is an error.
        corruptions: also score corrupted images; see ``EvaluationResult.robustness``.
        shots: also score with references; see ``EvaluationResult.shots``.
        output: see ``evaluation.output``; None writes nothing.
        command: the command line, for the page.

    Returns:
        One result per data set.

    Raises:
        DataError: an image cannot be read.
        Stopped: the command was asked to stop.
    """
    method = method or method_name(predictor)
    if corruptions is not None:
        note_corruptions(corruptions, sets)
    # First of all: references that cannot be had are not looked for after an hour of scoring.
    prepared = {}
    if shots is not None:
        prepared = prepare_shots(predictor, sets, shots, unreadable=unreadable)
    files = file_names(sets) if output is None else output.picture_names(sets)
    scored = []
    gallery: list[GalleryEntry] = []
    for name, manifest in sets.items():
        pictures = Gallery(options.gallery if output is not None else 0)
        data = _reading(predictor, unreadable)
        item = _score_set(
            predictor,
            name,
            manifest,
            data,
            options,
            method=method,
            batch_size=batch_size,
            num_workers=num_workers,
            pictures=pictures,
        )
        if corruptions is not None:
            robustness, examples = score_corrupted(
                predictor,
                name,
                manifest,
                data,
                corruptions,
                options,
                item.evaluator,
                batch_size=batch_size,
                num_workers=num_workers,
            )
            if output is not None:
                path = output.unfinished / "robustness" / f"{files[name]}.jpg"
                write_jpeg(path, side_by_side(examples))
                place = path.relative_to(output.unfinished).as_posix()
                robustness = replace(robustness, picture=place)
            item = replace(item, result=replace(item.result, robustness=robustness))
        if name in prepared:
            table = score_shots(
                predictor,
                name,
                manifest,
                data,
                prepared[name],
                options,
                batch_size=batch_size,
                num_workers=num_workers,
            )
            item = replace(item, result=replace(item.result, shots=table))
        if predictor.modalities:
            by_subset = score_subsets(
                predictor,
                name,
                manifest,
                data,
                options,
                batch_size=batch_size,
                num_workers=num_workers,
            )
            item = replace(item, result=replace(item.result, modalities=by_subset))
        scored.append(item)
        if output is not None:
            gallery += pictures.write(output.unfinished, name, method, files[name])
    if output is not None:
        write_evaluation(output, scored, gallery, intervals=options.intervals, command=command)
    return [item.result for item in scored]


def evaluate_run(
    predictor: Predictor,
    sets: Mapping[str, Manifest],
    options: ScoringOptions,
    *,
    batch_size: int,
    num_workers: int = 0,
    unreadable: str = "error",
    command: Sequence[str] = (),
) -> list[EvaluationResult]:
    """Score a run's model and write the results to its run folder; see ``evaluate_model``."""
    with OutputFolder(default_output(predictor.checkpoint.path), options) as folder:
        results = evaluate_model(
            predictor,
            sets,
            options,
            batch_size=batch_size,
            num_workers=num_workers,
            unreadable=unreadable,
            output=folder,
            command=command,
        )
        folder.finish()
    return results


def _reading(predictor: Predictor, unreadable: str) -> DataConfig:
    """Return how images are read for a model."""
    return DataConfig(
        img_size=predictor.img_size,
        max_pixels=predictor.config.data.max_pixels,
        unreadable=unreadable,
        modalities=predictor.modalities,
    )


def _score_set(
    predictor: Predictor,
    name: str,
    manifest: Manifest,
    data: DataConfig,
    options: ScoringOptions,
    *,
    method: str,
    batch_size: int,
    num_workers: int,
    pictures: Gallery,
) -> Scored:
    started = time.monotonic()
    evaluator = options.evaluator()
    # Without weighted F and the like, which would take longer than all measures of the model.
    cheap = tuple(key for key in options.keys if key in FAST_KEYS)
    everything = replace(options, keys=cheap).evaluator()
    loader = build_eval_loader(
        manifest,
        data,
        batch_size=batch_size,
        num_workers=num_workers,
        keep_images=pictures.size > 0,
    )

    experts = expert_meter(predictor.model)
    presence = PresenceMeter() if predictor.has_presence else None

    def seen(item: Item, prediction: Callable[[], NDArray[np.uint8]], row: Row) -> None:
        mask, void = split_void(item.mask)
        everything.add(item.name, np.full_like(item.mask, 255), mask, void=void)
        if experts is not None:
            experts.add_image(item, mask, void)
        original = item.original
        if original is None:
            return

        def picture(*, stretch: bool) -> NDArray[np.uint8]:
            return panel(original, item.mask, prediction() / np.float32(255), stretch=stretch)

        pictures.offer(row, partial(picture, stretch=options.protocol == "pysod"))
        probability = None if presence is None else presence.probabilities()[item.name]
        # Stretched, every map of an image without an object would show one.
        pictures.offer_presence(
            row, evaluator.claim(item.name), probability, partial(picture, stretch=False)
        )

    left_out: list[str] = []

    def read() -> Iterator[EvalBatch]:
        for batch in console.track(loader, f"evaluate {name}"):
            left_out.extend(reason for _, reason in batch.unreadable)
            yield batch

    score(
        predictor.model,
        read(),
        device=predictor.device,
        evaluator=evaluator,
        groups={pair.name: pair.group for pair in manifest.pairs},
        precision=predictor.precision,
        seen=seen,
        routed=None if experts is None else experts.add_choices,
        judged=None if presence is None else presence.add,
    )
    if left_out:
        if len(left_out) == len(manifest):
            raise DataError(f"{name}: none of its images can be read. The first: {left_out[0]}")
        console.warn(
            f"{name}: {len(left_out)} of {len(manifest)} images cannot be read and are missing "
            f"from the scores: {shorten(left_out)}"
        )
    note_void(name, evaluator)
    scored = summarise(
        evaluator,
        options,
        method=method,
        dataset=name,
        seconds=time.monotonic() - started,
        unreadable=left_out,
        probabilities=None if presence is None else presence.probabilities(),
        source=ModelSource(
            checkpoint=predictor.checkpoint.path.stem,
            weights=file_digest(predictor.checkpoint.path),
            img_size=predictor.img_size,
            precision=predictor.precision.name,
            zoom=predictor.zoom,
            baseline={"all_foreground": _results(everything)},
        ),
    )
    scored = replace(scored, result=replace(scored.result, split=manifest.split))
    if experts is None:
        return scored
    chosen = experts.columns()
    columns = {name: {**chosen[name], **more} for name, more in scored.columns.items()}
    scored = replace(scored, columns=columns)
    found = experts.table(scored.rows(), statistics=options.intervals)
    return replace(scored, result=replace(scored.result, experts=found))


def _results(evaluator: Evaluator) -> dict[str, float]:
    return evaluator.results() if evaluator.num_images else {}
