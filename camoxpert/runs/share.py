"""Weights for sharing: a safetensors file that cannot hold code, with settings and origin inside,
the same as JSON for readers, and a card."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from camoxpert.config import Config, config_from_dict, to_dict
from camoxpert.errors import CheckpointError, ConfigError
from camoxpert.files import finite, read_json, write_bytes, write_json
from camoxpert.runs.card import card
from camoxpert.runs.checkpoint import SHARED, Checkpoint, verified
from camoxpert.runs.hub import CARD, LIBRARY, SETTINGS
from camoxpert.runs.metadata import SHARED_SHAPE, check_shape
from camoxpert.runs.origin import (
    About,
    SharedFacts,
    backbone_origin,
    calibration_of,
    scored,
    training_facts,
)

# Settings with paths on the author's machine, which are not shared.
PRIVATE = (
    *("data.roots", "data.test_roots", "data.synthetic", "data.negatives", "data.unlabeled"),
    *("data.teacher", "data.cache_dir", "data.clean_list"),
    *("model.weights", "model.init_from"),
    *("run.dir", "run.name", "train.resume", "model.support.weights"),
    *("data.episodes.references", "data.splits"),
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


def write_shared(
    folder: Path, checkpoint: Checkpoint, *, licence: str = "", repo: str = ""
) -> Path:
    """Write the evaluated weights of a checkpoint for others; returns the folder.

    It holds ``model.safetensors`` (weights, settings, scores and origin, without paths on the
    author's machine), ``config.json`` (the same without the weights) and ``README.md``, a model
    card of the Hugging Face Hub. ``evaluate`` and ``predict`` take the folder or the file.

    Args:
        folder: created if missing.
        checkpoint: of a run, or one that was shared before.
        licence: of these weights, as the Hub writes it (``mit``, ``cc-by-nc-4.0``); "": the one
            that they were shared under before, or none.
        repo: ``USER/NAME`` for the commands of the card; "": a placeholder.

    Raises:
        CheckpointError: the folder cannot be written.
    """
    about = about_of(checkpoint, licence=licence)
    weights = {name: t.contiguous() for name, t in checkpoint.evaluated_weights.items()}
    try:
        metadata = {LIBRARY: json.dumps(about)}
        # The settings first: a folder that holds them is known to be ours.
        write_json(folder / SETTINGS, {"library_name": LIBRARY, **about})
        write_bytes(folder / SHARED, save(weights, metadata), durable=True)
        write_bytes(folder / CARD, card(about, repo).encode(errors="replace"))
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be written: {error}.") from error
    return folder


def save_shared(folder: Path, checkpoint: Checkpoint, *, licence: str = "", repo: str = "") -> Path:
    """Do ``write_shared`` into a folder of the user's choice, over an earlier one at most.

    Raises:
        ConfigError: it holds files of the same names that are not ours.
        CheckpointError: it cannot be written.
    """
    there = [name for name in (SHARED, SETTINGS, CARD) if (folder / name).exists()]
    if there and read_json(folder / SETTINGS).get("library_name") != LIBRARY:
        raise ConfigError(
            f"{folder / there[0]} exists, and it is not from a model that was saved here before. "
            "Nothing was written; name a new or empty folder."
        )
    return write_shared(folder, checkpoint, licence=licence, repo=repo)


def about_of(checkpoint: Checkpoint, *, licence: str = "") -> About:
    """Return what is said of shared weights, as JSON holds it."""
    values = checkpoint.values
    state = values.get("state") or {}
    # What was shared before knows its origin, and its run is elsewhere.
    before: SharedFacts = {}
    if checkpoint.path.suffix == ".safetensors":
        before = values
    about: About = {
        "format": values["format"],
        "config": shared_settings(checkpoint.config),
        "scores": values.get("scores", {}),
        "state": {
            "step": state.get("step"),
            "epoch": state.get("epoch"),
            "images": state.get("images"),
        },
        "data_hash": values.get("data_hash"),
        "backbone_weights": before.get("backbone_weights")
        or (backbone_origin(checkpoint.config.model) if not before else None),
        "results": before.get("results") or scored(checkpoint.path),
        "training": before.get("training") or training_facts(checkpoint.path),
        "calibration": calibration_of(checkpoint.evaluated_weights),
        "license": licence or before.get("license", ""),
    }
    known: About = finite(about)
    return known


def read_shared(path: Path) -> Checkpoint:
    """Read what ``write_shared`` wrote. Settings with paths are left out, whoever wrote them.

    Raises:
        CheckpointError: damaged, a safetensors file of something else, or ``config.json`` beside it
            holds other settings.
    """
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            metadata: dict[str, str] = file.metadata() or {}
            weights: dict[str, torch.Tensor] = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118
        about: dict[str, Any] = json.loads(metadata.get(LIBRARY, "{}"))
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read as safetensors ({error}).") from error
    if not isinstance(about, dict) or "config" not in about:
        raise CheckpointError(
            f"{path} is not a CamoXpert checkpoint. Backbone weights are given with --weights."
        )
    check_shape(path, about, SHARED_SHAPE)
    beside = read_json(path.parent / SETTINGS) if path.name == SHARED else {}
    if beside.get("library_name") == LIBRARY and beside.get("config") != about["config"]:
        raise CheckpointError(
            f"{path.parent / SETTINGS} holds other settings than {path.name}, whose weights go "
            f"with its own. Bring back the {SETTINGS} that was saved with it, or delete it."
        )
    found = verified(path, {"data_hash": None, **about, "model": weights, "ema": None})
    return dataclasses.replace(found, config=config_from_dict(shared_settings(found.config)))
