"""``crossval``: train every fold as an ordinary run, score what it held out, sum it up.

The same command continues where it was stopped. Several machines can each train some of the folds:
``splits.json`` and the run folders of all folds in one folder are all that the summary needs.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from camoxpert import console
from camoxpert.config import Config, TrainConfig, load_config
from camoxpert.crossval.collect import Collected, fold_folders, require_same_digest
from camoxpert.crossval.divide import divide, find_pool
from camoxpert.crossval.heldout import (
    MARKER,
    OUT_OF_FOLD,
    is_scored,
    score_fold,
    with_datasets,
)
from camoxpert.crossval.seen import require_nothing_seen, shared_stages
from camoxpert.data.files.folds import (
    SPLITS,
    Splits,
    fold_of,
    read_splits,
    require_fold,
    require_same_images,
    write_splits,
)
from camoxpert.data.files.manifest import Manifest
from camoxpert.errors import CheckpointError, ConfigError, Stopped
from camoxpert.files import lock, read_json, write_bytes, write_json
from camoxpert.runs.folder import recorded_hashes, run_name
from camoxpert.runs.identity import file_hashes, setting_differences
from camoxpert.runs.records import read_info
from camoxpert.stages.chain import Chain, Stage
from camoxpert.stages.run import run_chain
from camoxpert.text import count, shorten, table
from camoxpert.training import session

DEFAULT_FOLDS = 5


@dataclass(frozen=True)
class Division:
    """How the images are divided, as far as the user says it; None and "" are left open.

    Attributes:
        folds: in a repeat.
        repeats: how often all images are divided.
        by_class: a fold for each class.
        file: splits of another cross-validation to use.
    """

    folds: int | None = None
    repeats: int | None = None
    by_class: bool = False
    file: str = ""


@dataclass(frozen=True)
class CrossValidation:
    """A cross-validation in its folder.

    Attributes:
        folder: holds ``splits.json`` and a run folder for each fold.
        config: the settings of all folds but for fold, seed and place.
        pool: all images, ordered.
        splits: of the pool.
        chain: stages of every fold, or None.
        shared: of the stages before the last, the names of those that no fold's images are in.
    """

    folder: Path
    config: Config
    pool: Manifest
    splits: Splits
    chain: Chain | None = None
    shared: frozenset[str] = frozenset()

    def path(self, fold: int) -> Path:
        """Return the run folder of a fold, whose name says if it is a quick run."""
        return self.folder / run_name(self.config_of(fold))

    def config_of(self, fold: int) -> Config:
        """Return the settings of a fold's run, that of its last stage."""
        config = self.chain.resolve(self.config)[-1].config if self.chain else self.config
        config = self._held_out(config, fold)
        # Test sets wait for the model that is trained on all images.
        run = replace(config.run, dir=str(self.folder), name=f"fold-{fold}", test=False)
        return replace(config, run=run)

    def stages_of(self, fold: int) -> list[Stage]:
        """Return the stages of a fold; those that train on the divided images hold out the same."""
        stages = []
        for stage in self.chain.resolve(self.config) if self.chain else []:
            config = stage.config
            if stage.last:
                config = self.config_of(fold)
            elif stage.name not in self.shared:
                config = self._held_out(config, fold)
                # Not even an epoch is chosen by the images that score the fold.
                config = replace(config, data=replace(config.data, val_fraction=0.0))
            stages.append(replace(stage, config=config))
        return stages

    def _held_out(self, config: Config, fold: int) -> Config:
        """Return settings that hold out a fold."""
        return replace(
            config,
            data=replace(config.data, splits=str(self.folder / SPLITS), fold=fold),
            # Another seed in each repeat: its spread is that of initial weights as well.
            train=replace(config.train, seed=config.train.seed + self.splits.repeat_of(fold)),
        )

    @property
    def empty_gt(self) -> str:
        """How images without an object are scored: not at all where they are told apart."""
        return "skip" if any(pair.empty for pair in self.pool.pairs) else "pysod"

    @property
    def several(self) -> bool:
        """Whether there are several data sets, so that names need theirs."""
        return len({pair.dataset for pair in self.pool.pairs}) > 1


def open_folder(
    folder: Path,
    config: Config,
    division: Division,
    *,
    chain: Chain | None = None,
    write: bool = True,
) -> CrossValidation:
    """Find the images, and read the folds in a folder or make them.

    Args:
        folder: receives the folds.
        config: settings of all folds; ``--splits`` and ``--fold`` among them are the user's.
        division: what the user says about the folds.
        chain: stages of every fold.
        write: False writes nothing.

    Raises:
        ConfigError: settings that cannot be cross-validated, or other folds than the folder has.
        DataError: the images are not those that the folds were made for.
    """
    # Each fold sets its own; a stage that all folds share has none.
    shared_settings = replace(config, data=replace(config.data, splits="", fold=None))
    stages = chain.resolve(shared_settings) if chain else []
    configs = [stage.config for stage in stages] or [shared_settings]
    target = configs[-1]
    _check(target)
    pool = find_pool(target)
    path = folder / SPLITS
    if write:
        folder.mkdir(parents=True, exist_ok=True)
        # Folds may be started at the same moment.
        with lock(folder / ".lock"):
            splits, where = _settle(path, pool, target, division)
            if not path.is_file():
                if division.file:
                    write_bytes(path, Path(division.file).read_bytes(), durable=True)
                else:
                    write_splits(path, splits)
            _settle_chain(folder, chain)
    else:
        splits, where = _settle(path, pool, target, division, write=False)
    if config.data.fold is not None:
        require_fold(splits, config.data.fold, path)
    console.decide("folds", f"{splits.total} of {count(len(splits.images), 'image')}: {where}")
    require_nothing_seen(configs, pool)
    shared = shared_stages(chain, shared_settings, pool, write=write)
    return CrossValidation(folder, shared_settings, pool, splits, chain, shared)


