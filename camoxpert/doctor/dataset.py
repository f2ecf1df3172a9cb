"""Looks at every file of a data set; nothing is changed and nothing is dropped."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from camoxpert.data.files.layouts import recognise
from camoxpert.data.files.manifest import (
    Manifest,
    Pair,
    load_eval,
    load_train,
    pair_files,
    split_validation,
)
from camoxpert.doctor.copies import CANDIDATES, Match, find_copies, fingerprints
from camoxpert.doctor.finding import Finding
from camoxpert.doctor.inspect import SIZES, PairFacts, identical_files, inspect_pairs
from camoxpert.errors import DataError
from camoxpert.files import write_rows

MORE_ROUNDS = 4
# Pictures of every split on its contact sheet.
SHEET_PICTURES = 48

Track = Callable[[Iterable[Any], int, str], Iterable[Any]]


@dataclass
class Examination:
    """Everything found out about the data.

    Attributes:
        findings: in the order of the checks.
        facts: every pair.
        matches: (match, facts of one, facts of the other) for pictures that are there twice.
        clean_list: (data set, split, name, reason) of what is better left out.
        layouts: sentences about the layouts recognised.
    """

    findings: list[Finding] = field(default_factory=list)
    facts: list[PairFacts] = field(default_factory=list)
    matches: list[tuple[Match, PairFacts, PairFacts]] = field(default_factory=list)
    clean_list: list[tuple[str, str, str, str]] = field(default_factory=list)
    layouts: list[str] = field(default_factory=list)

    def add(self, level: str, check: str, text: str, files: Iterable[object] = ()) -> None:
        """Note a finding."""
        self.findings.append(Finding(level, check, text, tuple(str(file) for file in files)))


def examine_data(
    roots: Sequence[str | Path],
    *,
    layout: str = "auto",
    noncam: str = "exclude",
    val_fraction: float = 0.1,
    seed: int = 42,
    max_pixels: int,
    copies: bool = True,
    allow_outside: bool = False,
    track: Track,
) -> Examination:
    """Look at every file of the data sets.

    Args:
        roots, layout, noncam, val_fraction, seed, max_pixels: as for training.
        copies: also look for pictures that are there twice.
        allow_outside: a CSV may name files outside its own folder.
        track: wraps long loops for a progress bar.
    """
    found = Examination()
    pairs: list[tuple[Pair, str]] = []
    for root in roots:
        pairs += _find_pairs(Path(root), layout, noncam, allow_outside, found)
    if not pairs:
        found.add("error", "pairs", "No image with a mask was found.")
        return found
    found.facts = inspect_pairs(pairs, max_pixels=max_pixels, pictures=SHEET_PICTURES, track=track)
    _check_files(found)
    _check_masks(found)
    _check_objects(found)
    validation = _check_training(found, roots, layout, noncam, val_fraction, seed, allow_outside)
    _check_copies(found, validation, copies, max_pixels, track)
    return found


def _find_pairs(
    root: Path, layout: str, noncam: str, allow_outside: bool, found: Examination
) -> list[tuple[Pair, str]]:
    """Match files by name; say what has no partner."""
    if not root.exists():
        found.add("error", "layout", f"There is no file or folder {root}.")
        return []
    if root.is_file():
        manifests: list[Manifest] = []
        problem = ""
        for split in ("train", "test"):
            try:
                manifests += load_eval(root, split=split, allow_outside=allow_outside).values()
            except DataError as error:
                problem = str(error)
        if not manifests:
            found.add("error", "layout", problem)
        found.layouts.append(f"{root}: CSV")
        rows = {(p.dataset, m.split, p.name): (p, m.split) for m in manifests for p in m.pairs}
        return list(rows.values())
    recognised = recognise(root, layout)
    if recognised is None:
        found.add(
            "error",
            "layout",
            f"No known data set layout in {root}. The simplest is a folder with Imgs/ and GT/, one "
            f"mask per image with the same name.",
        )
        return []
    row, _, sources = recognised
    pairs: list[tuple[Pair, str]] = []
    for source in sources:
        pairing = pair_files(source, row.name, noncam)
        split = source.source.split
        words = f"{source.dataset} {split}: {len(pairing.pairs)} pairs ({row.name})"
        if pairing.left_out:
            words += f", {pairing.left_out} images without a camouflaged object left out"
        found.layouts.append(words)
        pairs += [(pair, split) for pair in pairing.pairs]
        where = f"{source.images} and {source.masks}"
        if pairing.missing:
            found.add(
                "error",
                "pairing",
                f"{source.dataset} {split}: images without a mask: {len(pairing.missing)} "
                f"({where}). Add the masks or take the images out.",
                pairing.missing,
            )
        if pairing.unused:
            found.add(
                "warning",
                "pairing",
                f"{source.dataset} {split}: masks without an image: {len(pairing.unused)} "
                f"({where}).",
                pairing.unused,
            )
        for first, second in pairing.doubled:
            found.add(
                "error",
                "pairing",
                f"{first.name} and {second.name} have the same name; remove one of them.",
                (first, second),
            )
    return pairs


def _check_files(found: Examination) -> None:
    broken = [facts for facts in found.facts if facts.faults]
    for facts in broken:
        found.add("error", "files", " ".join(facts.faults), (facts.pair.image, facts.pair.mask))
        found.clean_list.append((*_key(facts), "unreadable"))
    formats = Counter(facts.image_format for facts in found.facts if facts.image_format)
    text = ", ".join(f"{name} {count}" for name, count in formats.most_common())
    found.add("note", "files", f"{len(found.facts) - len(broken)} pairs are sound; images: {text}.")
    odd: dict[str, list[Path]] = {}
    for facts in found.facts:
        for oddity in facts.oddities:
            odd.setdefault(oddity, []).append(facts.pair.image)
    for oddity, files in odd.items():
        found.add("note", "files", f"{_count(len(files), 'image')}: {oddity}.", files)


def _check_masks(found: Examination) -> None:
    for dataset, split, sound in _parts(found):
        encodings = Counter(facts.encoding for facts in sound)
        text = ", ".join(f"{name} {count}" for name, count in encodings.most_common())
        found.add("note", "masks", f"{dataset} {split}: masks are stored as {text}.")
        empty = [facts for facts in sound if facts.share == 0]
        full = [facts for facts in sound if facts.share == 1]
        if empty:
            level = "warning" if len(empty) < len(sound) else "error"
            found.add(
                level,
                "masks",
                f"{dataset} {split}: empty masks: {len(empty)}. Images without an object teach "
                f"and are scored differently; leave them out unless they are meant.",
                [facts.pair.mask for facts in empty],
            )
        if full:
            found.add(
                "warning",
                "masks",
                f"{dataset} {split}: masks that mark every pixel: {len(full)}.",
                [facts.pair.mask for facts in full],
            )
        inverted = [facts for facts in sound if facts.border > 0.9 and 0.5 < facts.share < 1]
        if len(inverted) > 0.5 * len(sound):
            found.add(
                "error",
                "masks",
                f"{dataset} {split}: in {len(inverted)} of {len(sound)} masks the object surrounds "
                f"the image. They look inverted: the object must be white (255).",
                [facts.pair.mask for facts in inverted],
            )
        elif inverted:
            found.add(
                "warning",
                "masks",
                f"{dataset} {split}: {len(inverted)} masks look inverted (the object is the rim).",
                [facts.pair.mask for facts in inverted],
            )


def _check_objects(found: Examination) -> None:
    for dataset, split, sound in _parts(found):
        with_object = [facts for facts in sound if facts.share > 0]
        sizes = Counter(facts.size_class for facts in with_object)
        text = ", ".join(f"{name}: {sizes[name]}" for _, name in SIZES if sizes[name])
        several = sum(facts.objects > 1 for facts in with_object)
        found.add(
            "note",
            "objects",
            f"{dataset} {split}: object sizes {text}; {several} images with several objects.",
        )
        classes = Counter(facts.pair.group for facts in sound if facts.pair.group)
        if len(classes) > 1:
            shown = ", ".join(f"{name} {count}" for name, count in classes.most_common(8))
            found.add("note", "objects", f"{dataset} {split}: {len(classes)} classes: {shown}.")


def _check_copies(
    found: Examination,
    validation: set[tuple[str, str]],
    copies: bool,
    max_pixels: int,
    track: Track,
) -> None:
    """Look for pictures that are there twice, and say where that matters."""
    sound = [facts for facts in found.facts if not facts.faults]
    if copies:
        paths = [facts.pair.image for facts in sound]
        prints = fingerprints(paths, max_pixels=max_pixels, track=track)
        matches = find_copies(prints, track=track)
        for _ in range(MORE_ROUNDS):
            # A picture proposes few partners: a large family may hide its ties to another.
            large = [family for family in _families(matches) if len(family) > CANDIDATES]
            if not large:
                break
            left = list(prints)
            for family in large:
                for index in family[1:]:
                    left[index] = None
            more = find_copies(left, track=track)
            known = {(match.a, match.b) for match in matches}
            if all((match.a, match.b) in known for match in more):
                break
            matches += [match for match in more if (match.a, match.b) not in known]
    else:
        items = [(facts.pair.image, facts.split) for facts in sound]
        matches = [
            Match(group[0], other, 1.0, "the same file")
            for group in identical_files(items)
            for other in group[1:]
        ]
    found.matches = [(match, sound[match.a], sound[match.b]) for match in matches]

    def part(facts: PairFacts) -> str:
        if facts.split == "test":
            return "test"
        return "validation" if (facts.pair.dataset, facts.pair.name) in validation else "training"

    order = ("training", "validation", "test")
    listed = {row[:3] for row in found.clean_list}
    for members in _families(matches):
        # One of a family stays: test sets are what everybody else's are, validation before
        # training.
        ranked = sorted(members, key=lambda i: (-order.index(part(sound[i])), i))
        keeper = sound[ranked[0]]
        for index in ranked[1:]:
            loser = sound[index]
            if part(loser) != "test" and _key(loser) not in listed:
                reason = f"shows the same as {keeper.pair.name} ({part(keeper)})"
                found.clean_list.append((*_key(loser), reason))
    groups: dict[str, list[tuple[Match, PairFacts, PairFacts]]] = {}
    for match, a, b in found.matches:
        parts = sorted({part(a), part(b)})
        groups.setdefault(" and ".join(parts), []).append((match, a, b))
    for where, some in groups.items():
        across = " and " in where
        kind = "across" if across else "within"
        leak = "test" in where and across
        advice = "Training with them makes the scores look better than they are; " if leak else ""
        names = [f"{a.pair.image} = {b.pair.image} ({match.how})" for match, a, b in some]
        text = (
            f"{_count(len(some), 'pair')} of images show the same, {kind} {where}. "
            f"{advice}--clean-list FILE writes what to leave out."
        )
        found.add("warning", "copies", text, names)
    if not found.matches:
        sought = "re-encoded, resized, cropped or flipped copies" if copies else "identical files"
        found.add("note", "copies", f"No {sought} seen among {len(sound)} images.")


def _families(matches: Sequence[Match]) -> list[list[int]]:
    """Join matches that share a picture: whatever shows the same as a copy is a copy, too."""
    parent: dict[int, int] = {}

    def root(index: int) -> int:
        while parent.setdefault(index, index) != index:
            parent[index] = parent[parent[index]]
            index = parent[index]
        return index

    for match in matches:
        parent[root(match.a)] = root(match.b)
    families: dict[int, list[int]] = {}
    for index in sorted(parent):
        families.setdefault(root(index), []).append(index)
    return list(families.values())


def _check_training(
    found: Examination,
    roots: Sequence[str | Path],
    layout: str,
    noncam: str,
    fraction: float,
    seed: int,
    allow_outside: bool,
) -> set[tuple[str, str]]:
    """Load the data as training would; return which images it would set aside for validation."""
    try:
        whole = load_train(roots, layout=layout, noncam=noncam, allow_outside=allow_outside)
    except DataError as error:
        tests_only = found.facts and all(facts.split == "test" for facts in found.facts)
        if tests_only and not any(finding.check == "pairing" for finding in found.findings):
            text = "Only test images are here: there is nothing to train on, only to evaluate."
            found.add("warning", "training", text)
        elif not any(finding.level == "error" for finding in found.findings):
            found.add("error", "training", f"Training would stop here: {error}")
        return set()
    _, validation = split_validation(whole, fraction, seed)
    return {(pair.dataset, pair.name) for pair in validation.pairs}


def _parts(found: Examination) -> Iterable[tuple[str, str, list[PairFacts]]]:
    parts: dict[tuple[str, str], list[PairFacts]] = {}
    for facts in found.facts:
        if not facts.faults:
            parts.setdefault((facts.pair.dataset, facts.split), []).append(facts)
    for (dataset, split), sound in parts.items():
        yield dataset, split, sound


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _key(facts: PairFacts) -> tuple[str, str, str]:
    return facts.pair.dataset, facts.split, facts.pair.name


def write_clean_list(path: Path, rows: Sequence[tuple[str, str, str, str]]) -> None:
    """Write what to leave out, for ``--clean-list`` of train and evaluate."""
    columns = ("dataset", "split", "name", "reason")
    write_rows(path, [dict(zip(columns, row, strict=True)) for row in rows], columns)
