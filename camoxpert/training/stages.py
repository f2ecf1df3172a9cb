"""What changes between epochs: the trainable parameters, and the loader of a stage."""

from __future__ import annotations

from camoxpert.config import QuickConfig
from camoxpert.data.loader import Batches, build_loader
from camoxpert.models.modalities import PART
from camoxpert.training.plan import Stage
from camoxpert.training.routing import active_experts
from camoxpert.training.run import Run


class Loaders:
    """The training loader of the stage in progress, its workers kept from epoch to epoch.

    Args:
        run: what is trained.
    """

    def __init__(self, run: Run) -> None:
        self.run = run
        self._loader: Batches | None = None
        self._stage = 0
        self._learning: list[bool] = []

    def begin_epoch(self, epoch: int) -> Batches:
        """Unfreeze the epoch's parameters, set its experts, and return its remaining batches."""
        run = self.run
        stage = run.plan.stage_of_epoch(epoch)
        freed = set_trainable(run, stage, epoch)
        learning = [p.requires_grad for p in run.model.parameters()]
        if learning != self._learning:
            run.forward = run.model  # Frees the old wrapper before a new one is made.
            run.forward, self._learning = run.world.wrap(run.model), learning
        done = batches_done(run, stage)
        if self._loader is None or self._stage != stage.number:
            if self._loader is not None:
                self._loader.close()
            self._loader = training_loader(run, stage.batch_size, batches=stage.batches)
            self._stage = stage.number
            if epoch == stage.first_epoch and done == 0:
                run.note_event(f"stage {stage.number}: {freed}", coming=True)
        run.model.set_active_experts(active_experts(run.config, epoch))
        self._loader.set_epoch(epoch, start_batch=done)
        if done == 0:
            run.meter.reset()
        return self._loader

    def close(self) -> None:
        """End the workers: scoring the test sets starts its own."""
        if self._loader is not None:
            self._loader.close()


def training_loader(run: Run, batch_size: int, *, batches: int | None = None) -> Batches:
    """Build the training loader for one stage's batch size: this rank's share of every epoch.

    Args:
        run: what is trained.
        batch_size: of the stage.
        batches: of an epoch of a quick run.
    """
    quick = run.config.train.quick
    return build_loader(
        run.data.trained,
        run.config.data,
        run.data.loading,
        batch_size=batch_size,
        seed=run.config.train.seed,
        rank=run.world.rank,
        world_size=run.world.size,
        batches=batches if quick != QuickConfig() else None,
        by_heart=quick.overfit_batches is not None,
    )


def batches_done(run: Run, stage: Stage) -> int:
    """Return how many micro-batches of the epoch in progress are done."""
    return -(-run.state.position // (stage.batch_size * run.world.size))


def set_trainable(run: Run, stage: Stage, epoch: int) -> str:
    """Freeze or unfreeze the backbone for an epoch; return what is trained, in words.

    With ``--progressive-unfreeze`` stage 2 unfreezes one more level, deepest first, at equal
    intervals over its first half.
    """
    levels = run.model.backbone.parameter_levels()
    if run.config.train.keep_rgb:
        for name, parameter in run.model.named_parameters():
            parameter.requires_grad_(name.startswith(PART))
        return "the parts of the modalities alone"
    if stage.number == 1:
        free = 0
    elif run.config.train.progressive_unfreeze:
        interval = max(stage.epochs / 2 / len(levels), 1e-9)
        free = min(len(levels), 1 + int((epoch - stage.first_epoch) / interval))
    else:
        free = len(levels)
    for index, parameters in enumerate(levels):
        for parameter in parameters:
            parameter.requires_grad_(index >= len(levels) - free)
    if free == 0:
        return "decoder only, backbone frozen"
    return "everything" if free == len(levels) else f"decoder and {free} backbone levels"
