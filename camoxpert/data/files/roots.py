"""Read data roots, folders in a known layout or CSV files, into pairs of files by split."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from camoxpert.data.files.csv_paths import TABLE_SUFFIXES, listed_file, read_table
from camoxpert.data.files.layouts import (
    CSV_LAYOUT,
    IMAGE_FOLDERS,
    LAYOUTS,
    MASK_FOLDERS,
    SPLITS,
    Found,
    Recognised,
    Source,
    class_of,
    folders_named,
    recognise,
    split_of,
)
from camoxpert.data.files.listing import ARCHIVE_SUFFIXES, is_side_file
from camoxpert.data.files.modalities import counted, with_modalities
from camoxpert.data.files.pairing import Pair, Pairing, pair_files, path_stem
from camoxpert.errors import ConfigError, DataError
from camoxpert.files import why_missing
from camoxpert.text import count, shorten


@dataclass(frozen=True)
class Root:
    """One root as it was read.

    Attributes:
        path: as given.
        place: the resolved folder, or CSV file, that names its data.
        pairings: one per split and test set.
        notes: what in the folder is not read, or contradicts itself.
    """

    path: Path
    place: Path
    pairings: tuple[Pairing, ...]
    notes: tuple[str, ...] = ()


def read_roots(
    roots: Iterable[str | Path],
    *,
    layout: str,
    noncam: str,
    allow_outside: bool,
    any_size: bool = False,
    modalities: Sequence[str] = (),
) -> list[Root]:
    """Read roots; those whose folders have the same name get data set names that differ.

    Args:
        roots: folders or CSV files.
        layout: name of a known layout, or auto.
        noncam: exclude or include COD10K images without a camouflaged object.
        allow_outside: a CSV may name files outside its folder.
        any_size: a mask may have another size than its image.
        modalities: what other sensors saw, by name; see ``modalities.with_modalities``.

    Raises:
        DataError: no such root, no layout matches, a faulty CSV.
        ConfigError: unknown layout name.
    """
    return with_distinct_names(
        [
            read_root(Path(root), layout, noncam, allow_outside, any_size, modalities)
            for root in roots
        ]
    )


def with_distinct_names(roots: Sequence[Root]) -> list[Root]:
    """Return roots whose data set names differ where they had the same folder name."""
    names = distinct_names([root.place for root in roots])
    return [_renamed(root, names[root.place]) for root in roots]


def read_root(
    path: Path,
    layout: str,
    noncam: str,
    allow_outside: bool,
    any_size: bool = False,
    modalities: Sequence[str] = (),
) -> Root:
    """Read one root; see ``read_roots``."""
    root = _read_root(path, layout, noncam, allow_outside, modalities)
    if not any_size:
        return root
    pairings = tuple(
        replace(p, pairs=tuple(replace(pair, any_size=True) for pair in p.pairs))
        for p in root.pairings
    )
    return replace(root, pairings=pairings)


def _read_root(
    path: Path, layout: str, noncam: str, allow_outside: bool, modalities: Sequence[str]
) -> Root:
    known = [row.name for row in LAYOUTS] + [CSV_LAYOUT]
    if layout not in ("auto", *known):
        raise ConfigError(f"--layout {layout}: known layouts are auto, {', '.join(known)}.")
    if not path.exists():
        raise DataError(why_missing(path))
    if path.is_file():
        if path.suffix.lower() not in TABLE_SUFFIXES:
            kind = (
                "an archive: unpack it first"
                if path.suffix.lower() in ARCHIVE_SUFFIXES
                else "not a CSV"
            )
            raise DataError(f"{path} is {kind}. Give a data set folder or a CSV file.")
        pairings = tuple(_read_csv(path, allow_outside, modalities))
        return Root(path, path.resolve(), pairings, _divided_groups(pairings))
    recognised = recognise(path, layout, beside=modalities)
    if recognised is None:
        raise DataError(_unknown(path, known))
    return _read_folder(path, recognised, noncam, modalities)


def distinct_names(places: Sequence[Path]) -> dict[Path, str]:
    """Return a name for each of some resolved paths: their last part, or more where it repeats.

    ``siteA/data`` and ``siteB/data`` are called siteA-data and siteB-data.
    """
    known = list(dict.fromkeys(places))
    depth = dict.fromkeys(known, 1)
    while True:
        names = {place: "-".join(_parts(place)[-depth[place] :]) for place in known}
        users: dict[str, list[Path]] = defaultdict(list)
        for place, name in names.items():
            users[name.lower()].append(place)
        longer = [
            place
            for same in users.values()
            for place in (same if len(same) > 1 else ())
            if depth[place] < len(_parts(place))
        ]
        if not longer:
            return names
        for place in longer:
            depth[place] += 1


def _parts(place: Path) -> tuple[str, ...]:
    return place.with_suffix("").parts if place.is_file() else place.parts


def _read_folder(
    path: Path, recognised: Recognised, noncam: str, modalities: Sequence[str]
) -> Root:
    pairings = [pair_files(found, recognised.layout.name, noncam) for found in recognised.found]
    _require_own_masks(pairings)
    if modalities:
        pairings = [with_modalities(pairing, modalities) for pairing in pairings]
    return Root(path, recognised.root.resolve(), tuple(pairings), recognised.notes)


def _require_own_masks(pairings: Sequence[Pairing]) -> None:
    """Raise DataError if one mask is that of images in two folders."""
    known: dict[Path, Path] = {}
    for pairing in pairings:
        for pair in pairing.pairs:
            other = known.setdefault(pair.mask, pair.image)
            if other != pair.image:
                raise DataError(
                    f"{pair.mask} would be the mask of {other} and of {pair.image}. Put the masks "
                    f"of each split into a folder of its own, named like that of its images."
                )


def _renamed(root: Root, name: str) -> Root:
    """Return a root whose data sets are named ``name`` where they had the folder's own name."""
    own = _parts(root.place)[-1] if root.place.parts else ""
    if name == own:
        return root

    def changed(pairing: Pairing) -> Pairing:
        dataset = pairing.found.dataset
        if dataset not in (own, f"{own}-val"):
            return pairing
        dataset = name + dataset.removeprefix(own)
        pairs = tuple(replace(pair, dataset=dataset) for pair in pairing.pairs)
        return replace(pairing, found=replace(pairing.found, dataset=dataset), pairs=pairs)

    return replace(root, pairings=tuple(changed(pairing) for pairing in root.pairings))


