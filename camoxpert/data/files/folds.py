"""``splits.json``: which image each fold of a cross-validation holds out, written once and reused.

Every method that is compared trains on the same folds. The file has a hash of its own content, so
that an edited or damaged one is refused, and it knows the images it was made for, so that other
data is refused.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from camoxpert.data.files.manifest import Manifest
from camoxpert.data.files.split import split_validation
from camoxpert.errors import DataError
from camoxpert.files import why_missing, write_bytes
from camoxpert.text import count, shorten

SPLITS = "splits.json"
FORMAT = 1
NO_FOLD = 0
"""Number in place of a fold for an image that no fold holds out."""


@dataclass(frozen=True)
class Placed:
    """An image and the folds that hold it out.

    Attributes:
        dataset, name: of the pair.
        sizes: bytes of the files of image and mask.
        label: class of its object, or "".
        size: size of its object, as ``metrics.groups`` names it.
        series: what the column ``group`` of a table says, or "".
        group: number of its group, from 0; images of one group are never on both sides of a fold.
        folds: the fold that holds it out in each repeat, or ``NO_FOLD``.
        apart: folds that neither train on it nor hold it out, because others of its group are held
            out.
    """

    dataset: str
    name: str
    sizes: tuple[int, int]
    label: str
    size: str
    series: str
    group: int
    folds: tuple[int, ...]
    apart: tuple[int, ...] = ()

    @property
    def key(self) -> tuple[str, str]:
        """(data set, name)."""
        return self.dataset, self.name


@dataclass(frozen=True)
class Splits:
    """The folds of a cross-validation, numbered from 1 through all repeats.

    Attributes:
        images: every image, ordered by data set and name.
        folds: in a repeat.
        repeats: how often all images are divided.
        seed: of the first repeat.
        classes: the class that each fold holds out, where folds are classes.
        made_with: versions of what divided the images.
    """

    images: tuple[Placed, ...]
    folds: int
    repeats: int
    seed: int
    classes: tuple[str, ...] = ()
    made_with: Mapping[str, str] = field(default_factory=dict)

    @property
    def total(self) -> int:
        """Number of folds in all repeats."""
        return self.folds * self.repeats

    @property
    def digest(self) -> str:
        """The sha256 of the images and their folds: equal where other versions divide alike."""
        values = self.to_dict()
        del values["made_with"]
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()

    def repeat_of(self, fold: int) -> int:
        """Return the repeat of a fold, from 0."""
        return (fold - 1) // self.folds

    def held_out(self, fold: int) -> list[Placed]:
        """Return the images that a fold holds out."""
        repeat = self.repeat_of(fold)
        return [image for image in self.images if image.folds[repeat] == fold]

    def name_of(self, fold: int) -> str:
        """Return how a fold is called in tables."""
        if self.classes:
            return f"{fold}: {self.classes[fold - 1]}"
        if self.repeats == 1:
            return str(fold)
        return f"{fold} (repeat {self.repeat_of(fold) + 1})"

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return {
            "format": FORMAT,
            "folds": self.folds,
            "repeats": self.repeats,
            "seed": self.seed,
            "classes": list(self.classes),
            "made_with": dict(self.made_with),
            "images": [
                {
                    "dataset": image.dataset,
                    "name": image.name,
                    "bytes": list(image.sizes),
                    "class": image.label,
                    "size": image.size,
                    "series": image.series,
                    "group": image.group,
                    "folds": list(image.folds),
                    **({"apart": list(image.apart)} if image.apart else {}),
                }
                for image in self.images
            ],
        }


def write_splits(path: Path, splits: Splits) -> Path:
    """Write the file, one line for each image."""
    values = splits.to_dict()
    images = ",\n".join(f"  {json.dumps(image)}" for image in values.pop("images"))
    head = json.dumps({**values, "hash": splits.digest}, indent=1)[:-2]
    return write_bytes(path, f'{head},\n "images": [\n{images}\n ]\n}}\n'.encode(), durable=True)


def read_splits(path: Path) -> Splits:
    """Read what ``write_splits`` wrote.

    Raises:
        DataError: missing, not such a file, or changed since it was written.
    """
    if not path.is_file():
        raise DataError(f"--splits: {why_missing(path, 'file')} `camoxpert crossval` writes one.")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        known = values.pop("hash")
        splits = _from_dict(values)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"--splits: {path} is not a file of folds ({type(error).__name__}: {error}). Give the "
            f"{SPLITS} of a cross-validation."
        ) from error
    if known != splits.digest:
        raise DataError(
            f"--splits: {path} was changed since it was written (its hash is that of another "
            f"content), so its folds may not be those that others were trained on. Restore the "
            f"file, or let `camoxpert crossval` make folds in a new folder."
        )
    return splits


def fold_of(splits: Splits, fold: int, manifest: Manifest) -> tuple[Manifest, Manifest]:
    """Return the training and the held-out part of a fold.

    Args:
        splits: made for these images.
        fold: from 1.
        manifest: the images, in any order.
    """
    number = splits.repeat_of(fold)
    place = {image.key: image for image in splits.images}
    held_out, train = [], []
    for pair in manifest.pairs:
        image = place[pair.dataset, pair.name]
        if image.folds[number] == fold:
            held_out.append(pair)
        elif fold not in image.apart:
            train.append(pair)
    _, nothing = split_validation(manifest, 0.0, 0)
    return (
        replace(manifest, pairs=tuple(train)),
        replace(nothing, pairs=tuple(held_out)),
    )


def require_fold(splits: Splits, fold: int, path: Path) -> None:
    """Raise DataError for a fold that the splits do not have."""
    if not 1 <= fold <= splits.total:
        raise DataError(
            f"--fold {fold}: {path} has {count(splits.total, 'fold')}, numbered from 1. Name one "
            f"of them; no other split is made in its place."
        )


def require_same_images(splits: Splits, manifest: Manifest, path: Path) -> None:
    """Raise DataError unless the images are those that the splits were made for."""
    before = {image.key: image for image in splits.images}
    now = {(pair.dataset, pair.name): pair for pair in manifest.pairs}
    sizes = manifest.files()
    both = before.keys() & now.keys()
    changes = {
        "missing": before.keys() - now.keys(),
        "new": now.keys() - before.keys(),
        "with a file of another size": {k for k in both if before[k].sizes != sizes[k]},
        "in another series (column group)": {k for k in both if before[k].series != now[k].series},
    }
    words = [f"{len(keys)} {what}: {_named(keys)}" for what, keys in changes.items() if keys]
    if words:
        raise DataError(
            f"The data is not that of {path}, which was made for "
            f"{count(len(splits.images), 'image')} ({'; '.join(words)}). Scores of folds from "
            f"before and after a change cannot be joined. Restore the data, or make folds of the "
            f"data as it is now in another folder (-o)."
        )


def _named(keys: Iterable[tuple[str, str]]) -> str:
    return shorten((name for _, name in sorted(keys)), 3)


def _from_dict(values: Mapping[str, Any]) -> Splits:
    if values["format"] != FORMAT:
        raise ValueError(f"format {values['format']}, and this version reads {FORMAT}")
    return Splits(
        images=tuple(
            Placed(
                str(row["dataset"]),
                str(row["name"]),
                (int(row["bytes"][0]), int(row["bytes"][1])),
                str(row["class"]),
                str(row["size"]),
                str(row["series"]),
                int(row["group"]),
                tuple(int(fold) for fold in row["folds"]),
                tuple(int(fold) for fold in row.get("apart", ())),
            )
            for row in values["images"]
        ),
        folds=int(values["folds"]),
        repeats=int(values["repeats"]),
        seed=int(values["seed"]),
        classes=tuple(map(str, values["classes"])),
        made_with={str(k): str(v) for k, v in values["made_with"].items()},
    )
