"""A YAML list that names methods and data sets, for maps that are not in one folder tree."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from camoxpert.config import read_yaml
from camoxpert.data.files.listing import image_files
from camoxpert.errors import ConfigError, DataError
from camoxpert.evaluation.maps.find import (
    MapTask,
    PairOptions,
    chosen_tasks,
    dataset_folders,
    map_folder,
    pair_maps,
)
from camoxpert.evaluation.maps.masks import MaskSet, plain_set
from camoxpert.files import why_missing


def list_tasks(path: Path, options: PairOptions) -> list[MapTask]:
    """Return the tasks of a YAML list; see ``read_list`` and ``find_tasks``."""
    sets, methods = read_list(path, noncam=options.noncam)
    return chosen_tasks(pair_maps(methods, sets, options), sets, options)


def read_list(
    path: Path, *, noncam: str = "exclude"
) -> tuple[dict[str, MaskSet], dict[str, dict[str, Path]]]:
    """Read a YAML list of data sets and methods; paths are relative to the file.

    ::

        datasets:
          CAMO: {gt: CAMO/GT, images: CAMO/Imgs}    # or just the folder of masks
        methods:
          ours: maps/ours                           # with one folder per data set
          SINet: {CAMO: maps/sinet_camo}            # or a folder for each

    Args:
        path: the file.
        noncam: exclude or include COD10K images without a camouflaged object.

    Raises:
        ConfigError: no such file, or another content.
        DataError: a folder does not exist or holds no masks.
    """
    if not path.is_file():
        raise ConfigError(f"--list: {why_missing(path, 'file')}")
    content = read_yaml(path)
    unknown = set(content) - {"datasets", "methods"}
    if unknown or not all(
        isinstance(content.get(key), dict) and content[key] for key in ("datasets", "methods")
    ):
        raise ConfigError(
            f"{path} must have the two tables `datasets` (name: folder of masks) and `methods` "
            f"(name: folder of "
            f"maps){'; it has ' + ', '.join(map(str, content)) if unknown else ''}."
        )
    root = path.parent
    sets = {}
    for name, entry in content["datasets"].items():
        table = {"gt": entry} if isinstance(entry, str) else entry
        if not isinstance(table, dict) or set(table) - {"gt", "images"} or "gt" not in table:
            raise ConfigError(
                f"{path}: data set {name}: give a folder, or {{gt: ..., images: ...}}."
            )
        folder = _place(root, table["gt"])
        if not folder.is_dir() or not image_files(folder):
            raise DataError(f"{path}: data set {name}: {folder} holds no masks.")
        images = _place(root, table["images"]) if "images" in table else None
        if images is not None and not images.is_dir():
            raise DataError(f"{path}: data set {name}: there is no folder {images}.")
        plain = plain_set(folder, images, noncam)
        sets[str(name)] = replace(plain, name=str(name))
    methods = {
        str(name): _listed_folders(path, root, str(name), entry, sets)
        for name, entry in content["methods"].items()
    }
    return sets, methods


def _place(root: Path, written: object) -> Path:
    """Return a path of the list, relative to its folder; ``~`` is the user's."""
    return root / Path(str(written)).expanduser()


def _listed_folders(
    path: Path, root: Path, method: str, entry: Any, sets: Mapping[str, MaskSet]
) -> dict[str, Path]:
    if isinstance(entry, str):
        place = _place(root, entry)
        if not place.is_dir():
            raise DataError(f"{path}: method {method}: {why_missing(place, 'folder')}")
        folders = dataset_folders(place, sets)
        if not folders and len(sets) == 1:
            folders = {next(iter(sets)): map_folder(place) or place}
        if not folders:
            raise DataError(
                f"{path}: method {method}: {place} has no folder for {', '.join(sets)}."
            )
    elif isinstance(entry, dict):
        folders = {str(dataset): _place(root, folder) for dataset, folder in entry.items()}
    else:
        raise ConfigError(f"{path}: method {method}: give a folder, or one for each data set.")
    unknown = sorted(set(folders) - set(sets))
    if unknown:
        raise ConfigError(f"{path}: method {method} names the unknown data set {unknown[0]}.")
    for folder in folders.values():
        if not folder.is_dir():
            raise DataError(f"{path}: method {method}: {why_missing(folder, 'folder')}")
    return {dataset: map_folder(folder) or folder for dataset, folder in folders.items()}
