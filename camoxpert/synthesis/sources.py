"""The images that others are made from: found in data sets, tables and folders, none from a test.

An image of a test set must not become training data, however much it is changed: it is refused
with its name, or, where that is wanted, marked in the provenance of all that is made from it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from camoxpert import console
from camoxpert.data.files.csv_paths import TABLE_SUFFIXES
from camoxpert.data.files.headers import other_sizes
from camoxpert.data.files.image_io import MAX_PIXELS
from camoxpert.data.files.layouts import recognise
from camoxpert.data.files.listing import list_files
from camoxpert.data.files.manifest import (
    Manifest,
    Search,
    load_eval,
    manifest_of,
    read_all,
    without,
    without_split,
)
from camoxpert.data.files.pairing import Pair, by_name, group_of
from camoxpert.data.files.provenance import read_origins
from camoxpert.data.files.roots import Root
from camoxpert.doctor.leaks import LeakSearch, find_leaks
from camoxpert.errors import DataError
from camoxpert.files import why_missing
from camoxpert.inference.lists import files_in_table
from camoxpert.synthesis.records import LEDGER
from camoxpert.text import bullet_list, count, free_name, shorten

GROUND_TRUTH = "gt"
"""Value of ``--mask-source`` for the masks of the data set."""


@dataclass(frozen=True)
class SourceOptions:
    """Where images come from.

    Attributes:
        roots: data sets, tables, or, without ``masks``, folders of images.
        masks: the images must have masks of their own.
        test_roots: test sets to keep out, beside those of the same data sets.
        allow_test: do not refuse test images, mark them.
        search: how pairs are found.
        max_pixels: larger images are refused.
        cache: folder in which the search for copies keeps its results; None: nowhere.
    """

    roots: Sequence[str]
    masks: bool = True
    test_roots: Sequence[str] = ()
    allow_test: bool = False
    search: Search = field(default_factory=Search)
    max_pixels: int = MAX_PIXELS
    cache: Path | None = None


@dataclass(frozen=True)
class Sources:
    """Images to make others from.

    Attributes:
        pairs: with masks, or marked as unlabeled where others provide the masks.
        names: a name for each, unique, of the images made from it.
        leaks: position -> why it counts as a test image; empty unless those are allowed.
        tests: names of the test sets that were compared with.
        compared: images of these test sets.
    """

    pairs: tuple[Pair, ...]
    names: tuple[str, ...]
    leaks: Mapping[int, str] = field(default_factory=dict)
    tests: tuple[str, ...] = ()
    compared: int = 0


def find_sources(
    options: SourceOptions, *, what: str = "source", beside: Sequence[SourceOptions] = ()
) -> Sources:
    """Return the images of training splits, or of data without splits, after the leak guard.

    Args:
        options: where they come from.
        what: an image is called in messages.
        beside: where further sources of the same job come from: their test sets are guarded, too.

    Raises:
        DataError: nothing was found, or an image is a test image.
        ConfigError: unknown layout.
    """
    train: list[Manifest] = []
    tests: dict[str, Manifest] = {}
    for own, theirs in _read(options):
        train += [without(manifest, options.search.clean) for manifest in own]
        for manifest in theirs:
            tests[free_name(manifest.dataset, tests)] = manifest
    known = {pair.image.resolve() for manifest in tests.values() for pair in manifest.pairs}
    for manifest in (*_test_sets(options), *_tests_beside(beside)):
        # The test set of the data itself may be named as well.
        if any(pair.image.resolve() not in known for pair in manifest.pairs):
            tests[free_name(manifest.dataset, tests)] = manifest
            known |= {pair.image.resolve() for pair in manifest.pairs}
    for manifest in train:
        for note in manifest.notes:
            console.note(note)
    pairs = tuple(pair for manifest in train for pair in manifest.pairs)
    if not pairs:
        raise DataError("The clean list leaves no images to make others from.")
    if options.masks:
        _judge_sizes(pairs, options)
    search = LeakSearch(tests, options.max_pixels, options.cache)
    leaks = _made_of_tests(pairs, options.roots) | find_leaks(pairs, search)
    sources = Sources(pairs, _names(pairs), leaks, tuple(tests), sum(map(len, tests.values())))
    _judge(sources, options, what)
    return sources


def _judge_sizes(pairs: Sequence[Pair], options: SourceOptions) -> None:
    """Refuse masks of another size than their image, or say which are resized.

    Stretched over an image that shows more, a mask would lie beside the object in all that is made.
    """
    asked = tuple(replace(pair, any_size=True) for pair in pairs)
    found = other_sizes(Manifest(asked, "", "train", ""))
    if not found:
        return
    listed = f"{count(len(found), 'mask')} of another size than the image"
    if not options.search.any_size:
        raise DataError(
            f"{listed}: {shorten(found)}. Where both show the whole picture --resize bilinear "
            f"resizes the mask."
        )
    console.note(f"{listed}, as --resize bilinear allows: {shorten(found)}")


def _made_of_tests(pairs: Sequence[Pair], roots: Sequence[str]) -> dict[int, str]:
    """Return the images that were made from test images, as the provenance of a root says."""
    origins = {image: found for root in roots for image, found in read_origins(Path(root)).items()}
    tested = {image: found.tested for image, found in origins.items() if found.tested}
    if not tested:
        return {}
    known = ((n, tested.get(pair.image.resolve())) for n, pair in enumerate(pairs))
    return {n: f"it was made from a test image ({reason})" for n, reason in known if reason}


def _judge(sources: Sources, options: SourceOptions, what: str) -> None:
    """Refuse test images, or say what the guard found."""
    leaks = sources.leaks
    if leaks and not options.allow_test:
        listed = [f"{sources.pairs[n].image}: {reason}" for n, reason in leaks.items()]
        raise DataError(
            f"{count(len(leaks), what)} of {len(sources.pairs)} would leak a test set into the "
            f"training data:\n{bullet_list(listed)}\nLeave them out: "
            "`camoxpert doctor DATA --clean-list FILE` lists copies, and --clean-list FILE is for "
            "this command as well. --allow-test-sources uses them and says so in the provenance "
            "of every image."
        )
    if leaks:
        console.warn(
            f"{count(len(leaks), what)} of {len(sources.pairs)} are test images "
            "(--allow-test-sources); what is made from them must not be trained on before that "
            "test"
        )
    elif sources.tests:
        console.decide(
            "leak guard",
            f"none of {count(len(sources.pairs), what)} is among {sources.compared} test images "
            f"({', '.join(sources.tests)})",
        )
    else:
        console.decide(
            "leak guard",
            f"no test images are known to compare {count(len(sources.pairs), what)} with: only "
            "their folders were looked at (--test-data names test sets)",
        )


def _read(options: SourceOptions) -> list[tuple[list[Manifest], list[Manifest]]]:
    """Return what to make images from and the test sets beside it, for each root."""
    plain: dict[str, Manifest] = {}
    for root in options.roots:
        if not Path(root).exists():
            raise DataError(why_missing(root))
        found = None if options.masks else _plain(Path(root), options)
        if found is not None:
            plain[root] = found
    plain = _distinct(plain)
    others = iter(read_all([root for root in options.roots if root not in plain], options.search))
    return [
        ([plain[root]], []) if root in plain else _divided(next(others)) for root in options.roots
    ]


def _tests_beside(others: Sequence[SourceOptions]) -> list[Manifest]:
    """Return the test sets in the data of further sources."""
    found: list[Manifest] = []
    for options in others:
        for root in options.roots:
            if not Path(root).exists():
                raise DataError(why_missing(root))
            if not options.masks and _plain(Path(root), options) is not None:
                continue
            (read,) = read_all([root], options.search)
            tested = [p for p in read.pairings if p.found.source.split == "test"]
            found += [manifest_of(pairing) for pairing in tested]
    return found


def _divided(read: Root) -> tuple[list[Manifest], list[Manifest]]:
    """Return the images of a root to make others from, and its test sets.

    Data that holds nothing but test images is returned as both: the guard names it.
    """
    for note in (*read.notes, *without_split(read.pairings)):
        console.note(note)
    by_split: dict[str, list[Manifest]] = {}
    for pairing in read.pairings:
        by_split.setdefault(pairing.found.source.split, []).append(manifest_of(pairing))
    tests = by_split.get("test", [])
    found = by_split.get("train") or by_split.get("all") or tests
    if not found:
        splits = ", ".join(sorted(by_split))
        raise DataError(f"{read.path} has no training split (found: {splits}).")
    return found, tests


def _distinct(plain: Mapping[str, Manifest]) -> dict[str, Manifest]:
    """Tell folders of the same name apart by the folder above, as data sets are."""
    doubled = [name for name, n in Counter(m.dataset for m in plain.values()).items() if n > 1]
    found = {}
    for root, manifest in plain.items():
        name = manifest.dataset
        if name in doubled:
            name = f"{Path(root).resolve().parent.name}-{name}"
        pairs = tuple(replace(pair, dataset=name) for pair in manifest.pairs)
        found[root] = replace(manifest, pairs=pairs, dataset=name)
    return found


def _plain(path: Path, options: SourceOptions) -> Manifest | None:
    """Return the images of a table or a folder without masks; None where a layout has masks."""
    if path.is_file():
        if path.suffix.lower() not in TABLE_SUFFIXES:
            return None
        listed = files_in_table(path, "image", allow_outside=options.search.allow_outside)
        named = {name: file for file, name in listed}
    else:
        if recognise(path, options.search.layout) is not None:
            return None
        # Images that were made earlier may lie below.
        listing = list_files(path, nested=True, enter=lambda inner: not (inner / LEDGER).is_file())
        files = listing.images
        named, doubled = by_name(files, path)
        if doubled:
            raise DataError(f"{doubled[0][0]} and {doubled[0][1]} have the same name. Remove one.")
    if not named:
        raise DataError(f"{path} holds no images.")
    dataset = path.resolve().stem if path.is_file() else path.resolve().name
    pairs = tuple(
        Pair(name, image, image, dataset, group_of(name), labeled=False)
        for name, image in sorted(named.items())
    )
    return Manifest(pairs, dataset, "all", "images without masks")


def _test_sets(options: SourceOptions) -> list[Manifest]:
    """Return the test sets that ``--test-data`` names; folders of images alone will do."""
    found: list[Manifest] = []
    for root in options.test_roots:
        path = Path(root)
        if not path.exists():
            raise DataError(f"--test-data: {why_missing(path)}")
        if path.is_dir() and recognise(path) is None:
            images, _ = by_name(list_files(path, nested=True).images, path)
            if not images:
                raise DataError(f"--test-data: {path} holds no images.")
            name = path.resolve().name
            pairs = tuple(
                Pair(key, image, image, name, "", labeled=False)
                for key, image in sorted(images.items())
            )
            found.append(Manifest(pairs, name, "test", "folder of images"))
        else:
            found += load_eval(root, options.search).values()
    return found


def _names(pairs: Sequence[Pair]) -> tuple[str, ...]:
    """Return the names of pairs, below the name of their data set where there are several.

    Raises:
        DataError: two pairs have the same name.
    """
    several = len({pair.dataset for pair in pairs}) > 1
    names = tuple(f"{pair.dataset}/{pair.name}" if several else pair.name for pair in pairs)
    seen: dict[str, Path] = {}
    for name, pair in zip(names, pairs, strict=True):
        if name in seen:
            raise DataError(
                f"{seen[name]} and {pair.image} have the same name, {name!r}. Was a folder given "
                "twice?"
            )
        seen[name] = pair.image
    return names


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceItem:
    """An image that is made from one source.

    Attributes:
        name: of the image.
        path, mask: files of the source.
        any_size: the mask may have another size than the image.
        group: class of the source.
        index: of the draw.
        leak: why the source counts as a test image, "" if it does not.
        derived: how the mask came about, where it is not the ground truth.
        fault: why there is no mask, "" if there is one.
    """

    name: str
    path: Path
    mask: Path
    any_size: bool
    group: str
    index: int
    leak: str = ""
    derived: str = ""
    fault: str = ""

    @property
    def files(self) -> tuple[Path, ...]:
        """What the image is made from."""
        return self.path, self.mask
