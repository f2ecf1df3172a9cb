"""``crossval``: train every fold as an ordinary run, score what it held out, sum it up.

The same command continues where it was stopped. Several machines can each train some of the folds:
``splits.json`` and the run folders of all folds in one folder are all that the summary needs.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from camoxpert import console
from camoxpert.config import Config, TrainConfig, load_config
from camoxpert.crossval.collect import Collected, fold_folders, require_same_digest
from camoxpert.crossval.heldout import (
    MARKER,
    OUT_OF_FOLD,
    is_scored,
    score_fold,
    with_datasets,
)
from camoxpert.crossval.method import method_differences, method_of, method_of_run
from camoxpert.crossval.opening import CrossValidation
from camoxpert.data.files.folds import SPLITS, fold_of
from camoxpert.data.files.made import find_made
from camoxpert.data.files.manifest import Manifest, read_clean_list
from camoxpert.data.files.unlabeled import NO_IMAGES
from camoxpert.errors import CheckpointError, Stopped
from camoxpert.files import read_json, try_lock
from camoxpert.runs.folder import recorded_hashes
from camoxpert.runs.identity import file_hashes
from camoxpert.runs.records import read_info
from camoxpert.runs.samples import read_samples
from camoxpert.stages.key import SPLITS as SPLITS_PATH
from camoxpert.stages.run import run_chain
from camoxpert.text import count, shorten
from camoxpert.training import session
from camoxpert.training.data import search_of
from camoxpert.training.split import CALIBRATION, MADE_CALIBRATION


def require_same_splits(found: CrossValidation, others: Sequence[Collected]) -> None:
    """Raise DataError where another method was trained on other folds."""
    for other in others:
        require_same_digest(found.splits, found.folder, other.splits, other.folder)


def train_folds(found: CrossValidation, folds: Sequence[int], argv: Sequence[str] = ()) -> None:
    """Train and score folds, skipping what is done.

    Args:
        found: the cross-validation.
        folds: their numbers.
        argv: the command, for ``run.json``.

    Raises:
        Stopped: the same call continues.
        CheckpointError: a folder holds a run with other settings.
    """
    hours = found.config.train.max_hours
    deadline = None if hours is None else time.monotonic() + 3600 * hours
    for fold in folds:
        # Before hours of training: folds of other settings are refused at once.
        _is_trained(found, fold)
    for fold in folds:
        if is_scored(found.path(fold)):
            console.say(f"fold {found.splits.name_of(fold)}: done before")
            continue
        started = time.monotonic()
        config = found.config_of(fold)
        if not _is_trained(found, fold):
            console.say(f"\nfold {found.splits.name_of(fold)} of {found.splits.total}: training")
            if deadline is not None:
                # A run that begins at the deadline stops in its first step.
                left = max((deadline - started) / 3600, 1e-6)
                config = replace(config, train=replace(config.train, max_hours=left))
            try:
                _train(found, config, fold, argv)
            except Stopped as stopped:
                stopped.args = (
                    f"{stopped.args[0]} Fold {found.splits.name_of(fold)} of "
                    f"{found.splits.total}; the same command continues there.",
                )
                raise
        score_one(found, fold)
        about = read_about(found.path(fold))
        console.say(f"fold {found.splits.name_of(fold)}: {about}")


def _train(found: CrossValidation, config: Config, fold: int, argv: Sequence[str]) -> None:
    """Train a fold's run, after the stages that lead to it."""
    _require_idle(found, fold)
    stages = found.stages_of(fold)
    if not stages:
        _require_own(found, fold, session.run(config, argv=argv).path)
        return
    stages = [
        replace(stage, config=replace(stage.config, train=_with_hours(stage.config, config)))
        for stage in stages
    ]
    result = run_chain(stages, argv=argv, folder=found.folder / "stages", keep_last=False)
    _require_own(found, fold, result.path)


def _require_idle(found: CrossValidation, fold: int) -> None:
    """Raise CheckpointError if another process trains the fold: this one would train it beside it.

    Only a moment is looked at; ``_require_own`` sees what happens afterwards.
    """
    path = found.path(fold)
    if not path.is_dir():
        return
    held = try_lock(path / ".lock")
    if held is None:
        raise CheckpointError(
            f"Fold {found.splits.name_of(fold)} is being trained by another process, in {path}. "
            f"Let it end and give the same command again, or train other folds with --fold."
        )
    held.release()


