"""Validation: score the evaluated weights on the validation split, shared by all processes."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np

from camoxpert.data.loader import build_eval_loader
from camoxpert.data.samples.batches import EvalBatch
from camoxpert.inference.score import Item, score
from camoxpert.metrics import Evaluator
from camoxpert.pages.plots import panel
from camoxpert.runs.log import RunLog
from camoxpert.training.guards import StopFlag
from camoxpert.training.prepare import Setup, autocast
from camoxpert.training.state import TrainState

Report = Callable[[str], None]


class ValidationStopped(Exception):
    """A process was asked to stop in the middle of a validation."""


def validate(
    setup: Setup, log: RunLog, state: TrainState, stop: StopFlag, report: Report | None = None
) -> tuple[dict[str, float], list[str]]:
    """Score the evaluated weights on the validation split at original size.

    Every process scores its share of the images; the scores are those of one process, exactly.

    Returns:
        The scores; what was left out because it cannot be read (``--unreadable skip``).

    Raises:
        ValidationStopped: a process was asked to stop; raised on all of them.
    """
    data, count, world = setup.config.data, setup.config.run.num_images, setup.world
    evaluator = Evaluator()
    whole = setup.data.validation
    loader = build_eval_loader(
        replace(whole, pairs=whole.pairs[world.rank :: world.size]),
        data,
        batch_size=setup.plan.stages[0].batch_size,
        num_workers=setup.data.num_workers,
        keep_images=count > 0 and setup.config.run.tensorboard and world.first,
    )
    left_out: list[str] = []

    def read() -> Iterator[EvalBatch]:
        for batch in loader:
            left_out.extend(f"{name} ({reason})" for name, reason in batch.unreadable)
            yield batch

    shown = itertools.count()

    def show(item: Item, prediction: Callable[[], np.ndarray], row: dict[str, Any]) -> None:
        if item.original is not None and next(shown) < count:
            picture = panel(item.original, item.mask, prediction() / np.float32(255))
            log.image(f"validation/{row['name']}", picture, state.step)

    def check_stop() -> None:
        if stop.code():
            raise ValidationStopped

    # What is saved is the first process's: that is what all of them score.
    world.share_buffers(setup.evaluated_model)
    setup.evaluated_model.set_active_experts(setup.config.model.top_k)
    found: dict[str, Any] | None = None
    try:
        score(
            setup.evaluated_model,
            read(),
            device=setup.device,
            evaluator=evaluator,
            context=lambda: autocast(setup),
            seen=show,
            check_stop=check_stop,
        )
        found = evaluator.state_dict()
    except ValidationStopped:
        pass
    # Shares may take longer than a step: a process that is slow is not lost.
    parts = world.gather((found, stop.code(), left_out), patiently=True)
    if any(part is None for part, _, _ in parts):
        stop.agree({f"stop {code}": 1.0 for _, code, _ in parts})
        raise ValidationStopped
    merged = Evaluator()
    for part, _, _ in parts:
        one = Evaluator()
        one.load_state_dict(part or {})
        merged.merge(one)
    return merged.results(), [text for _, _, texts in parts for text in texts]
