"""The page about a run, from the files in its folder and nothing else."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from camoxpert.config import changed_settings, config_from_dict, get_setting, leaves, read_yaml
from camoxpert.errors import ConfigError
from camoxpert.pages import charts
from camoxpert.pages.presence import PresencePart, presence_part
from camoxpert.pages.render import Chart, Picture, arrow, draw, inline_jpeg, number, write_page
from camoxpert.pages.scored import run_results
from camoxpert.runs.records import (
    EventRecord,
    Records,
    RoutingRecord,
    RunInfo,
    TrainRecord,
    read_info,
    read_records,
)
from camoxpert.runs.scores import RunPicture, RunResult, WithPresence


class Measure(NamedTuple):
    """How a measure is called on the page."""

    label: str
    hint: str = ""


MEASURES = {
    "Smeasure": Measure("S", "structure"),
    "wFmeasure": Measure("wF", "weighted F"),
    "meanEm": Measure("E mean", "alignment"),
    "maxEm": Measure("E max"),
    "adpEm": Measure("E adp"),
    "meanFm": Measure("F mean", "beta2 0.3"),
    "maxFm": Measure("F max"),
    "adpFm": Measure("F adp"),
    "IoU": Measure("IoU", "at 0.5"),
    "Dice": Measure("Dice", "at 0.5"),
    "MAE": Measure("MAE", "mean error"),
}
TILES = {
    "Smeasure": "S-measure",
    "wFmeasure": "weighted F",
    "meanEm": "mean E",
    "IoU": "IoU",
    "MAE": "MAE",
}

GALLERIES = {
    "best": "best predictions",
    "worst": "worst predictions",
    "false_alarm": "without an object, most as if there were one",
    "missed": "with an object, least as if there were one",
}


class ScoreRow(NamedTuple):
    """A line of the score table; kind ``floor`` is a value to compare with."""

    label: str
    scores: Mapping[str, float]
    kind: str = ""


@dataclass(frozen=True)
class Experts:
    """How the last logged epoch used the experts.

    ``idle`` names, by level, those with less than a tenth of their fair share. ``units``: how many
    regions were routed; empty where whole images were.
    """

    count: int
    epoch: int
    entropy: list[str]
    excess: list[str]
    idle: list[tuple[str, list[str]]]
    units: list[str]
    chart: Chart


class Speed(NamedTuple):
    """Speed of the last logged step; data_wait is a share of the time, 0..1."""

    images_per_second: float
    data_wait: float


class Settings(NamedTuple):
    """Settings as (path, value), or why they could not be read."""

    changed: list[tuple[str, str]]
    defaults: list[tuple[str, str]]
    fault: str = ""


@dataclass(frozen=True)
class RunPage:
    """The values of ``report.html.j2``."""

    name: str
    quick: list[str]
    facts: list[str]
    tiles: list[tuple[str, str]]
    measures: Mapping[str, Measure]
    scores: list[ScoreRow]
    tested: bool
    presence: PresencePart | None
    galleries: list[tuple[str, list[Picture]]]
    curves: list[Chart]
    experts: Experts | None
    speed: Speed | None
    phases: Chart | None
    events: list[EventRecord]
    settings: Settings
    command: str
    decisions: Sequence[str]
    environment: list[tuple[str, object]]


def write_report(run_dir: Path, page_file: Path | None = None) -> Path:
    """Write the page of a run; parts that are missing become a sentence.

    Args:
        run_dir: the run folder.
        page_file: the page; None: ``report.html`` in the run folder.
    """
    info = read_info(run_dir)
    records = read_records(run_dir / "metrics.jsonl")
    results = run_results(run_dir)
    phases = {name: seconds for name, seconds in (info.get("phases") or {}).items() if seconds}
    page = RunPage(
        name=run_dir.name,
        quick=quick_sentences(info),
        facts=_facts(info),
        tiles=_tiles(results, records),
        measures=MEASURES,
        scores=list(_score_rows(results, records)),
        tested=bool(results),
        presence=_presence(results, records),
        galleries=list(_galleries(run_dir, results)),
        curves=list(_curves(records, results)),
        experts=_experts(records.routing, regions=_routes_regions(run_dir)),
        speed=_speed(records.train),
        phases=draw(lambda: charts.plot_phases(phases), "time") if phases else None,
        events=records.events,
        settings=_settings(run_dir),
        command=shlex.join(str(word) for word in info.get("argv", ())),
        decisions=info.get("decisions", ()),
        environment=_environment(info),
    )
    return write_page(page_file or run_dir / "report.html", "report.html.j2", page)


def quick_sentences(info: RunInfo) -> list[str]:
    """Return what makes a run a quick one, in sentences; [] for a whole run."""
    quick = info.get("quick")
    return [str(words) for words in quick.values()] if isinstance(quick, dict) else []


def _facts(info: RunInfo) -> list[str]:
    facts = [f"status {info.get('status', 'unknown')}", f"device {info.get('device', '?')}"]
    if info.get("precision"):
        facts.append(str(info["precision"]))
    if info.get("parameters"):
        facts.append(f"{info['parameters'] / 1e6:.2f} M parameters, {info['gmacs']:.2f} GMACs")
    images = info.get("images", {})
    if images.get("synthetic"):
        real, made = images["training"], images.get("synthetic_per_epoch", 0)
        facts.append(
            f"{real} real and {made} of {images['synthetic']} made training images an epoch "
            f"({made / max(real + made, 1):.0%} made); validation and tests are real"
        )
    if images.get("negatives"):
        facts.append(
            f"{images.get('negatives_per_epoch', 0)} of {images['negatives']} images without an "
            f"object an epoch"
        )
    fit = info.get("presence")
    if fit:
        facts.append(
            f"presence calibrated on {fit['objects']:.0f} images with and {fit['empty']:.0f} "
            f"without an object"
        )
    guided = info.get("guidance")
    if guided:
        encoder = guided.get("encoder", {})
        facts.append(
            f"guided by {guided.get('references', '?')} references that {encoder.get('encoder')} "
            f"describes at {encoder.get('side')} px; support cache: {guided.get('cache_text')}"
        )
    return [*facts, f"started {info.get('started', '?')}"]


def _tiles(results: Sequence[RunResult], records: Records) -> list[tuple[str, str]]:
    if results:
        scores, where = results[0]["scores"], f"on {results[0]['dataset']}"
    elif records.best:
        scores, where = records.best["scores"], "validation, best epoch"
    else:
        return []
    return [
        (number(scores.get(key)), f"{label} {arrow(key)} {where}") for key, label in TILES.items()
    ]


def _score_rows(results: Sequence[RunResult], records: Records) -> Iterator[ScoreRow]:
    for result in results:
        missing = len(result.get("unreadable", ()))
        left_out = f", {missing} unreadable left out" if missing else ""
        yield ScoreRow(f"{result['dataset']} ({result['num_images']}{left_out})", result["scores"])
        floor = result.get("baseline", {}).get("all_foreground")
        if floor:
            yield ScoreRow("baseline: everything is object", floor, "floor")
    if records.best:
        label = f"validation, best: epoch {records.best['epoch']}"
        yield ScoreRow(label, records.best["scores"], "floor")


def _galleries(run_dir: Path, results: Sequence[RunResult]) -> Iterator[tuple[str, list[Picture]]]:
    for result in results:
        for kind, title in GALLERIES.items():
            pictures = []
            for entry in result.get("gallery", {}).get(kind, ()):
                path = run_dir / entry["panel"]
                # A path in a JSON file from elsewhere must not pull in other files.
                if not path.resolve().is_relative_to(run_dir.resolve()) or not path.is_file():
                    continue
                shown = _caption(kind, entry)
                source = inline_jpeg(path.read_bytes())
                pictures.append(Picture(source, f"{entry['name']}: {shown}"))
            if pictures:
                yield f"{result['dataset']}: {title}", pictures


def _caption(kind: str, entry: RunPicture) -> str:
    if kind in ("false_alarm", "missed"):
        return ", ".join(f"{entry['measure']} {number(v)}" for v in entry["values"].values())
    values = (("wF", "wFmeasure"), ("S", "Smeasure"), ("MAE", "MAE"))
    return ", ".join(f"{label} {number(entry.get(key))}" for label, key in values)


def _presence(results: Sequence[RunResult], records: Records) -> PresencePart | None:
    """Return the table of presence: of the test sets and of the validation that chose."""
    found: list[WithPresence] = list(results)
    names = [str(result["dataset"]) for result in results]
    if records.best and records.best.get("presence"):
        found.append({"presence": records.best["presence"]})
        names.append(f"validation, best: epoch {records.best['epoch']}")
    return presence_part(found, names)


def _curves(records: Records, results: Sequence[RunResult]) -> Iterator[Chart]:
    if records.train:
        yield draw(lambda: charts.plot_training(records.train), "training loss")
    if records.validation:
        yield draw(lambda: charts.plot_scores(records.validation), "validation scores")
    curves = {r["dataset"]: r["curves"] for r in results if r.get("curves")}
    if curves:
        yield draw(lambda: charts.plot_curves(curves), "PR, F and E curves")


def _routes_regions(run_dir: Path) -> bool:
    try:
        return config_from_dict(read_yaml(run_dir / "config.yaml")).model.routing_grid > 1
    except ConfigError:
        return False


def _experts(routing: Sequence[RoutingRecord], *, regions: bool) -> Experts | None:
    known = [record for record in routing if record.get("levels")]
    if not known:
        return None
    last = known[-1]
    levels = last["levels"].items()
    count = len(last["experts"])
    idle = {
        name: [
            expert
            for expert, usage in zip(last["experts"], level["usage"], strict=True)
            if usage < 0.1 / count
        ]
        for name, level in levels
    }
    return Experts(
        count=count,
        epoch=last["epoch"],
        entropy=[f"{name} {level['entropy']:.2f}" for name, level in levels],
        excess=[
            f"{name} {level['max_violation']:+.0%}"
            for name, level in levels
            if "max_violation" in level
        ],
        idle=[(name, experts) for name, experts in idle.items() if experts],
        units=[f"{name} {level.get('units', '?')}" for name, level in levels] if regions else [],
        chart=draw(lambda: charts.plot_routing(last), "expert usage"),
    )


def _speed(train: Sequence[TrainRecord]) -> Speed | None:
    if not train:
        return None
    last = train[-1]
    return Speed(last.get("images_per_second") or 0.0, last.get("data_wait") or 0.0)


def _settings(run_dir: Path) -> Settings:
    try:
        config = config_from_dict(read_yaml(run_dir / "config.yaml"))
    except ConfigError as error:
        return Settings([], [], str(error))
    changed = changed_settings(config)
    rest = {leaf.path: get_setting(config, leaf.path) for leaf in leaves()}
    return Settings(
        [(path, _shown(value)) for path, value in changed.items()],
        [(path, _shown(value)) for path, value in rest.items() if path not in changed],
    )


def _shown(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, tuple | list) else str(value)


def _environment(info: RunInfo) -> list[tuple[str, object]]:
    return [
        ("platform", info.get("platform")),
        ("cores", info.get("cores")),
        ("commit", info.get("git_commit")),
        ("data hash", info.get("data_hash")),
        *(info.get("versions") or {}).items(),
    ]
