"""Manifests: the pairs of a data set by split, with a content hash. Nothing is dropped silently."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from camoxpert.data.files.csv_paths import read_table
from camoxpert.data.files.pairing import Pair, Pairing
from camoxpert.data.files.roots import Root, read_roots
from camoxpert.errors import DataError
from camoxpert.text import count, free_name, shorten

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
        any_size: a mask may have another size than its image.
        modalities: what other sensors saw, by name, where images have it.
    """

    layout: str = "auto"
    noncam: str = "exclude"
    clean: CleanList = field(default_factory=dict)
    allow_outside: bool = False
    any_size: bool = False
    modalities: tuple[str, ...] = ()


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
        for pair in self.pairs:
            for name, path in pair.modalities:
                line = f"{pair.dataset}/{pair.name}\t{name}\t{_size(path)}\n"
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
    return _train_of(read_all(roots, search), search)


@dataclass(frozen=True)
class TrainingData:
    """What a run may train and validate on.

    Attributes:
        whole: every image of it, those for validation included.
        given: the validation split that comes with the data; None: it has none.
        unused: images of such a split that are not used.
    """

    whole: Manifest
    given: Manifest | None = None
    unused: int = 0


def load_training_data(
    roots: Sequence[str | Path], search: Search, *, validate: bool = True
) -> TrainingData:
    """Return the training images of one or more data sets with their validation split, if any.

    Args:
        roots, search: see ``load_train``.
        validate: False leaves the images of a validation split out.

    Raises:
        DataError, ConfigError: as ``load_train``.
    """
    read = read_all(roots, search)
    train = _train_of(read, search)
    manifests = [
        without(manifest_of(pairing), search.clean)
        for root in read
        for pairing in root.pairings
        if pairing.found.source.split == "val"
    ]
    number = sum(map(len, manifests))
    if not number or not validate:
        return TrainingData(train, None, number)
    given = concat(manifests)
    return TrainingData(replace(concat([train, given]), dataset=train.dataset), given)


def find_test_sets(roots: Sequence[str | Path], search: Search = USUAL) -> dict[str, Manifest]:
    """Return the test sets that come with training data, by name; {} if there are none."""
    found = [
        manifest_of(pairing)
        for root in read_all(roots, search)
        for pairing in root.pairings
        if pairing.found.source.split == "test"
    ]
    return _by_name(found, search)


def load_eval(
    paths: str | Path | Sequence[str | Path], search: Search = USUAL, *, split: str = "test"
) -> dict[str, Manifest]:
    """Return the images to evaluate: a data set's test sets, or all of it if it has no splits.

    Args:
        paths: one or more data sets.
        search: how pairs are found.
        split: train, val or test. Another split is never taken instead.

    Returns:
        Manifests by name: that of the data set, followed by ``-train`` or ``-val`` where these are
        not its test images.

    Raises:
        DataError: as ``load_train``, or there is no such split.
    """
    roots = [paths] if isinstance(paths, (str, Path)) else paths
    missing = f"{split} split (found: {{}}). Choose another with --split."
    by_root = [_of_split(root, split, missing) for root in read_all(roots, search)]
    names = Counter(name for manifests in by_root for name in {m.dataset for m in manifests})
    for name, number in names.items():
        if number > 1:
            raise DataError(f"Two data sets are called {name}; score them in separate calls.")
    return _by_name([manifest for manifests in by_root for manifest in manifests], search)


def read_all(roots: Sequence[str | Path], search: Search) -> list[Root]:
    """Return what lies in some data sets, as a search wants it."""
    return read_roots(
        roots,
        layout=search.layout,
        noncam=search.noncam,
        allow_outside=search.allow_outside,
        any_size=search.any_size,
        modalities=search.modalities,
    )


def _train_of(read: Sequence[Root], search: Search) -> Manifest:
    manifests = [
        without(manifest, search.clean)
        for root in read
        for manifest in _of_split(root, "train", "training split (found: {}).")
    ]
    whole = concat(manifests)
    if not whole.pairs:
        raise DataError("The clean list leaves no training images.")
    return whole


def _of_split(root: Root, split: str, missing: str) -> list[Manifest]:
    """Return the manifests of a split, or of data without splits; ``missing`` ends the message."""
    splits = [pairing.found.source.split for pairing in root.pairings]
    # Images without a split are trained on where no others are: then they are no test images.
    free = split == "train" or "train" in splits or set(splits) == {"all"}
    for wanted in (split, "all") if free else (split,):
        chosen = [p for p in root.pairings if p.found.source.split == wanted]
        if chosen:
            first, *rest = [manifest_of(pairing) for pairing in chosen]
            unused = () if wanted == "all" else without_split(root.pairings)
            return [replace(first, notes=(*root.notes, *unused, *first.notes)), *rest]
    names = ", ".join(sorted(set(splits)))
    raise DataError(f"{root.path} has no {missing.format(names)}")


def without_split(pairings: Sequence[Pairing]) -> tuple[str, ...]:
    """Return a note if some images of a data set have a split and others have none."""
    rest = [p for p in pairings if p.found.source.split == "all"]
    if not rest or len(rest) == len(pairings):
        return ()
    named = ", ".join(dict.fromkeys(pairing.found.dataset for pairing in rest))
    number = count(sum(len(pairing.pairs) for pairing in rest), "image")
    return (
        f"{number} of {named} without a split are not used, because others have one: write one "
        "in the column split of a table, or give their folder by itself",
    )


def _by_name(manifests: Sequence[Manifest], search: Search) -> dict[str, Manifest]:
    sets: dict[str, Manifest] = {}
    for manifest in manifests:
        # Validation images have such a name already: they may be numbered like training images.
        other = "-train" if manifest.split == "train" else ""
        sets[free_name(manifest.dataset + other, sets)] = without(manifest, search.clean)
    return sets


def evenly(manifest: Manifest, number: int) -> Manifest:
    """Return at most ``number`` pairs of a manifest, evenly spread over it."""
    total = len(manifest)
    if number >= total:
        return manifest
    return replace(
        manifest, pairs=tuple(manifest.pairs[i * total // number] for i in range(number))
    )


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


def manifest_of(pairing: Pairing) -> Manifest:
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
    notes = list(pairing.notes)
    if not total:
        raise DataError(". ".join([f"{found.images} holds no images", *notes]) + ".")
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
            f"remove the images.{''.join(f' {note}.' for note in notes)}"
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
    rows = read_table(path, ("dataset", "split", "name"), errors="surrogateescape")
    return {(row["dataset"], row["split"], row["name"]): row.get("reason", "") for _, row in rows}
