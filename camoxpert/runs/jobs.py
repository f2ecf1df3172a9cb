"""Folders of results of ``predict`` and ``synthesize``, typed: the rows of their ledgers, and where
the time of a call went.

Ledgers are ``predictions.jsonl`` and ``synthesis.jsonl``; see ``inference/ledger.py``. Engines say
where the time went, ``predict.json`` holds it, and pages read it. A number that was NaN or infinite
is null in the files.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypedDict, cast

from camoxpert.files import read_json

if TYPE_CHECKING:
    # Annotations are never evaluated, so Python 3.10 need not have it.
    from typing import NotRequired


class ImageFacts(TypedDict, total=False):
    """What a row says of an image that was made or looked at; of a video: the mean of its frames.

    ``confidence`` is of predictions, ``presence`` of models with the presence head.
    """

    height: int
    width: int
    object_fraction: float
    confidence: float
    presence: float
    seconds: dict[str, float]  # by stage


class VideoFacts(TypedDict, total=False):
    """What the row of a video says besides; ``shows`` where a video was written."""

    pictures: int
    every: int
    smooth: float
    shows: str


class MadeSource(TypedDict):
    """A file that an image was made from."""

    role: str
    path: str


class MadeFacts(TypedDict, total=False):
    """What the row of a made image says besides; each kind of image has some of it."""

    kind: str
    made: str
    group: str
    seed: int
    index: int
    parameters: dict[str, Any]  # those that were drawn
    sources: list[MadeSource]
    files: dict[str, str]  # kind -> path in the folder
    sha256: dict[str, str]
    test_source: str
    mask_source: str
    changed_fraction: float
    difficulty: float | None
    difficulty_source: float | None


class SourceFacts(TypedDict):
    """The file of an item as it was read; null where there was none, or where it changed then."""

    source: str | None
    size: int | None
    mtime_ns: int | None
    ctime_ns: int | None


class ItemRow(SourceFacts, ImageFacts, VideoFacts, MadeFacts):
    """A row of a ledger: the last attempt at an item.

    ``reason`` is of failures, which have neither ``kinds`` nor facts of an image; ``digest`` is
    missing where the file was not read.
    """

    item: str
    status: Literal["ok", "failed"]
    attempt: int
    worker: str
    digest: NotRequired[str | None]
    kinds: NotRequired[list[str]]
    reason: NotRequired[str]


class LoadFacts(TypedDict, total=False):
    """How long the model took to load; not said of videos, which use a loaded one."""

    load_seconds: float


class CudaFacts(TypedDict, total=False):
    """What is known of a CUDA device alone."""

    device_name: str
    peak_memory_bytes: int


class DeviceFacts(LoadFacts, CudaFacts):
    """The device of a worker, and how it was used."""

    device: str
    batch_size: int
    batch_size_reason: str


class TimingFacts(TypedDict):
    """Where the time of a worker went: see ``inference.timing.Timing``.

    The last two need more passes than those that warm up.
    """

    images: int
    wall_seconds: float
    images_per_second: float
    loop_seconds: dict[str, float]
    loop_shares: dict[str, float]  # of the wall clock; they add up to 1
    thread_seconds: dict[str, float]  # by stage; they overlap
    device_busy_share: float
    forward_passes: int
    warm_up_seconds_per_input: list[float]
    forward_seconds_per_input: NotRequired[dict[str, float]]  # p50, p95
    steady_inputs_per_second: NotRequired[float]


class WorkerSummary(DeviceFacts, TimingFacts):
    """A worker of a call, by its name."""

    worker: str


class LeakGuard(TypedDict):
    """The test sets that sources were compared with."""

    test_sets: list[str]
    test_images: int


class SourceNotes(TypedDict, total=False):
    """What ``synthesize`` says of its sources; each kind of image has some of them."""

    sources: int
    objects: int
    backgrounds: int
    not_pasted: dict[str, int]  # reason -> objects
    test_sources: dict[str, str]  # path -> why it is taken for a test image
    leak_guard: LeakGuard
    mask_models_loaded: int
    broken_sources: list[list[str]]  # path, reason


class JobSummary(SourceNotes, total=False):
    """The content of ``predict.json``, and of the file that ``synthesize`` writes beside images.

    {} where there was nothing to do; else the first four keys are there. Of the others, two are of
    engines with several processes, ``videos`` of ``predict``, ``caches`` of ``synthesize``.
    """

    engine: str  # local, devices or ray
    wall_seconds: float
    model_loads: int
    workers: list[WorkerSummary]
    load_seconds: list[float]  # of each load
    deaths: int
    videos: JobSummary  # where there were photos as well
    settings: dict[str, Any]  # the head of the ledger, and the kinds of files
    caches: dict[str, dict[str, int]]  # stage -> outcome -> how often


def read_summary(path: Path) -> JobSummary:
    """Read ``predict.json``; {} where it is missing or damaged."""
    return cast("JobSummary", read_json(path))
