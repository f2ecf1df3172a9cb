"""Contents of a run's checkpoints, when they are written, and how one is restored."""

from __future__ import annotations

import time
from pathlib import Path

import torch

from camoxpert.config import to_dict
from camoxpert.errors import CheckpointError, NumericError, Stopped
from camoxpert.runs.checkpoint import (
    FORMAT,
    Checkpoint,
    CheckpointValues,
    EmaValues,
    IndexFacts,
    RandomStates,
)
from camoxpert.runs.store import CheckpointFolder
from camoxpert.training.optim import (
    load_optimizer,
    lr_scales,
    saved_names,
    starts_with_weights,
)
from camoxpert.training.overfit import Overfit
from camoxpert.training.run import Run, TrainState


def snapshot(run: Run) -> CheckpointValues:
    """Return everything a run needs to continue; tensors and plain Python only.

    Every rank calls this; the result of rank 0 is the one to save. Moves the routing counts of all
    ranks to rank 0.
    """
    rng: RandomStates = {"cpu": torch.get_rng_state()}
    if run.device.type == "cuda":
        rng["cuda"] = torch.cuda.get_rng_state(run.device)
    rngs = run.world.gather(rng)
    run.meter.merge(run.world.sum, first=run.world.first)
    batching = run.batching
    values: CheckpointValues = {
        "format": FORMAT,
        "config": to_dict(run.asked),
        "data_hash": run.data.data_hash,
        "files": run.files,
        "model": run.model.state_dict(),
        "ema": run.ema.state_dict() if run.ema else None,
        "optimizer": run.optimizer.state_dict(),
        "scaler": run.scaler.state_dict(),
        "state": run.state.to_dict(),
        "routing": run.meter.state_dict(),
        "rng": rngs[0],
        "other_rngs": rngs[1:],
        "batch": {
            "size": batching.size,
            "steps": batching.steps,
            "processes": batching.processes,
            "effective": images_per_step(run),
        },
    }
    if run.overfit is not None:
        values["overfit"] = {
            "steps": list(run.overfit.steps),
            "losses": list(run.overfit.losses),
        }
    return values


def images_per_step(run: Run) -> dict[str, int]:
    """Return the images of an optimizer step over all processes, by the name of the stage."""
    slots = run.batching.steps * run.batching.processes
    return {f"stage {stage.number}": stage.batch_size * slots for stage in run.plan.stages}


def evaluated_weights(run: Run, scores: dict[str, float]) -> CheckpointValues:
    """Return what evaluation and prediction need: the evaluated weights and the settings."""
    return {
        "format": FORMAT,
        "config": to_dict(run.asked),
        "data_hash": run.data.data_hash,
        "model": run.evaluated_model.state_dict(),
        "ema": None,
        "state": run.state.to_dict(),
        "scores": scores,
    }


