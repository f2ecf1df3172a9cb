"""One run from start to end: folder, preparation, training, shared weights, test scores, report."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from camoxpert import console, stop
from camoxpert.config import Config, quick_words, to_yaml
from camoxpert.errors import (
    CamoXpertError,
    CheckpointError,
    ConfigError,
    DataError,
    NumericError,
    Stopped,
)
from camoxpert.files import require_writable, why_unwritable, write_bytes
from camoxpert.runs.checkpoint import Checkpoint, load_checkpoint
from camoxpert.runs.folder import RunFolder, find_run
from camoxpert.runs.info import update_run_json, write_run_json
from camoxpert.runs.log import RunLog
from camoxpert.runs.records import read_info
from camoxpert.runs.share import write_shared
from camoxpert.runs.store import CheckpointFolder
from camoxpert.runtime.processes import World, join, named_faults
from camoxpert.training.calibrate import calibrate_best
from camoxpert.training.checkpoints import require_space, restore
from camoxpert.training.data import hash_of_data
from camoxpert.training.overfit import verdict
from camoxpert.training.prepare import prepare
from camoxpert.training.recipe import recipe_of_older_version
from camoxpert.training.resume import Changes, changes_since, refuse_if_trained
from camoxpert.training.run import Run
from camoxpert.training.split import read_split, write_samples
from camoxpert.training.step import memory_explained
from camoxpert.training.trainer import train
from camoxpert.training.trial import trial_step

NOTHING_YET = "Nothing was trained yet; the same command starts again."


@dataclass(frozen=True)
class Result:
    """The outcome of a training run.

    Attributes:
        path: the run folder.
        scores: the measures of every test set, by name; empty without test sets.
    """

    path: Path
    scores: dict[str, dict[str, float]] = field(default_factory=dict)


def run(config: Config, *, argv: Sequence[str] = ()) -> Result:
    """Train, score the test sets with the best weights, and write the report.

    Continues a stopped run with the same settings if there is one.

    Args:
        config: checked settings.
        argv: the command, for ``run.json``.

    Raises:
        Stopped: a stop was requested; the same call continues.
        CamoXpertError: any expected error.
    """
    started = time.monotonic()
    with joined(config) as world:
        with contextlib.ExitStack() as stack:
            with stop.outcome(NOTHING_YET), console.remembering() as decisions:
                folder = find_folder(config, world)
                stack.callback(folder.close)
                unchanged = f"{folder.path} is as it was; the same command continues it."
                with stop.outcome(NOTHING_YET if folder.checkpoint is None else unchanged):
                    prepared = prepare_run(config, folder, world)
                    changes = open_folder(prepared, folder)
                    open_log(prepared, folder.checkpoint, changes, argv, decisions)
            prepared.log.add_phase("start", time.monotonic() - started)
            scores = train_and_score(prepared)
        if world.first:
            _say_done(prepared, time.monotonic() - started)
        # The others are done; an exit code of theirs would end rank 0 while it still writes.
        fault = verdict(prepared) if world.first else ""
        if fault:
            raise NumericError(fault)
        return Result(prepared.folder, scores)


def dry_run(config: Config) -> None:
    """Check settings and the data's headers, build everything, take one step; write nothing."""
    with joined(config) as world, stop.outcome(NOTHING_YET):
        folder = find_folder(config, world)
        folder.close()
        run = prepare_run(config, folder, world, write=False)
        largest = max(stage.batch_size for stage in run.plan.stages)
        if folder.checkpoint is not None and folder.path is not None:
            for change in changes_since(folder.checkpoint, run, folder.path).lines:
                console.say(f"changed     {change}")
        with memory_explained(run):
            trial_step(run.model, config, run.device, run.precision, largest)
        console.say(
            "dry run     one step forward and back on a blank batch worked; nothing was written"
        )
        console.say(f"data        {run.data.checked}; `camoxpert doctor` reads every file")


def find_folder(config: Config, world: World) -> RunFolder:
    """Return the folder of the stopped run that these settings continue, the same on all ranks.

    Raises:
        ConfigError: the run could not write its folder; decoding and building come later.
    """

    def find() -> RunFolder:
        found = find_run(config, data_hash=lambda: hash_of_data(config))
        try:
            require_writable(found.path or Path(config.run.dir))
        except OSError as error:
            found.close()
            raise ConfigError(
                f"The run could not be written to {found.path or config.run.dir}: "
                f"{why_unwritable(error)}. Name another folder with --checkpoint-dir."
            ) from error
        return found

    return world.from_first(find)


