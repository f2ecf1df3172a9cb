"""Find methods, data sets and prediction maps on disk, and pair each map with its mask.

Nothing is intersected silently: a map without a mask, a mask without a map and a file that is not
image are faults, unless the caller says otherwise.
"""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from camoxpert import console
from camoxpert.data.files.layouts import (
    IMAGE_FOLDERS,
    IMAGE_SUFFIXES,
    MASK_FOLDERS,
    class_of,
    image_files,
    is_noncam,
    recognise,
)
from camoxpert.data.files.manifest import Search, load_eval
from camoxpert.errors import ConfigError, DataError
from camoxpert.text import shorten

SHOWN = 10
"""Names that a message lists before it says how many more there are."""


@dataclass(frozen=True)
class MaskSet:
    """The ground truth of one data set.

    Attributes:
        name: of the data set.
        masks: image stem -> mask file.
        images: image stem -> image file, for pictures only; may be incomplete.
        notes: messages for the user.
    """

    name: str
    masks: Mapping[str, Path]
    images: Mapping[str, Path] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class MapJob:
    """One image to score."""

    name: str
    map: Path
    mask: Path
    image: Path | None
    group: str


@dataclass(frozen=True)
class MapTask:
    """One method on one data set.

    Attributes:
        method, dataset: names.
        jobs: one per image, by name.
        missing: masks without a map that are left out, as allowed.
        extra: maps without a mask that are left out, as allowed.
    """

    method: str
    dataset: str
    jobs: tuple[MapJob, ...]
    missing: tuple[str, ...] = ()
    extra: tuple[str, ...] = ()


@dataclass(frozen=True)
class PairOptions:
    """Which of the maps and masks that were found are scored.

    Attributes:
        noncam: exclude or include COD10K images without a camouflaged object.
        allow_missing: masks without a map are left out, and counted.
        allow_extra: maps without a mask are left out, and counted.
        method: another name for the only method, or "".
    """

    noncam: str = "exclude"
    allow_missing: bool = False
    allow_extra: bool = False
    method: str = ""


def find_tasks(
    predictions: Sequence[Path],
    gt: Sequence[Path],
    options: PairOptions,
    *,
    images: Sequence[Path] = (),
) -> list[MapTask]:
    """Find maps and masks, pair them and print notes.

    Args:
        predictions: see ``find_maps``.
        gt, images: see ``find_masks``.
        options: which of them to score.

    Raises:
        ConfigError: flags that contradict each other.
        DataError: a list of all errors in all folders, or nothing found.
    """
    sets = find_masks(gt, images=images, noncam=options.noncam)
    tasks = find_maps(
        predictions,
        sets,
        allow_missing=options.allow_missing,
        allow_extra=options.allow_extra,
    )
    return chosen_tasks(tasks, sets, options)


def chosen_tasks(
    tasks: Sequence[MapTask], sets: Mapping[str, MaskSet], options: PairOptions
) -> list[MapTask]:
    """Return the tasks, renamed if ``options.method`` is set, and print the data sets' notes."""
    names = sorted({task.method for task in tasks})
    if options.method and len(names) > 1:
        raise ConfigError(
            f"--method {options.method} renames a single method, but there are {len(names)}: "
            f"{', '.join(names)}. Leave it out, or give names with --list FILE."
        )
    for mask_set in sets.values():
        for note in mask_set.notes:
            console.note(note)
    return [replace(task, method=options.method or task.method) for task in tasks]


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
            raise DataError(f"--images: there is no folder {folder}.")
    sets: dict[str, MaskSet] = {}
    for index, path in enumerate(paths):
        if not path.is_dir():
            raise DataError(f"--gt: there is no folder {path}.")
        found = _mask_sets(path, images[index] if images else None, noncam)
        for mask_set in found:
            if mask_set.name in sets:
                raise DataError(
                    f"Two data sets are called {mask_set.name}; give names with --list FILE."
                )
            sets[mask_set.name] = mask_set
    return sets


def _mask_sets(path: Path, images: Path | None, noncam: str) -> list[MaskSet]:
    own = _mask_folder(path)
    if own is not None:
        return [plain_set(own, images, noncam)]
    if images is not None:
        raise ConfigError(
            f"--images belongs to a --gt that is one folder of masks; {path} holds several."
        )
    layout = recognise(path)
    # A folder of data sets is read below, so that a set without masks is reported.
    if layout is not None and layout[0].name != "folder of data sets":
        return [
            MaskSet(
                name,
                {pair.name: pair.mask for pair in manifest.pairs},
                {pair.name: pair.image for pair in manifest.pairs},
                manifest.notes,
            )
            for name, manifest in load_eval(path, Search(noncam=noncam)).items()
        ]
    folders = {sub: _mask_folder(sub) for sub in _subfolders(path)}
    bare = [sub.name for sub, masks in folders.items() if masks is None]
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
    return [plain_set(masks, None, noncam) for masks in folders.values() if masks is not None]


