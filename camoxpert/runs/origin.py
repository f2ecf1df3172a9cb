"""Where shared weights come from: the backbone's first weights, the training, the test scores."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict, TypeGuard

from torch import Tensor

from camoxpert.config import ModelConfig
from camoxpert.files import file_digest, read_json
from camoxpert.runs.records import RunInfo, read_info
from camoxpert.runs.scores import RunResult

if TYPE_CHECKING:
    # Annotations are never evaluated, so Python 3.10 need not have it.
    from typing import NotRequired

UNKNOWN = "unknown"


class BackboneOrigin(TypedDict):
    """What the backbone of a run started from; see ``backbone_origin``."""

    source: str
    name: str
    hub: str
    license: str


class SharedResult(TypedDict):
    """The test scores of shared weights on a data set; null what the evaluation did not say.

    ``presence``: where some images have no object.
    """

    dataset: str | None
    num_images: int | None
    num_skipped: int | None
    scores: dict[str, float] | None
    intervals: dict[str, tuple[float, float]] | None
    protocol: str | None
    empty_gt: str | None
    img_size: int | None
    precision: str | None
    data_hash: str | None
    presence: NotRequired[dict[str, float] | None]


class TrainingFacts(TypedDict, total=False):
    """What ``run.json`` says of the training; each key where it is there, {} without a run."""

    parameters: int
    gmacs: float
    images: dict[str, int]
    started: str
    versions: dict[str, str | None]


class SharedFacts(TypedDict, total=False):
    """Where shared weights come from: of ``About``, and of a checkpoint that was read from it.

    The first files of shared weights had none of them.
    """

    backbone_weights: BackboneOrigin | None
    results: list[SharedResult]
    training: TrainingFacts
    calibration: dict[str, float] | None
    license: str


class SharedState(TypedDict):
    """Where the run of shared weights stood; null: unknown."""

    step: int | None
    epoch: int | None
    images: int | None


class About(TypedDict):
    """What is said of shared weights, in ``model.safetensors`` and in ``config.json`` beside it.

    ``share.about_of`` makes it, cards and ``share.read_shared`` read it. Files of older releases
    lack keys; they are read as checkpoints, whose keys may be missing.
    """

    format: int
    config: dict[str, Any]  # nested settings, without paths
    scores: dict[str, float]  # of the validation
    state: SharedState
    data_hash: str | None
    backbone_weights: BackboneOrigin | None
    results: list[SharedResult]  # [] without tests
    training: TrainingFacts
    calibration: dict[str, float] | None  # None without a presence head
    license: str


def backbone_origin(model: ModelConfig) -> BackboneOrigin:
    """Return what the backbone of a run started from.

    Returns:
        ``source``: ``none`` (random), ``file``, ``model`` (an own one) or ``timm``; ``license``:
        that of these weights, as far as timm says, else ``unknown``; ``name``: timm's name of
        them; ``hub``: their repository on the Hub, or "".
    """
    known: BackboneOrigin = {"name": "", "hub": "", "license": UNKNOWN, "source": "none"}
    if model.init_from:
        return {**known, "source": "model"}
    if model.weights:
        return {**known, "source": "file"}
    if not model.pretrained:
        return {**known, "license": ""}
    import timm

    # None for a name that timm does not know or has no weights for.
    found = timm.get_pretrained_cfg(model.backbone) if timm.is_model(model.backbone) else None
    if found is None:
        return {**known, "license": ""}
    return {
        "source": "timm",
        "name": ".".join(part for part in (found.architecture, found.tag) if part),
        "hub": found.hf_hub_id or "",
        "license": found.license or UNKNOWN,
    }


def scored(checkpoint: Path) -> list[SharedResult]:
    """Return the test scores in a run folder that are of this checkpoint's file.

    Scores of images that it was trained or chosen with are none, nor are those at two sizes, which
    are of another way to use it.
    """
    entries = _read(checkpoint, "evaluation/scores.json").get("results")
    ours = [entry for entry in entries or () if _names_its_weights(entry)]
    if not ours or not checkpoint.is_file():
        return []
    digest = file_digest(checkpoint)
    kept = []
    for entry in ours:
        # Older releases say zoom by the name alone.
        zoomed = entry.get("zoom") or str(entry.get("method")).endswith("-zoom")
        other_split = entry.get("split") in ("train", "val")
        if entry["weights"] == digest and not zoomed and not other_split:
            row: SharedResult = {
                "dataset": entry.get("dataset"),
                "num_images": entry.get("num_images"),
                "num_skipped": entry.get("num_skipped"),
                "scores": entry.get("scores"),
                "intervals": entry.get("intervals"),
                "protocol": entry.get("protocol"),
                "empty_gt": entry.get("empty_gt"),
                "img_size": entry.get("img_size"),
                "precision": entry.get("precision"),
                "data_hash": entry.get("data_hash"),
            }
            presence = entry.get("presence")
            if isinstance(presence, dict):
                row["presence"] = presence.get("scores")
            kept.append(row)
    return kept


def _names_its_weights(entry: object) -> TypeGuard[RunResult]:
    return isinstance(entry, dict) and "weights" in entry


def training_facts(checkpoint: Path) -> TrainingFacts:
    """Return what ``run.json`` says of size, cost, images and versions; {} without a run."""
    run = _run_of(checkpoint)
    info: RunInfo = {} if run is None else read_info(run)
    facts: TrainingFacts = {}
    if "parameters" in info:
        facts["parameters"] = info["parameters"]
    if "gmacs" in info:
        facts["gmacs"] = info["gmacs"]
    if "images" in info:
        facts["images"] = info["images"]
    if "started" in info:
        facts["started"] = info["started"]
    versions = info.get("versions")
    if isinstance(versions, dict):
        facts["versions"] = {key: versions.get(key) for key in ("camoxpert", "torch", "timm")}
    return facts


def calibration_of(weights: Mapping[str, Tensor]) -> dict[str, float] | None:
    """Return temperature, bias and number of images of the presence head's calibration; None
    without the head."""
    parts = ("temperature", "bias", "images")
    found = {part: weights.get(f"presence.calibration.{part}") for part in parts}
    if any(value is None for value in found.values()):
        return None
    return {part: float(value) for part, value in found.items() if value is not None}


def _run_of(checkpoint: Path) -> Path | None:
    """Return the run folder that holds a checkpoint, or None."""
    folder = checkpoint.parent
    return folder.parent if folder.name == "checkpoints" else None


def _read(checkpoint: Path, name: str) -> dict[str, Any]:
    """Return a JSON file of the run folder that holds a checkpoint; {} without a run."""
    run = _run_of(checkpoint)
    return {} if run is None else read_json(run / name)
