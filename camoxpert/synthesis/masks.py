"""Masks for sources that bring none: from a CamoXpert checkpoint, or from a folder of maps.

Both become files of 0 and 255 in the cache, named by the content of what they were made from, so
that the stages behind them read masks of one kind. A checkpoint's masks are made by ``predict``
itself: its ledger, its devices, and its way of going on after a stop.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from camoxpert import console
from camoxpert.data.cache.stages import (
    CORRUPT,
    HIT,
    NOT_MADE,
    content_key,
    require_hits,
    settings_key,
)
from camoxpert.data.files.image_io import (
    MAX_PIXELS,
    UNLIMITED,
    probe,
    read_map,
    write_png,
)
from camoxpert.data.files.listing import list_files
from camoxpert.data.files.names import match_names
from camoxpert.data.files.pairing import Pair, by_name
from camoxpert.data.files.png import require_checksums
from camoxpert.errors import CheckpointError, ConfigError, DataError
from camoxpert.files import file_digest, why_missing
from camoxpert.inference.photos import PhotoOptions, predict_photos
from camoxpert.inference.plan import model_digest
from camoxpert.inference.predictor import load_for
from camoxpert.inference.sources import Photo
from camoxpert.runs.checkpoint import resolve_checkpoint
from camoxpert.runs.hub import is_hub_name
from camoxpert.synthesis.job import say_outcomes
from camoxpert.synthesis.sources import GROUND_TRUTH
from camoxpert.text import shorten

THRESHOLD = 0.5
CUT = 127
"""A map's level above which a pixel is object."""


@dataclass(frozen=True)
class MaskOptions:
    """Where masks come from.

    Attributes:
        source: ``gt``, a run folder or checkpoint, or a folder of maps.
        folder: of the cache.
        devices, device, precision, batch_size: of the model, as for ``predict``.
        max_pixels: larger images are refused.
        strict: a mask that is not cached is an error.
    """

    source: str
    folder: Path
    devices: Sequence[str] = ()
    device: str = "auto"
    precision: str = "auto"
    batch_size: int | None = 8
    max_pixels: int | None = None
    strict: bool = False


@dataclass(frozen=True)
class Masked:
    """Sources with masks.

    Attributes:
        pairs: in the order of the sources; those without a usable mask have one that is missing.
        derived: what made the masks, "" for ground truth.
        models: how many models were loaded for them.
        failed: image -> reason, of sources without a mask.
    """

    pairs: tuple[Pair, ...]
    derived: str = ""
    models: int = 0
    failed: Mapping[Path, str] = field(default_factory=dict)


def kind_of(source: str) -> str:
    """Return ``gt``, ``model`` or ``maps``.

    Raises:
        DataError: there is no such file or folder.
        CheckpointError: it is neither a model nor a folder of images.
    """
    if source == GROUND_TRUTH:
        return source
    path = Path(source)
    if not path.exists() and not is_hub_name(path):
        raise DataError(f"--mask-source: {why_missing(path)} Or give gt, for the data's own masks.")
    try:
        resolve_checkpoint(path)
    except CheckpointError:
        if path.is_dir() and list_files(path, nested=True).images:
            return "maps"
        raise
    return "model"


def with_masks(pairs: Sequence[Pair], names: Sequence[str], options: MaskOptions) -> Masked:
    """Return the sources with masks from where the options say; say what the cache had.

    Args:
        pairs: the sources.
        names: of the sources, unique: those of several data sets are told apart by it.
        options: where masks come from.

    Raises:
        ConfigError: a mask is not cached, under ``--strict-cache``; or no source got a mask.
        DataError: there are no maps, or they do not fit the images.
        CheckpointError: no usable model.
    """
    kind = kind_of(options.source)
    if kind == GROUND_TRUTH:
        return Masked(tuple(pairs))
    masked = _from_maps(pairs, names, options) if kind == "maps" else _from_model(pairs, options)
    if masked.failed and len(masked.failed) == len(masked.pairs):
        reason = next(iter(masked.failed.values()))
        raise ConfigError(f"--mask-source {options.source} gave no mask: {reason}")
    return masked


