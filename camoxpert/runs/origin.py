"""Where shared weights come from: the backbone's first weights, the training, the test scores."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from camoxpert.config import ModelConfig
from camoxpert.files import file_digest, read_json

UNKNOWN = "unknown"
RUN_FACTS = ("parameters", "gmacs", "images", "started")
RESULT_FACTS = (
    *("dataset", "num_images", "num_skipped", "scores", "intervals"),
    *("protocol", "empty_gt", "img_size", "precision", "data_hash"),
)


def backbone_origin(model: ModelConfig) -> dict[str, str]:
    """Return what the backbone of a run started from.

    Returns:
        ``source``: ``none`` (random), ``file``, ``model`` (an own one) or ``timm``; ``license``:
        that of these weights, as far as timm says, else ``unknown``; ``name``: timm's name of
        them; ``hub``: their repository on the Hub, or "".
    """
    known = {"name": "", "hub": "", "license": UNKNOWN}
    if model.init_from:
        return {**known, "source": "model"}
    if model.weights:
        return {**known, "source": "file"}
    if not model.pretrained:
        return {**known, "source": "none", "license": ""}
    import timm

    # None for a name that timm does not know or has no weights for.
    found = timm.get_pretrained_cfg(model.backbone) if timm.is_model(model.backbone) else None
    if found is None:
        return {**known, "source": "none", "license": ""}
    return {
        "source": "timm",
        "name": ".".join(part for part in (found.architecture, found.tag) if part),
        "hub": found.hf_hub_id or "",
        "license": found.license or UNKNOWN,
    }


def scored(checkpoint: Path) -> list[dict[str, Any]]:
    """Return the test scores in a run folder that are of this checkpoint's file."""
    entries = _read(checkpoint, "evaluation/scores.json").get("results")
    ours = [entry for entry in entries or () if isinstance(entry, dict) and "weights" in entry]
    if not ours or not checkpoint.is_file():
        return []
    digest = file_digest(checkpoint)
    kept = []
    for entry in ours:
        # Scores at two sizes are those of another way to use it.
        if entry["weights"] == digest and not str(entry.get("method")).endswith("-zoom"):
            row = {key: entry.get(key) for key in RESULT_FACTS}
            presence = entry.get("presence")
            if isinstance(presence, dict):
                row["presence"] = presence.get("scores")
            kept.append(row)
    return kept


def training_facts(checkpoint: Path) -> dict[str, Any]:
    """Return what ``run.json`` says of size, cost, images and versions; {} without a run."""
    info = _read(checkpoint, "run.json")
    facts = {key: info[key] for key in RUN_FACTS if key in info}
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


def _read(checkpoint: Path, name: str) -> dict[str, Any]:
    """Return a JSON file of the run folder that holds a checkpoint; {} without a run."""
    folder = checkpoint.parent
    return read_json(folder.parent / name) if folder.name == "checkpoints" else {}
