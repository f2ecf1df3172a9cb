"""Train a chain of stages: what an earlier run, or another fold, left in the cache is reused."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from camoxpert import console
from camoxpert.config import Config
from camoxpert.data.cache.choice import cache_root
from camoxpert.errors import CheckpointError, ConfigError, DataError
from camoxpert.runs.checkpoint import BEST, load_checkpoint
from camoxpert.runs.folder import run_name
from camoxpert.runs.info import update_run_json
from camoxpert.runs.records import StageRecord, read_info
from camoxpert.stages import store
from camoxpert.stages.chain import Stage
from camoxpert.stages.key import Facts, facts_of
from camoxpert.training import session


@dataclass(frozen=True)
class Planned:
    """A stage with what its result depends on."""

    stage: Stage
    facts: Facts


def plan(stages: Sequence[Stage]) -> list[Planned]:
    """Return what the result of each stage depends on, the stages before it included.

    Raises:
        ConfigError: several processes, or a run to continue: a chain has several.
        DataError: the data of a stage cannot be found.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError(
            "--stages trains in one process. Under torchrun start each stage as a run of its own, "
            "with --init-from RUN for those after the first."
        )
    for stage in stages:
        if stage.config.train.resume not in ("auto", "never"):
            raise ConfigError(
                f"--resume {stage.config.train.resume} names one run, and --stages has several. "
                f"Leave it out: the same command continues the stage that was stopped."
            )
    found: list[Planned] = []
    for stage in stages:
        parent = found[-1].facts.key if found else ""
        found.append(Planned(stage, facts_of(stage.config, parent)))
    return found


def run_chain(
    stages: Sequence[Stage],
    *,
    argv: Sequence[str] = (),
    folder: Path | None = None,
    keep_last: bool = True,
) -> session.Result:
    """Train the stages that are not kept, and always the last, which is the run that is asked for.

    Args:
        stages: in their order.
        argv: the command, for ``run.json``.
        folder: receives the runs of the stages before the last; None: where the last run is.
        keep_last: also keep the result of the last stage, for chains that go on from it.

    Returns:
        The result of the last stage.

    Raises:
        Stopped: the same call continues.
        DataError: a stage is not kept, and ``--strict-cache`` forbids to train it.
    """
    planned = plan(stages)
    last = planned[-1]
    deadline = _Deadline(last.stage.config)
    weights, records = "", list[StageRecord]()
    for one in planned[_first_needed(planned) : -1]:
        weights, record = _obtain(one, weights, deadline, argv, folder)
        records.append(record)
    started = time.monotonic()
    config = _starting_from(last.stage.config, weights, deadline)
    console.decide("stage", f"{last.stage.name}: the run that is asked for")
    result = session.run(config, argv=argv)
    seconds = time.monotonic() - started
    update_run_json(result.path, stages=records)
    if keep_last:
        root = cache_root(config.data)
        store.keep(root, last.facts, result.path, name=last.stage.name, seconds=seconds)
    return result


def preview(stages: Sequence[Stage]) -> None:
    """Print what the cache says of each stage, and take one step of each; write nothing.

    A stage whose start is not kept yet is tried without one, and so without the settings that need
    it.
    """
    weights: Path | None = None
    for number, one in enumerate(plan(stages)):
        config, verdict = one.stage.config, "the run that is asked for"
        if number and weights is None:
            config, words = _without_start(config)
        else:
            words = ""
            if weights is not None:
                config = replace(config, model=replace(config.model, init_from=str(weights)))
        if not one.stage.last:
            found = store.find(cache_root(config.data), one.facts)
            verdict, weights = found.verdict, found.weights
        console.say(f"stage       {one.stage.name}: {verdict}")
        if words:
            console.say(f"            {words}")
        session.dry_run(config)


def _without_start(config: Config) -> tuple[Config, str]:
    """Return settings that can be tried before there is a start, and what is not tried, in words;
    "": everything is."""
    given = {
        "--keep-rgb": config.train.keep_rgb,
        "model.upcycle_noise": config.model.upcycle_noise > 0,
    }
    tried = replace(
        config,
        train=replace(config.train, keep_rgb=False),
        model=replace(config.model, upcycle_noise=0.0),
    )
    names = " and ".join(name for name, there in given.items() if there)
    words = f"{names} not tried: the stage before, the start, is not trained yet" if names else ""
    return tried, words