def prepare_run(config: Config, folder: RunFolder, world: World, *, write: bool = True) -> Run:
    """Build the run. One that continues keeps its batching and split, and needs no weights."""
    stopped = folder.checkpoint is not None
    return prepare(
        config,
        continued=folder.info,
        kept=read_split(folder.path) if stopped else {},
        recipe=_recipe_of(folder),
        presence=folder.checkpoint.model_config.presence if folder.checkpoint else None,
        restored=stopped,
        write=write,
        world=world,
    )


def _recipe_of(folder: RunFolder) -> Mapping[str, float] | None:
    """Return what the preset of the stopped run decided; None for a new run."""
    if folder.checkpoint is None:
        return None
    known = folder.info.get("recipe")
    return known if known else recipe_of_older_version(folder.checkpoint.config)


@contextmanager
def joined(config: Config) -> Iterator[World]:
    """Join the processes of the run: they stop together, and one of them prints the error."""
    # Before signals are watched: ranks waiting here can be killed safely.
    world = join(config.train.device, timeout=config.train.process_timeout)
    try:
        with contextlib.ExitStack() as stack:
            request = stack.enter_context(stop.watch(config.train.max_hours))
            stack.enter_context(named_faults(world))
            if world.size > 1:
                # All ranks stop at the same point: see World.check_stop.
                stack.enter_context(request.deferred())
            yield world
    except (Stopped, NumericError) as error:
        error.quiet = not world.first
        raise
    except ConfigError as error:
        # All ranks of a machine raise the same error, unless one alone ran out of memory.
        error.quiet = error.quiet or (world.local_rank > 0 and error.__cause__ is None)
        raise
    finally:
        world.close()


def open_folder(run: Run, folder: RunFolder) -> Changes:
    """Claim the folder of a run, and restore the checkpoint it continues from.

    A stopped run that this refuses to continue keeps its settings, log and checkpoints unchanged.

    Raises:
        CheckpointError: the stopped run cannot be continued with these settings or data, or the
            folder cannot be used.
    """
    checkpoint = folder.checkpoint

    def claim() -> tuple[Path, Changes]:
        changes = Changes()
        if checkpoint is not None and folder.path is not None:
            changes = changes_since(checkpoint, run, folder.path)
            if folder.info.get("status") == "finished" and changes.lines:
                refuse_if_trained(checkpoint, run, changes)
        # Before anything is written: a refusal must not change the folder.
        require_space(run, folder.path)
        try:
            path = folder.create(run.asked)
        except OSError as error:
            raise CheckpointError(
                f"The run folder in {run.config.run.dir} cannot be used: {error}."
            ) from error
        for note in folder.notes:
            console.say(note)
        for change in changes.lines:
            console.say(f"changed     {change}")
        console.say(f"run         {path}")
        return path, changes

    run.path, changes = run.world.from_first(claim)
    if checkpoint is not None:
        restore(run, checkpoint, restart_epoch=changes.data)
        state = run.state
        kept = CheckpointFolder(run.folder / "checkpoints")
        aside = run.world.from_first(lambda: kept.set_best_aside(state.step))
        if aside:
            state.best, state.best_epoch, state.stale = None, 0, 0
            line = f"best.pt is of a later step than {state.step} and is now {aside}"
            changes = replace(changes, lines=(*changes.lines, line))
            console.say(f"changed     {line}")
        name = checkpoint.path.name
        console.say(f"resumed     {name}: epoch {state.epoch + 1}, step {state.step}")
    return changes


def open_log(
    run: Run,
    checkpoint: Checkpoint | None,
    changes: Changes,
    argv: Sequence[str],
    decisions: Sequence[str],
) -> None:
    """Write the settings, samples and ``run.json`` of a run, and open its log, on rank 0."""

    def opening() -> None:
        folder, config = run.folder, run.config
        step = checkpoint.values["state"]["step"] + 1 if checkpoint else None
        try:
            write_bytes(folder / "config.yaml", to_yaml(run.asked).encode())
            data = run.data
            real, made = data.real_and_made()
            beside = (made, data.unlabeled, data.calibration, data.left_out)
            write_samples(folder, real, data.validation, *beside)
            write_run_json(
                folder,
                argv=argv,
                device=str(run.device),
                data_hash=run.data.data_hash,
                phases=read_info(folder).get("phases", {}),
                extra={
                    "files": run.files,
                    "images": run.data.counts(),
                    "decisions": list(decisions),
                    "recipe": run.data.recipe.values,
                    "precision": run.precision.name,
                    "parameters": run.parameters,
                    "gmacs": run.gmacs,
                    "quick": quick_words(config.train.quick),
                    "batch": run.batching.record(),
                    "guidance": {} if run.guide is None else run.guide.facts,
                },
            )
            run.log = RunLog(folder, tensorboard=config.run.tensorboard, resume_step=step)
        except OSError as error:
            raise CheckpointError(f"The run folder {folder} cannot be written: {error}.") from error

    run.world.from_first(opening)
    for change in changes.lines:
        run.log.write({"kind": "event", "text": f"changed     {change}"})


