"""Check every file of a data set; nothing is changed and nothing is dropped."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from camoxpert.config import DataConfig
from camoxpert.data.files.jpeg import hears_warnings
from camoxpert.data.files.manifest import Search, load_training_data, without_split
from camoxpert.data.files.pairing import Pair
from camoxpert.data.files.roots import Root, read_root, with_distinct_names
from camoxpert.data.files.split import split_validation
from camoxpert.doctor.copies import Match, families_of, find_all_copies, fingerprints
from camoxpert.doctor.families import inseparable
from camoxpert.doctor.finding import Finding
from camoxpert.doctor.inspect import MaskShape, PairFacts, identical_files, inspect_pairs
from camoxpert.doctor.registration import check_modalities
from camoxpert.doctor.tables import CLEAN
from camoxpert.errors import DataError
from camoxpert.files import write_rows
from camoxpert.metrics.groups import SIZES
from camoxpert.text import count

# Number of pictures on the contact sheet of a split.
SHEET_PICTURES = 48
PARTS = ("training", "validation", "test")


@dataclass
class Examination:
    """Everything that was found out about the data.

    Attributes:
        findings: in the order of the checks.
        facts: every pair.
        matches: (match, facts of one, facts of the other) for duplicate pictures.
        clean_list: (data set, split, name, reason) of images to leave out.
        layouts: sentences about the layouts recognised.
    """

    findings: list[Finding] = field(default_factory=list)
    facts: list[PairFacts] = field(default_factory=list)
    matches: list[tuple[Match, PairFacts, PairFacts]] = field(default_factory=list)
    clean_list: list[tuple[str, str, str, str]] = field(default_factory=list)
    layouts: list[str] = field(default_factory=list)

    def add(self, level: str, check: str, text: str, files: Iterable[object] = ()) -> None:
        """Append a finding."""
        self.findings.append(Finding(level, check, text, tuple(str(file) for file in files)))


def examine_data(data: DataConfig, *, seed: int = 42, copies: bool = True) -> Examination:
    """Examine every file of the data sets and return what was found.

    Args:
        data: settings of the planned training.
        seed: seed of the planned training.
        copies: also look for duplicate pictures by content.

    Raises:
        Stopped: Ctrl-C, SIGTERM or the deadline.
    """
    found = Examination()
    search = Search(
        data.layout,
        data.noncam,
        {},
        data.allow_outside,
        any_size=data.resize == "bilinear",
        modalities=data.beside_rgb,
    )
    roots = with_distinct_names(_read_roots(data.roots, search, found))
    pairs = [pair for root in roots for pair in _find_pairs(root, found)]
    if not pairs:
        found.add("error", "pairs", "No image with a mask was found.")
        return found
    found.facts = inspect_pairs(pairs, max_pixels=data.max_pixels, pictures=SHEET_PICTURES)
    _check_files(found)
    _check_masks(found)
    sound = [facts.pair for facts in found.facts if not facts.faults]
    found.findings += check_modalities(sound, data.beside_rgb, max_pixels=data.max_pixels)
    _check_objects(found)
    validation = _check_training(found, data, search, seed)
    _check_copies(found, validation, copies, data.max_pixels)
    return found


def _read_roots(roots: Sequence[str], search: Search, found: Examination) -> list[Root]:
    """Return the roots that can be read; report the others."""
    read = []
    for root in roots:
        try:
            read.append(
                read_root(
                    Path(root),
                    search.layout,
                    search.noncam,
                    search.allow_outside,
                    search.any_size,
                    search.modalities,
                )
            )
        except DataError as error:
            found.add("error", "layout", str(error))
    return read


def _find_pairs(root: Root, found: Examination) -> list[tuple[Pair, str]]:
    """Return (pair, split) for files matched by name; report those without a partner."""
    pairs: list[tuple[Pair, str]] = []
    for note in (*root.notes, *without_split(root.pairings)):
        found.add("warning", "layout", f"{note}.")
    for pairing in root.pairings:
        source, split = pairing.found, pairing.found.source.split
        words = f"{source.dataset} {split}: {len(pairing.pairs)} pairs ({pairing.layout})"
        if pairing.left_out:
            words += f", {pairing.left_out} images without a camouflaged object left out"
        found.layouts.append(words)
        for note in pairing.notes:
            found.add("note", "pairing", f"{note}.")
        pairs += [(pair, split) for pair in pairing.pairs]
        where = f"{source.images} and {source.masks}"
        if pairing.missing:
            found.add(
                "error",
                "pairing",
                f"{source.dataset} {split}: images without a mask: {len(pairing.missing)} "
                f"({where}). Add the masks or remove the images.",
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
    text = ", ".join(f"{name} {number}" for name, number in formats.most_common())
    found.add("note", "files", f"{len(found.facts) - len(broken)} pairs are sound; images: {text}.")
    if "JPEG" in text and not hears_warnings():
        found.add(
            "note",
            "files",
            "Random damage in JPEGs is not seen without simplejpeg: pip install simplejpeg.",
        )
    odd: dict[str, list[Path]] = {}
    for facts in found.facts:
        for oddity in facts.oddities:
            odd.setdefault(oddity, []).append(facts.pair.image)
    for oddity, files in odd.items():
        found.add("note", "files", f"{count(len(files), 'image')}: {oddity}.", files)


def _check_masks(found: Examination) -> None:
    for dataset, split, sound in _parts(found):
        encodings = Counter(facts.encoding for facts in sound)
        text = ", ".join(f"{name} {number}" for name, number in encodings.most_common())
        found.add("note", "masks", f"{dataset} {split}: masks are stored as {text}.")
        empty = [facts for facts in sound if facts.share == 0]
        full = [facts for facts in sound if facts.share == 1]
        if empty:
            level = "warning" if len(empty) < len(sound) else "error"
            found.add(
                level,
                "masks",
                f"{dataset} {split}: empty masks: {len(empty)}. Training and scoring "
                f"treat images without an object differently; leave them out unless they are "
                f"intended.",
                [facts.pair.mask for facts in empty],
            )
        if full:
            found.add(
                "warning",
                "masks",
                f"{dataset} {split}: masks that mark every pixel: {len(full)}.",
                [facts.pair.mask for facts in full],
            )
        void = [facts for facts in sound if facts.void]
        if void:
            share = sum(facts.void for facts in void) / len(void)
            found.add(
                "note",
                "masks",
                f"{dataset} {split}: {len(void)} of {len(sound)} masks have unlabelled pixels "
                f"(void, {share:.1%} of each on average); losses and measures leave them out.",
                [facts.pair.mask for facts in void],
            )
            plain = [facts for facts in sound if facts.encoding == "0/255"]
            if plain:
                found.add(
                    "warning",
                    "masks",
                    f"{dataset} {split}: {len(plain)} masks beside them have no label but white, "
                    f"which is read as object there. Is it void?",
                    [facts.pair.mask for facts in plain],
                )
        inverted = [
            facts for facts in sound if MaskShape(facts.share, facts.void, facts.border).inverted
        ]
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
                f"{dataset} {split}: {len(inverted)} masks look inverted (the object is along the "
                f"border).",
                [facts.pair.mask for facts in inverted],
            )


def _check_objects(found: Examination) -> None:
    for dataset, split, sound in _parts(found):
        with_object = [facts for facts in sound if facts.share > 0]
        sizes = Counter(facts.size_class for facts in with_object)
        text = ", ".join(f"{name}: {sizes[name]}" for name in SIZES if sizes[name])
        several = sum(facts.objects > 1 for facts in with_object)
        found.add(
            "note",
            "objects",
            f"{dataset} {split}: object sizes {text}; {several} images with several objects.",
        )
        classes = Counter(facts.pair.group for facts in sound if facts.pair.group)
        if len(classes) > 1:
            shown = ", ".join(f"{name} {number}" for name, number in classes.most_common(8))
            found.add("note", "objects", f"{dataset} {split}: {len(classes)} classes: {shown}.")


def _check_copies(
    found: Examination, validation: set[tuple[str, str]], copies: bool, max_pixels: int
) -> None:
    """Look for duplicate pictures, and report the splits that they are in."""
    sound = [facts for facts in found.facts if not facts.faults]
    if copies:
        prints = fingerprints([facts.pair.image for facts in sound], max_pixels=max_pixels)
        matches = find_all_copies(prints)
    else:
        matches = [
            Match(group[0], other, 1.0, "the same file")
            for group in identical_files([facts.pair.image for facts in sound])
            for other in group[1:]
        ]
    found.matches = [(match, sound[match.a], sound[match.b]) for match in matches]

    def part(facts: PairFacts) -> str:
        if facts.split == "test":
            return "test"
        return "validation" if (facts.pair.dataset, facts.pair.name) in validation else "training"

    left_out = {row[:3] for row in found.clean_list}
    for members in families_of(matches):
        # Keep one of each family. Test sets are never cleaned, so that scores stay comparable;
        # validation takes precedence over training.
        ranked = sorted(members, key=lambda i: (-PARTS.index(part(sound[i])), i))
        keeper = sound[ranked[0]]
        for loser in (sound[index] for index in ranked[1:]):
            if part(loser) != "test" and _key(loser) not in left_out:
                reason = f"a copy of {keeper.pair.name} ({part(keeper)})"
                found.clean_list.append((*_key(loser), reason))
    groups: dict[str, list[str]] = {}
    for match, a, b in found.matches:
        where = " and ".join(sorted({part(a), part(b)}))
        groups.setdefault(where, []).append(f"{a.pair.image} = {b.pair.image} ({match.how})")
    for where, names in groups.items():
        across = " and " in where
        leak = "test" in where and across
        advice = "Training with them makes the scores look better than they are; " if leak else ""
        found.add(
            "warning",
            "copies",
            f"{count(len(names), 'pair')} of copies {'across' if across else 'within'} {where}. "
            f"{advice}--clean-list FILE writes what to leave out.",
            names,
        )
    if not found.matches:
        sought = "re-encoded, resized, cropped or flipped copies" if copies else "identical files"
        found.add("note", "copies", f"No {sought} found among {len(sound)} images.")


def _check_training(
    found: Examination, data: DataConfig, search: Search, seed: int
) -> set[tuple[str, str]]:
    """Load the data as training would; return the images that it would use for validation."""
    try:
        loaded = load_training_data(data.roots, search, validate=data.val_fraction > 0)
    except DataError as error:
        tests_only = found.facts and all(facts.split == "test" for facts in found.facts)
        if tests_only and not any(finding.check == "pairing" for finding in found.findings):
            text = "Only test images were found: there is nothing to train on, only to evaluate."
            found.add("warning", "training", text)
        elif not any(finding.level == "error" for finding in found.findings):
            found.add("error", "training", f"Training would stop here: {error}")
        return set()
    if loaded.given is not None:
        validation = loaded.given
    else:
        families = inseparable(loaded.whole, data)
        _, validation = split_validation(loaded.whole, data.val_fraction, seed, families)
    return {(pair.dataset, pair.name) for pair in validation.pairs}


def _parts(found: Examination) -> Iterator[tuple[str, str, list[PairFacts]]]:
    parts: dict[tuple[str, str], list[PairFacts]] = {}
    for facts in found.facts:
        if not facts.faults:
            parts.setdefault((facts.pair.dataset, facts.split), []).append(facts)
    for (dataset, split), sound in parts.items():
        yield dataset, split, sound


def _key(facts: PairFacts) -> tuple[str, str, str]:
    return facts.pair.dataset, facts.split, facts.pair.name


def write_clean_list(path: Path, rows: Sequence[tuple[str, str, str, str]]) -> None:
    """Write the images to leave out, for ``--clean-list`` of train and evaluate."""
    write_rows(path, [dict(zip(CLEAN, row, strict=True)) for row in rows], CLEAN)