def _first_needed(planned: Sequence[Planned]) -> int:
    """Return the position of the last stage that is kept, or 0: those before it are not needed."""
    for position in range(len(planned) - 2, 0, -1):
        one = planned[position]
        if store.find(cache_root(one.stage.config.data), one.facts).weights is not None:
            names = ", ".join(p.stage.name for p in planned[:position])
            console.decide("stage", f"{names}: not needed, a later one is kept")
            return position
    return 0


def _obtain(
    one: Planned, parent: str, deadline: _Deadline, argv: Sequence[str], folder: Path | None
) -> tuple[str, StageRecord]:
    """Return the weights of a stage, from the cache or trained now, and its record."""
    stage, facts = one.stage, one.facts
    root, strict = cache_root(stage.config.data), stage.config.data.strict_cache
    found = store.find(root, facts)
    run = None if found.weights else _finished(_run_folder(one, folder))
    done = ""
    if found.weights is None and not strict:
        again = "again" if found.verdict.startswith("corrupt") else "now"
        done = f": trained {again}" if run is None else f"; its run {run} is finished"
    console.decide("stage", f"{stage.name}: {found.verdict}{done}")
    if found.weights is None and strict:
        raise DataError(
            f"--strict-cache: the result of stage {stage.name} is not kept: {found.verdict}. Run "
            f"once without --strict-cache to train it."
        )
    if found.weights is None:
        with store.held(root, facts.key):
            # Another process may have trained it while this one waited.
            again_found = store.find(root, facts)
            if again_found.weights is None:
                run = run or _train(one, parent, deadline, argv, folder)
                seconds = _seconds_of(run)
                weights = store.keep(root, facts, run, name=stage.name, seconds=seconds)
                return str(weights), _record(one, found.verdict, seconds)
            found = again_found
            console.decide("", f"{found.verdict}, made by another process")
    return str(found.weights), _record(one, found.verdict, found.seconds)


def _run_folder(one: Planned, folder: Path | None) -> Path:
    """Return where a stage before the last is trained; the name says what it depends on."""
    config = _named(one, folder)
    return Path(config.run.dir) / run_name(config)


def _named(one: Planned, folder: Path | None) -> Config:
    """Return the settings of a stage before the last, with the name and place of its run."""
    config = one.stage.config
    place = str(folder or config.run.dir)
    name = f"{one.stage.name}-{one.facts.key}"
    return replace(config, run=replace(config.run, dir=place, name=name))


def _finished(run: Path) -> Path | None:
    """Return the run of a stage if it is finished and whole: it was stopped before its result was
    kept, or what was kept is gone."""
    if read_info(run).get("status") != "finished":
        return None
    try:
        load_checkpoint(run / "checkpoints" / BEST)
    except CheckpointError:
        return None
    return run


def _train(
    one: Planned, parent: str, deadline: _Deadline, argv: Sequence[str], folder: Path | None
) -> Path:
    """Train a stage as a run of its own; return its folder."""
    config = _starting_from(_named(one, folder), parent, deadline)
    return session.run(config, argv=argv).path


def _seconds_of(run: Path) -> float:
    """Return the wall seconds of all sessions of a run."""
    return float(sum(read_info(run).get("phases", {}).values()))


def _starting_from(config: Config, weights: str, deadline: _Deadline) -> Config:
    """Return the settings of a stage that starts from weights, with what is left of the time."""
    if weights:
        config = replace(config, model=replace(config.model, init_from=weights))
    return replace(config, train=replace(config.train, max_hours=deadline.left()))


def _record(one: Planned, verdict: str, seconds: float) -> StageRecord:
    return {"name": one.stage.name, "key": one.facts.key, "verdict": verdict, "seconds": seconds}


class _Deadline:
    """What is left of ``--max-hours`` for the stages together."""

    def __init__(self, config: Config, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, hours = clock, config.train.max_hours
        self._end = None if hours is None else clock() + 3600 * hours

    def left(self) -> float | None:
        """Return the hours left; a run that begins after the end stops in its first step."""
        return None if self._end is None else max((self._end - self._clock()) / 3600, 1e-6)
