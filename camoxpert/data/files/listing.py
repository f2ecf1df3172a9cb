"""List the images of a folder. Nothing is dropped: what is no image is counted and named.

Only the side files of operating systems and notebooks are ignored, by name (``is_side_file``).
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from camoxpert.text import shorten

IMAGE_SUFFIXES = frozenset(
    (
        *(".jpg", ".jpeg", ".jpe", ".jfif", ".jp2", ".png", ".bmp", ".tif", ".tiff", ".webp"),
        *(".gif", ".avif", ".tga", ".ppm", ".pgm", ".pbm", ".pnm"),
    )
)
"""Endings that are read. A file that the installed Pillow cannot read is an error that names it."""
ARCHIVE_SUFFIXES = frozenset((".zip", ".tar", ".gz", ".tgz", ".7z", ".rar", ".xz", ".bz2"))
VIDEO_SUFFIXES = frozenset((".mp4", ".mov", ".avi", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg"))
OUTPUT_TABLE = "results.csv"
OUTPUT_RECORD = "predictions.jsonl"
OUTPUT_SUMMARY = "predict.json"
OUTPUT_COCO = "coco.json"
OUTPUT_FOLDERS = ("maps", "masks", "cutouts", "overlays", "coco_parts", "labelme")
"""What ``predict`` writes."""
OUTPUT_COLUMNS = b"image,height,width"
SIDE_FILES = frozenset(("thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r", "__macosx", "@eadir"))


@dataclass(frozen=True)
class Listing:
    """The content of a folder.

    Attributes:
        images: files with an image ending, by name; links to missing files are among them, so that
            reading them is an error.
        others: every other file, except side files.
        folders: sub-folders that were not entered.
    """

    images: tuple[Path, ...]
    others: tuple[Path, ...] = ()
    folders: tuple[Path, ...] = ()


def is_side_file(name: str) -> bool:
    """Return whether a name is hidden, or one that Windows, macOS or a NAS leaves in folders."""
    return name.startswith(".") or name.lower() in SIDE_FILES


def is_image_name(path: Path) -> bool:
    """Return whether a file's ending is one of an image."""
    return path.suffix.lower() in IMAGE_SUFFIXES


def is_predict_output(folder: Path) -> bool:
    """Return whether ``predict`` wrote into a folder; it may hold other files as well."""
    table = folder / OUTPUT_TABLE
    if (folder / OUTPUT_RECORD).is_file():
        return True
    if not table.is_file():
        return False
    with table.open("rb") as file:
        return file.read(len(OUTPUT_COLUMNS)) == OUTPUT_COLUMNS


def list_files(
    folder: Path, *, nested: bool = False, enter: Callable[[Path], bool] = lambda path: True
) -> Listing:
    """Return the files of a folder, sorted.

    Args:
        folder: an existing folder.
        nested: also list the sub-folders, linked ones included; a link back to a folder that
            contains it is followed once.
        enter: whether to list a sub-folder; the others are returned.
    """
    images: list[Path] = []
    others: list[Path] = []
    left: list[Path] = []
    # Real paths of the folders above, so that a link to one of them ends the walk.
    todo: list[tuple[Path, frozenset[str]]] = [(folder, frozenset((os.path.realpath(folder),)))]
    while todo:
        place, above = todo.pop()
        for path in place.iterdir():
            if is_side_file(path.name):
                continue
            if path.is_dir():
                real = os.path.realpath(path)
                if not nested or not enter(path):
                    left.append(path)
                elif real not in above:
                    todo.append((path, above | {real}))
            elif is_image_name(path) and (path.is_file() or path.is_symlink()):
                images.append(path)
            else:
                others.append(path)
    return Listing(tuple(sorted(images)), tuple(sorted(others)), tuple(sorted(left)))


def image_files(folder: Path) -> list[Path]:
    """Return the image files directly in a folder, sorted by name."""
    return list(list_files(folder).images)


def subfolders(path: Path) -> list[Path]:
    """Return the folders in a folder, sorted, without hidden and side ones."""
    return sorted(p for p in path.iterdir() if p.is_dir() and not is_side_file(p.name))


def endings(files: Iterable[Path]) -> str:
    """Return how many files have each ending and one example: ``.txt 3 (for example a.txt)``."""
    known = list(files)
    counts = Counter(path.suffix.lower() or "no ending" for path in known)
    shown = shorten(f"{ending} {number}" for ending, number in counts.most_common())
    return f"{shown} (for example {known[0].name})"