def _unknown(path: Path, known: Sequence[str]) -> str:
    """Return why no layout matches a folder, and what to do."""
    entries = shorten(sorted(p.name for p in path.iterdir() if not is_side_file(p.name)), 12)
    images, masks = folders_named(path, IMAGE_FOLDERS), folders_named(path, MASK_FOLDERS)
    lacking = ""
    if images and not masks:
        lacking = f" {images[0].name} was found, but no folder of masks beside it."
    elif masks and not images:
        lacking = f" {masks[0].name} was found, but no folder of images beside it."
    return (
        f"No known data set layout in {path} (it holds: {entries or 'nothing'}).{lacking} Known: "
        f"{', '.join(known)}; the simplest is a folder with Imgs/ and GT/, one mask per image "
        f"with the same name."
    )


def _read_csv(path: Path, allow_outside: bool, modalities: Sequence[str] = ()) -> list[Pairing]:
    """Read columns image, mask and optionally split, class, group and modalities; paths are
    relative to the file, and an empty cell of a modality says that the image has none."""
    splits: dict[str, dict[str, Pair]] = defaultdict(dict)
    lines: dict[tuple[str, str], int] = {}
    for number, row in read_table(path, ("image", "mask")):
        (image, name), (mask, _) = (
            listed_file(path, row[key], number, column=key, allow_outside=allow_outside)
            for key in ("image", "mask")
        )
        seen = tuple(
            (
                key,
                listed_file(path, row[key], number, column=key, allow_outside=allow_outside)[0],
            )
            for key in modalities
            if row.get(key)
        )
        for file_path in (image, mask, *(file for _, file in seen)):
            if not file_path.is_file():
                raise DataError(f"{path}, line {number}: {why_missing(file_path)}")
        if mask == image:
            raise DataError(
                f"{path}, line {number}: image and mask are the same file, {row['mask']!r}. Name "
                f"its mask; images without one belong to --unlabeled."
            )
        written = row.get("split", "")
        split = split_of(written) if written and written.lower() != "all" else "all"
        if not split:
            raise DataError(
                f"{path}, line {number}: split must be train, val or test, not {written!r}."
            )
        if (split, name) in lines:
            raise DataError(
                f"{path}, line {number}: {row['image']} is already in line "
                f"{lines[split, name]}. Remove one of them."
            )
        lines[split, name] = number
        dataset = path.stem + ("-val" if split == "val" else "")
        told = row.get("class", "")
        group = told or class_of(path_stem(name))
        splits[split][name] = Pair(
            name,
            image,
            mask,
            dataset,
            group,
            told=bool(told),
            series=row.get("group", ""),
            modalities=seen,
        )
    if not lines:
        raise DataError(f"{path} has no rows.")
    order = [split for split in (*SPLITS, "all") if split in splits]
    return [
        Pairing(
            Found(
                Source(split, (), ()), path.stem + ("-val" if split == "val" else ""), path, path
            ),
            CSV_LAYOUT,
            tuple(pair for _, pair in sorted(splits[split].items())),
            (),
            (),
            (),
            0,
            _lacking(splits[split].values(), modalities, f"{path.stem} {split}"),
        )
        for split in order
    ]


def _divided_groups(pairings: Sequence[Pairing]) -> tuple[str, ...]:
    """Return a note if images of one group have different splits."""
    splits: dict[str, set[str]] = defaultdict(set)
    for pairing in pairings:
        for pair in pairing.pairs:
            if pair.series:
                splits[pair.series].add(pairing.found.source.split)
    divided = sorted(group for group, of_group in splits.items() if len(of_group) > 1)
    if not divided:
        return ()
    verb = "is" if len(divided) == 1 else "are"
    return (
        f"{count(len(divided), 'group')} ({shorten(divided)}) {verb} in more than one split: "
        "images of one group are both learned from and scored, and such scores are too good",
    )


def _lacking(pairs: Iterable[Pair], modalities: Sequence[str], where: str) -> tuple[str, ...]:
    """Return a note for each modality that some rows of a table do not name."""
    known = list(pairs)
    have = counted(known, modalities)
    return tuple(
        f"{where}: {len(known) - number} of {count(len(known), 'image')} have no {name}"
        for name, number in have.items()
        if number < len(known)
    )
