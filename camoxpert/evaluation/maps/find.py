"""Find methods, data sets and prediction maps on disk, and pair each map with its mask.

Nothing is intersected silently: a map without a mask, a mask without a map and a file that is not
image are faults, unless the caller says otherwise.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from camoxpert import console
from camoxpert.data.files.layouts import folders_named
from camoxpert.data.files.listing import (
    endings,
    image_files,
    is_predict_output,
    list_files,
    subfolders,
)
from camoxpert.data.files.names import match_names, strip_suffix
from camoxpert.data.files.pairing import group_of
from camoxpert.errors import ConfigError, DataError
from camoxpert.evaluation.maps.masks import (
    DOCUMENTS,
    SHOWN,
    MaskSet,
    absolute,
    find_masks,
    named,
)
from camoxpert.files import why_missing
from camoxpert.text import count, shorten

MAP_FOLDERS = ("maps", "map", "predictions", "preds", "pred")
"""Folders inside a method's folder that hold its maps."""


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
        map_suffix: what the names of maps have behind the image's name; None: found by rule.
    """

    noncam: str = "exclude"
    allow_missing: bool = False
    allow_extra: bool = False
    method: str = ""
    map_suffix: str | None = None


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
    return chosen_tasks(find_maps(predictions, sets, options), sets, options)


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


def find_maps(
    paths: Sequence[Path], sets: Mapping[str, MaskSet], options: PairOptions
) -> list[MapTask]:
    """Find the maps of every method for every data set.

    A path is a folder of maps (one data set only), a method's folder with one folder per data set,
    the output of ``predict``, or a folder of these.

    Args:
        paths: such folders.
        sets: from ``find_masks``.
        options: what is left out.

    Raises:
        DataError: every fault of every folder in one list, or nothing found.
    """
    methods: dict[str, dict[str, Path]] = {}
    for path in paths:
        if not path.is_dir():
            raise DataError(f"--predictions: {why_missing(path, 'folder')}")
        for method, folders in _methods_in(path, sets).items():
            if method in methods:
                raise DataError(
                    f"Two methods are called {method}; give names with --list FILE, or rename one."
                )
            methods[method] = folders
    return pair_maps(methods, sets, options)


def pair_maps(
    methods: Mapping[str, Mapping[str, Path]],
    sets: Mapping[str, MaskSet],
    options: PairOptions,
) -> list[MapTask]:
    """Pair the maps of each method with the masks of each data set; see ``find_maps``."""
    faults: list[str] = []
    tasks = []
    for dataset, mask_set in sets.items():
        for method, folders in methods.items():
            if dataset not in folders:
                if not options.allow_missing:
                    faults.append(f"{method} has no folder for the data set {dataset}")
                continue
            task, found = _pair_folder(method, mask_set, folders[dataset], options)
            if task.missing and not options.allow_missing:
                found.append(
                    f"{method} on {dataset}: {len(task.missing)} of "
                    f"{len(task.jobs) + len(task.missing)} masks have no map: "
                    f"{shorten(task.missing, SHOWN)} (--allow-missing leaves them out)"
                )
            if task.extra and not options.allow_extra:
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


def _pair_folder(
    method: str, mask_set: MaskSet, folder: Path, options: PairOptions
) -> tuple[MapTask, list[str]]:
    """Pair the maps of one folder; return the task and what is wrong with the folder."""
    label = f"{method} on {mask_set.name}"
    faults: list[str] = []
    listing = list_files(folder, nested=True)
    documents = [path for path in listing.others if path.suffix.lower() in DOCUMENTS]
    strangers = [path.name for path in listing.others if path not in set(documents)]
    if strangers:
        faults.append(
            f"{label}: {len(strangers)} files in {folder} are not images: "
            f"{shorten(strangers, SHOWN)}"
        )
    if documents:
        console.note(f"{label}: {count(len(documents), 'file')} ignored: {endings(documents)}")
    maps = named(listing.images, folder)
    if options.map_suffix is not None:
        kept = strip_suffix(maps, options.map_suffix)
        if len(kept) < len(maps):
            console.note(
                f"{label}: {len(maps) - len(kept)} of {len(maps)} maps do not end in "
                f"{options.map_suffix} and are left out"
            )
        maps = {name: maps[whole] for name, whole in kept.items()}
    advice = "Choose one with --map-suffix, for example --map-suffix _sal."
    matched = match_names(mask_set.masks, maps, advice=advice)
    if matched.rule:
        console.note(f"{label}: maps matched by a rule: {matched.rule}")
    wanted = _wanted(label, mask_set, matched.partner)
    jobs = tuple(
        MapJob(
            name,
            maps[matched.partner[name]],
            mask_set.masks[name],
            mask_set.images.get(name),
            group_of(name),
        )
        for name in sorted(wanted)
        if name in matched.partner
    )
    missing = tuple(sorted(wanted - matched.partner.keys()))
    extra = tuple(sorted(maps.keys() - set(matched.partner.values())))
    return MapTask(method, mask_set.name, jobs, missing, extra), faults


def _wanted(label: str, mask_set: MaskSet, mapped: Mapping[str, str]) -> set[str]:
    """Return the images that a method must have maps of; print it where that is not all.

    The folders of images decide which images are the test split; a method that has some of its maps
    only is incomplete, not a method of another split.
    """
    tests = {name for name, split in mask_set.splits.items() if split == "test"}
    others = sorted(mapped.keys() - tests)
    if not tests or (others and not mask_set.test_only):
        return set(mask_set.masks)
    words = f"{label}: the {len(tests)} images of the test split are scored"
    if others:
        words += f"; {count(len(others), 'map')} of other splits not ({shorten(others)})"
    if len(tests) < len(mask_set.masks):
        console.note(f"{words} ({len(mask_set.masks)} masks in all)")
    return tests


def map_folder(path: Path) -> Path | None:
    """Return the folder with maps: this one, or ``maps`` in it, as ``predict`` writes it.

    Of an output of ``predict`` that holds binary masks only, these are the maps.
    """
    if image_files(path):
        return path
    written = is_predict_output(path)
    inner = folders_named(path, (*MAP_FOLDERS, *(("masks",) if written else ())))
    inner = [folder for folder in inner if list_files(folder, nested=True).images]
    others = [p for p in subfolders(path) if p not in inner and image_files(p)]
    return inner[0] if inner and (written or not others) else None


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
    found = _method(path, sets)
    if found:
        return {name: found}
    methods: dict[str, dict[str, Path]] = {}
    bare = []
    for sub in subfolders(path):
        inner = _method(sub, sets)
        if inner:
            methods[sub.name] = inner
        else:
            bare.append(sub.name)
    if not methods:
        others = [p for p in list_files(path).others if p.suffix.lower() not in DOCUMENTS]
        held = f" It holds {endings(others)}, which are not images." if others else ""
        raise DataError(
            f"--predictions: no maps for {', '.join(sets)} found in {path}.{held} Give a folder of "
            "maps, "
            "a method's folder with one folder per data set, or a folder of methods."
        )
    if bare:
        raise DataError(
            f"--predictions: these folders in {path} hold no maps for {', '.join(sets)}: "
            f"{shorten(bare, SHOWN)}. Name the methods one by one, or take these folders out."
        )
    return methods


def _method(path: Path, sets: Mapping[str, MaskSet]) -> dict[str, Path]:
    """Return data set -> folder of maps for a method's folder; {} if it holds none."""
    place = map_folder(path)
    folders = dataset_folders(place or path, sets)
    if folders or place is None or len(sets) > 1:
        return folders
    return {next(iter(sets)): place}


def dataset_folders(path: Path, sets: Mapping[str, MaskSet]) -> dict[str, Path]:
    """Return data set -> folder of maps for the subfolders that are named like one.

    Other subfolders are printed as a note.
    """
    found: dict[str, Path] = {}
    other = []
    for folder in subfolders(path):
        name = _match(folder.name, sets)
        if name is None:
            other.append(folder.name)
        elif name in found:
            raise DataError(
                f"{found[name]} and {folder} are both named like the data set {name}. Remove or "
                "rename one."
            )
        else:
            found[name] = map_folder(folder) or folder
    if found and other:
        console.note(f"{path}: not scored, as --gt has no such data set: {shorten(other, SHOWN)}")
    return found


def _match(name: str, sets: Mapping[str, MaskSet]) -> str | None:
    """Return the data set of that name, in upper or lower case; None if there is none."""
    return next((own for own in sets if own.lower() == name.lower()), None)
