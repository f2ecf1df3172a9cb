"""Made images: training pairs that ``synthesize`` generated, beside the real ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from camoxpert.data.files.manifest import Manifest, Search, load_train
from camoxpert.errors import DataError

MADE = "synthetic"
NO_MADE = Manifest((), "", MADE, "")
"""The manifest of a run without such images."""


def find_made(folders: Sequence[str | Path], search: Search) -> Manifest:
    """Return the training pairs of made data; no folders give an empty manifest.

    Args:
        folders: data set folders or CSV files; their test and validation splits are not read.
        search: how the real pairs are found. The layout is recognised for each folder, and black
            masks are kept: images without an object are made on purpose.

    Raises:
        DataError: nothing found, no layout matches, missing masks, duplicate names.
    """
    if not folders:
        return NO_MADE
    own = Search(
        noncam="include",
        allow_outside=search.allow_outside,
        any_size=search.any_size,
        modalities=search.modalities,
    )
    try:
        found = load_train(folders, own)
    except DataError as error:
        raise DataError(f"--synthetic: {error}") from error
    # A name that no real data set has: a made image often keeps the name of its source.
    pairs = tuple(
        replace(pair, dataset=f"{MADE} {pair.dataset}", made=True) for pair in found.pairs
    )
    return replace(found, pairs=pairs, dataset=f"{MADE} {found.dataset}", split=MADE)
