"""Scoring a guided model with references: none, the class memory, some, and wrong ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from camoxpert import console
from camoxpert.config import DataConfig
from camoxpert.data.cache.support import Reference as ReferenceFile
from camoxpert.data.cache.support import SupportCache
from camoxpert.data.files.classes import object_classes
from camoxpert.data.files.manifest import Manifest, Search, load_train
from camoxpert.data.files.pairing import Pair
from camoxpert.data.loader import build_eval_loader
from camoxpert.errors import DataError
from camoxpert.evaluation.options import ScoringOptions, ShotOptions
from camoxpert.evaluation.shots import Shots, ShotScore, ShotTable
from camoxpert.inference.predictor import Predictor
from camoxpert.inference.score import Item, forward_batch, score
from camoxpert.metrics import Evaluator
from camoxpert.metrics.statistics import Scores, compare
from camoxpert.models.guidance import Reference, combine
from camoxpert.text import count, shorten

NONE, MEMORY = "no reference", "class memory"
"""What the first two rows of the table are called."""


def find_pool(predictor: Predictor, asked: ShotOptions) -> tuple[Pair, ...]:
    """Return the training images from which references are drawn.

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
    if not any(object_classes(pairs)):
        raise DataError(
            f"--shots draws references from training images of the same class, and "
            f"{count(len(pairs), 'training image')} of {shorten(roots) or 'the run'} have no "
            "class. Classes come from COD10K names, names such as crab_12, sub-folders or a CSV "
            "column class. Name other data with --reference-data DIR."
        )
    return pairs


def score_shots(
    predictor: Predictor,
    name: str,
    manifest: Manifest,
    data: DataConfig,
    asked: ShotOptions,
    pool: Sequence[Pair],
    options: ScoringOptions,
    *,
    batch_size: int,
    num_workers: int,
) -> ShotTable | None:
    """Score a model on a data set with references of several kinds.

    Each image is decoded once.

    Args:
        predictor: of a model with guidance.
        name, manifest: the data set.
        data: how images are read, as in the pass without references.
        asked: numbers of references.
        pool: training images.
        options: how to score.
        batch_size, num_workers: of the loader; they change no number.

    Returns:
        The table; None, with a warning, if no image has a reference.

    Raises:
        ConfigError: the model takes no references.
        DataError: an image or reference cannot be read.
        Stopped: the command was asked to stop.
    """
    guidance = predictor.network.require_guidance()
    shots = Shots(manifest, pool, seed=asked.seed)
    if not shots.pairs:
        console.warn(f"{name}: no image has a class of which there are training images: no shots")
        return None
    cache = predictor.support_cache_with(asked.weights)
    targets = _targets(predictor, cache, shots, asked, guidance.classes)
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
        seed=asked.seed,
        rows=_rows(evaluators, intervals=options.intervals),
        cache=cache.stats.to_dict(),
    )


def _targets(
    predictor: Predictor,
    cache: SupportCache,
    shots: Shots,
    asked: ShotOptions,
    known: Sequence[str],
) -> dict[str, dict[str, Tensor]]:
    """Return what is shown -> image name -> features (D,); without an entry: no reference."""
    numbers = sorted(set(asked.numbers))
    most = numbers[-1]
    drawn: dict[str, dict[str, list[Pair]]] = {
        count(number, "reference"): {pair.name: shots.right(pair, number) for pair in shots.pairs}
        for number in numbers
    }
    wrong = {pair.name: shots.wrong(pair, most) for pair in shots.pairs}
    if any(wrong.values()):
        drawn[f"{most} of another class"] = wrong
    used = {(p.image, p.mask): p for t in drawn.values() for pairs in t.values() for p in pairs}
    files = [ReferenceFile(pair.image, pair.mask) for pair in used.values()]
    features = dict(zip(used, cache.features(files), strict=True))
    console.note(f"support cache: {cache.stats.describe()}")
    targets: dict[str, dict[str, Tensor]] = {NONE: {}}
    if known:
        guidance = predictor.network.require_guidance()
        targets[MEMORY] = {
            pair.name: guidance.prototype(shots.class_of(pair)).cpu()
            for pair in shots.pairs
            if shots.class_of(pair) in known
        }
    for shown, table in drawn.items():
        targets[shown] = {
            image: combine(torch.stack([features[p.image, p.mask] for p in pairs]))
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


def _rows(evaluators: Mapping[str, Evaluator], *, intervals: bool) -> tuple[ShotScore, ...]:
    base = evaluators[NONE]
    enough = intervals and base.num_images > 1
    rows = []
    for shown, evaluator in evaluators.items():
        found = {}
        if enough and shown != NONE:
            found = compare(Scores(evaluator), Scores(base))
        differences = {key: value._asdict() for key, value in found.items()}
        rows.append(ShotScore(shown, evaluator.results(), differences))
    return tuple(rows)
