"""``--init-from``: start from an own model; what fits is taken, what does not is listed."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from camoxpert import console
from camoxpert.config import Config, ModelConfig
from camoxpert.errors import CheckpointError
from camoxpert.models.camoxpert import CamoXpert
from camoxpert.models.experts import expert_kinds
from camoxpert.models.stacked import FIELDS
from camoxpert.runs.checkpoint import Checkpoint, load_checkpoint, resolve_checkpoint
from camoxpert.text import count, shorten

EXPERT = re.compile(r"(decoder\.levels\.\d+\.moe\.)experts\.(\d+)\.(.+)")
ROWS = re.compile(r"decoder\.levels\.\d+\.moe\.(router\.gate\.(weight|bias)|router\.bias_E)")
STACKED = re.compile(r"decoder\.levels\.\d+\.moe\.experts\.\w+")


def read_initial(config: Config) -> Checkpoint | None:
    """Return the model that ``--init-from`` names, or None without it.

    Raises:
        CheckpointError: there is none, or it is damaged.
    """
    if not config.model.init_from:
        return None
    try:
        return load_checkpoint(resolve_checkpoint(Path(config.model.init_from)))
    except CheckpointError as error:
        raise CheckpointError(f"--init-from: {error}") from error


def start_from(model: CamoXpert, source: Checkpoint) -> None:
    """Copy the evaluated weights of another model as far as they fit, and print what does not.

    Experts are matched by kind, not by number, and the router's outputs with them.

    Raises:
        CheckpointError: nothing fits.
    """
    weights = source.evaluated_weights
    own = model.state_dict()
    taken = _fitting(own, weights, source.config.model, model.config)
    learned = {name for name, _ in model.named_parameters()}
    if not taken.keys() & learned:
        raise CheckpointError(
            f"--init-from: nothing in {source.path} fits this model; its backbone is "
            f"{source.config.model.backbone} and its width {source.config.model.width}."
        )
    model.load_state_dict(own | taken)
    console.decide("init", f"{len(taken)} of {len(own)} tensors from {source.path}")
    fresh = _parts(name for name in own if name not in taken)
    if fresh:
        console.decide("", f"not in it, or of another kind or size, and new here: {shorten(fresh)}")
    if any(name.startswith("backbone.net.") for name in own.keys() - taken.keys()):
        console.decide("", f"its backbone is {source.config.model.backbone}")


def _fitting(
    own: Mapping[str, Tensor], weights: Mapping[str, Tensor], old: ModelConfig, new: ModelConfig
) -> dict[str, Tensor]:
    """Return own name -> tensor to copy."""
    same_backbone = old.backbone == new.backbone
    place = _matched(_kinds(old), _kinds(new))
    known = all(number is not None for number in place)
    same_family = old.expert_family == new.expert_family
    taken: dict[str, Tensor] = {}
    for name, tensor in own.items():
        expert = EXPERT.fullmatch(name)
        stacked = new.expert_family == "uniform" and STACKED.fullmatch(name) is not None
        if name.startswith("backbone.") or name in ("mean", "std"):
            # Equal names and shapes in another network say nothing.
            source = weights.get(name) if same_backbone else None
        elif expert is not None:
            number = place[int(expert[2])] if same_family else None
            key = f"{expert[1]}experts.{number}.{expert[3]}"
            source = weights.get(key) if number is not None else None
        elif stacked or ROWS.fullmatch(name):
            source = weights.get(name) if known and same_family else None
            if source is not None:
                source = source[torch.tensor([number or 0 for number in place])]
        elif ".moe.shared." in name and old.shared_expert != new.shared_expert:
            source = None
        else:
            source = weights.get(name)
        if source is not None and source.shape == tensor.shape:
            taken[name] = source
    return taken


def _kinds(model: ModelConfig) -> tuple[str, ...]:
    if model.expert_family == "uniform":
        fields = tuple(FIELDS)
        return tuple(fields[i % len(fields)] for i in range(model.num_experts))
    return expert_kinds(model.num_experts, model.experts)


def _matched(old: Sequence[str], new: Sequence[str]) -> list[int | None]:
    """Return for each new expert the number of an old one of its kind that is not taken yet."""
    left = list(range(len(old)))
    found: list[int | None] = []
    for kind in new:
        number = next((number for number in left if old[number] == kind), None)
        if number is not None:
            left.remove(number)
        found.append(number)
    return found


def _parts(names: Iterable[str]) -> list[str]:
    """Return the parts of the model that tensors belong to, with their number."""
    parts: dict[str, int] = {}
    for name in names:
        words = name.split(".")
        part = ".".join(words[: 6 if "experts" in words else 5 if "moe" in words else 3])
        if words[0] == "backbone":
            part = "backbone"
        parts[part] = parts.get(part, 0) + 1
    return [f"{part} ({count(number, 'tensor')})" for part, number in parts.items()]
