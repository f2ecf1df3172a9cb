"""Validation: score the evaluated weights on the validation split, shared by all processes."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from camoxpert import console
from camoxpert.data.files.manifest import Manifest, evenly
from camoxpert.data.files.pairing import Pair
from camoxpert.data.loader import build_eval_loader
from camoxpert.data.samples.batches import EvalBatch
from camoxpert.errors import Stopped
from camoxpert.evaluation.presence import PresenceMeter
from camoxpert.inference.score import WHERE_FROM, Item, Shown, forward_batch, score
from camoxpert.metrics import Evaluator, is_better
from camoxpert.metrics.presence import PresenceScores, presence_scores
from camoxpert.models.guidance import Reference
from camoxpert.models.modalities import photograph_alone
from camoxpert.pages.pictures import panel
from camoxpert.runs.records import ValidationRecord, deciding_score
from camoxpert.runtime.processes import World
from camoxpert.text import count, shorten
from camoxpert.training.checkpoints import Saver, require_finite
from camoxpert.training.guide import Guide
from camoxpert.training.run import Run

Listener = Callable[[int, float], str]
_listeners: list[Listener] = []


@contextmanager
def heard_by(listener: Listener) -> Iterator[None]:
    """Call ``listener`` with (epoch, score of the measure that selects) after each validation
    inside the block; a text that it returns ends the training and says why."""
    _listeners.append(listener)
    try:
        yield
    finally:
        _listeners.remove(listener)


def validate_epoch(run: Run, epoch: int, saver: Saver) -> None:
    """Score the weights at the end of an epoch, log the scores, and save the best weights.

    Raises:
        Stopped: a stop was requested; the state is saved, and the epoch's end is repeated as a
            whole when the run continues.
        NumericError: the weights are not finite.
    """
    state, config = run.state, run.config.train
    require_finite(run)
    try:
        with run.log.phase("validation"):
            scores, left_out, presence = validate(run)
            guided = validate(run, run.guide).scores if run.guide and run.guide.validates else None
            alone = validate(run, shown=photograph_alone).scores if run.model.modalities else None
    except Stopped:
        run.log.truncate_after(state.step, epoch_done=False)
        raise saver.saved_and_stopped() from None
    state.epoch, state.position = epoch + 1, 0
    record: ValidationRecord = {
        "kind": "validation",
        "step": state.step,
        "epoch": state.epoch,
        "stage": run.plan.stage_of_epoch(epoch).number,
        "scores": scores,
        "best": False,
        "weights": "ema" if run.ema else "model",
    }
    if guided:
        record["guided"] = guided
    if alone:
        record["rgb"] = alone
    if left_out:
        record["unreadable"] = left_out
    if presence is not None:
        record["presence"] = presence.entry()
    measure = deciding_score(record, config.select)
    better = record["best"] = state.best is None or is_better(config.select, measure, state.best)
    if better:
        state.best, state.best_epoch, state.stale = measure, state.epoch, 0
        saver.save_best(scores)
    else:
        state.stale += 1
    run.log.write(record)
    if left_out and state.epoch <= config.validate_every:
        # Said at the first validation only; every record has the names.
        text = f"{len(left_out)} validation images are left out, for example {left_out[0]}"
        run.note_event(text, epoch_end=True)
        console.note(f"warning     {text}")
    judged = {} if presence is None else presence.scores
    every = {"validation": {**scores, **judged}, "validation_guided": guided or {}}
    every["validation_rgb"] = alone or {}
    for name, values in every.items():
        run.log.scalars(state.step, {f"{name}/{k}": v for k, v in values.items()})
    console.say(
        f"epoch {state.epoch:>3}/{run.plan.epochs}  S {scores['Smeasure']:.3f}  wF "
        f"{scores['wFmeasure']:.3f}  E {scores['meanEm']:.3f}  IoU {scores['IoU']:.3f}  MAE "
        f"{scores['MAE']:.3f}{_presence_words(judged)}{_guided_words(guided)}{_alone_words(alone)}"
        f"{'  best so far' if better else ''}"
    )
    for listener in _listeners:
        state.ended = listener(state.epoch, measure) or state.ended


def _presence_words(judged: Mapping[str, float]) -> str:
    words = [f"AUROC {judged['AUROC']:.3f}"] if "AUROC" in judged else []
    words += [f"false masks {judged['FalseMasks']:.0%}"] if "FalseMasks" in judged else []
    return f"  {'  '.join(words)}" if words else ""


def _guided_words(scores: dict[str, float] | None) -> str:
    if not scores:
        return ""
    return f"  with references wF {scores['wFmeasure']:.3f}  IoU {scores['IoU']:.3f}"


def _alone_words(scores: dict[str, float] | None) -> str:
    if not scores:
        return ""
    return f"  photograph alone S {scores['Smeasure']:.3f}  wF {scores['wFmeasure']:.3f}"


def own_share(pairs: tuple[Pair, ...], world: World, size: int) -> tuple[Pair, ...]:
    """Return every ``world.size``-th block of ``size`` pairs, from that of this rank on."""
    blocks = range(world.rank * size, len(pairs), world.size * size)
    return tuple(pair for start in blocks for pair in pairs[start : start + size])


def validated(run: Run) -> Manifest:
    """Return the images of a validation; those of a quick run are the same in every epoch."""
    limit = run.config.train.quick.limit_batches
    if limit is None:
        return run.data.validation
    size = run.plan.stages[0].batch_size * run.world.size
    return evenly(run.data.validation, limit * size)


def empty_gt(run: Run) -> str:
    """Return how images without an object are scored: not at all where they are told apart.

    Every mask measure is 0 for them, or a reward for an empty map: it would choose another epoch
    than the images with objects do.
    """
    apart = len(run.data.negatives) or any(pair.empty for pair in run.data.validation.pairs)
    return "skip" if apart else "pysod"


class Validated(NamedTuple):
    """What a validation found.

    Attributes:
        scores: of the masks.
        left_out: images that could not be read (``--unreadable skip``).
        presence: how images with and without an object are told apart; None: all have one.
    """

    scores: dict[str, float]
    left_out: list[str]
    presence: PresenceScores | None


def validate(run: Run, guide: Guide | None = None, shown: Shown | None = None) -> Validated:
    """Score the evaluated weights on the validation split at original size.

    Every rank scores its share of the images, in the forward passes of one process: the scores are
    exactly those of one process.

    Args:
        run: what is trained.
        guide: shows every image what the model remembers of its class; None shows nothing.
        shown: which modalities count; None: all that there are.

    Raises:
        Stopped: any rank was asked to stop; raised on all of them.
    """
    world, count = run.world, run.config.run.num_images
    whole = validated(run)
    evaluator = Evaluator(empty_gt=empty_gt(run))
    loader = build_eval_loader(
        replace(whole, pairs=own_share(whole.pairs, world, forward_batch(run.device))),
        run.config.data,
        batch_size=run.plan.stages[0].batch_size,
        num_workers=run.data.loading.num_workers,
        keep_images=count > 0
        and run.config.run.tensorboard
        and world.first
        and guide is None
        and shown is None,
    )
    left_out: list[str] = []
    broken: list[str] = []
    meter = PresenceMeter()

    def read() -> Iterator[EvalBatch]:
        for batch in loader:
            left_out.extend(f"{name} ({reason})" for name, reason in batch.unreadable)
            yield batch

    pictures = itertools.count()

    def show(item: Item, prediction: Callable[[], np.ndarray], row: dict[str, Any]) -> None:
        if item.original is not None and next(pictures) < count:
            picture = panel(item.original, item.mask, prediction() / np.float32(255))
            run.log.image(f"validation/{row['name']}", picture, run.state.step)

    # Checkpoints hold the buffers of rank 0, so all ranks score with those.
    world.share_buffers(run.evaluated_model)
    run.evaluated_model.set_active_experts(run.config.model.top_k)
    found: dict[str, Any] | None = None
    try:
        with run.stop.undeferred():
            score(
                run.evaluated_model,
                read(),
                device=run.device,
                evaluator=evaluator,
                precision=run.precision,
                seen=show,
                judged=meter.add,
                references=None if guide is None else partial(remembered, run, guide),
                shown=shown,
                broken=broken.extend,
            )
            found = evaluator.state_dict()
    except Stopped:
        pass
    # A share may take longer than the process timeout.
    own = (found, run.stop.code(), left_out, broken, dict(meter.probabilities()))
    parts = world.gather(own, patiently=True)
    if any(part is None for part, *_ in parts):
        run.stop.agree(code for _, code, *_ in parts)
        raise run.stop.stopped()
    note_broken(run, [name for *_, names, _ in parts for name in names])
    merged = Evaluator(empty_gt=empty_gt(run))
    probabilities: dict[str, float] = {}
    for part, *_, judged in parts:
        one = Evaluator(empty_gt=empty_gt(run))
        one.load_state_dict(part or {})
        merged.merge(one)
        probabilities |= judged
    presence = presence_scores(merged.claims(), probabilities or None, intervals=False)
    texts = [text for _, _, left, *_ in parts for text in left]
    return Validated(merged.results(), texts, presence)


def note_broken(run: Run, names: Sequence[str]) -> None:
    """Warn of validation images whose map is not finite; one bad pass must not end a run."""
    if names:
        text = (
            f"validation: the output is not finite for {count(len(names), 'image')} "
            f"({shorten(names)}), which count as if nothing was found. {WHERE_FROM}"
        )
        run.note_event(text, epoch_end=True)
        console.note(f"warning     {text}")


def remembered(run: Run, guide: Guide, items: Sequence[Item]) -> Reference:
    """Return what the evaluated weights remember of the classes of images; nothing of others."""
    classes = [guide.validation.get(item.name, "") for item in items]
    return run.evaluated_model.require_guidance().recall(classes)
