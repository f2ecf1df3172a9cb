"""``scores.json`` of an evaluation, typed: its results, comparisons and pictures.

``evaluation/output.py`` writes it; pages, tables, model cards and comparisons of runs read it. A
number that was NaN or infinite is null in the file. Keys that a type marks ``NotRequired`` are left
out where there is nothing to say, or were not written by older releases: each says which.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypedDict, TypeGuard

if TYPE_CHECKING:
    # Annotations are never evaluated, so Python 3.10 need not have it.
    from typing import NotRequired, Required

    from typing_extensions import ReadOnly

    from camoxpert.metrics.presence import PresenceEntry

Breakdown = dict[str, dict[str, dict[str, float]]]
"""Division (class, object size, ...) -> part -> measure -> value."""


class CorruptedEntry(TypedDict):
    """The scores of one corruption at one severity; see ``evaluation.robustness``."""

    corruption: str
    severity: int
    scores: dict[str, float]
    retention: dict[str, float]


class RobustnessEntry(TypedDict):
    """Retention under corruptions; see ``evaluation.robustness``."""

    measure: str
    severities: Sequence[int]
    seed: int
    scores: Sequence[CorruptedEntry]
    means: dict[str, float]
    intervals: dict[str, tuple[float, float]]
    picture: str


class ExpertEntry(TypedDict):
    """The images that one expert of a level was chosen for; see ``evaluation.experts``."""

    level: str
    expert: str
    images: int
    share: float
    means: dict[str, float]


class ExpertsEntry(TypedDict):
    """What each expert was chosen for; see ``evaluation.experts``."""

    keys: Sequence[str]
    uses: Sequence[ExpertEntry]
    p_values: dict[str, dict[str, float]]


class ShownEntry(TypedDict):
    """The scores of all images with one kind of reference, or with some of their modalities.

    ``images`` is missing in files of releases that did not count them.
    """

    shown: str
    scores: dict[str, float]
    differences: dict[str, dict[str, float]]
    images: NotRequired[int]


class ShownTable(TypedDict):
    """What a table by what the model is shown needs, of ``ShotsEntry`` or ``SubsetsEntry``."""

    images: int
    rows: Sequence[ShownEntry]


class CacheCounts(TypedDict):
    """What the support cache did; see ``data.cache.support.SupportStats``."""

    hits: int
    misses: dict[str, int]
    found_seconds: float
    encoded_seconds: float
    saved_seconds: float


class ShotsEntry(ShownTable):
    """Scores by the number of references; see ``evaluation.shots.ShotTable``."""

    classes: int
    left_out: int
    seed: int
    cache: CacheCounts


class SubsetsEntry(ShownTable):
    """Scores by the modalities shown; see ``evaluation.shots.SubsetTable``."""

    have: dict[str, int]
    mean: dict[str, float]
    worst: dict[str, float]


class DatasetScores(TypedDict):
    """Scores on a data set, of anything: measure -> fraction (HCE: a count)."""

    dataset: ReadOnly[str]
    scores: ReadOnly[Mapping[str, float]]


class TableEntry(DatasetScores):
    """What a line of a score table needs, of a result or of anything else that has scores.

    ``num_images`` is a text where two kinds of images are counted. ``intervals`` (measure -> two
    ends) are missing where nobody resampled the images, as in published scores.
    """

    method: ReadOnly[str]
    num_images: ReadOnly[int | str]
    intervals: NotRequired[ReadOnly[Mapping[str, tuple[float, float]]]]


class WithPresence(TypedDict, total=False):
    """Anything that may have a table of presence."""

    presence: ReadOnly[PresenceEntry]


class AskedTables(TypedDict, total=False):
    """Tables of a result: those that were asked for; ``presence`` where some images are empty."""

    robustness: RobustnessEntry
    experts: ExpertsEntry
    presence: PresenceEntry
    shots: ShotsEntry
    modalities: SubsetsEntry


class SourceEntry(TypedDict, total=False):
    """What was scored: the keys of ``evaluation.ModelSource``, or those of ``MapSource``."""

    checkpoint: str
    weights: str
    img_size: int
    precision: str
    zoom: bool
    baseline: dict[str, dict[str, float]]
    num_missing: int
    num_extra: int
    resize: str
    gt_threshold: int | None


class ResultEntry(AskedTables, SourceEntry):
    """An entry of ``results``: one method on one data set; see ``evaluation.EvaluationResult``."""

    dataset: str
    method: str
    num_images: int
    num_skipped: int
    scores: dict[str, float]
    intervals: dict[str, tuple[float, float]]
    protocol: str
    empty_gt: str
    data_hash: str
    breakdown: Breakdown
    curves: dict[str, list[float]]
    seconds: float
    unreadable: Sequence[str]
    num_unreadable: int
    split: NotRequired[str]  # not in files of older releases


class ComparisonEntry(TypedDict):
    """Method a against method b on one data set."""

    dataset: str
    a: str
    b: str
    measures: dict[str, dict[str, float]]


class GalleryEntry(TypedDict):
    """One picture: an image that scored best, worst or most differently, or was taken for the other
    kind.

    The kinds ``false_alarm`` and ``missed`` are those of images without and with an object that
    look most as if it were the other way round. ``values`` holds the score of each method in
    ``measure``, ``scores`` the main ones of a single model; ``panel`` is a path relative to
    ``scores.json``.
    """

    dataset: str
    kind: str
    name: str
    measure: str
    values: dict[str, float]
    panel: str
    scores: NotRequired[dict[str, float]]


class RunPicture(TypedDict):
    """A picture of a run: ``panel`` is relative to the run folder, its scores are beside its name.

    So they stood in the files of releases up to 0.1, which had neither ``measure`` nor ``values``.
    """

    name: str
    panel: str
    measure: NotRequired[str]
    values: NotRequired[dict[str, float]]
    wFmeasure: NotRequired[float]
    Smeasure: NotRequired[float]
    MAE: NotRequired[float]


class RunResult(AskedTables, SourceEntry, total=False):
    """The result of a data set as a run folder holds it, from whichever release.

    Releases up to 0.1 wrote ``DATASET.json`` with fewer keys, so all but the first three may be
    missing. ``gallery``: pictures by kind.
    """

    dataset: Required[str]
    scores: Required[dict[str, float]]
    num_images: Required[int]
    method: str
    num_skipped: int
    intervals: dict[str, tuple[float, float]]
    protocol: str
    empty_gt: str
    data_hash: str
    breakdown: Breakdown
    curves: dict[str, list[float]]
    seconds: float
    unreadable: Sequence[str]
    num_unreadable: int
    split: str
    gallery: dict[str, list[RunPicture]]


class ScoresFile(TypedDict):
    """The content of ``scores.json``, but for ``files``, the names of all that was written."""

    command: list[str]
    versions: dict[str, str]
    results: list[ResultEntry]
    comparisons: list[ComparisonEntry]
    gallery: list[GalleryEntry]


class EarlierScores(TypedDict, total=False):
    """``scores.json`` as it was found: {}, or with ``results`` and ``gallery``."""

    command: list[str]
    versions: dict[str, str]
    results: list[ResultEntry]
    comparisons: list[ComparisonEntry]
    gallery: list[GalleryEntry]
    files: list[str]


def holds_results(content: dict[str, Any]) -> TypeGuard[EarlierScores]:
    """Return whether a file holds results that can stand beside others."""
    results = content.get("results")
    known = isinstance(results, list) and all(
        isinstance(entry, dict)
        and isinstance(entry.get("scores"), dict)
        and isinstance(entry.get("curves"), dict)
        and {"method", "dataset", "protocol", "empty_gt"} <= entry.keys()
        for entry in results
    )
    return known and isinstance(content.get("gallery"), list)


def is_picture(entry: object) -> TypeGuard[GalleryEntry]:
    """Return whether a value from a file is a picture."""
    return isinstance(entry, dict) and {"name", "panel", "measure", "values"} <= entry.keys()


def is_run_result(entry: object) -> TypeGuard[RunResult]:
    """Return whether a value from a file is the result of a data set."""
    return isinstance(entry, dict) and bool(entry.get("scores"))
