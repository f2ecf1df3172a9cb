"""The training loop, from top to bottom."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing

from camoxpert import console
from camoxpert.data.loader import Batches, device_batches
from camoxpert.runs.checkpoint import BEST
from camoxpert.training.checkpoints import Saver, require_finite
from camoxpert.training.optim import set_lr
from camoxpert.training.plan import lr_at
from camoxpert.training.run import Run, TrainState
from camoxpert.training.stages import Loaders, batches_done
from camoxpert.training.step import memory_explained, train_step, windows
from camoxpert.training.steplog import StepLog, log_routing
from camoxpert.training.validate import validate_epoch


def train(run: Run) -> TrainState:
    """Train until the plan is done, early stopping ends the run or a stop is requested.

    Every rank calls this and takes the same steps; rank 0 writes.

    Args:
        run: prepared, restored if it continues a stopped one, with its folder and log.

    Raises:
        Stopped: a stop was requested; the state is saved and the same command continues.
        NumericError: too many non-finite steps in a row, or weights that are no longer finite.
        ConfigError: out of memory.
        DataError, CheckpointError: a file cannot be read or written.
        PeerError: another process ended or does not answer.
    """
    state = run.state
    # At step 0 the folder may hold records of a run that died before its first checkpoint.
    run.log.truncate_after(state.step or -1, epoch_done=not state.position)
    saver, steps, loaders = Saver(run), StepLog(run), Loaders(run)
    with run.stop.deferred(), closing(loaders), steps.open():
        epochs = 0
        for epoch in epochs_left(run):
            train_epoch(run, epoch, loaders.begin_epoch(epoch), steps, saver)
            finish_epoch(run, epoch, steps, saver)
            epochs += 1
        if not epochs:
            keep_best(run, saver)
    return state


def keep_best(run: Run, saver: Saver) -> None:
    """Write the best weights of a run that is over as it continues, because it got fewer epochs,
    and that had not reached an epoch that writes them."""
    best = run.folder / "checkpoints" / BEST
    if run.world.from_first(best.is_file):
        return
    if len(run.data.validation):
        with memory_explained(run):
            validate_epoch(run, run.state.epoch - 1, saver)
        return
    require_finite(run)
    run.state.best_epoch = run.state.epoch
    saver.save_best({})


def epochs_left(run: Run) -> Iterator[int]:
    """Yield the epochs left to train, until the plan is done or early stopping ends the run."""
    while run.state.epoch < run.plan.epochs and not stopped_early(run):
        yield run.state.epoch


def stopped_early(run: Run) -> bool:
    """Return whether validation has not improved for too long; checked between epochs only."""
    state, patience = run.state, run.config.train.early_stopping
    if state.position:
        return False
    # Without a worse validation there is nothing to judge yet.
    waited = state.epoch - state.best_epoch if state.stale else 0
    return bool(state.ended) or (bool(patience) and waited >= patience)


def train_epoch(run: Run, epoch: int, loader: Batches, steps: StepLog, saver: Saver) -> None:
    """Take the remaining optimizer steps of an epoch.

    Raises:
        Stopped: a stop was requested; the state is saved.
    """
    stage = run.plan.stage_of_epoch(epoch)
    with steps.epoch(epoch, stage, batches_done(run, stage)):
        batches = device_batches(loader, run.device)
        for items in windows(batches, run.batching.steps):
            window = [batch for batch, _ in items]
            done = batches_done(run, stage) // run.batching.steps
            lr = lr_at(run.plan, run.config.optim, run.plan.step_of(epoch, done))
            set_lr(run.optimizer, lr)
            steps.note_unreadable(window)
            with memory_explained(run):
                values = train_step(run, window)
            run.count_window(window)
            steps.push(values, window, lr=lr, waited=sum(wait for _, wait in items))
            if run.stop_code():
                steps.flush()
                raise saver.saved_and_stopped()
            if saver.is_due():
                steps.flush()
                saver.save()
    steps.flush()
    if run.stop_code():
        raise saver.saved_and_stopped()


def finish_epoch(run: Run, epoch: int, steps: StepLog, saver: Saver) -> None:
    """Log the routing, validate, and write the epoch's checkpoints.

    Raises:
        Stopped: a stop was requested before the last epoch.
    """
    state, train = run.state, run.config.train
    last = epoch + 1 == run.plan.epochs
    steps.share_unreadable()
    if run.overfit is not None:
        # Once more after a stop in the validation of this epoch, which has no steps then.
        state.ended = run.overfit.end_epoch() or state.ended
    log_routing(run, run.plan.stage_of_epoch(epoch), epoch)
    if not len(run.data.validation):
        state.epoch, state.position = epoch + 1, 0
        if last:
            require_finite(run)
            state.best_epoch = state.epoch
            saver.save_best({})
    elif last or (epoch + 1) % train.validate_every == 0:
        with memory_explained(run):
            validate_epoch(run, epoch, saver)
    state.epoch, state.position = epoch + 1, 0
    keep_every = run.config.run.keep_every
    saver.save(stays=bool(keep_every) and state.epoch % keep_every == 0, epoch_done=True)
    if stopped_early(run):
        stale = f"early stopping: no better {train.select} since epoch {state.best_epoch}"
        text = state.ended or stale
        run.note_event(text)
        console.say(text)
    elif run.world.agree_to_stop() and not last:
        raise saver.stopped()
