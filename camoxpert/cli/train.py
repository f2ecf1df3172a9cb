"""``train``: settings in, a trained model with its scores, pictures and report out."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from camoxpert.config import Config, Leaf, leaves, load_config, parse_text, to_yaml
from camoxpert.errors import (
    CamoXpertError,
    CheckpointError,
    ConfigError,
    DataError,
    NumericError,
    Stopped,
)

if TYPE_CHECKING:
    from camoxpert.runs.checkpoint import Checkpoint
    from camoxpert.runs.log import RunLog
    from camoxpert.runtime.processes import World
    from camoxpert.training.guards import StopFlag
    from camoxpert.training.prepare import Setup

Say = Callable[[str], None]

OVERRIDE = re.compile(r"(data|model|loss|optim|train|run)\.[\w.]+=.*", re.DOTALL)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add ``--config`` and one flag for every setting that declares one."""
    parser.usage = "camoxpert train --dataset-path DIR [DIR ...] [flags] [group.name=value ...]"
    parser.add_argument(
        "--print-config", action="store_true", help="print the whole settings tree and leave"
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="check settings and data, build everything, take one step, write nothing",
    )
    add_setting_flags(parser)


def add_setting_flags(parser: argparse.ArgumentParser) -> None:
    """Add ``--config`` and the flags of all settings."""
    parser.add_argument("--config", metavar="FILE", help="YAML file of settings (see configs/)")
    for leaf in leaves():
        if leaf.metadata["flag"]:
            add_flag(parser, leaf)


def add_flag(parser: argparse.ArgumentParser, leaf: Leaf) -> None:
    """Add one setting's flag; its value arrives under the dotted path, only if typed."""
    shown = "unset" if leaf.default is None else leaf.default
    shown = {True: "on", False: "off", "": "none", (): "none"}.get(shown, shown)
    options: dict[str, Any] = {
        "dest": leaf.path,
        "default": argparse.SUPPRESS,
        "help": f"{leaf.metadata['help']} [{shown}]".replace("%", "%%"),
    }
    flag = leaf.metadata["flag"]
    if leaf.type is bool:
        parser.add_argument(flag, action=argparse.BooleanOptionalAction, **options)
        return
    if leaf.path == "train.gradient_checkpointing":
        options |= {"nargs": "?", "const": "on"}
    if leaf.path == "data.multi_scale":
        options |= {"nargs": "+"}
    if leaf.path == "data.roots":
        options |= {"nargs": "+", "action": "extend"}
    choices = leaf.metadata["choices"]
    name = "{" + ",".join(choices) + "}" if choices else flag.removeprefix("--").upper()
    parser.add_argument(flag, metavar=name.replace("-", "_") if not choices else name, **options)


def read_config(options: argparse.Namespace, rest: list[str]) -> Config:
    """Merge defaults, file, flags and overrides of one command line."""
    table = {leaf.path: leaf for leaf in leaves()}
    typed = {path: value for path, value in vars(options).items() if path in table}
    if "data.roots" in typed:
        # `--dataset-path A B optim.lr=3e-4`: the list of folders swallows the override.
        roots = typed["data.roots"]
        rest = [*rest, *(root for root in roots if OVERRIDE.fullmatch(root))]
        typed["data.roots"] = [root for root in roots if not OVERRIDE.fullmatch(root)]
    flags = {
        path: parse_text(value, table[path]) if isinstance(value, str) else value
        for path, value in typed.items()
    }
    return load_config(file=options.config, flags=flags, overrides=rest)


def check_data_given(config: Config) -> None:
    """Raise ConfigError or DataError unless every data root is named and exists."""
    if not config.data.roots:
        raise ConfigError(
            "No training data: give a data set folder with --dataset-path. "
            "`camoxpert synthesize toy DIR` generates one to try things out."
        )
    for root in config.data.roots:
        if not Path(root).exists():
            raise DataError(f"--dataset-path: there is no file or folder {root}.")