def _mask_folder(path: Path) -> Path | None:
    """Return the folder with masks: this one, or GT (or similar) in it; None if there is none."""
    if image_files(path):
        return path
    inner = (path / name for name in MASK_FOLDERS)
    return next((folder for folder in inner if folder.is_dir() and image_files(folder)), None)


def plain_set(path: Path, images: Path | None, noncam: str) -> MaskSet:
    """Read a folder of masks.

    Args:
        path: the folder.
        images: folder of the images; None looks for one beside the masks.
        noncam: exclude or include COD10K images without a camouflaged object.
    """
    _refuse_strangers(path, "--gt")
    masks = _by_stem(path)
    kept = {s: p for s, p in masks.items() if noncam == "include" or not is_noncam(s)}
    left_out = len(masks) - len(kept)
    place = absolute(path)
    name = place.parent.name if place.name in MASK_FOLDERS else place.name
    notes: tuple[str, ...] = ()
    if left_out:
        notes = (
            f"{name}: {left_out} images without a camouflaged object are left out (--noncam "
            "include keeps them)",
        )
    if images is not None:
        return MaskSet(name, kept, _by_stem(images), notes)
    beside = (place.parent / folder for folder in IMAGE_FOLDERS)
    folder = next((p for p in beside if p.is_dir() and p != place), None)
    try:
        return MaskSet(name, kept, _by_stem(folder) if folder is not None else {}, notes)
    except DataError as error:
        # The user did not name these images, and they are only for pictures: not an error.
        return MaskSet(name, kept, {}, (*notes, f"{name}: no images in the pictures: {error}"))


def find_maps(
    paths: Sequence[Path],
    sets: Mapping[str, MaskSet],
    *,
    allow_missing: bool = False,
    allow_extra: bool = False,
) -> list[MapTask]:
    """Find the maps of every method for every data set.

    A path is a folder of maps (one data set only), a method's folder with one folder per data set,
    or a folder of methods.

    Args:
        paths: such folders.
        sets: from ``find_masks``.
        allow_missing: masks without a map are left out, and counted.
        allow_extra: maps without a mask are left out, and counted.

    Raises:
        DataError: every fault of every folder in one list, or nothing found.
    """
    methods: dict[str, dict[str, Path]] = {}
    for path in paths:
        if not path.is_dir():
            raise DataError(f"--predictions: there is no folder {path}.")
        for method, folders in _methods_in(path, sets).items():
            if method in methods:
                raise DataError(
                    f"Two methods are called {method}; give names with --list FILE, or rename one."
                )
            methods[method] = folders
    return pair_maps(methods, sets, allow_missing=allow_missing, allow_extra=allow_extra)


def pair_maps(
    methods: Mapping[str, Mapping[str, Path]],
    sets: Mapping[str, MaskSet],
    *,
    allow_missing: bool = False,
    allow_extra: bool = False,
) -> list[MapTask]:
    """Pair the maps of each method with the masks of each data set; see ``find_maps``."""
    faults: list[str] = []
    tasks = []
    for dataset, mask_set in sets.items():
        for method, folders in methods.items():
            if dataset not in folders:
                if not allow_missing:
                    faults.append(f"{method} has no folder for the data set {dataset}")
                continue
            task, found = _pair_folder(method, mask_set, folders[dataset])
            if task.missing and not allow_missing:
                found.append(
                    f"{method} on {dataset}: {len(task.missing)} of {len(mask_set.masks)} masks "
                    f"have no map: {shorten(task.missing, SHOWN)} (--allow-missing leaves them "
                    "out)"
                )
            if task.extra and not allow_extra:
                found.append(
                    f"{method} on {dataset}: {len(task.extra)} maps have no mask: "
                    f"{shorten(task.extra, SHOWN)} (--allow-extra leaves them out)"
                )
            if not task.jobs and not found:
                found.append(f"{method} on {dataset}: no map has the name of a mask")
            faults += found
            tasks.append(task)
    if faults:
        raise DataError("The prediction maps and masks do not match:\n  " + "\n  ".join(faults))
    if not tasks:
        raise DataError("There is nothing to score: no folder of maps belongs to a data set.")
    return tasks


