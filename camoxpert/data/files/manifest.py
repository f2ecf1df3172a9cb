"""Manifests: the pairs of a data set by split, with a content hash. Nothing is dropped silently."""

from __future__ import annotations

import csv
import hashlib
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from camoxpert.data.files.csv_paths import listed_file, text_file
from camoxpert.data.files.layouts import CSV_LAYOUT, LAYOUTS, class_of, recognise
from camoxpert.data.files.pairing import Pair, Pairing, pair_files
from camoxpert.errors import ConfigError, DataError
from camoxpert.text import free_name, shorten

CleanList = Mapping[tuple[str, str, str], str]
"""(data set, split, name) of each image to leave out -> reason."""


@dataclass(frozen=True)
class Search:
    """How the pairs of a data set are found.

    Attributes:
        layout: name of a known layout, or auto.
        noncam: exclude or include COD10K images without a camouflaged object.
        clean: pairs to leave out, as ``read_clean_list`` returns them.
        allow_outside: a CSV may name files outside its folder.
    """

    layout: str = "auto"
    noncam: str = "exclude"
    clean: CleanList = field(default_factory=dict)
    allow_outside: bool = False


USUAL = Search()


@dataclass(frozen=True)
class Manifest:
    """The pairs of one split.

    Attributes:
        pairs: ordered by data set and name.
        dataset: name, joined with + for several.
        split: train, test, all or validation.
        layout: names of the layouts recognised.
        excluded: images left out on purpose (``notes`` says why).
        notes: sentences for the user.
        cleaned: rows of a clean list that matched an image.
    """

    pairs: tuple[Pair, ...]
    dataset: str
    split: str
    layout: str
    excluded: int = 0
    notes: tuple[str, ...] = ()
    cleaned: tuple[tuple[str, str, str], ...] = ()

    def __len__(self) -> int:
        return len(self.pairs)

    def files(self) -> dict[tuple[str, str], tuple[int, int]]:
        """Return (data set, name) -> bytes of image and mask, -1 for what is missing."""
        return {(p.dataset, p.name): (_size(p.image), _size(p.mask)) for p in self.pairs}

    def content_hash(self) -> str:
        """Return the SHA-256 of names and file sizes; moving the data does not change it."""
        digest = hashlib.sha256()
        for (dataset, name), sizes in self.files().items():
            line = f"{dataset}/{name}\t{sizes[0]}\t{sizes[1]}\n"
            digest.update(line.encode(errors="surrogateescape"))
        return digest.hexdigest()


def load_train(roots: Sequence[str | Path], search: Search = USUAL) -> Manifest:
    """Return the training pairs of one or more data sets.

    Args:
        roots: folders or CSV files.
        search: how pairs are found.

    Raises:
        DataError: nothing found, no layout matches, missing masks, duplicate names.
        ConfigError: unknown layout name.
    """
    manifests = [
        without(manifest, search.clean)
        for root in roots
        for manifest in _of_split(root, search, "train", "training split (found: {}).")
    ]
    whole = concat(manifests)
    if not whole.pairs:
        raise DataError("The clean list leaves no training images.")
    return whole


def find_test_sets(roots: Sequence[str | Path], search: Search = USUAL) -> dict[str, Manifest]:
    """Return the test sets that come with training data, by name; {} if there are none."""
    found = [m for root in roots for m in _read(Path(root), search) if m.split == "test"]
    return _by_name(found, search)


def load_eval(
    path: str | Path, search: Search = USUAL, *, split: str = "test"
) -> dict[str, Manifest]:
    """Return the images to evaluate: a data set's test sets, or all of it if it has no splits."""
    missing = f"{split} split (found: {{}}). Choose another with --split."
    return _by_name(_of_split(path, search, split, missing), search)


def _of_split(root: str | Path, search: Search, split: str, missing: str) -> list[Manifest]:
    """Return the manifests of a split, or of data without splits; ``missing`` ends the message."""
    manifests = _read(Path(root), search)
    for wanted in (split, "all"):
        chosen = [m for m in manifests if m.split == wanted]
        if chosen:
            return chosen
    names = ", ".join(sorted({m.split for m in manifests}))
    raise DataError(f"{root} has no {missing.format(names)}")


def _by_name(manifests: Sequence[Manifest], search: Search) -> dict[str, Manifest]:
    sets: dict[str, Manifest] = {}
    for manifest in manifests:
        sets[free_name(manifest.dataset, sets)] = without(manifest, search.clean)
    return sets


def concat(manifests: Sequence[Manifest]) -> Manifest:
    """Join manifests of one split; pairs keep the name of their data set."""
    pairs = tuple(pair for manifest in manifests for pair in manifest.pairs)
    doubled = [k for k, n in Counter((p.dataset, p.name) for p in pairs).items() if n > 1]
    if doubled:
        raise DataError(
            f"{len(doubled)} samples are in more than one of the given folders, for example "
            f"{'/'.join(doubled[0])}. Was a folder given twice?"
        )
    return Manifest(
        pairs,
        "+".join(dict.fromkeys(m.dataset for m in manifests)),
        manifests[0].split,
        ", ".join(dict.fromkeys(m.layout for m in manifests)),
        sum(m.excluded for m in manifests),
        tuple(note for m in manifests for note in m.notes),
        tuple(row for m in manifests for row in m.cleaned),
    )


def _size(path: Path) -> int:
    """Return a file's size, or -1 if it is missing."""
    try:
        return path.stat().st_size
    except OSError:
        return -1


