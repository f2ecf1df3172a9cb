"""Scoring a checkpoint on corrupted images: one pass over the files for each corruption."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from camoxpert import console
from camoxpert.config import DataConfig
from camoxpert.data.files.manifest import Manifest
from camoxpert.data.loader import build_corrupted_loader
from camoxpert.evaluation.options import CorruptionOptions, ScoringOptions
from camoxpert.evaluation.results import deciding_key
from camoxpert.evaluation.robustness import Robustness, compare_with_clean
from camoxpert.inference.predictor import Predictor
from camoxpert.inference.score import forward_batch, score
from camoxpert.metrics import Evaluator
from camoxpert.text import count

Pictures = dict[str, NDArray[np.uint8]]
"""Caption -> uint8 RGB."""


def note_corruptions(asked: CorruptionOptions, sets: Mapping[str, Manifest]) -> None:
    """Print what will be scored, and how much longer than clean images that takes."""
    images = sum(len(manifest) for manifest in sets.values())
    passes = len(asked.names) * len(asked.severities)
    less = "; --severity 1 3 5 takes less" if len(asked.severities) == 5 else ""
    console.note(
        f"corruptions {count(len(asked.names), 'corruption')} "
        f"at severity {', '.join(map(str, asked.severities))}: {count(images, 'image')} are scored "
        f"{count(passes, 'time')} besides the clean pass{less}"
    )


def score_corrupted(
    predictor: Predictor,
    name: str,
    manifest: Manifest,
    data: DataConfig,
    asked: CorruptionOptions,
    options: ScoringOptions,
    clean: Evaluator,
    *,
    batch_size: int,
    num_workers: int,
) -> tuple[Robustness, Pictures]:
    """Score a model on a data set under corruptions.

    Each image is decoded once per corruption; its severities are made from the same pixels.

    Args:
        predictor: the model.
        name, manifest: the data set.
        data: how images are read, as in the clean pass.
        asked: corruptions and severities.
        options: how to score; the same as for the clean images.
        clean: scores of the clean images.
        batch_size, num_workers: of the loader; they change no number.

    Returns:
        The robustness, and the first image under each corruption at the highest severity.

    Raises:
        DataError: an image cannot be read.
        Stopped: the command was asked to stop.
    """
    measure = deciding_key(clean.keys)
    found: dict[tuple[str, int], Evaluator] = {}
    pictures: Pictures = {}
    whole = forward_batch(predictor.device)
    groups = {pair.name: pair.group for pair in manifest.pairs}
    for kind in asked.names:
        own = {(kind, severity): options.evaluator() for severity in asked.severities}
        loader = build_corrupted_loader(
            manifest,
            data,
            list(own),
            seed=asked.seed,
            # Whole forward passes: the last of a batch would be filled with copies.
            batch_size=-(-batch_size // whole) * whole,
            num_workers=num_workers,
        )
        for batches in console.track(loader, f"evaluate {name}, {kind}"):
            for evaluator, batch in zip(own.values(), batches, strict=True):
                score(
                    predictor.model,
                    [batch],
                    device=predictor.device,
                    evaluator=evaluator,
                    groups=groups,
                    precision=predictor.precision,
                )
            if kind not in pictures and batches[-1].names:
                first = batches[-1].images[0].permute(1, 2, 0).numpy()
                pictures[kind] = np.ascontiguousarray(first)
        found |= own
    intervals = options.intervals
    return (
        compare_with_clean(clean, found, measure=measure, seed=asked.seed, intervals=intervals),
        pictures,
    )
