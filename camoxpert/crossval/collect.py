"""Join the scores of all folds; compare two methods on the same folds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from camoxpert.crossval.heldout import OUT_OF_FOLD, FoldScores, is_scored, read_fold
from camoxpert.crossval.method import method_differences, method_of_run
from camoxpert.data.files.folds import SPLITS, Splits, read_splits
from camoxpert.errors import DataError
from camoxpert.metrics import Evaluator
from camoxpert.metrics.statistics import Comparison, Scores, compare
from camoxpert.text import count, shorten


@dataclass(frozen=True)
class Collected:
    """All folds of a cross-validation.

    Attributes:
        folder: of the cross-validation.
        splits: the folds.
        folds: their scores, in order.
        repeats: the evaluator of each repeat, which has every image once.
        scores: of the images, averaged over repeats.
        units_N: number of each image's group, in the order of ``scores.names``.
    """

    folder: Path
    splits: Splits
    folds: tuple[FoldScores, ...]
    repeats: tuple[Evaluator, ...]
    scores: Scores
    units_N: NDArray[np.int64]


def collect(folder: Path) -> Collected:
    """Read all folds.

    Raises:
        DataError: a fold is missing or damaged, or was trained with other settings or on other
            folds.
    """
    if not (folder / SPLITS).is_file():
        raise DataError(
            f"{folder} is not the folder of a cross-validation: there is no {SPLITS} in it."
        )
    splits = read_splits(folder / SPLITS)
    require_all(folder, splits)
    folds = tuple(read_fold(fold_folder(folder, n)) for n in range(1, splits.total + 1))
    for number, fold in enumerate(folds, 1):
        if fold.about.get("splits") != splits.digest or fold.fold != number:
            raise DataError(
                f"{fold.path} is not fold {number} of {folder / SPLITS}: it was scored on other "
                f"folds. Copy the run that was trained with this file, or remove it and train it "
                f"again."
            )
    _require_one_method(folds, splits)
    repeats = []
    for repeat in range(splits.repeats):
        own = [fold for fold in folds if splits.repeat_of(fold.fold) == repeat]
        merged = Evaluator(empty_gt=own[0].evaluator.empty_gt, keys=own[0].evaluator.keys)
        for fold in own:
            merged.merge(fold.evaluator)
        repeats.append(merged)
    try:
        scores = Scores.averaged([Scores(evaluator) for evaluator in repeats])
    except DataError as error:
        raise DataError(f"{folder}: the repeats cannot be joined. {error}") from error
    return Collected(folder, splits, folds, tuple(repeats), scores, units_of(splits, scores.names))


def require_all(folder: Path, splits: Splits) -> None:
    """Raise DataError, naming them, unless every fold is trained and scored."""
    missing = missing_folds(folder, splits)
    if missing:
        one = len(missing) == 1
        names = shorten(map(splits.name_of, missing), 10)
        raise DataError(
            f"{folder}: {count(len(missing), 'fold')} of {splits.total} {'is' if one else 'are'} "
            f"missing or not scored: {names}. A summary of some folds would be one of some images. "
            f"Train {'it' if one else 'them'} with the same command, or copy the run "
            f"{'folder' if one else 'folders'} ({shorten(f'fold-{n}' for n in missing)}) from "
            f"where {'it was' if one else 'they were'} trained."
        )


def missing_folds(folder: Path, splits: Splits) -> list[int]:
    """Return the folds that are not trained or not scored."""
    return [n for n in range(1, splits.total + 1) if not is_scored(fold_folder(folder, n))]


def fold_folders(folder: Path, number: int) -> list[Path]:
    """Return the run folders that a fold may have: the whole run's, and those of quick ones."""
    return [folder / f"fold-{number}", *sorted(folder.glob(f"fold-{number}-quick-*"))]


def fold_folder(folder: Path, number: int) -> Path:
    """Return the run folder of a fold that is scored, else that of a whole run.

    Raises:
        DataError: there are several, whole or quick in different ways.
    """
    folders = fold_folders(folder, number)
    scored = [path for path in folders if is_scored(path)]
    if len(scored) > 1:
        raise DataError(
            f"{folder} holds fold {number} more than once "
            f"({', '.join(path.name for path in scored)}): quick runs and whole ones are other "
            f"methods. Remove or move the run that does not belong here."
        )
    return scored[0] if scored else folders[0]


def units_of(splits: Splits, names: Sequence[str]) -> NDArray[np.int64]:
    """Return the number of each image's group, without gaps, in the order of ``names``."""
    several = len({image.dataset for image in splits.images}) > 1
    group = {
        f"{image.dataset}/{image.name}" if several else image.name: image.group
        for image in splits.images
    }
    numbers: dict[int, int] = {}
    return np.array([numbers.setdefault(group[name], len(numbers)) for name in names], np.int64)


def compare_methods(first: Collected, second: Collected) -> dict[str, Comparison]:
    """Return the paired differences, first minus second, over all held-out images that both score.

    Raises:
        DataError: the two were not trained on the same folds.
    """
    require_same_digest(first.splits, first.folder, second.splits, second.folder)
    names = compared_images(first, second)
    scores = [found.scores.part(names) for found in (first, second)]
    return compare(*scores, units_N=units_of(first.splits, scores[0].names))


def compared_images(first: Collected, second: Collected) -> frozenset[str]:
    """Return the images by which two methods are compared.

    A method that tells images without an object apart does not score their maps, and one without
    does (``--presence off``): then those with an object are compared.

    Raises:
        DataError: images are missing in one of them for another reason, or there are none.
    """
    ours, theirs = set(first.scores.names), set(second.scores.names)
    unexplained = (ours ^ theirs) - _without_object(first) - _without_object(second)
    if unexplained or not ours & theirs:
        alone = sorted(unexplained or ours ^ theirs)
        raise DataError(
            f"{first.folder} and {second.folder} cannot be compared: not scored in both: "
            f"{count(len(alone), 'image')} ({shorten(alone, 3)}). Score both with the same images, "
            f"which can be read in both."
        )
    return frozenset(ours & theirs)


def _without_object(found: Collected) -> set[str]:
    """Return the images that were seen and not scored, as they have no object."""
    return {name for repeat in found.repeats for name in repeat.claims()} - set(found.scores.names)


def require_same_digest(first: Splits, folder: Path, second: Splits, other: Path) -> None:
    """Raise DataError unless two cross-validations have the same folds."""
    if first.digest != second.digest:
        raise DataError(
            f"{folder} and {other} have other folds (their {SPLITS} differ), so their scores are "
            f"not of the same training images. Train one of them on the folds of the other: "
            f"--splits {other / SPLITS} and another folder with -o."
        )


def _require_one_method(folds: Sequence[FoldScores], splits: Splits) -> None:
    """Raise DataError where a fold was trained in another way than the first."""
    methods = [
        method_of_run(fold.path, fold.about, repeat=splits.repeat_of(fold.fold)) for fold in folds
    ]
    for fold, method in zip(folds[1:], methods[1:], strict=True):
        other = method_differences(methods[0], method)
        if other:
            raise DataError(
                f"{fold.path} was trained with other settings than {folds[0].path} "
                f"({shorten(other, 3)}): they are not folds of one method. Train one of them "
                f"again."
            )
        if fold.about.get("empty_gt") != folds[0].about.get("empty_gt"):
            raise DataError(
                f"{fold.path / OUT_OF_FOLD} scores images without an object in another way than "
                f"that of {folds[0].path}. Score the folds with one version."
            )