def _from_maps(pairs: Sequence[Pair], names: Sequence[str], options: MaskOptions) -> Masked:
    """Cut maps at one half, at the size of their images."""
    root = Path(options.source)
    maps, _ = by_name(list_files(root, nested=True).images, root)
    matched = match_names(names, maps, advice=f"Keep the maps of one kind in {root}.")
    if matched.rule:
        console.note(f"maps in {root} matched by a rule: {matched.rule}")
    missing = [name for name in names if name not in matched.partner]
    if missing:
        raise DataError(
            f"--mask-source {root}: {len(missing)} of {len(pairs)} images have no map: "
            f"{shorten(missing)}. A map must have its image's name; those of several data sets lie "
            f"in a folder for each."
        )
    found: list[Pair] = []
    failed: dict[Path, str] = {}
    outcomes: Counter[str] = Counter()
    misses: list[tuple[object, str]] = []
    folder = options.folder / "mask" / settings_key({"maps": 1, "cut": CUT})
    named = zip(pairs, names, strict=True)
    for pair, name in console.track(named, "masks from maps", total=len(pairs)):
        path = maps[matched.partner[name]]
        target = folder / f"{content_key(file_digest(path))}.png"
        outcome = _state(target)
        outcomes[outcome] += 1
        if outcome != HIT and options.strict:
            misses.append((pair.image, outcome))
        elif outcome != HIT:
            try:
                write_png(target, _cut(path, options.max_pixels))
            except DataError as error:
                failed[pair.image] = str(error)
        found.append(replace(pair, mask=target, any_size=True, labeled=True))
    require_hits("mask", misses)
    say_outcomes("mask", outcomes)
    return Masked(tuple(found), f"maps in {root}", 0, failed)


def _cut(path: Path, max_pixels: int | None) -> np.ndarray:
    map_HW = read_map(path, max_pixels=max_pixels or MAX_PIXELS)
    return np.where(map_HW > CUT, np.uint8(255), np.uint8(0))


def _from_model(pairs: Sequence[Pair], options: MaskOptions) -> Masked:
    """Predict masks into the cache."""
    predictor = load_for(
        Path(options.source),
        options.devices,
        device=options.device,
        precision=options.precision,
        max_pixels=options.max_pixels,
    )
    digest = model_digest(predictor.checkpoint)
    settings = {"model": digest, "threshold": THRESHOLD, "precision": predictor.precision.name}
    folder = options.folder / "mask" / settings_key(settings)
    photos: dict[str, Photo] = {}
    names: list[str] = []
    for pair in console.track(pairs, "looking for masks", total=len(pairs)):
        name = _name_of(pair.image)
        names.append(name)
        photos.setdefault(name, Photo(pair.image, name))
    states = {name: _state(folder / "masks" / f"{name}.png") for name in photos}
    say_outcomes("mask", Counter(states.values()))
    misses = [(photos[name].path, why) for name, why in states.items() if why != HIT]
    if options.strict:
        require_hits("mask", misses)
    failed: dict[Path, str] = {}
    if misses:
        for name, why in states.items():
            if why == CORRUPT:
                (folder / "masks" / f"{name}.png").unlink()
        wanted = PhotoOptions(
            kinds=("mask",),
            batch_size=options.batch_size,
            threshold=THRESHOLD,
            devices=options.devices,
        )
        todo = [photo for name, photo in photos.items() if states[name] != HIT]
        failed = dict(predict_photos(predictor, todo, folder, wanted).failed)
    found = tuple(
        replace(pair, mask=folder / "masks" / f"{name}.png", any_size=False, labeled=True)
        for pair, name in zip(pairs, names, strict=True)
    )
    derived = f"model {digest[:16]}, above {THRESHOLD:g}"
    return Masked(found, derived, max(1, len(options.devices)) if misses else 0, failed)


def _name_of(image: Path) -> str:
    """Return the name of a mask: of the content of its image, or the path of a missing one."""
    try:
        return content_key(file_digest(image))
    except OSError:
        return content_key(hashlib.sha256(os.fsencode(image)).hexdigest())


def _state(mask: Path) -> str:
    """Return whether a cached mask is there and whole."""
    if not mask.is_file():
        return NOT_MADE
    try:
        # Our own file: it is as large as its image, which was not too large.
        probe(mask, max_pixels=UNLIMITED)
        require_checksums(mask)
    except (DataError, OSError, ValueError, SyntaxError):
        return CORRUPT
    return HIT
