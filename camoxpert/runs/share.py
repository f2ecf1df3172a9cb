"""Weights for sharing: one safetensors file that cannot hold code, with its settings inside, and a
card that says what it is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from camoxpert.config import Config, to_dict
from camoxpert.config.data import RGB
from camoxpert.errors import CheckpointError
from camoxpert.files import write_bytes
from camoxpert.runs.checkpoint import FORMAT, SHARED, Checkpoint, verified

# Settings with paths on the author's machine, which are not shared.
PRIVATE = (
    *("data.roots", "data.test_roots", "data.synthetic", "data.negatives", "data.unlabeled"),
    *("data.teacher", "data.cache_dir", "data.clean_list"),
    *("model.weights", "model.init_from"),
    *("run.dir", "run.name", "train.resume", "model.support.weights"),
    "data.episodes.references",
)


def shared_settings(config: Config) -> dict[str, Any]:
    """Return settings as nested mappings, without paths on the author's machine."""
    settings = to_dict(config)
    for path in PRIVATE:
        *groups, name = path.split(".")
        holder = settings
        for group in groups:
            holder = holder[group]
        kept = holder[name]
        holder[name] = [] if isinstance(kept, list) else "auto" if name == "resume" else ""
    return settings


def write_shared(folder: Path, checkpoint: Checkpoint) -> Path:
    """Write the evaluated weights of a checkpoint for others; returns the folder.

    It holds ``model.safetensors`` (weights, settings and scores, without paths on the
    author's machine) and ``README.md``. ``evaluate`` and ``predict`` take the folder or the file.

    Args:
        folder: created if missing.
        checkpoint: of a run.

    Raises:
        CheckpointError: the folder cannot be written.
    """
    settings = shared_settings(checkpoint.config)
    state = checkpoint.values.get("state", {})
    about = {
        "format": checkpoint.values["format"],
        "config": settings,
        "scores": checkpoint.values.get("scores", {}),
        "state": {name: state.get(name) for name in ("step", "epoch", "images")},
    }
    weights = {name: t.contiguous() for name, t in checkpoint.evaluated_weights.items()}
    try:
        write_bytes(folder / SHARED, save(weights, {"camoxpert": json.dumps(about)}), durable=True)
        write_bytes(folder / "README.md", card(about).encode(errors="replace"))
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be written: {error}.") from error
    return folder


def read_shared(path: Path) -> Checkpoint:
    """Read what ``write_shared`` wrote.

    Raises:
        CheckpointError: damaged, or a safetensors file of something else.
    """
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            metadata: dict[str, str] = file.metadata() or {}
            weights: dict[str, torch.Tensor] = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118
        about: dict[str, Any] = json.loads(metadata.get("camoxpert", "{}"))
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read as safetensors ({error}).") from error
    if not isinstance(about, dict) or "config" not in about:
        raise CheckpointError(
            f"{path} is not a CamoXpert checkpoint. Backbone weights are given with --weights."
        )
    return verified(path, {"data_hash": None, **about, "model": weights, "ema": None})


def card(about: dict[str, Any]) -> str:
    """Return the README that goes with shared weights."""
    model, data = about["config"]["model"], about["config"]["data"]
    scores = about["scores"]
    rows = "".join(f"| {_plain(name)} | {value:.3f} |\n" for name, value in scores.items())
    table = f"| measure | validation |\n| --- | --- |\n{rows}\n" if rows else ""
    return (
        f"# CamoXpert weights: {_plain(model['backbone'])}, {model['num_experts']} experts, top "
        f"{model['top_k']}\n\nA mixture-of-experts network that finds camouflaged objects, "
        f"trained at {data['img_size']} px.{_sensors(data)}\n\n{table}```\n"
        f"camoxpert predict THIS_FOLDER photos/ "
        f"-o out/\ncamoxpert evaluate THIS_FOLDER --data DATASET\n```\n\n`{SHARED}` holds weights "
        f"and settings and no code (checkpoint format {FORMAT}).\n"
    )


def _sensors(data: dict[str, Any]) -> str:
    """Return a sentence about the modalities beside the photograph, if there are any."""
    names = [_plain(name) for name in data.get("modalities", ()) if name != RGB]
    if not names:
        return ""
    return (
        f" Beside photographs it takes {', '.join(names)}, any of which may be missing: `predict "
        f"--modality {names[0]} FOLDER`."
    )


def _plain(text: Any) -> str:
    """Return text without characters that Markdown or HTML interpret."""
    return "".join(c if c.isalnum() or c in " _-." else " " for c in str(text))