def restore(run: Run, checkpoint: Checkpoint, *, restart_epoch: bool = False) -> None:
    """Restore a snapshot: weights, optimizer, scaler, EMA, state, and the random state last.

    Args:
        run: freshly prepared.
        checkpoint: of this run.
        restart_epoch: repeat the epoch in progress from its start, because its order of samples
            has changed.

    Raises:
        CheckpointError: weights only, or weights of another model.
    """
    values = checkpoint.values
    if "optimizer" not in values:
        raise CheckpointError(
            f"{checkpoint.path} holds weights only and cannot be continued. Use a step_*.pt file "
            f"or the run folder; to start a new run from these weights give them with --init-from."
        )
    try:
        run.model.load_state_dict(values["model"])
        before = checkpoint.config
        learned = starts_with_weights(before.model)
        scales = lr_scales(run.model, before.optim, has_weights=learned)
        names = saved_names(values["optimizer"], run.model, scales)
        load_optimizer(run.optimizer, values["optimizer"], names)
        if values["scaler"]:
            # Empty where the run was in fp32 or bf16; a machine that takes fp16 begins anew.
            run.scaler.load_state_dict(values["scaler"])
        if run.ema is not None:
            # An EMA that was off before starts at the current weights.
            fresh: EmaValues = {"weights": values["model"], "updates": 0}
            run.ema.load_state_dict(values["ema"] or fresh)
        if run.guide is not None:
            # Other data has other classes: their memory is that of the references of now.
            for model in {run.model, run.evaluated_model}:
                run.guide.teach(model.require_guidance(), restored=True)
        run.state = TrainState.from_dict(values["state"])
        if run.overfit is not None and "overfit" in values:
            run.overfit = Overfit(**values["overfit"])
        if restart_epoch:
            run.state.position = 0
            if run.overfit is not None:
                run.overfit.steps = []
        elif "routing" in values:
            # Counts of an epoch that was stopped midway: rank 0 keeps them for all.
            run.meter.load_state_dict(values["routing"], run.device)
            run.meter.merge(lambda counts: counts, first=run.world.first)
    except (RuntimeError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{checkpoint.path} does not fit this run: {error}") from error
    rngs = [values["rng"], *values.get("other_rngs", [])]
    if run.world.rank < len(rngs):
        # Ranks that the stopped run did not have keep their initial seeds.
        rng = rngs[run.world.rank]
        torch.set_rng_state(rng["cpu"])
        if run.device.type == "cuda" and "cuda" in rng:
            torch.cuda.set_rng_state(rng["cuda"], run.device)


def require_finite(run: Run) -> None:
    """Raise NumericError if weights or buffers are not finite, or too large for a finite norm.

    Waits for the device once; call this before weights are saved.
    """
    models = [run.model] if run.ema is None else [run.model, run.ema.module]
    weights = [p.detach() for model in models for p in model.parameters()]
    weights += [b for model in models for b in model.buffers() if b.is_floating_point()]
    if not torch.stack(torch._foreach_norm(weights)).isfinite().all():
        raise NumericError(
            f"The weights are no longer finite after step {run.state.step} (epoch "
            f"{run.state.epoch + 1}): training diverged. They are not saved; the last checkpoint "
            f"is intact. Lower --lr, or keep --clip-grad-norm on."
        )


def checkpoint_bytes(run: Run) -> int:
    """Return the bytes of a checkpoint: weights, EMA and AdamW's two moments."""
    weights = sum(t.numel() * t.element_size() for t in run.model.state_dict().values())
    return int(weights) * (4 if run.ema else 3)


def require_space(run: Run, path: Path | None) -> None:
    """Raise CheckpointError unless the checkpoints of a run fit on the disk of its folder.

    Args:
        run: what is trained.
        path: its folder; None for a new run.
    """
    keep_every = run.config.run.keep_every
    others = run.plan.epochs // keep_every if keep_every else 0
    folder = (path or Path(run.config.run.dir)).absolute() / "checkpoints"
    CheckpointFolder(folder).require_space(checkpoint_bytes(run), others=others)


class Saver:
    """Writes the checkpoints of a run, on rank 0, with the state of all ranks.

    A state whose last step was skipped is not written, so that the newest checkpoint of a diverging
    run is from before it diverged. The save is made up for after the next good step. At the end of
    an epoch one or two fp16 overflows are routine and do not count. Weights that are not finite are
    never written.

    Args:
        run: its folder exists; every rank creates a Saver.

    Raises:
        CheckpointError: not enough disk space for the checkpoints.
    """

    ROUTINE_OVERFLOWS = 2

    def __init__(self, run: Run) -> None:
        self.run = run
        self.saved_step = run.state.step or None
        self._owed = self._owed_stays = False
        self._started, self._seconds_before = time.monotonic(), run.state.seconds
        self._folder: CheckpointFolder | None = None
        run.world.from_first(self._open)

    def _open(self) -> None:
        self._folder = CheckpointFolder(self.run.folder / "checkpoints")
        self._folder.clean()
        require_space(self.run, self.run.folder)

    def is_due(self) -> bool:
        """Return whether to save after the step that was just taken."""
        every = self.run.config.run.save_every
        return self._owed or bool(every and self.run.state.step % every == 0)

    def save(self, *, stays: bool = False, epoch_done: bool = False) -> bool:
        """Write a resumable checkpoint unless its last step was skipped; return whether it did.

        Args:
            stays: never delete this one.
            epoch_done: whether this is the end of an epoch.
        """
        run, state = self.run, self.run.state
        routine = epoch_done and run.scaler.is_enabled()
        if state.skipped_in_a_row > (self.ROUTINE_OVERFLOWS if routine else 0):
            if not self._owed:
                run.note_event(f"not saved at step {state.step}: its last step was skipped")
            self._owed, self._owed_stays = True, self._owed_stays or stays
            return False
        stays = stays or self._owed_stays
        self._owed = self._owed_stays = False
        require_finite(run)
        state.seconds = self._seconds_before + time.monotonic() - self._started
        with run.log.phase("checkpoints"):
            values = snapshot(run)
            if self._folder is not None:
                self._folder.save(values, step=state.step, stays=stays, about=self._about())
        self.saved_step = state.step
        return True

    def save_best(self, scores: dict[str, float]) -> None:
        """Write the evaluated weights with their validation scores ({} without a validation)."""
        if self._folder is not None:
            values = evaluated_weights(self.run, scores)
            self._folder.save_best(values, step=self.run.state.step, about=self._about())

    def saved_and_stopped(self) -> Stopped:
        """Save if the state is good; return the exception that ends the run."""
        self.save()
        return self.stopped()

    def stopped(self) -> Stopped:
        """Return the exception that ends the run; its text says where the run continues."""
        run = self.run
        if self.saved_step is None:
            return run.stop.stopped(
                f"Nothing was worth saving yet in {run.path}. The same command restarts it."
            )
        return run.stop.stopped(
            f"Saved at step {self.saved_step} of {run.plan.steps} in {run.path}. Run the same "
            f"command again to continue."
        )

    def _about(self) -> IndexFacts:
        return {
            "epoch": self.run.state.epoch,
            "best": self.run.state.best,
            "data_hash": self.run.data.data_hash,
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
            "processes": self.run.world.size,
        }
