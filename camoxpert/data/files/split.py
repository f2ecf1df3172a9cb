"""Carve validation from the training data; copies of one picture stay on the same side."""

from __future__ import annotations

import hashlib
import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace

from camoxpert.data.files.manifest import Manifest
from camoxpert.data.files.pairing import Pair

Unit = tuple[Pair, ...]
"""Pairs that are never separated."""
Class = tuple[str, str, bool]
"""Data set, group, and whether the images are known to have no object."""


def split_validation(
    manifest: Manifest, fraction: float, seed: int, families: Sequence[Sequence[int]] = ()
) -> tuple[Manifest, Manifest]:
    """Split off a part of the training data for validation.

    The images that are known to have no object contribute their share, and so does each class of
    either kind (largest remainders first). The choice depends only on the seed, the names and the
    families, not on the order of files on disk. A family that does not fit into the share of its
    class stays in training; if the shares remain unfilled for this reason, other families and
    pictures take the places.

    Args:
        manifest: the training data.
        fraction: share of validation, 0..1.
        seed: of the choice.
        families: positions of pictures that are copies of each other.

    Returns:
        (train, validation); validation is empty for fraction 0 and if all pairs are one family,
        and has at least one pair otherwise.
    """
    total = len(manifest)
    wanted = min(max(1, round(fraction * total)), total - 1) if fraction > 0 and total > 1 else 0

    def rank(pair: Pair) -> str:
        return hashlib.sha256(
            f"{seed}/{pair.dataset}/{pair.name}".encode(errors="surrogateescape")
        ).hexdigest()

    classes: dict[Class, list[Unit]] = defaultdict(list)
    sizes: dict[Class, int] = defaultdict(int)
    first: dict[Class, str] = {}
    for pair in manifest.pairs:
        sizes[_class_of(pair)] += 1
        first.setdefault(_class_of(pair), rank(pair))
    for unit in _units(manifest, families):
        ranked = tuple(sorted(unit, key=rank))
        classes[_class_of(ranked[0])].append(ranked)
    counts = _shares_by_kind(sizes, wanted, first)
    chosen: list[Unit] = []
    left: list[Unit] = []
    for key, units in classes.items():
        room = counts[key]
        for unit in sorted(units, key=lambda unit: rank(unit[0])):
            if len(unit) <= room:
                chosen.append(unit)
                room -= len(unit)
            else:
                left.append(unit)
    room = wanted - sum(map(len, chosen))
    for unit in sorted(left, key=lambda unit: rank(unit[0])):
        if len(unit) <= room:
            chosen.append(unit)
            room -= len(unit)
    if wanted and not chosen:
        # Only families larger than the whole share, as in frames of a few videos.
        smallest = min(left, key=lambda unit: (len(unit), rank(unit[0])))
        chosen = [smallest] if len(smallest) < total else []
    validation = {pair for unit in chosen for pair in unit}
    return (
        replace(manifest, pairs=tuple(p for p in manifest.pairs if p not in validation)),
        replace(
            manifest,
            pairs=tuple(p for p in manifest.pairs if p in validation),
            split="validation",
            excluded=0,
            notes=(),
        ),
    )


def _class_of(pair: Pair) -> Class:
    return pair.dataset, pair.group, pair.empty


def _units(manifest: Manifest, families: Sequence[Sequence[int]]) -> Iterator[Unit]:
    """Yield the families, and every other pair alone."""
    members = {index for family in families for index in family}
    for family in families:
        yield tuple(manifest.pairs[index] for index in family)
    for index, pair in enumerate(manifest.pairs):
        if index not in members:
            yield (pair,)


def _shares_by_kind(
    sizes: dict[Class, int], wanted: int, rank: dict[Class, str]
) -> dict[Class, int]:
    """Distribute ``wanted`` pairs over images with and without an object, then over classes:
    classes of a few images each would leave the share of a kind to chance."""
    kinds = {
        empty: {key: size for key, size in sizes.items() if key[2] is empty}
        for empty in (False, True)
    }
    totals = {("", "", empty): sum(own.values()) for empty, own in kinds.items() if own}
    of_kind = _shares(totals, wanted, dict.fromkeys(totals, ""))
    counts: dict[Class, int] = {}
    for (_, _, empty), number in of_kind.items():
        counts |= _shares(kinds[empty], number, rank)
    return counts


def _shares(sizes: dict[Class, int], wanted: int, rank: dict[Class, str]) -> dict[Class, int]:
    """Distribute ``wanted`` pairs over classes, largest remainders first; ``rank`` breaks ties."""
    total = sum(sizes.values())
    shares = {key: wanted * size / total for key, size in sizes.items()}
    counts = {key: math.floor(share) for key, share in shares.items()}
    by_remainder = sorted(shares, key=lambda key: (counts[key] - shares[key], rank[key], key))
    for key in by_remainder[: wanted - sum(counts.values())]:
        counts[key] += 1
    return counts
