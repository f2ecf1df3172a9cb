"""Find the masks of data sets on disk, and which of them belong to a test split.

A folder of masks that several splits share is divided by the folders of images.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from camoxpert.data.files.layouts import (
    IMAGE_FOLDERS,
    MASK_FOLDERS,
    folders_named,
    is_noncam,
    recognise,
)
from camoxpert.data.files.listing import image_files, list_files, subfolders
from camoxpert.data.files.manifest import manifest_of
from camoxpert.data.files.pairing import by_name, path_stem
from camoxpert.data.files.roots import distinct_names, read_root
from camoxpert.errors import ConfigError, DataError
from camoxpert.files import why_missing
from camoxpert.text import shorten

SHOWN = 10
"""Names that a message lists before it says how many more there are."""
DOCUMENTS = frozenset(
    (
        *(".txt", ".log", ".csv", ".tsv", ".json", ".jsonl", ".yaml", ".yml", ".md", ".xml"),
        *(".html", ".xls", ".xlsx", ".pdf", ".py", ".sh"),
    )
)
"""Endings of files beside maps that cannot be maps."""


@dataclass(frozen=True)
class MaskSet:
    """The ground truth of one data set.

    Attributes:
        name: of the data set.
        masks: image stem -> mask file.
        images: image stem -> image file, for pictures only; may be incomplete.
        notes: messages for the user.
        splits: image name -> its split, where the folders of images say so.
        test_only: only the test split is scored, whatever else has maps.
    """

    name: str
    masks: Mapping[str, Path]
    images: Mapping[str, Path] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    splits: Mapping[str, str] = field(default_factory=dict)
    test_only: bool = False


def find_masks(
    paths: Sequence[Path], *, images: Sequence[Path] = (), noncam: str = "exclude"
) -> dict[str, MaskSet]:
    """Find masks: folders of masks, folders of such folders, or data sets in a known layout.

    Args:
        paths: one or more folders.
        images: folders of the images, in the order of ``paths``; without them a folder of images
            beside the masks is used.
        noncam: exclude or include COD10K images without a camouflaged object.

    Raises:
        DataError: no masks found, or two data sets with the same name.
    """
    if images and len(images) != len(paths):
        raise ConfigError(
            f"--images names {len(images)} folders and --gt {len(paths)}: give one for each."
        )
    for folder in images:
        if not folder.is_dir():
            raise DataError(f"--images: {why_missing(folder, 'folder')}")
    found: list[tuple[MaskSet, Path]] = []
    for index, path in enumerate(paths):
        if not path.is_dir():
            raise DataError(f"--gt: {why_missing(path, 'folder')}")
        found += _mask_sets(path, images[index] if images else None, noncam)
    names = [mask_set.name.lower() for mask_set, _ in found]
    longer = distinct_names([home for _, home in found])
    sets: dict[str, MaskSet] = {}
    for mask_set, home in found:
        repeated = names.count(mask_set.name.lower()) > 1
        name = longer[home] if repeated else mask_set.name
        if name in sets:
            raise DataError(f"Two data sets are called {name}; give names with --list FILE.")
        sets[name] = replace(mask_set, name=name)
    return sets


def _mask_sets(path: Path, images: Path | None, noncam: str) -> list[tuple[MaskSet, Path]]:
    """Return the mask sets in a folder, each with the folder that names it."""
    inside = bool(image_files(path))
    divided = [] if inside or images is not None else _divided_sets(path, noncam)
    if divided:
        return [(mask_set, absolute(path)) for mask_set in divided]
    own = _mask_folder(path)
    if own is not None:
        return [(plain_set(own, images, noncam), home_of(own))]
    if images is not None:
        raise ConfigError(
            f"--images belongs to a --gt that is one folder of masks; {path} holds several."
        )
    folders = {sub: _sets_in(sub, noncam) for sub in subfolders(path)}
    bare = [sub.name for sub, sets in folders.items() if not sets]
    if not folders or len(bare) == len(folders):
        raise DataError(
            f"--gt: no masks found in {path}. Give a folder of masks, a folder with one such "
            "folder per data set, or a known data set layout."
        )
    if bare:
        raise DataError(
            f"--gt: these folders in {path} hold no masks: {shorten(bare, SHOWN)}. Name the others "
            "one by one, or add the masks."
        )
    return [pair for sets in folders.values() for pair in sets]


def _sets_in(path: Path, noncam: str) -> list[tuple[MaskSet, Path]]:
    """Return the mask sets of one data set's folder, named after it; none if it has no masks."""
    divided = [] if image_files(path) else _divided_sets(path, noncam)
    if divided:
        only = len(divided) == 1
        return [(replace(s, name=path.name if only else s.name), absolute(path)) for s in divided]
    masks = _mask_folder(path)
    return [] if masks is None else [(plain_set(masks, None, noncam), home_of(masks))]