def train_and_score(run: Run) -> dict[str, dict[str, float]]:
    """Train; on rank 0 then write the shared weights, score the test sets and close the run."""
    status, scores = "failed", {}
    try:
        train(run)
        fault = verdict(run)
        if fault:
            run.note_event(fault)
        if run.world.first:
            # Rank 0 scores and reports alone; the other ranks do not wait for it.
            outcome = f"Training is done and saved in {run.path}; the same command finishes it."
            with stop.outcome(outcome), run.stop.undeferred():
                scores = share_and_score(run)
        status = "finished"
    except Stopped:
        status = "stopped"
        raise
    except CamoXpertError as error:
        # The log itself may be what failed.
        with contextlib.suppress(CamoXpertError, OSError, ValueError):
            run.log.write({"kind": "event", "text": str(error)})
        raise
    except MemoryError as error:
        raise ConfigError(
            "The host ran out of memory. Lower --batch-size or --num-workers, or use --cache disk; "
            "the checkpoints already written are intact."
        ) from error
    finally:
        # A stop in here would leave a finished run without its report, or one that is neither.
        with run.stop.deferred():
            run.log.close()
            if run.world.first:
                close_run(run, status)
    return scores


def share_and_score(run: Run) -> dict[str, dict[str, float]]:
    """Write the best weights for sharing, score them on every test set, and print the table."""
    from camoxpert.evaluation.model import evaluate_run
    from camoxpert.evaluation.options import ScoringOptions
    from camoxpert.evaluation.published import published_rows
    from camoxpert.inference.predictor import Predictor
    from camoxpert.pages.tables import text_table

    best = run.folder / "checkpoints" / "best.pt"
    tested = run.config.run.test and bool(run.data.tests)
    if not best.is_file() and not tested:
        return {}
    checkpoint = load_checkpoint(best)
    calibrate_best(run, checkpoint)
    write_shared(run.folder / "model", checkpoint)
    if not tested:
        return {}
    predictor = Predictor(checkpoint, device=run.device, precision=run.precision)
    try:
        with run.log.phase("testing"):
            results = evaluate_run(
                predictor,
                run.data.tests,
                ScoringOptions(gallery=run.config.run.num_images),
                batch_size=run.plan.stages[-1].batch_size,
                num_workers=run.data.loading.num_workers,
                # A broken test image must not keep a trained run from finishing: it is named.
                unreadable="skip",
            )
    except (ConfigError, DataError) as error:
        # ConfigError: the folder for the scores cannot be used. The training is kept.
        text = f"the test sets could not be scored: {error}"
        run.log.write({"kind": "event", "text": text})
        console.warn(text)
        return {}
    # Again, now that its scores are known.
    write_shared(run.folder / "model", checkpoint)
    rows = [result.to_dict() for result in results] + published_rows(results)
    console.say(text_table(rows, tuple(results[0].scores)))
    return {result.dataset: result.scores for result in results}


def close_run(run: Run, status: str) -> None:
    """Write the final status and the report; an error here must not hide how training ended."""
    info = run.folder / "run.json"
    try:
        phases = dict(read_info(run.folder).get("phases", {}))
        for name, seconds in run.log.phases.items():
            phases[name] = phases.get(name, 0.0) + seconds
        update_run_json(run.folder, status=status, phases=phases)
    except (OSError, ValueError) as error:
        console.note(f"warning: {info} could not be updated: {error}")
        return
    if run.config.run.report:
        from camoxpert.pages.report import write_report

        try:
            write_report(run.folder)
        except Exception as error:
            console.note(f"warning: the report could not be written: {error}")


def _say_done(run: Run, seconds: float) -> None:
    if run.state.skipped:
        console.say(
            f"skipped     {run.state.skipped} optimizer steps (non-finite); see metrics.jsonl"
        )
    for words in quick_words(run.config.train.quick).values():
        console.say(f"quick run   {words}: not a whole run")
    console.say(f"done        {seconds:.0f} s; weights {run.folder / 'checkpoints' / 'best.pt'}")
    if run.config.run.report:
        console.say(f"report      {run.folder / 'report.html'}")
