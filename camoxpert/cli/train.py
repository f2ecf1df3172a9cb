"""``train``: settings in, a trained model with its scores, pictures and report out."""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import sys
import time
from pathlib import Path
from typing import Any

from camoxpert.config import Config, Leaf, leaves, load_config, parse_text, to_yaml
from camoxpert.errors import CamoXpertError, ConfigError, DataError, Stopped

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
    config = read_config(options, rest)
    if options.print_config:
        print(to_yaml(config), end="")
        return 0
    check_data_given(config)
    started = time.monotonic()
    from camoxpert.training.rundir import stopped_run
    from camoxpert.training.setup import prepare, trial_step

    setup = prepare(config, print, continued=stopped_run(config), write=not options.dry_run)
    if options.dry_run:
        largest = max(stage.batch_size for stage in setup.plan.stages)
        trial_step(setup.model, config, setup.device, setup.precision, largest)
        print("dry run     one step forward and back worked; nothing was written")
        return 0
    return train_and_report(setup, config, typed, started)


def train_and_report(setup: Any, config: Config, typed: list[str], started: float) -> int:
    """Open the run folder, train, score the test sets with the best weights, write the report."""
    from camoxpert.data.workers import is_worker_death, worker_death
    from camoxpert.observe.runlog import RunLog, update_run_json, write_run_json
    from camoxpert.training.guards import StopFlag, watch
    from camoxpert.training.rundir import check_data, open_run
    from camoxpert.training.trainer import train

    opened = open_run(config)
    run_dir = opened.path
    if opened.resume is not None:
        check_data(opened.resume, setup.data.data_hash)
    for note in opened.notes:
        print(note)
    print(f"run         {run_dir}")
    (run_dir / "config.yaml").write_text(to_yaml(config))
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
    step = opened.resume.values["state"]["step"] + 1 if opened.resume else None
    log = RunLog(run_dir, tensorboard=config.run.tensorboard, resume_step=step)
    log.add_phase("start", time.monotonic() - started)
    stop = StopFlag(config.train.max_hours)
    status = "failed"
    try:
        with watch(stop):
            summary = train(setup, run_dir, log, stop=stop, say=print, resume=opened.resume)
            if config.run.test and setup.data.tests:
                with log.phase("testing"):
                    score_tests(setup, run_dir, config, stop)
        status = "finished"
    except Stopped:
        status = "stopped"
        raise
    except CamoXpertError as error:
        log.write({"kind": "event", "text": str(error)})
        raise
    except RuntimeError as error:
        # torch reports a dead data worker from a signal handler, wherever the program happens to
        # be.
        if not is_worker_death(error):
            raise
        log.write({"kind": "event", "text": str(worker_death(error))})
        raise worker_death(error) from error
    finally:
        log.close()
        phases = merged(previous_phases(run_dir), log.phases)
        update_run_json(run_dir, status=status, phases=phases)
        if config.run.report:
            write_report_if_possible(run_dir)
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


def score_tests(setup: Any, run_dir: Path, config: Config, stop: Any) -> None:
    """Score every test set found beside the training data and print the table."""
    from camoxpert.inference.evaluate import evaluate_set, score_table
    from camoxpert.inference.predictor import Predictor
    from camoxpert.training.checkpoint import load_checkpoint

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
    from camoxpert.observe.report import write_report

    try:
        write_report(run_dir)
    except Exception as error:
        print(f"warning: the report could not be written: {error}", file=sys.stderr)