def _require_own(found: CrossValidation, fold: int, trained: Path) -> None:
    """Raise CheckpointError unless what was trained is the run that is scored, and finished."""
    path = found.path(fold)
    if trained.resolve() != path.resolve():
        raise CheckpointError(
            f"Fold {found.splits.name_of(fold)} was trained in {trained}, as {path} belongs to a "
            f"run that this one could not continue; another process may be training it. Nothing "
            f"is scored. Let that process end and give the same command again; then remove "
            f"{trained}. To keep the new run instead, remove {path} and rename {trained}."
        )
    status = read_info(path).get("status")
    if status != "finished":
        raise CheckpointError(
            f"{path} was trained, and its run.json says {status or 'nothing'} and not finished. "
            f"Nothing is scored: the same command continues it."
        )


def _with_hours(config: Config, limit: Config) -> TrainConfig:
    return replace(config.train, max_hours=limit.train.max_hours)


def score_one(found: CrossValidation, fold: int) -> None:
    """Score the images that a trained fold held out."""
    _, held_out = fold_of(found.splits, fold, found.pool)
    score_fold(
        found.path(fold),
        found.config_of(fold),
        with_datasets(held_out, found.several),
        fold=fold,
        splits=found.splits,
        empty_gt=found.empty_gt,
        calibration=_calibration_of(found, fold),
        stages=found.stages_before(fold),
    )


def _calibration_of(found: CrossValidation, fold: int) -> Manifest:
    """Return the images that the run of a fold set aside to calibrate its presence head."""
    rows, data = read_samples(found.path(fold)), found.config_of(fold).data
    if not {CALIBRATION, MADE_CALIBRATION} & set(rows.values()):
        return NO_IMAGES
    made = find_made(data.synthetic, search_of(data, read_clean_list(data.clean_list)))
    pairs = tuple(
        pair
        for pair in (*found.pool.pairs, *made.pairs)
        if rows.get((pair.dataset, pair.name)) in (CALIBRATION, MADE_CALIBRATION)
    )
    return replace(NO_IMAGES, pairs=pairs)


def read_about(run: Path) -> str:
    """Return the scores of a fold as a line."""
    about = read_json(run / OUT_OF_FOLD / MARKER)
    scores = about.get("scores", {})
    words = ", ".join(f"{key} {scores[key]:.3f}" for key in ("wFmeasure", "IoU") if key in scores)
    return f"{count(int(about['images']), 'image')} held out, {words} with the last epoch's weights"


def _is_trained(found: CrossValidation, fold: int) -> bool:
    """Return whether the run of a fold is finished.

    Raises:
        CheckpointError: it was trained with other settings, or on other folds.
    """
    path = found.path(fold)
    for other in fold_folders(found.folder, fold):
        if other != path and (other / "config.yaml").is_file():
            raise CheckpointError(
                f"{other} is there: quick runs and whole ones, or runs that are quick in other "
                f"ways, are not folds of one cross-validation. Give another folder with -o, or "
                f"remove that run."
            )
    # It comes last when a run begins: without it nothing was trained.
    if not (path / "run.json").is_file():
        return False
    info, about = read_info(path), read_json(path / OUT_OF_FOLD / MARKER)
    changes = _changes(found, fold, about)
    if changes:
        raise CheckpointError(
            f"{path} was trained with other settings ({shorten(changes, 3)}). Folds of "
            f"one cross-validation share them: give another folder with -o, or remove that run."
        )
    return info.get("status") == "finished"


def _changes(found: CrossValidation, fold: int, about: Mapping[str, Any]) -> list[str]:
    """Return in what the run of a fold was trained in another way than is asked for, in words.

    Args:
        found: the cross-validation.
        fold: whose run folder holds settings.
        about: content of its ``fold.json``; {} for one that is not scored.
    """
    path, config, repeat = found.path(fold), found.config_of(fold), found.splits.repeat_of(fold)
    info = read_info(path)
    recorded = recorded_hashes(info)
    # Models that are gone, or cannot be downloaded now, are not needed to compare.
    files = file_hashes(config, recorded)
    # What leads to a run that is not scored is not recorded yet: the folder's file says it.
    old = method_of_run(path, about, repeat=repeat, staged=None if about else found.chained)
    # A run that is not finished is compared with the data by whoever continues it.
    finished = info.get("status") == "finished"
    new = method_of(
        config,
        repeat=repeat,
        files=files,
        data=found.data_hash if finished else old.data,
        stages=None if about.get("stages") is None else found.stages_before(fold),
        staged=found.chained,
    )
    words = method_differences(old, new)
    held_out = load_config(file=path / "config.yaml").data.fold
    if held_out != fold:
        words.append(f"data.fold: {held_out} -> {fold}")
    if about:
        same = about.get("splits") == found.splits.digest
    else:
        same = recorded.get(SPLITS_PATH) == files.get(SPLITS_PATH)
    return words if same else [*words, f"data.splits: other folds than those of {SPLITS}"]
