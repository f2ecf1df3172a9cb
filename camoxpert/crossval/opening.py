"""The folder of a cross-validation: which images, which folds, which stages; all checked at once,
before anything is trained."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from camoxpert import console
from camoxpert.config import Config
from camoxpert.crossval.divide import divide, find_pool
from camoxpert.crossval.method import stages_before
from camoxpert.crossval.seen import require_nothing_seen, shared_stages
from camoxpert.data.files.folds import (
    SPLITS,
    Splits,
    read_splits,
    require_fold,
    require_same_images,
    write_splits,
)
from camoxpert.data.files.manifest import Manifest
from camoxpert.errors import ConfigError
from camoxpert.files import lock, read_json, write_bytes, write_json
from camoxpert.runs.folder import run_name
from camoxpert.runs.identity import FILES, FREE, PLACES
from camoxpert.runs.records import read_info
from camoxpert.stages.chain import Chain, Stage
from camoxpert.text import count, shorten, table
from camoxpert.training.data import hash_of_data

DEFAULT_FOLDS = 5
CHAIN = "stages.json"


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
    def chained(self) -> bool:
        """Whether stages lead to the run of each fold."""
        return self.chain is not None and len(self.chain.stages) > 1

    def stages_before(self, fold: int) -> list[tuple[str, dict[str, Any]]]:
        """Return what the stages that lead to the run of a fold depend on."""
        return stages_before(self.stages_of(fold), repeat=self.splits.repeat_of(fold))

    @cached_property
    def data_hash(self) -> str:
        """Hash of all that the folds train on, the same for each."""
        return hash_of_data(self.config_of(1))

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
    train: bool = True,
) -> CrossValidation:
    """Find the images, and read the folds in a folder or make them.

    Args:
        folder: receives the folds.
        config: settings of all folds; ``--splits`` and ``--fold`` among them are the user's.
        division: what the user says about the folds.
        chain: stages of every fold.
        write: False writes nothing.
        train: False: folds are only summed up, whose own records say how they were trained.

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
            if train:
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
    """Keep the stages of the folds in the folder; raise ConfigError where they were others.

    Of folds that were trained elsewhere, which come without the file, their own records say if
    there were stages; what these were is compared with each (``_changes``).
    """
    path = folder / CHAIN
    now = {} if chain is None else chain.to_dict()
    began = path.is_file() or any(folder.glob("fold-*"))
    before = read_json(path) if path.is_file() else _recorded_chain(folder)
    alone = not path.is_file() and bool(before) and bool(now)
    if began and not alone and _without_places(before) != _without_places(now):
        raise ConfigError(
            f"--stages: the folds in {folder} {_chain_words(before)}, and these "
            f"{_chain_words(now)}. All folds of one cross-validation have the same stages: give "
            f"another folder with -o."
        )
    if now and not path.is_file():
        write_json(path, now)


def _recorded_chain(folder: Path) -> dict[str, Any]:
    """Return the names of the stages that the folds in a folder record, as a file of them has
    them; {}: none of them had any."""
    for run in sorted(folder.glob("fold-*")):
        listed = read_info(run).get("stages")
        if listed:
            return {"stages": [[one.get("name", ""), {}] for one in listed] + [["the last", {}]]}
    return {}


def _without_places(chain: Mapping[str, Any]) -> dict[str, Any]:
    """Return a chain without paths, which differ between machines: what lies there is compared."""

    def kept(settings: Mapping[str, Any]) -> dict[str, Any]:
        apart = {*PLACES, *FILES, *FREE}
        return {path: value for path, value in settings.items() if path not in apart}

    if not chain:
        return {}
    stages = [[name, kept(own)] for name, own in chain["stages"]]
    return {"common": kept(chain.get("common", {})), "stages": stages}


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
