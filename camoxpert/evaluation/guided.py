"""Scoring a guided model with references: none, the class memory, some, and wrong ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from camoxpert import console, stop
from camoxpert.config import DataConfig
from camoxpert.data.cache.support import Reference as ReferenceFile
from camoxpert.data.files.classes import object_classes
from camoxpert.data.files.manifest import Manifest, Search, load_train
from camoxpert.data.files.pairing import Pair
from camoxpert.data.loader import build_eval_loader
from camoxpert.doctor.inspect import copies_among
from camoxpert.errors import DataError
from camoxpert.evaluation.options import ScoringOptions, ShotOptions
from camoxpert.evaluation.shots import Shots, ShotScore, ShotTable
from camoxpert.inference.predictor import Predictor
from camoxpert.inference.score import Item, forward_batch, score
from camoxpert.metrics import Evaluator
from camoxpert.metrics.statistics import Scores, compare
from camoxpert.models.guidance import Reference, combine
from camoxpert.runs.scores import CacheCounts
from camoxpert.text import count, shorten

NONE, MEMORY = "no reference", "class memory"
"""What the first two rows of the table are called."""


@dataclass(frozen=True)
class Prepared:
    """What the images of a data set are shown, described before anything is scored.

    Attributes:
        shots: the images that have references, and which.
        targets: what is shown -> image name -> features (D,); without an entry: no reference.
        cache: what the support cache did up to here.
    """

    shots: Shots
    targets: dict[str, dict[str, Tensor]]
    cache: CacheCounts


def prepare_shots(
    predictor: Predictor,
    sets: Mapping[str, Manifest],
    asked: ShotOptions,
    *,
    unreadable: str = "error",
) -> dict[str, Prepared]:
    """Draw the references of all data sets and describe them.

    Those with an empty mask are left out, and with ``unreadable`` ``skip`` those that cannot be
    read; others are drawn for them.

    Args:
        predictor: of a model with guidance.
        sets: data sets by name.
        asked: numbers of references, and where they are drawn from.
        unreadable: ``error`` or ``skip``.

    Returns:
        By the names of the data sets, without those of which no image has a reference, with a
        warning.

    Raises:
        ConfigError, CheckpointError: the model takes no references, or its encoder cannot be had.
        DataError: there are no training images with classes, or one cannot be read.
        Stopped: the command was asked to stop.
    """
    pool = find_pool(predictor, asked)
    cache = predictor.support_cache_with(asked.weights)
    described: dict[Pair, Tensor | None] = {}

    def usable(pair: Pair) -> bool:
        if pair not in described:
            reference = ReferenceFile(pair.image, pair.mask, pair.any_size)
            described[pair] = cache.drawn(reference, unreadable=unreadable)
        return described[pair] is not None

    prepared = {}
    for name, manifest in sets.items():
        shots = Shots(manifest, pool, usable=usable, seed=asked.seed)
        drawn = _draw(name, shots, asked)
        if not shots.pairs:
            console.warn(
                f"{name}: no image has a class of which there are training images: no shots"
            )
            continue
        features = {pair: found for pair, found in described.items() if found is not None}
        targets = _targets(predictor, shots, drawn, features)
        prepared[name] = Prepared(shots, targets, cache.stats.to_dict())
    left_out = [pair.name for pair, found in described.items() if found is None]
    if left_out:
        console.note(
            f"{count(len(left_out), 'training image')} cannot be a reference, because the mask is "
            f"empty or a file cannot be read: {shorten(left_out)}"
        )
    console.note(f"support cache: {cache.stats.describe()}")
    return prepared


def find_pool(predictor: Predictor, asked: ShotOptions) -> tuple[Pair, ...]:
    """Return the images from which references are drawn: those that ``asked`` names, or those of
    the training.

    Raises:
        ConfigError: the model takes no references.
        DataError: there are none, or they have no classes.
    """
    predictor.network.require_guidance()
    data = predictor.config.data
    roots: Sequence[str] = asked.roots or data.roots
    # What may be read is the user's choice of now, not one of the checkpoint.
    search = Search(
        "auto" if asked.roots else data.layout,
        allow_outside=asked.allow_outside,
        any_size=bool(asked.roots) or data.resize == "bilinear",
    )
    pairs = load_train(roots, search).pairs if roots else ()
    beside = "" if asked.roots else data.episodes.references
    if beside:
        more = _read_beside(beside, search)
        # A copy would be drawn twice.
        copies = copies_among(more, pairs)
        pairs += tuple(pair for number, pair in enumerate(more) if number not in copies)
    if not any(object_classes(pairs)):
        raise DataError(
            f"--shots draws references from training images of the same class, and "
            f"{count(len(pairs), 'training image')} of {shorten(roots) or 'the run'} have no "
            "class. Classes come from COD10K names, names such as crab_12, sub-folders or a CSV "
            "column class. Name other data with --reference-data DIR."
        )
    return pairs


def _read_beside(folder: str, search: Search) -> tuple[Pair, ...]:
    """Return the references that training had beside its images."""
    try:
        return load_train([folder], search).pairs
    except DataError as error:
        raise DataError(
            f"--shots also draws from the --reference-data of the training, {folder}: {error} Name "
            "data with --reference-data DIR to draw from that alone."
        ) from error


def score_shots(
    predictor: Predictor,
    name: str,
    manifest: Manifest,
    data: DataConfig,
    prepared: Prepared,
    options: ScoringOptions,
    *,
    batch_size: int,
    num_workers: int,
) -> ShotTable:
    """Score a model on a data set with references of several kinds.

    Each image is decoded once.

    Args:
        predictor: of a model with guidance.
        name, manifest: the data set.
        data: how images are read, as in the pass without references.
        prepared: the references of its images.
        options: how to score.
        batch_size, num_workers: of the loader; they change no number.

    Raises:
        ConfigError: the model takes no references.
        DataError: an image cannot be read.
        Stopped: the command was asked to stop.
    """
    guidance = predictor.network.require_guidance()
    shots, targets = prepared.shots, prepared.targets
    evaluators = {shown: options.evaluator() for shown in targets}
    whole = forward_batch(predictor.device)
    loader = build_eval_loader(
        replace(manifest, pairs=shots.pairs),
        data,
        # Whole forward passes: the last of a batch would be filled with copies.
        batch_size=-(-batch_size // whole) * whole,
        num_workers=num_workers,
    )
    groups = {pair.name: pair.group for pair in shots.pairs}
    for batch in console.track(loader, f"evaluate {name}, shots"):
        for shown, features in targets.items():
            score(
                predictor.model,
                [batch],
                device=predictor.device,
                evaluator=evaluators[shown],
                groups=groups,
                precision=predictor.precision,
                references=_lookup(features, guidance.features, predictor.device),
            )
    return ShotTable(
        images=evaluators[NONE].num_images,
        classes=len({shots.class_of(pair) for pair in shots.pairs}),
        left_out=len(manifest) - len(shots.pairs),
        seed=shots.seed,
        rows=_rows(evaluators, targets, intervals=options.intervals),
        cache=prepared.cache,
    )


Drawn = dict[str, dict[str, list[Pair]]]
"""What is shown -> image name -> references."""


def _draw(name: str, shots: Shots, asked: ShotOptions) -> Drawn:
    """Return the references of the images of a data set; drawing describes them."""
    numbers = sorted(set(asked.numbers))
    most = numbers[-1]
    right: dict[str, list[Pair]] = {}
    wrong: dict[str, list[Pair]] = {}
    images = shots.manifest.pairs
    with console.progress(f"draw references, {name}", total=len(images)) as bar:
        for pair in images:
            stop.check()
            right[pair.name] = shots.right(pair, most)
            wrong[pair.name] = shots.wrong(pair, most) if right[pair.name] else []
            bar.update()
    # Those of a larger number begin with those of a smaller one.
    drawn = {
        count(number, "reference"): {image: pairs[:number] for image, pairs in right.items()}
        for number in numbers
    }
    if any(wrong.values()):
        drawn[f"{most} of another class"] = wrong
    return drawn


def _targets(
    predictor: Predictor, shots: Shots, drawn: Drawn, features: Mapping[Pair, Tensor]
) -> dict[str, dict[str, Tensor]]:
    """Return what is shown -> image name -> features (D,); without an entry: no reference."""
    targets: dict[str, dict[str, Tensor]] = {NONE: {}}
    guidance = predictor.network.require_guidance()
    known = guidance.classes
    if known:
        targets[MEMORY] = {
            pair.name: guidance.prototype(shots.class_of(pair)).cpu()
            for pair in shots.pairs
            if shots.class_of(pair) in known
        }
    for shown, table in drawn.items():
        targets[shown] = {
            image: combine(torch.stack([features[pair] for pair in pairs]))
            for image, pairs in table.items()
            if pairs
        }
    return targets


def _lookup(
    features: Mapping[str, Tensor], width: int, device: torch.device
) -> Callable[[Sequence[Item]], Reference]:
    """Return the function that gives the images of a forward pass their references."""
    nothing = torch.zeros(width)

    def references(items: Sequence[Item]) -> Reference:
        found = torch.stack([features.get(item.name, nothing) for item in items])
        present = torch.tensor([item.name in features for item in items])
        return Reference(found.to(device), present.to(device))

    return references


def _rows(
    evaluators: Mapping[str, Evaluator],
    targets: Mapping[str, Mapping[str, Tensor]],
    *,
    intervals: bool,
) -> tuple[ShotScore, ...]:
    base = evaluators[NONE]
    enough = intervals and base.num_images > 1
    rows = []
    for shown, evaluator in evaluators.items():
        found = {}
        if enough and shown != NONE:
            found = compare(Scores(evaluator), Scores(base))
        differences = {key: value._asdict() for key, value in found.items()}
        images = sum(row["name"] in targets[shown] for row in evaluator.rows())
        rows.append(ShotScore(shown, evaluator.results(), differences, images))
    return tuple(rows)
