"""Score a model with every subset of what its sensors saw: what a missing one costs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

from camoxpert import console
from camoxpert.config import DataConfig
from camoxpert.config.data import RGB
from camoxpert.data.files.manifest import Manifest
from camoxpert.data.files.modalities import counted
from camoxpert.data.loader import build_eval_loader
from camoxpert.data.samples.batches import EvalBatch
from camoxpert.evaluation.options import ScoringOptions
from camoxpert.evaluation.shots import ShotScore, SubsetTable
from camoxpert.inference.predictor import Predictor
from camoxpert.inference.score import forward_batch, score
from camoxpert.metrics import HIGHER_IS_BETTER, Evaluator
from camoxpert.metrics.statistics import Scores, compare
from camoxpert.models.modalities import chosen, subsets


def score_subsets(
    predictor: Predictor,
    name: str,
    manifest: Manifest,
    data: DataConfig,
    options: ScoringOptions,
    *,
    batch_size: int,
    num_workers: int,
) -> SubsetTable | None:
    """Score a model on a data set with every non-empty subset of the photograph and the modalities
    that any of the images has.

    Each image is decoded once.

    Args:
        predictor: of a model with modalities.
        name, manifest: the data set.
        data: how images are read, as in the pass with everything.
        options: how to score.
        batch_size, num_workers: of the loader; they change no number.

    Returns:
        None, with a note, where the images have no modality.

    Raises:
        DataError: a file cannot be read.
        Stopped: the command was asked to stop.
    """
    names = predictor.modalities
    have = counted(manifest.pairs, names)
    if not any(have.values()):
        console.note(
            f"{name}: no image has {' or '.join(names)}, so the photographs alone are scored. They "
            f"are looked for in folders of these names beside the images, or in columns of a CSV."
        )
        return None
    whole = forward_batch(predictor.device)
    loader = build_eval_loader(
        manifest,
        data,
        # Whole forward passes: the last of a batch would be filled with copies.
        batch_size=-(-batch_size // whole) * whole,
        num_workers=num_workers,
    )
    shown = [s for s in subsets(len(names)) if all(have[n] for n in _names(s, names) if n != RGB)]
    evaluators = {subset: options.evaluator() for subset in shown}
    groups = {pair.name: pair.group for pair in manifest.pairs}
    for batch in console.track(loader, f"evaluate {name}, subsets"):
        for subset, evaluator in evaluators.items():
            score(
                predictor.model,
                [_known(batch, subset)],
                device=predictor.device,
                evaluator=evaluator,
                groups=groups,
                precision=predictor.precision,
                shown=partial(chosen, subset),
            )
    base = evaluators[shown[0]]
    rows = tuple(
        ShotScore(
            " + ".join(_names(subset, names)),
            evaluator.results(),
            _differences(evaluator, base) if options.intervals else {},
            evaluator.num_images,
        )
        for subset, evaluator in evaluators.items()
        if evaluator.num_images
    )
    scored = {row["name"] for row in base.rows()}
    have = counted((pair for pair in manifest.pairs if pair.name in scored), names)
    return SubsetTable(base.num_images, have, rows, *_over(rows))


def _names(subset: Sequence[bool], modalities: Sequence[str]) -> list[str]:
    return [name for name, there in zip((RGB, *modalities), subset, strict=True) if there]


def _known(batch: EvalBatch, subset: Sequence[bool]) -> EvalBatch:
    """Return the images of a batch of which a subset shows anything."""
    if subset[0] or batch.planes is None:
        return batch
    there_BM = (batch.planes > 0).flatten(2).any(2)
    shown = [number for number, there in enumerate(subset[1:]) if there]
    return batch.only(there_BM[:, shown].any(1).nonzero()[:, 0].tolist())


def _differences(evaluator: Evaluator, base: Evaluator) -> dict[str, dict[str, float]]:
    """Return how an evaluator's scores differ from those of the photographs alone."""
    if evaluator is base or base.num_images < 2 or evaluator.num_images < base.num_images:
        return {}
    found = compare(Scores(evaluator), Scores(base))
    return {key: value._asdict() for key, value in found.items()}


def _over(rows: Sequence[ShotScore]) -> tuple[dict[str, float], dict[str, float]]:
    """Return the mean and the worst of the rows, by measure."""
    table: Mapping[str, list[float]] = {
        key: [row.scores[key] for row in rows] for key in rows[0].scores
    }
    mean = {key: sum(values) / len(values) for key, values in table.items()}
    worst = {
        key: min(values) if HIGHER_IS_BETTER.get(key, True) else max(values)
        for key, values in table.items()
    }
    return mean, worst
