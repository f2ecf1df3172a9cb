"""What several runs are and scored, read from their folders, and which of them can be compared."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import fmean, median
from typing import Any

from camoxpert.config import Config, config_from_dict, get_setting, read_yaml
from camoxpert.errors import ConfigError
from camoxpert.pages.report import quick_sentences
from camoxpert.pages.scored import run_results
from camoxpert.runs.identity import PLACES, what_is_trained
from camoxpert.runs.per_image import ImageScores, image_scores
from camoxpert.runs.records import Records, RunInfo, read_info, read_records
from camoxpert.runs.samples import read_samples
from camoxpert.runs.scores import RunResult
from camoxpert.text import count, free_name, shorten

PATHS_SHOWN = 2
"""Names in a sentence before it says how many more there are."""


@dataclass(frozen=True)
class ComparedRun:
    """A run, as its folder tells it.

    Attributes:
        path: its folder.
        name: unique among the runs compared.
        info, records: ``run.json`` and ``metrics.jsonl``.
        config: its settings; None if they cannot be read.
        tests: data set -> result of the run's weights on it.
        images: data set -> scores of its images.
    """

    path: Path
    name: str
    info: RunInfo
    records: Records
    config: Config | None
    tests: Mapping[str, RunResult]
    images: Mapping[str, ImageScores]

    @property
    def select(self) -> str:
        """The measure that chose its weights."""
        return "wFmeasure" if self.config is None else self.config.train.select

    @property
    def validation(self) -> dict[str, float]:
        """The scores of the best validation; {} without one."""
        best = self.records.best
        return {} if best is None else dict(best.get("scores") or {})

    @cached_property
    def validated(self) -> frozenset[tuple[str, str]]:
        """The images it was validated with: (data set, name)."""
        rows = read_samples(self.path)
        return frozenset(key for key, split in rows.items() if split == "validation")

    @property
    def images_per_second(self) -> float | None:
        """Median speed of the logged steps, the first half left out: caches fill there."""
        rates = [r.get("images_per_second") for r in self.records.train]
        known = [rate for rate in rates[len(rates) // 2 :] if rate]
        return median(known) if known else None


@dataclass(frozen=True)
class Setting:
    """Runs with the same settings and data but for the seed.

    Attributes:
        label: short name.
        runs: in the order given.
    """

    label: str
    runs: tuple[ComparedRun, ...]

    def mean(self, values: Sequence[float | None]) -> float | None:
        """Return the mean of the values of the runs that have one; None if none has."""
        known = [value for value in values if value is not None]
        return fmean(known) if known else None


def read_run(path: Path, name: str) -> ComparedRun:
    """Read the folder of a run; parts that are missing or damaged are empty."""
    try:
        config = config_from_dict(read_yaml(path / "config.yaml"))
    except ConfigError:
        config = None
    results = run_results(path)
    own: dict[str, RunResult] = {}
    # A folder may hold scores of other methods: its own are under its name, or came first.
    for result in sorted(results, key=lambda entry: entry.get("method") != path.resolve().name):
        own.setdefault(str(result["dataset"]), result)
    images = {dataset: image_scores(path, results, result) for dataset, result in own.items()}
    records = read_records(path / "metrics.jsonl")
    return ComparedRun(path, name, read_info(path), records, config, own, images)


def read_runs(paths: Sequence[Path]) -> list[ComparedRun]:
    """Read runs; those whose folders have one name are called after the folders above as well."""
    places = [Path(os.path.abspath(path)) for path in paths]
    names: list[str] = []
    for place in places:
        twice = sum(other.name == place.name for other in places) > 1
        names.append(free_name(f"{place.parent.name}/{place.name}" if twice else place.name, names))
    return [read_run(path, name) for path, name in zip(paths, names, strict=True)]


def group_runs(runs: Sequence[ComparedRun]) -> list[Setting]:
    """Group the runs that differ in their seed alone, in the order of their first."""
    groups: dict[str, list[ComparedRun]] = {}
    for run in runs:
        groups.setdefault(_meaning(run), []).append(run)
    labels: list[str] = []
    for group in groups.values():
        labels.append(free_name(_label([run.name for run in group]), labels))
    return [
        Setting(label, tuple(group)) for label, group in zip(labels, groups.values(), strict=True)
    ]


def _meaning(run: ComparedRun) -> str:
    """Return a text that is equal for runs that learn the same from the same."""
    if run.config is None:
        return str(run.path)
    files = run.info.get("files") or {}
    # Data and files count by their content: moved ones are the same.
    values = {
        path: value
        for path, value in what_is_trained(run.config).items()
        if path not in PLACES and path not in files and path != "train.seed"
    }
    return json.dumps([values, run.info.get("data_hash"), files], sort_keys=True)


def _label(names: Sequence[str]) -> str:
    if len(names) == 1:
        return names[0]
    start = names[0]
    while not all(name.startswith(start) for name in names):
        start = start[:-1]
    start = re.sub(r"[-_ ]*seed[-_ ]*\d*$|[-_ ]+$", "", start)
    return f"{start or names[0]} ({len(names)} runs)"


def setting_columns(settings: Sequence[Setting]) -> list[tuple[str, list[str]]]:
    """Return the settings that differ: (dotted path, value of each)."""
    known = [config for s in settings if (config := s.runs[0].config) is not None]
    if not known:
        return []
    paths = [path for path in what_is_trained(known[0]) if path != "train.seed"]
    columns = []
    for path in paths:
        values = [_value(setting.runs[0], path) for setting in settings]
        if len({value for value in values if value is not None}) > 1:
            columns.append((path, ["?" if value is None else value for value in values]))
    return columns


def _value(run: ComparedRun, path: str) -> str | None:
    """Return a setting as a run has it, with what its preset chose where it was left open."""
    if run.config is None:
        return None
    value = get_setting(run.config, path)
    if value is None:
        chosen = (run.info.get("recipe") or {}).get(path)
        return "unset" if chosen is None else f"{_plain(chosen)} (preset)"
    return _plain(value)


def _plain(value: object) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, (tuple, list)):
        return ", ".join(map(_plain, value)) or "none"
    return str(value) if value != "" else "none"


def environment_columns(runs: Sequence[ComparedRun]) -> list[tuple[str, list[str]]]:
    """Return what differs around the runs: (name, value of each run)."""
    columns = []
    for name in ("device", "precision", "platform", "cores", "git_commit"):
        columns.append((name, [str(run.info.get(name, "?")) for run in runs]))
    every = dict.fromkeys(key for run in runs for key in run.info.get("versions") or {})
    for key in every:
        found = [str((run.info.get("versions") or {}).get(key, "?")) for run in runs]
        columns.append((key, found))
    return [(name, values) for name, values in columns if len(set(values)) > 1]


def warnings_of(runs: Sequence[ComparedRun], settings: Sequence[Setting]) -> list[str]:
    """Return why some of the runs cannot be compared, a sentence each; the gravest first."""
    found = [*_unfinished(runs), *_of_data(runs), *_of_tests(runs), *_of_validation(runs)]
    devices = {str(run.info.get("device", "?")) for run in runs}
    if len(devices) > 1:
        found.append(f"Speeds were measured on different devices: {', '.join(sorted(devices))}.")
    if any(run.tests for run in runs) and any(len(setting.runs) < 3 for setting in settings):
        found.append(
            "Fewer than three runs of a setting: intervals hold for other images, and say little "
            "of other seeds."
        )
    return found


def _unfinished(runs: Sequence[ComparedRun]) -> Iterator[str]:
    quick = [(run.name, "; ".join(quick_sentences(run.info))) for run in runs]
    for words in dict.fromkeys(words for _, words in quick if words):
        names = [name for name, own in quick if own == words]
        are = "is a quick run, not a whole one" if len(names) == 1 else "are quick runs"
        yield f"{shorten(names, PATHS_SHOWN)} {are}: {words}."
    open_runs = [run.name for run in runs if run.info.get("status") != "finished"]
    if open_runs:
        yield f"Not finished: {shorten(open_runs, PATHS_SHOWN)}."


def _of_data(runs: Sequence[ComparedRun]) -> Iterator[str]:
    groups = _grouped(runs, [run.info.get("data_hash") for run in runs])
    if len(groups) > 1:
        yield f"Trained on different data (data hash): {_against(groups)}."


def _of_tests(runs: Sequence[ComparedRun]) -> Iterator[str]:
    for dataset in datasets_of(runs):
        having = [run for run in runs if dataset in run.tests]
        lacking = [run.name for run in runs if dataset not in run.tests]
        if lacking:
            yield f"{dataset} was not scored by {shorten(lacking, PATHS_SHOWN)}."
        for key, what in (
            ("data_hash", "other images or masks"),
            ("protocol", "another protocol"),
            ("empty_gt", "another rule for images without an object"),
        ):
            groups = _grouped(having, [run.tests[dataset].get(key) for run in having])
            if len(groups) > 1:
                yield f"{dataset} was scored with {what}: {_against(groups)}."


def _of_validation(runs: Sequence[ComparedRun]) -> Iterator[str]:
    having = [run for run in runs if run.validation and run.validated]
    groups = _grouped(having, [run.validated for run in having])
    if len(groups) > 1:
        yield (
            "Validation scores are those of different images (another seed, other data or "
            f"--val-fraction): {_against(groups)}."
        )
    chosen = {run.select for run in runs if run.validation}
    if len(chosen) > 1:
        yield f"Weights were chosen by different measures: {', '.join(sorted(chosen))}."


def _grouped(runs: Sequence[ComparedRun], keys: Sequence[Any]) -> list[list[str]]:
    groups: dict[Any, list[str]] = {}
    for run, key in zip(runs, keys, strict=True):
        groups.setdefault(key, []).append(run.name)
    return list(groups.values())


def _against(groups: Sequence[Sequence[str]]) -> str:
    if len(groups) > PATHS_SHOWN:
        return f"{count(len(groups), 'group')} of runs"
    return " against ".join(shorten(names, PATHS_SHOWN) for names in groups)


def datasets_of(runs: Sequence[ComparedRun]) -> list[str]:
    """Return the names of all test sets that any of the runs scored."""
    return list(dict.fromkeys(dataset for run in runs for dataset in run.tests))
