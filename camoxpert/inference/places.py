"""Whose files lie where results go: the user's are not written over, and photos are not frames."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

from camoxpert.errors import ConfigError, DataError
from camoxpert.files import leads_outside
from camoxpert.inference.ledger import Ledger
from camoxpert.inference.plan import Made
from camoxpert.inference.prediction import PICTURES, TIMES, output_path
from camoxpert.inference.products import Product
from camoxpert.inference.sources import Photo

FRAME_FILE = re.compile(r"\d{6,}\.(png|jpg)")


def require_other_files(
    folder: Path, items: Sequence[Made], kinds: Sequence[str], product: Product
) -> None:
    """Raise ConfigError if a result would be written over one of the files that it is made of."""
    roots = tuple(os.path.abspath(folder / name) + os.sep for name in product.folders.values())
    inside = {path for item in items for path in map(os.path.abspath, item.files)}
    inside = {path for path in inside if path.startswith(roots)}
    for item in items if inside else ():
        for kind in kinds:
            if (
                kind in product.folders
                and os.path.abspath(product.path(folder, kind, item.name)) in inside
            ):
                raise ConfigError(
                    f"{product.path(folder, kind, item.name)} is one of the inputs, and a result "
                    "would be written over it. Name another folder with -o."
                )


def require_no_frames(ledger: Ledger, photos: Sequence[Photo]) -> None:
    """Raise DataError if results of photos would lie among the frames of a video."""
    seen: set[str] = set()
    for photo in photos:
        folder = photo.name.rpartition("/")[0]
        while folder and folder not in seen:
            seen.add(folder)
            if ledger.index.status(folder) and times_path(ledger.folder, folder).is_file():
                raise DataError(
                    f"{ledger.folder} holds the frames of a video in {folder}/, where the results "
                    f"of {photo.path} would be written. Name another folder with -o."
                )
            folder = folder.rpartition("/")[0]


def require_own_files(
    ledger: Ledger, video: Photo, kinds: Sequence[str], *, overwrite: bool
) -> None:
    """Refuse to write results of a video over other files; to be called before ``make_plan``.

    Raises:
        ConfigError: files of unknown origin are there, without ``overwrite``, or even the video.
    """
    folder, name = ledger.folder, video.name
    whole = output_path(folder, "video", name)
    own = whole.is_file() and video.path.is_file() and whole.samefile(video.path)
    if "video" in kinds and own:
        raise ConfigError(
            f"{whole} is the input, and the result would be written over it. Name another folder "
            "with -o."
        )
    # A call that was killed may have left files that no row lists yet.
    orderly = ledger.earlier is None or ledger.finished
    if overwrite or not orderly or ledger.index.status(name):
        return
    files = [path for kind in PICTURES for path in frame_files(folder, kind, name)[:1]]
    files += [path for path in (whole, times_path(folder, name)) if path.exists()]
    if files:
        raise ConfigError(
            f"{files[0]} is there already, and no ledger in {folder} says how it was made. Name "
            "another folder with -o, or add --overwrite to replace such files."
        )


def times_path(folder: Path, name: str) -> Path:
    """Return the table of the times of a video's frames."""
    path = folder / TIMES / f"{name}.csv"
    if leads_outside(folder, path):
        raise DataError(f"{path} would be written outside {folder}. Name another folder with -o.")
    return path


def frame_files(folder: Path, kind: str, name: str) -> list[Path]:
    """Return the pictures of one kind of a video's frames."""
    place = output_path(folder, kind, f"{name}/1").parent
    if not place.is_dir():
        return []
    return [path for path in place.iterdir() if FRAME_FILE.fullmatch(path.name)]
