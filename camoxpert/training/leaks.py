"""Keep what a run is measured with out of the made images that it trains on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from camoxpert import console
from camoxpert.data.files.made import MADE
from camoxpert.data.files.manifest import Manifest
from camoxpert.data.files.pairing import Pair
from camoxpert.data.files.provenance import PROVENANCE, Finder, Known, Origin, read_origins
from camoxpert.data.files.unlabeled import NO_IMAGES
from camoxpert.errors import DataError
from camoxpert.text import count, shorten

TRAINING, VALIDATION = "training", "validation"
APART = "held out"
"""Word for images of a fold that it neither trains on nor is scored by."""


def without_leaks(
    made: Manifest,
    folders: Sequence[str],
    train: Manifest,
    validation: Manifest,
    tests: Mapping[str, Manifest],
    apart: Manifest = NO_IMAGES,
) -> Manifest:
    """Return made images without those that come from validation images or others that are held
    out, printing their names.

    Which images validate is decided by each run, so data that was made from TRAIN usually holds
    some that come from them.

    Args:
        made: the made images.
        folders: where they lie, each with its provenance.
        train, validation, tests: the real images of the run.
        apart: images that are on neither side of a fold, as others of their group are held out.

    Raises:
        DataError: made images come from test images, or are real training images.
    """
    if not len(made):
        return made
    # Held out first: where an old path fits two images, the careful answer counts.
    held_out_parts = {VALIDATION: validation, APART: apart}
    finder = Finder({**_by_name(tests), **held_out_parts, TRAINING: train})
    origins: dict[Path, Origin] = {}
    for folder in folders:
        origins |= read_origins(Path(folder))
    unknown, elsewhere, leaked, real = 0, 0, list[tuple[Pair, Known]](), list[str]()
    for pair in made.pairs:
        origin = origins.get(pair.image.resolve())
        unknown += origin is None
        elsewhere += origin is not None and bool(origin.tested)
        # An image may also be in the wrong folder itself.
        found = [finder.find(file) for file in (pair.image, *(origin.sources if origin else ()))]
        held_out = next((k for k in found if k is not None and k.part != TRAINING), None)
        if held_out is not None:
            leaked.append((pair, held_out))
        elif found[0] is not None:
            real.append(pair.name)
    tested = [(pair, known) for pair, known in leaked if known.part not in held_out_parts]
    if tested:
        raise DataError(
            f"--synthetic: {len(tested)} of {count(len(made), 'made image')} come from test "
            f"images, whose scores would then mean nothing: {_named(tested)}. Make the data again "
            f"from training images, or remove these images with their masks."
        )
    if real:
        raise DataError(
            f"--synthetic: {len(real)} of {count(len(made), 'image')} are real training images of "
            f"this run: {shorten(real)}. Give the folders of made images alone."
        )
    if unknown:
        console.decide(
            "warning",
            f"{unknown} of {count(len(made), 'made image')} are in no {PROVENANCE}: whether they "
            f"come from validation or test images is not known",
        )
    if elsewhere:
        console.decide(
            "warning",
            f"{elsewhere} of {count(len(made), 'made image')} were made from images of a test set "
            f"that is not scored here (--allow-test-sources): scores on it would mean nothing",
        )
    if not leaked:
        return made
    what = VALIDATION if all(known.part == VALIDATION for _, known in leaked) else "held-out"
    console.decide(
        MADE,
        f"{len(leaked)} of {count(len(made), 'made image')} come from {what} images and are not "
        f"used: {_named(leaked)}",
    )
    left_out = {pair for pair, _ in leaked}
    return replace(made, pairs=tuple(pair for pair in made.pairs if pair not in left_out))


def made_from(made: Manifest, folders: Sequence[str], sources: Manifest) -> tuple[Pair, ...]:
    """Return the made images that come from these images.

    Args:
        made: the made images.
        folders: where they lie, each with its provenance.
        sources: real images.
    """
    if not len(made) or not len(sources):
        return ()
    finder = Finder({"": sources})
    origins: dict[Path, Origin] = {}
    for folder in folders:
        origins |= read_origins(Path(folder))
    own = [(pair, origins.get(pair.image.resolve())) for pair in made.pairs]
    return tuple(p for p, origin in own if origin and any(map(finder.find, origin.sources)))


def _by_name(tests: Mapping[str, Manifest]) -> dict[str, Manifest]:
    """Return test sets under names that no other part has."""
    return {f"test set {name}": manifest for name, manifest in tests.items()}


def _named(leaked: Sequence[tuple[Pair, Known]]) -> str:
    return shorten(f"{pair.name} (from {known.path.name}, {known.part})" for pair, known in leaked)
