"""What a run records about itself, typed: the lines of ``metrics.jsonl`` and ``run.json``.

A number that was NaN or infinite is null in the files. A file may come from elsewhere, so readers
must expect missing keys and values of another type.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypedDict, cast

from camoxpert.files import read_json, read_jsonl

if TYPE_CHECKING:
    # Annotations are never evaluated, so Python 3.10 need not have it.
    from typing import NotRequired

    from camoxpert.metrics.presence import PresenceEntry
    from camoxpert.runs.scores import CacheCounts


class _AtStep(TypedDict):
    step: int  # optimizer steps done
    epoch: int  # from 1
    stage: int  # 1 or 2


class TrainRecord(_AtStep):
    """A logged optimizer step."""

    kind: Literal["train"]
    loss: float
    terms: dict[str, float]
    lr: float
    grad_norm: float
    images_per_second: float | None
    data_wait: float | None  # share of the time, 0..1
    gpu: float | None  # utilisation in percent
    memory: int | None  # bytes in use on the device


class _Validation(_AtStep):
    kind: Literal["validation"]
    scores: dict[str, float]
    best: bool
    weights: Literal["ema", "model"]


class ValidationRecord(_Validation, total=False):
    """The scores of an epoch.

    ``presence`` where there are images without an object: as in ``scores.json``.
    """

    unreadable: list[str]
    presence: PresenceEntry
    guided: dict[str, float]  # with references
    rgb: dict[str, float]  # photographs alone, of a model with other modalities


def deciding_score(record: ValidationRecord, measure: str) -> float:
    """Return the score by which a validation chooses weights.

    Without references a guided model must find everything that is hidden: half of its training.
    What it does with them is what it is for. A model with other modalities is for images with all
    of them as well as for photographs: the mean.
    """
    score = (record.get("guided") or record["scores"])[measure]
    alone = record.get("rgb")
    return (score + alone[measure]) / 2 if alone else score


class LevelRouting(TypedDict):
    """How one level of the model used its experts; lists are in the experts' order."""

    usage: list[float]  # share of choices
    gate: list[float]  # share of probability
    entropy: float  # of the usage: 1 is uniform, 0 a single expert
    max_violation: float  # excess of the busiest expert over its fair share, as a multiple of it
    units: int  # images, or regions of images, that were routed


class RoutingRecord(_AtStep):
    """Which experts the images of an epoch used, by level."""

    kind: Literal["routing"]
    experts: list[str]
    levels: dict[str, LevelRouting]


class ImageFacts(TypedDict):
    """An image of a skipped step: name, mean grey value (0..255), share of object pixels."""

    name: str
    mean: float
    object: float


class _Event(TypedDict):
    kind: Literal["event"]
    text: str


class EventRecord(_Event, total=False):
    """Something worth a line in the report; the last five keys belong to a skipped step.

    With ``epoch_end`` it belongs to the end of an epoch: routing and validation.
    """

    step: int
    epoch: int
    epoch_end: bool
    loss: float
    grad_norm: float
    lr: float
    scale: float | None
    images: list[ImageFacts]


Record = TrainRecord | ValidationRecord | RoutingRecord | EventRecord


class BatchRecord(TypedDict):
    """The batching that was chosen: see ``training.batching.Batching``.

    Read back when the run continues; the first versions did not write the last three.
    """

    size: int
    steps: int
    checkpointing: bool
    reason: str
    predicted: int | None
    measured: int | None
    processes: NotRequired[int]
    stage2_size: NotRequired[int | None]
    asked: NotRequired[Sequence[int | None]]


class StageRecord(TypedDict):
    """A stage before this run."""

    name: str
    key: str
    verdict: str  # what the cache said
    seconds: float  # that training took, now or before


class EncoderRecord(TypedDict):
    """The network that describes references: see ``models.support.Facts``."""

    encoder: str
    weights: str
    side: int
    version: int


class GuidanceRecord(TypedDict, total=False):
    """What describes the references of a guided run; {} without guidance, else all of it."""

    encoder: EncoderRecord
    width: int
    references: int
    cache: CacheCounts
    cache_text: str


class FitRecord(TypedDict):
    """What calibrated the presence head, and its gain: see ``training.calibrate.Fit``."""

    temperature: float
    bias: float
    objects: int
    empty: int
    before: float
    after: float


class RunInfo(TypedDict, total=False):
    """The content of ``run.json``.

    A key is there once it is known, and may be missing in files of older releases.
    """

    argv: list[str]
    status: str  # running, finished, stopped or failed
    started: str  # ISO time, UTC
    device: str
    platform: str
    cores: int | None
    versions: dict[str, str]
    git_commit: str | None
    data_hash: str
    files: dict[str, str]  # sha256 of the files that settings name, by dotted path
    images: dict[str, int]  # of each kind; "..._per_epoch": how many of them an epoch sees
    presence: FitRecord
    phases: dict[str, float]  # wall seconds
    decisions: list[str]
    recipe: dict[str, float]  # dotted path -> value of the settings that the preset filled
    precision: str
    parameters: int
    gmacs: float
    guidance: GuidanceRecord
    quick: dict[str, str]  # dotted path -> what makes it a quick run; {} for a whole one
    stages: list[StageRecord]  # before this run
    batch: BatchRecord


class Records(NamedTuple):
    """The records of a run by kind, in their order."""

    train: list[TrainRecord]
    validation: list[ValidationRecord]
    routing: list[RoutingRecord]
    events: list[EventRecord]

    @property
    def best(self) -> ValidationRecord | None:
        """The validation that chose the weights, or None."""
        return next((record for record in reversed(self.validation) if record.get("best")), None)


def read_records(path: Path) -> Records:
    """Read ``metrics.jsonl``; a missing file has no records."""
    lines = [line for line in read_jsonl(path) if isinstance(line, dict)]
    kinds = ("train", "validation", "routing", "event")
    # The kind is all that is checked: the types say what our own lines hold besides.
    return Records(*(cast(Any, [r for r in lines if r.get("kind") == kind]) for kind in kinds))


def read_info(run_dir: Path) -> RunInfo:
    """Read ``run.json``; empty where it is missing or damaged."""
    return cast(RunInfo, read_json(run_dir / "run.json"))