def run(options: argparse.Namespace, rest: list[str], typed: list[str]) -> int:
    """Train; see ``training.trainer.train`` for the loop."""
    started = time.monotonic()
    try:
        config = read_config(options, rest)
        if options.print_config:
            print(to_yaml(config), end="")
            return 0
        check_data_given(config)
    except CamoXpertError as error:
        # Every process of torchrun finds the same: one on each machine says it.
        error.quiet = os.environ.get("LOCAL_RANK", "0") != "0"
        raise
    from camoxpert.runtime.processes import join, named_faults, restarts_left
    from camoxpert.training.guards import StopFlag, watch

    stop = StopFlag(config.train.max_hours)
    # Before signals are watched: who still waits for the others can simply be ended.
    world = join(config.train.device, timeout=config.train.process_timeout)
    try:
        with watch(stop), named_faults(world):
            return prepare_and_train(config, options.dry_run, typed, world, stop, started)
    except (Stopped, NumericError) as error:
        error.quiet = not world.first
        if isinstance(error, Stopped) and world.size > 1 and restarts_left():
            # For torchrun any other code is a fault, after which it starts everything anew.
            if world.first:
                print(error)
            return 0
        raise
    except ConfigError as error:
        # All processes of a machine find the same, but for memory that ran out on one.
        error.quiet = error.quiet or (world.local_rank > 0 and error.__cause__ is None)
        raise
    finally:
        world.close()


def prepare_and_train(
    config: Config, dry_run: bool, typed: list[str], world: World, stop: StopFlag, started: float
) -> int:
    """Decide and build everything, then train; returns the exit code."""
    from camoxpert.training.prepare import prepare, trial_step
    from camoxpert.training.resume import stopped_run

    say = print if world.first else _silent
    setup = prepare(
        config,
        say,
        continued=world.from_first(lambda: stopped_run(config)),
        write=not dry_run,
        world=world,
        stop=stop,
    )
    if dry_run:
        largest = max(stage.batch_size for stage in setup.plan.stages)
        trial_step(setup.model, config, setup.device, setup.precision, largest)
        say("dry run     one step forward and back worked; nothing was written")
        return 0
    return train_and_report(setup, config, typed, stop, say, started)


def train_and_report(
    setup: Setup, config: Config, typed: list[str], stop: StopFlag, say: Say, started: float
) -> int:
    """Open the run folder, train, score the test sets with the best weights, write the report."""
    from camoxpert.runs.log import RunLog
    from camoxpert.training.resume import check_batch, check_data, open_run
    from camoxpert.training.snapshot import images_per_step
    from camoxpert.training.trainer import train

    world = setup.world
    locks = []

    def opening() -> tuple[Path, Checkpoint | None, list[str]]:
        try:
            opened = open_run(config)
        except OSError as error:
            raise CheckpointError(
                f"The run folder in {config.run.dir} cannot be used: {error}."
            ) from error
        locks.append(opened.lock)
        notes = opened.notes
        if opened.resume is not None:
            notes = [
                *notes,
                *check_batch(opened.resume, setup.micro_batch, images_per_step(setup)),
                *check_data(
                    opened.resume,
                    opened.path,
                    setup.data,
                    allow_change=config.train.allow_data_change,
                ),
            ]
        for note in notes:
            say(note)
        say(f"run         {opened.path}")
        return opened.path, opened.resume, [n for n in notes if n.startswith("changed")]

    run_dir, resume, changes = world.from_first(opening)
    log = RunLog(None)
    if world.first:
        log = open_log(setup, run_dir, config, typed, resume)
        for change in changes:
            log.write({"kind": "event", "text": change})
    log.add_phase("start", time.monotonic() - started)
    status = "failed"
    try:
        summary = train(setup, run_dir, log, stop=stop, say=say, resume=resume)
        if not world.first:
            # The first process scores and reports alone; nobody waits for it.
            return 0
        share_weights(run_dir)
        if config.run.test and setup.data.tests:
            with log.phase("testing"):
                score_tests(setup, run_dir, config, stop)
        status = "finished"
    except Stopped:
        status = "stopped"
        raise
    except CamoXpertError as error:
        write_event(log, str(error))
        raise
    except MemoryError as error:
        raise ConfigError(
            "The host ran out of memory. Lower --batch-size or --num-workers, or use --cache disk; "
            "the checkpoints already written are intact."
        ) from error
    finally:
        log.close()
        if world.first:
            close_run(run_dir, status, log, report=config.run.report)
    if summary.state.skipped:
        print(
            f"skipped     {summary.state.skipped} optimizer steps (non-finite); see metrics.jsonl"
        )
    print(
        f"done        {time.monotonic() - started:.0f} s; weights "
        f"{run_dir / 'checkpoints' / 'best.pt'}"
    )
    if config.run.report:
        print(f"report      {run_dir / 'report.html'}")
    return 0


