"""Find training images that are test images: in a test split, of the same name, or copies.

What is made from such an image, or learned from it, raises the scores of that test set.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from camoxpert import console
from camoxpert.data.files.image_io import MAX_PIXELS
from camoxpert.data.files.layouts import split_of
from camoxpert.data.files.manifest import Manifest
from camoxpert.data.files.pairing import Pair, path_stem
from camoxpert.doctor.copies import find_copies_between, fingerprints
from camoxpert.files import file_digest, read_json, write_json
from camoxpert.text import count

VERSION = 1
"""Increased when the search changes what it finds."""
MOST_PAIRS = 12_000**2
"""Pairs of a source and a test image up to which their pictures are compared: two minutes."""
PLAIN_NAME = re.compile(r"[^\W\d_]*[-_ .]?\d*")
"""Names that images of any two data sets share: numbers, or a word with a number."""
NEAR_FOLDERS = 3
"""Folders above an image that can say that it is in a test split."""


@dataclass(frozen=True)
class LeakSearch:
    """Test images to compare with.

    Attributes:
        tests: test sets by name.
        max_pixels: larger images are not read.
        folder: where results are kept; None: nowhere.
    """

    tests: Mapping[str, Manifest]
    max_pixels: int = MAX_PIXELS
    folder: Path | None = None


def find_leaks(pairs: Sequence[Pair], search: LeakSearch) -> dict[int, str]:
    """Return position -> reason for the images that are test images.

    Args:
        pairs: images to train on, or to make images from.
        search: the test images.
    """
    leaks: dict[int, str] = {}
    tests = [(name, pair) for name, found in search.tests.items() for pair in found.pairs]
    real = {_real(pair.image): name for name, pair in tests}
    named = {path_stem(pair.name).casefold(): name for name, pair in tests if is_telling(pair.name)}
    for position, pair in enumerate(pairs):
        folder = _test_folder(pair.image)
        if _real(pair.image) in real:
            leaks[position] = f"it is in the test set {real[_real(pair.image)]}"
        elif folder:
            leaks[position] = f"its folder {folder} says that it is in a test split"
        elif path_stem(pair.name).casefold() in named:
            leaks[position] = (
                f"the test set {named[path_stem(pair.name).casefold()]} has an image of this name"
            )
    left = [position for position in range(len(pairs)) if position not in leaks]
    if left and tests:
        copies = copies_of(
            [pairs[n].image for n in left], [pair.image for _, pair in tests], search
        )
        for a, b, how in copies:
            name, pair = tests[b]
            leaks.setdefault(left[a], f"it is a copy of {pair.name} in the test set {name} ({how})")
    return dict(sorted(leaks.items()))


def is_telling(name: str) -> bool:
    """Return whether images with the same name are the same image: not for 0001 or cat-12."""
    return PLAIN_NAME.fullmatch(path_stem(name)) is None


def _test_folder(image: Path) -> str:
    """Return the folder above an image that is called like a test split, "" if there is none.

    The innermost folder that is called like a split decides; those far above do not count.
    """
    names = reversed(image.parent.parts[-NEAR_FOLDERS:])
    split = next((name for name in names if split_of(name)), "")
    return split if split_of(split) == "test" else ""


def _real(path: Path) -> str:
    return str(path.resolve())


def copies_of(
    sources: Sequence[Path], tests: Sequence[Path], search: LeakSearch
) -> list[tuple[int, int, str]]:
    """Return (source, test image, how) of copies; results are kept by what the files are."""
    place = _kept_at(sources, tests, search)
    kept = read_json(place).get("copies") if place is not None else None
    if isinstance(kept, list):
        return [(int(a), int(b), str(how)) for a, b, how in kept]
    if len(sources) * len(tests) > MOST_PAIRS:
        console.decide(
            "leak guard",
            f"{count(len(sources), 'source')} and {count(len(tests), 'test image')}: identical "
            "files are looked for, similar pictures are not (`camoxpert doctor` does)",
        )
        found = _identical(sources, tests)
    else:
        prints = fingerprints([*sources, *tests], max_pixels=search.max_pixels)
        first, second = prints[: len(sources)], prints[len(sources) :]
        found = [(m.a, m.b, m.how) for m in find_copies_between(first, second)]
    if place is not None:
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            write_json(place, {"copies": found})
        except OSError as error:
            console.decide("", f"the copies found are not kept: {place.parent}: {error.strerror}")
    return found


def _identical(sources: Sequence[Path], tests: Sequence[Path]) -> list[tuple[int, int, str]]:
    """Return the pairs of files with the same content."""
    sizes = {_size(path) for path in tests} & {_size(path) for path in sources}
    known = {file_digest(path): n for n, path in enumerate(tests) if _size(path) in sizes}
    return [
        (n, known[digest], "the same file")
        for n, path in enumerate(sources)
        if _size(path) in sizes and (digest := file_digest(path)) in known
    ]


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return -1


def _kept_at(sources: Sequence[Path], tests: Sequence[Path], search: LeakSearch) -> Path | None:
    if search.folder is None:
        return None
    digest = hashlib.sha256(json.dumps([VERSION, search.max_pixels]).encode())
    for files in (sources, tests):
        digest.update(b"\n")
        for path in files:
            try:
                found = path.stat()
                state = (found.st_size, found.st_mtime_ns)
            except OSError:
                state = (-1, 0)
            digest.update(f"{path.resolve()} {state}\n".encode(errors="surrogateescape"))
    return search.folder / f"{digest.hexdigest()[:16]}.json"