def _check(config: Config) -> None:
    """Raise ConfigError for settings that would make the scores mean something else."""
    if config.train.early_stopping:
        raise ConfigError(
            "--early-stopping would choose the length of the training on the images that are "
            "scored. Leave it out: every fold is scored with the weights of its last epoch."
        )
    if config.train.quick.overfit_batches is not None:
        raise ConfigError(
            "--overfit-batches learns a few batches by heart and holds nothing out. Use it with "
            "`camoxpert train`; folds that are quick take --data-fraction or --limit-batches."
        )
    if config.train.resume not in ("auto", "never"):
        raise ConfigError(
            f"--resume {config.train.resume} names one run, and a cross-validation has several. "
            f"Leave it out: the same command continues every fold."
        )
    if config.train.resume == "never":
        raise ConfigError(
            "--resume never would train a stopped fold a second time in another folder, and the "
            "fold's own folder would be scored. Leave it out; to train a fold from its beginning, "
            "remove its run folder (fold-N) first."
        )
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError(
            "crossval trains its folds in one process. Start `camoxpert train --splits FILE --fold "
            "N` under torchrun for a single fold, or the folds on several machines with --fold."
        )


def _settle(
    path: Path, pool: Manifest, config: Config, division: Division, *, write: bool = True
) -> tuple[Splits, str]:
    """Return the folds to train and where they are from."""
    given = None if not division.file else read_splits(Path(division.file))
    if path.is_file():
        splits, where = read_splits(path), f"as in {path}"
        if given is not None and given.digest != splits.digest:
            raise ConfigError(
                f"--splits {division.file}: {path.parent} holds folds of other splits. Give a "
                f"folder of its own with -o."
            )
        _require_as_asked(splits, division, path)
    elif given is not None:
        splits, where = given, f"as in {division.file}"
        _require_as_asked(splits, division, Path(division.file))
    else:
        splits = divide(
            pool,
            config.data,
            folds=division.folds or DEFAULT_FOLDS,
            repeats=division.repeats or 1,
            seed=config.train.seed,
            by_class=division.by_class,
            write=write,
        )
        return splits, f"made now, with seed {config.train.seed}"
    require_same_images(splits, pool, path if path.is_file() else Path(division.file))
    return splits, where


def _settle_chain(folder: Path, chain: Chain | None) -> None:
    """Keep the stages of the folds in the folder; raise ConfigError where they were others."""
    path = folder / "stages.json"
    now = {} if chain is None else chain.to_dict()
    began = path.is_file() or any(folder.glob("fold-*"))
    if began and read_json(path) != now:
        raise ConfigError(
            f"--stages: the folds in {folder} {_chain_words(read_json(path))}, and these "
            f"{_chain_words(now)}. All folds of one cross-validation have the same stages: give "
            f"another folder with -o."
        )
    if now and not began:
        write_json(path, now)


def _chain_words(chain: Mapping[str, object]) -> str:
    stages = chain.get("stages")
    if not isinstance(stages, list):
        return "have no stages"
    return f"have {count(len(stages), 'stage')} ({shorten(str(one[0]) for one in stages)})"


def _require_as_asked(splits: Splits, division: Division, path: Path) -> None:
    """Raise ConfigError where the user asks for other folds than those of a file."""
    by_class = bool(splits.classes)
    asked = {
        "--folds": (division.folds, None if by_class else splits.folds),
        "--repeats": (division.repeats, splits.repeats),
    }
    for flag, (wanted, known) in asked.items():
        if wanted is not None and wanted != known:
            raise ConfigError(
                f"{flag} {wanted}: {path} has "
                f"{'a fold for each class' if known is None else known}. Folds are made once; "
                f"leave the flag out, or give another folder with -o."
            )
    if division.by_class and not by_class:
        raise ConfigError(
            f"--leave-class-out: the folds of {path} are not classes. Give another folder with -o."
        )


def describe(splits: Splits) -> str:
    """Return a table of the folds: images, groups, classes and object sizes held out."""
    labels = [label for label in sorted({image.label for image in splits.images}) if label]
    sizes = sorted({image.size for image in splits.images})
    shown = labels if 1 < len(labels) <= 6 and not splits.classes else []
    rows = [["fold", "images", "groups", *shown, *sizes]]
    for fold in range(1, splits.total + 1):
        images = splits.held_out(fold)
        rows.append(
            [
                splits.name_of(fold),
                str(len(images)),
                str(len({image.group for image in images})),
                *(str(sum(image.label == label for image in images)) for label in shown),
                *(str(sum(image.size == size for image in images)) for size in sizes),
            ]
        )
    return table(rows)


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
    )


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
    if not (path / "config.yaml").is_file():
        return False
    info, config = read_info(path), found.config_of(fold)
    old = load_config(file=path / "config.yaml")
    before, now = recorded_hashes(info), file_hashes(config)
    changes = setting_differences(old, config, before=before, now=now)
    if found.chain is not None:
        # What the stage before it left; the stages themselves are compared by ``_settle_chain``.
        changes.pop("model.init_from", None)
    if changes:
        raise CheckpointError(
            f"{path} was trained with other settings ({shorten(changes.values(), 3)}). Folds of "
            f"one cross-validation share them: give another folder with -o, or remove that run."
        )
    return info.get("status") == "finished"