def _pair_folder(method: str, mask_set: MaskSet, folder: Path) -> tuple[MapTask, list[str]]:
    faults = []
    strangers = _strangers(folder)
    if strangers:
        faults.append(
            f"{method} on {mask_set.name}: {len(strangers)} files in {folder} are not images: "
            f"{shorten(strangers, SHOWN)}"
        )
    maps = _by_stem(folder)
    jobs = tuple(
        MapJob(name, maps[name], mask, mask_set.images.get(name), class_of(name))
        for name, mask in sorted(mask_set.masks.items())
        if name in maps
    )
    missing = tuple(sorted(mask_set.masks.keys() - maps.keys()))
    extra = tuple(sorted(maps.keys() - mask_set.masks.keys()))
    return MapTask(method, mask_set.name, jobs, missing, extra), faults


def _methods_in(path: Path, sets: Mapping[str, MaskSet]) -> dict[str, dict[str, Path]]:
    place = absolute(path)
    name = place.name
    if image_files(path):
        if len(sets) > 1:
            own = _match(name, sets)
            if own is None:
                raise DataError(
                    f"{path} holds maps, but --gt has {len(sets)} data sets ({', '.join(sets)}). "
                    "Give a folder with one folder per data set."
                )
            return {place.parent.name: {own: path}}
        only = next(iter(sets))
        return {place.parent.name if _match(name, sets) else name: {only: path}}
    folders = dataset_folders(path, sets)
    if folders:
        return {name: folders}
    methods: dict[str, dict[str, Path]] = {}
    bare = []
    for sub in _subfolders(path):
        if image_files(sub) and len(sets) == 1:
            methods[sub.name] = {next(iter(sets)): sub}
        elif inner := dataset_folders(sub, sets):
            methods[sub.name] = inner
        else:
            bare.append(sub.name)
    if not methods:
        raise DataError(
            f"--predictions: no maps for {', '.join(sets)} found in {path}. Give a folder of maps, "
            "a method's folder with one folder per data set, or a folder of methods."
        )
    if bare:
        raise DataError(
            f"--predictions: these folders in {path} hold no maps for {', '.join(sets)}: "
            f"{shorten(bare, SHOWN)}. Name the methods one by one, or take these folders out."
        )
    return methods


def dataset_folders(path: Path, sets: Mapping[str, MaskSet]) -> dict[str, Path]:
    """Return data set -> folder of maps for the subfolders that are named like one.

    Other subfolders are printed as a note.
    """
    found: dict[str, Path] = {}
    other = []
    for folder in _subfolders(path):
        name = _match(folder.name, sets)
        if name is None:
            other.append(folder.name)
        elif name in found:
            raise DataError(
                f"{found[name]} and {folder} are both named like the data set {name}. Remove or "
                "rename one."
            )
        else:
            found[name] = folder
    if found and other:
        console.note(f"{path}: not scored, as --gt has no such data set: {shorten(other, SHOWN)}")
    return found


def _match(name: str, sets: Mapping[str, MaskSet]) -> str | None:
    """Return the data set of that name, in upper or lower case; None if there is none."""
    return next((own for own in sets if own.lower() == name.lower()), None)


def _subfolders(path: Path) -> list[Path]:
    return sorted(p for p in path.iterdir() if p.is_dir() and not p.name.startswith("."))


def _strangers(folder: Path) -> list[str]:
    return sorted(
        p.name
        for p in folder.iterdir()
        if p.is_file() and not p.name.startswith(".") and p.suffix.lower() not in IMAGE_SUFFIXES
    )


def _refuse_strangers(folder: Path, flag: str) -> None:
    strangers = _strangers(folder)
    if strangers:
        raise DataError(
            f"{flag}: {len(strangers)} files in {folder} are not images: "
            f"{shorten(strangers, SHOWN)}. Remove them."
        )


def _by_stem(folder: Path) -> dict[str, Path]:
    files: dict[str, Path] = {}
    for path in image_files(folder):
        # macOS writes decomposed accents: the same name must compare equal.
        stem = unicodedata.normalize("NFC", path.stem)
        if stem in files:
            raise DataError(f"{files[stem]} and {path} have the same name. Remove or rename one.")
        files[stem] = path
    return files


def absolute(path: Path) -> Path:
    """Return the absolute path without resolving symlinks: their names are the user's choice."""
    return Path(os.path.abspath(path))
