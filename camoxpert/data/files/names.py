"""Match the names of two folders: equal ones, or by one rule that explains all of them.

Masks and maps are often called ``0001_mask``, ``0001_sal_fuse``, ``0001.jpg`` (from
``0001.jpg.png``) or ``1`` where the image is ``0001``. A rule is used only if it gives every name
of one side its own partner on the other; it is never used for some of the files.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass

from camoxpert.errors import DataError
from camoxpert.text import shorten

LOOKED_AT = 8
"""Names of each side from which affixes are taken; they are tried on all names."""
MASK_WORDS = re.compile(r"mask|gt|truth|label|seg|ann|matte|object", re.IGNORECASE)
Rule = tuple[dict[str, str], str]
"""Name -> other name, and the rule in words."""


@dataclass(frozen=True)
class NameMatch:
    """Matched names.

    Attributes:
        partner: name -> name on the other side; those without a partner are missing.
        rule: how they were matched, for the user; "" if they are equal.
    """

    partner: dict[str, str]
    rule: str = ""


def match_names(names: Collection[str], others: Collection[str], *, advice: str) -> NameMatch:
    """Match names with others: equal ones first, then the first rule that explains all of a side.

    Args:
        names: of images or masks; ``/`` separates folders.
        others: of the masks or maps that belong to them.
        advice: what to do if several names of the other side fit each name.

    Raises:
        DataError: several affixes fit all names (``_sal`` and ``_edge``).
    """
    if not names or not others:
        return NameMatch({})
    for change, words in (
        (str, ""),
        (str.casefold, "upper and lower case ignored"),
        (_unpadded, "zeros before numbers ignored"),
        (_bare, "sub-folders ignored"),
        (lambda name: _unpadded(_bare(name)), "sub-folders and zeros before numbers ignored"),
    ):
        own, theirs = _changed(names, change), _changed(others, change)
        if own is None or theirs is None:
            continue
        for found, rule in _rules(own, theirs, advice):
            if len(found) in (len(own), len(theirs)):
                partner = {own[key]: theirs[other] for key, other in found.items()}
                return NameMatch(partner, ", ".join(filter(None, (rule, words))))
    return NameMatch({name: name for name in names if name in others})


def strip_suffix(others: Collection[str], suffix: str) -> dict[str, str]:
    """Return name without the suffix -> name, for the names that end with it."""
    return {name[: len(name) - len(suffix)]: name for name in others if name.endswith(suffix)}


def _rules(names: Collection[str], others: Collection[str], advice: str) -> Iterator[Rule]:
    """Yield matches that may be complete, the plainest first."""
    yield {name: name for name in names if name in others}, ""
    for swapped in (False, True):
        short, long = (others, names) if swapped else (names, others)
        complete = []
        kinds: dict[frozenset[str], list[str]] = defaultdict(list)
        for before, after in sorted(_affixes(short, long)):
            found = {n: f"{before}{n}{after}" for n in short if f"{before}{n}{after}" in long}
            kinds[frozenset(found)].append(f"{before}NAME{after}")
            if len(found) in (len(short), len(long)):
                complete.append((found, f"{before}NAME{after}"))
        # Several kinds of maps of the same images: each has all of them, together they are all.
        for same, texts in kinds.items():
            every = len(same) == len(short) or len(same) * len(texts) == len(long)
            if len(texts) > 1 and every and not swapped:
                raise DataError(f"Each name has several partners ({shorten(texts)}). {advice}")
        for found, text in complete[:1]:
            found = {b: a for a, b in found.items()} if swapped else found
            yield found, f"{'NAME' if swapped else text} for {text if swapped else 'NAME'}"
    own, theirs = _core(names), _core(others)
    first = next(iter(theirs), "")
    # Not for any two numbered sets: animal-1 and camo_1 are images of different data sets.
    if own and MASK_WORDS.search(theirs.get(first, "").replace(first, "")):
        found = {own[key]: theirs[key] for key in own.keys() & theirs.keys()}
        shown = theirs[first].replace(first, "NAME")
        yield dict(sorted(found.items())), f"{shown} for {own.get(first, first)}"


def _affixes(short: Collection[str], long: Collection[str]) -> set[tuple[str, str]]:
    """Return what some names of one side have before and after a name of the other side."""
    found = set()
    pairs = [(n, other) for other in _sample(long) for n in short if n and n in other]
    pairs += [(n, other) for n in _sample(short) for other in long if n and n in other]
    for name, other in pairs:
        start = other.find(name)
        while start >= 0:
            before, after = other[:start], other[start + len(name) :]
            cut = not _joined(before[-1:], name[:1]) and not _joined(name[-1:], after[:1])
            if cut and (before or after) and "/" not in before + after:
                found.add((before, after))
            start = other.find(name, start + 1)
    return found


def _joined(left: str, right: str) -> bool:
    """Return whether two characters are within one word or number: 1 in 11, cat in cats."""
    return (left.isdigit() and right.isdigit()) or (left.isalpha() and right.isalpha())


def _sample(names: Collection[str]) -> Sequence[str]:
    ordered = sorted(names)
    step = max(1, (len(ordered) - 1) // (LOOKED_AT - 1))
    return [*ordered[::step][:LOOKED_AT], ordered[-1]]


def _core(names: Collection[str]) -> dict[str, str]:
    """Return names without the beginning and ending that all share; {} if that is ambiguous."""
    if len(names) < 2:
        return {}
    before = len(_shared(list(names)))
    rest = [name[before:] for name in names]
    after = len(_shared([name[::-1] for name in rest]))
    core = {part[: len(part) - after]: name for part, name in zip(rest, names, strict=True)}
    return core if len(core) == len(names) and "" not in core else {}


def _shared(names: Sequence[str]) -> str:
    """Return the beginning that names share, cut where a word or number would be cut."""
    first, last = min(names), max(names)
    shared = first[: next((i for i, a in enumerate(first) if a != last[i : i + 1]), len(first))]
    while shared and any(_joined(shared[-1], name[len(shared) :][:1]) for name in names):
        shared = shared[:-1]
    return shared


def _changed(names: Collection[str], change: Callable[[str], str]) -> dict[str, str] | None:
    """Return changed name -> name, or None if two become equal."""
    changed = {change(name): name for name in names}
    return changed if len(changed) == len(names) else None


def _unpadded(name: str) -> str:
    return re.sub(r"\d+", lambda number: number[0].lstrip("0") or "0", name.casefold())


def _bare(name: str) -> str:
    return name.rpartition("/")[2]