def _read(root: Path, search: Search) -> list[Manifest]:
    """Return a manifest per split (and per test set) of one root."""
    known = [row.name for row in LAYOUTS] + [CSV_LAYOUT]
    if search.layout not in ("auto", *known):
        raise ConfigError(f"--layout {search.layout}: known layouts are auto, {', '.join(known)}.")
    if not root.exists():
        raise DataError(f"There is no file or folder {root}.")
    if root.is_file():
        if root.suffix.lower() != ".csv":
            raise DataError(f"{root} is not a CSV. Give a data set folder or a CSV file.")
        return _read_csv(root, search.allow_outside)
    recognised = recognise(root, search.layout)
    if recognised is None:
        entries = ", ".join(sorted(p.name for p in root.iterdir())[:12]) or "nothing"
        raise DataError(
            f"No known data set layout in {root} (it holds: {entries}). Known: "
            f"{', '.join(known)}; the simplest is a folder with Imgs/ and GT/, one mask per image "
            f"with the same name."
        )
    row, _, found = recognised
    return [_manifest_of(pair_files(source, row.name, search.noncam)) for source in found]


def _manifest_of(pairing: Pairing) -> Manifest:
    """Return a pairing's manifest; missing or duplicate files are errors, unused masks a note."""
    found = pairing.found
    if pairing.doubled:
        first, second = pairing.doubled[0]
        raise DataError(f"{first} and {second} have the same name. Remove one of them.")
    missing, unused = pairing.missing, pairing.unused
    total = len(pairing.pairs) + len(missing)
    if not total and pairing.left_out:
        raise DataError(
            f"{found.images}: all {pairing.left_out} images are NonCAM. Use --noncam include to "
            f"keep them."
        )
    if not total:
        raise DataError(f"{found.images} holds no images.")
    notes = []
    if pairing.left_out:
        notes.append(
            f"{found.dataset} {found.source.split}: {pairing.left_out} images without a "
            f"camouflaged object are left out (--noncam include keeps them)"
        )
    if missing:
        hint = f" {len(unused)} masks have no image, for example {unused[0]}." if unused else ""
        raise DataError(
            f"{len(missing)} of {total} images have no mask ({found.images} and {found.masks}): "
            f"{shorten(missing)}.{hint} A mask must have its image's name. Add the masks or "
            f"remove the images."
        )
    if unused:
        notes.append(
            f"{found.dataset}: {len(unused)} masks have no image ({shorten(unused)}); unused"
        )
    return Manifest(
        pairing.pairs,
        found.dataset,
        found.source.split,
        pairing.layout,
        pairing.left_out,
        tuple(notes),
    )


def without(manifest: Manifest, unwanted: CleanList) -> Manifest:
    """Return a manifest without the pairs of a clean list; a note says how many were left out."""
    kept = tuple(
        pair for pair in manifest.pairs if (pair.dataset, manifest.split, pair.name) not in unwanted
    )
    left = set(kept)
    cleaned = tuple(
        (pair.dataset, manifest.split, pair.name) for pair in manifest.pairs if pair not in left
    )
    gone = len(cleaned)
    if not gone:
        return manifest
    note = f"{manifest.dataset} {manifest.split}: {gone} images left out by the clean list"
    return replace(
        manifest,
        pairs=kept,
        excluded=manifest.excluded + gone,
        notes=(*manifest.notes, note),
        cleaned=cleaned,
    )


def unused_rows(clean: CleanList, manifests: Sequence[Manifest]) -> list[tuple[str, str, str]]:
    """Return the rows of a clean list that left no image out of these manifests."""
    used = {row for manifest in manifests for row in manifest.cleaned}
    return [row for row in clean if row not in used]


def read_clean_list(path: str | Path) -> dict[tuple[str, str, str], str]:
    """Read a clean list: columns dataset, split, name and, optionally, reason.

    An empty path gives an empty list.

    Raises:
        DataError: the file or a column is missing.
    """
    if not str(path):
        return {}
    path = Path(path)
    if not path.is_file():
        raise DataError(f"--clean-list: there is no file {path}. `camoxpert doctor` writes one.")
    # Written by this program: names that are not UTF-8 come back as they were written.
    with text_file(path, errors="surrogateescape") as file:
        reader = csv.DictReader(file)
        columns = list(reader.fieldnames or [])
        if not {"dataset", "split", "name"} <= set(columns):
            raise DataError(f"{path} needs the columns dataset, split and name; it has {columns}.")
        return {
            (row["dataset"], row["split"], row["name"]): row.get("reason") or "" for row in reader
        }


def _read_csv(path: Path, allow_outside: bool) -> list[Manifest]:
    """Read columns image, mask and optionally split and class; paths are relative to the file."""
    with text_file(path) as file:
        reader = csv.DictReader(file)
        columns = reader.fieldnames or []
        if not {"image", "mask"} <= set(columns):
            raise DataError(f"{path} needs the columns image and mask; it has {list(columns)}.")
        rows = list(reader)
    splits: dict[str, list[Pair]] = defaultdict(list)
    for number, row in enumerate(rows, start=2):
        (image, name), (mask, _) = (
            listed_file(path, row[key], number, allow_outside=allow_outside)
            for key in ("image", "mask")
        )
        for file_path in (image, mask):
            if not file_path.is_file():
                raise DataError(f"{path}, line {number}: there is no file {file_path}.")
        group = row.get("class") or class_of(image.stem)
        splits[row.get("split") or "all"].append(Pair(name, image, mask, path.stem, group))
    if not rows:
        raise DataError(f"{path} has no rows.")
    unknown = set(splits) - {"train", "test", "all"}
    if unknown:
        raise DataError(f"{path}: split must be train or test, not {shorten(sorted(unknown))}.")
    manifests = []
    for split, pairs in splits.items():
        ordered = tuple(sorted(pairs, key=lambda pair: pair.name))
        manifests.append(concat([Manifest(ordered, path.stem, split, CSV_LAYOUT)]))
    return manifests
