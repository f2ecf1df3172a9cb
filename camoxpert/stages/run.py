"""Train a chain of stages: what an earlier run, or another fold, left in the cache is reused."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypedDict

from camoxpert import console
from camoxpert.config import Config
from camoxpert.data.cache.choice import cache_root
from camoxpert.errors import ConfigError, DataError
from camoxpert.runs.info import update_run_json
from camoxpert.runs.records import read_info
from camoxpert.stages import store
from camoxpert.stages.chain import Stage
from camoxpert.stages.key import Facts, facts_of
from camoxpert.training import session


class StageRecord(TypedDict):
    """A stage in ``run.json`` of the run that it led to."""

    name: str
    key: str
    verdict: str  # what the cache said
    seconds: float  # that training took, now or before


@dataclass(frozen=True)
class Planned:
    """A stage with what its result depends on."""

    stage: Stage
    facts: Facts


def plan(stages: Sequence[Stage]) -> list[Planned]:
    """Return what the result of each stage depends on, the stages before it included.

    Raises:
        ConfigError: several processes; chains are trained by one.
        DataError: the data of a stage cannot be found.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError(
            "--stages trains in one process. Under torchrun start each stage as a run of its own, "
            "with --init-from RUN for those after the first."
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
    """Print what the cache says of each stage, and take one step of each; write nothing."""
    for one in plan(stages):
        verdict = "the run that is asked for"
        if not one.stage.last:
            verdict = store.find(cache_root(one.stage.config.data), one.facts).verdict
        console.say(f"stage       {one.stage.name}: {verdict}")
        session.dry_run(one.stage.config)


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
    root = cache_root(stage.config.data)

    def look() -> store.Found:
        found = store.find(root, facts)
        trained = "" if found.weights else "; trained now"
        if found.verdict.startswith("corrupt"):
            trained = ": trained again"
        if stage.config.data.strict_cache and not found.weights:
            trained = ""
        console.decide("stage", f"{stage.name}: {found.verdict}{trained}")
        return found

    found = look()
    if found.weights is None and stage.config.data.strict_cache:
        raise DataError(
            f"--strict-cache: the result of stage {stage.name} is not kept: {found.verdict}. Run "
            f"once without --strict-cache to train it."
        )
    if found.weights is None:
        with store.held(root, facts.key):
            # Another process may have trained it while this one waited.
            again = store.find(root, facts)
            if again.weights is None:
                weights, seconds = _train(one, parent, deadline, argv, folder)
                return str(weights), _record(one, found.verdict, seconds)
            found = again
            console.decide("", f"{found.verdict}, made by another process")
    return str(found.weights), _record(one, found.verdict, found.seconds)


def _train(
    one: Planned, parent: str, deadline: _Deadline, argv: Sequence[str], folder: Path | None
) -> tuple[Path, float]:
    """Train a stage as a run of its own, and keep its result; return weights and seconds."""
    stage, key = one.stage, one.facts.key
    config = _starting_from(stage.config, parent, deadline)
    place = folder or Path(config.run.dir)
    name = f"{stage.name}-{key}"
    config = replace(config, run=replace(config.run, dir=str(place), name=name))
    run = place / name
    # Finished and not kept: stopped in between, or the cache was deleted. The name says the key.
    finished = read_info(run).get("status") == "finished"
    if finished and (run / "checkpoints" / "best.pt").is_file():
        console.decide("", f"trained before in {run}")
    else:
        run = session.run(config, argv=argv).path
    seconds = float(read_info(run).get("phases", {}).get("training", 0.0)) or _seconds_of(run)
    weights = store.keep(cache_root(config.data), one.facts, run, name=stage.name, seconds=seconds)
    return weights, seconds


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