def open_log(
    setup: Setup, run_dir: Path, config: Config, typed: list[str], resume: Checkpoint | None
) -> RunLog:
    """Write what is known of a run before it begins, and open its log."""
    from camoxpert.files import write_bytes
    from camoxpert.runs.info import write_run_json
    from camoxpert.runs.log import RunLog
    from camoxpert.training.resume import write_samples

    step = resume.values["state"]["step"] + 1 if resume else None
    try:
        write_bytes(run_dir / "config.yaml", to_yaml(config).encode())
        write_samples(run_dir, setup.data)
        write_run_json(
            run_dir,
            argv=["camoxpert", *typed],
            device=str(setup.device),
            data_hash=setup.data.data_hash,
            phases=previous_phases(run_dir),
            extra={
                "decisions": setup.decisions,
                "precision": setup.precision.name,
                "parameters": setup.parameters,
                "gmacs": setup.gmacs,
                "batch": dataclasses.asdict(setup.micro_batch),
            },
        )
        return RunLog(run_dir, tensorboard=config.run.tensorboard, resume_step=step)
    except OSError as error:
        raise CheckpointError(f"The run folder {run_dir} cannot be written: {error}.") from error


def close_run(run_dir: Path, status: str, log: RunLog, *, report: bool) -> None:
    """Write how a run ended; where even that cannot be written, the fault that ended it counts."""
    from camoxpert.runs.info import update_run_json

    try:
        phases = merged(previous_phases(run_dir), log.phases)
        update_run_json(run_dir, status=status, phases=phases)
    except (OSError, ValueError) as error:
        print(f"warning: {run_dir / 'run.json'} could not be updated: {error}", file=sys.stderr)
        return
    if report:
        write_report_if_possible(run_dir)


def write_event(log: RunLog, text: str) -> None:
    """Log a fault, unless the log itself is what failed."""
    with contextlib.suppress(CamoXpertError, OSError, ValueError):
        log.write({"kind": "event", "text": text})


def share_weights(run_dir: Path) -> None:
    """Write the best weights as safetensors with their settings, to be given to others."""
    from camoxpert.runs.checkpoint import load_checkpoint
    from camoxpert.runs.share import write_shared

    best = run_dir / "checkpoints" / "best.pt"
    if best.is_file():
        write_shared(run_dir / "model", load_checkpoint(best))


def _silent(text: str) -> None:
    """Say nothing: the first process speaks."""


def score_tests(setup: Any, run_dir: Path, config: Config, stop: Any) -> None:
    """Score every test set found beside the training data and print the table."""
    from camoxpert.evaluation.model import evaluate_set, score_table
    from camoxpert.inference.predictor import Predictor
    from camoxpert.runs.checkpoint import load_checkpoint

    checkpoint = load_checkpoint(run_dir / "checkpoints" / "best.pt")
    predictor = Predictor(checkpoint, device=setup.device, precision=setup.precision)

    def check_stop() -> None:
        if stop.code():
            raise stop.stopped(
                f"Training is done and saved in {run_dir}; the same command scores it."
            )

    results = [
        evaluate_set(
            predictor,
            name,
            manifest,
            output=run_dir,
            batch_size=setup.plan.stages[-1].batch_size,
            num_workers=0,
            gallery=config.run.num_images,
            check_stop=check_stop,
        )
        for name, manifest in setup.data.tests.items()
    ]
    print(score_table(results))


def previous_phases(run_dir: Path) -> dict[str, float]:
    """Return the wall seconds per phase of earlier sessions of a run."""
    try:
        phases: dict[str, float] = json.loads((run_dir / "run.json").read_text())["phases"]
    except (OSError, ValueError, KeyError):
        return {}
    return phases


def merged(a: dict[str, float], b: dict[str, float]) -> dict[str, float]:
    """Add two tables of seconds."""
    return {
        name: a.get(name, 0.0) + b.get(name, 0.0) for name in [*a, *(k for k in b if k not in a)]
    }


def write_report_if_possible(run_dir: Path) -> None:
    """Write the report; a fault in it must not hide how training ended."""
    from camoxpert.pages.report import write_report

    try:
        write_report(run_dir)
    except Exception as error:
        print(f"warning: the report could not be written: {error}", file=sys.stderr)
