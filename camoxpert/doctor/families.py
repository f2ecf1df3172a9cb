"""Families of training pictures that a split never separates: copies of each other, which are kept
in the cache folder, and those of one series."""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict

from camoxpert import console
from camoxpert.config import DataConfig
from camoxpert.data.cache.choice import cache_root
from camoxpert.data.cache.table import description
from camoxpert.data.files.manifest import Manifest
from camoxpert.doctor.copies import FINE, families_of, find_all_copies, fingerprints
from camoxpert.doctor.inspect import identical_files
from camoxpert.files import read_json, write_json

VERSION = 1
"""Increased when the search changes what it finds."""
MOST_IMAGES = 12_000
"""Every picture is compared with every other: two minutes for this many on two cores."""


def inseparable(manifest: Manifest, data: DataConfig, *, write: bool = True) -> list[list[int]]:
    """Return the positions of pictures that stay on one side of a split, family by family.

    A family holds copies (unless ``group_copies`` is off) and pictures of one series of a data set,
    and what either of them is joined with.

    Args:
        manifest: the training data.
        data: settings.
        write: keep the copies found.
    """
    series: dict[tuple[str, str], list[int]] = defaultdict(list)
    for index, pair in enumerate(manifest.pairs):
        if pair.series:
            series[pair.dataset, pair.series].append(index)
    families = list(series.values())
    if data.group_copies and len(manifest) > 1:
        families += copy_families(manifest, data, write=write)
    if not series:
        return families
    pairs = [(family[0], other) for family in families for other in family[1:]]
    return sorted(families_of(pairs))


def copy_families(manifest: Manifest, data: DataConfig, *, write: bool = True) -> list[list[int]]:
    """Return the positions of pictures that are copies: the same file, or similar content.

    The result is kept in the cache folder, under a name made from the paths, sizes and times of the
    files, and is found there next time. Unreadable files are in no family.

    Args:
        manifest: the training data.
        data: settings.
        write: keep the result.
    """
    files = description(manifest, FINE, data.max_pixels)["files"]
    key = hashlib.sha256(json.dumps([VERSION, data.max_pixels, files]).encode()).hexdigest()[:16]
    path = cache_root(data) / "copies" / f"{key}.json"
    kept = read_json(path).get("families")
    if isinstance(kept, list):
        return [[int(index) for index in family] for family in kept]
    paths = [pair.image for pair in manifest.pairs]
    pairs: list[tuple[int, int]] = [
        (group[0], other) for group in identical_files(paths) for other in group[1:]
    ]
    if len(paths) <= MOST_IMAGES:
        prints = fingerprints(paths, max_pixels=data.max_pixels)
        pairs += [(match.a, match.b) for match in find_all_copies(prints)]
    else:
        console.decide(
            "",
            f"more than {MOST_IMAGES} images: identical files are kept together, similar ones are "
            f"not looked for (`camoxpert doctor` does)",
        )
    families = sorted(families_of(pairs))
    if write:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json(path, {"families": families, "images": len(manifest)})
        except OSError as error:
            console.decide("", f"the copies found are not kept: {path.parent}: {error.strerror}")
    return families