def _divided_sets(path: Path, noncam: str) -> list[MaskSet]:
    """Return the test sets of a data set in a known layout with splits; [] for any other folder.

    Raises:
        DataError: the data set has splits, but none for testing.
    """
    layout = recognise(path)
    # A folder of data sets is read one by one, so that a set without masks is reported.
    if layout is None or layout.layout.name in ("folder of data sets", "flat folder"):
        return []
    splits = {found.source.split for found in layout.found}
    if splits == {"all"}:
        return []
    if "test" not in splits:
        raise DataError(
            f"--gt: {path} has no test split (found: {', '.join(sorted(splits))}). Give its folder "
            "of masks to score them."
        )
    root = read_root(path, "auto", noncam, False)
    others = [p for pairing in root.pairings for p in pairing.pairs]
    split_of_other = {
        pair.name: pairing.found.source.split for pairing in root.pairings for pair in pairing.pairs
    }
    sets = []
    for pairing in root.pairings:
        if pairing.found.source.split != "test":
            continue
        tests = manifest_of(pairing)
        every = {pair.name: pair for pair in (*others, *tests.pairs)}
        own = {pair.name for pair in tests.pairs}
        sets.append(
            MaskSet(
                tests.dataset,
                {name: pair.mask for name, pair in every.items()},
                {name: pair.image for name, pair in every.items()},
                tests.notes,
                {name: "test" if name in own else split_of_other[name] for name in every},
                test_only=True,
            )
        )
    return sets


def _mask_folder(path: Path) -> Path | None:
    """Return the folder with masks: this one, or GT (or similar) in it; None if there is none."""
    if image_files(path):
        return path
    inner = folders_named(path, MASK_FOLDERS)
    return next((folder for folder in inner if list_files(folder, nested=True).images), None)


def home_of(masks: Path) -> Path:
    """Return the folder that names the data set of a folder of masks."""
    place = absolute(masks)
    return place.parent if place.name.lower() in MASK_FOLDERS else place


def plain_set(path: Path, images: Path | None, noncam: str) -> MaskSet:
    """Read a folder of masks.

    Args:
        path: the folder; its sub-folders are read as well.
        images: folder of the images; None looks for one beside the masks.
        noncam: exclude or include COD10K images without a camouflaged object.
    """
    name = home_of(path).name
    listing = list_files(path, nested=True)
    strangers = [p.name for p in listing.others if p.suffix.lower() not in DOCUMENTS]
    if strangers:
        raise DataError(
            f"--gt: {len(strangers)} files in {path} are not images: "
            f"{shorten(strangers, SHOWN)}. Remove them."
        )
    masks = named(listing.images, path)
    kept = {s: p for s, p in masks.items() if noncam == "include" or not is_noncam(path_stem(s))}
    left_out = len(masks) - len(kept)
    notes: tuple[str, ...] = ()
    if left_out:
        notes = (
            f"{name}: {left_out} images without a camouflaged object are left out (--noncam "
            "include keeps them)",
        )
    splits = {} if images is not None else _splits_beside(path, noncam)
    splits = {image: split for image, split in splits.items() if image in kept}
    place = absolute(path)
    beside = [p for p in folders_named(place.parent, IMAGE_FOLDERS) if p != place]
    folder = images if images is not None else next(iter(beside), None)
    if folder is None:
        return MaskSet(name, kept, {}, notes, splits)
    try:
        pictures = named(list_files(folder, nested=True).images, folder)
    except DataError as error:
        if images is not None:
            raise
        # The user did not name these images, and they are only for pictures: not an error.
        notes = (*notes, f"{name}: no images in the pictures: {error}")
        return MaskSet(name, kept, {}, notes, splits)
    bare = {path_stem(stem): picture for stem, picture in pictures.items()}
    return MaskSet(name, kept, {**bare, **pictures}, notes, splits)


def _splits_beside(masks: Path, noncam: str) -> dict[str, str]:
    """Return image name -> split for a folder of masks that several splits of a data set share."""
    layout = recognise(absolute(masks).parent)
    if layout is None or layout.layout.name == "folder of data sets":
        return {}
    own = [found for found in layout.found if found.masks.samefile(masks)]
    if len({found.source.split for found in own}) < 2:
        return {}
    root = read_root(absolute(masks).parent, "auto", noncam, False)
    return {
        pair.name: pairing.found.source.split
        for pairing in root.pairings
        if pairing.found.masks.samefile(masks)
        for pair in pairing.pairs
    }


def named(files: Sequence[Path], folder: Path) -> dict[str, Path]:
    """Return files by name; DataError if two share one."""
    named, doubled = by_name(files, folder)
    for first, second in doubled:
        raise DataError(f"{first} and {second} have the same name. Remove or rename one.")
    return named


def absolute(path: Path) -> Path:
    """Return the absolute path without resolving symlinks: their names are the user's choice."""
    return Path(os.path.abspath(path))
