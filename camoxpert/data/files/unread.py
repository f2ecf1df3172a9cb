"""Folders with images that a layout does not read: nobody should miss a data set without a word."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from pathlib import Path

from camoxpert.data.files.listing import image_files, subfolders


def unread(
    root: Path, used: Collection[Path], beside: Collection[str], kinds: Collection[str]
) -> tuple[str, ...]:
    """Return notes about images in a folder that are not read.

    Args:
        root: the folder.
        used: folders of images and masks that are read, resolved.
        beside: names of folders, in lower case, that are read in another way.
        kinds: names of folders of images and of masks: what lies beside one is another kind of file
            of the same data, such as edges, except directly in ``root``.
    """
    ends = tuple(f"-{name}" for name in beside)

    def left_in(folder: Path) -> Iterator[Path]:
        inner = subfolders(folder)
        others = folder == root or not any(
            path.resolve() in used and path.name.lower() in kinds for path in inner
        )
        for path in inner:
            name = path.name.lower()
            if _inside(path, used):
                continue
            if any(place.is_relative_to(path.resolve()) for place in used):
                yield from left_in(path)
            elif others and name not in beside and not name.endswith(ends) and _has_images(path):
                yield path

    notes = []
    left = [path.relative_to(root).as_posix() for path in left_in(root)]
    if left:
        notes.append(f"{root}: folders with images that are not read: {', '.join(left)}")
    loose = [] if root.resolve() in used else image_files(root)
    if loose:
        notes.append(
            f"{root}: {len(loose)} images beside the folders are not read: {loose[0].name}"
        )
    return tuple(notes)


def _inside(path: Path, folders: Collection[Path]) -> bool:
    return any(path.resolve().is_relative_to(folder) for folder in folders)


def _has_images(folder: Path) -> bool:
    """Return whether there are images in a folder or one or two levels below it."""
    level = [folder]
    for _ in range(3):
        if any(image_files(place) for place in level):
            return True
        level = [inner for place in level for inner in subfolders(place)]
    return False
