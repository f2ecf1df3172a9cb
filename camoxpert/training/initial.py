"""``--init-from``: start from an own model; what fits is taken, what does not is listed."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from camoxpert import console
from camoxpert.config import Config, ModelConfig
from camoxpert.errors import CheckpointError, ConfigError
from camoxpert.models.camoxpert import CamoXpert
from camoxpert.models.experts import expert_kinds
from camoxpert.models.guidance import RESIZED
from camoxpert.models.modalities import PART
from camoxpert.models.router import folded
from camoxpert.models.stacked import FIELDS
from camoxpert.runs.checkpoint import Checkpoint, load_checkpoint, resolve_checkpoint
from camoxpert.text import count, shorten

EXPERT = re.compile(r"(decoder\.levels\.\d+\.moe\.)experts\.(\d+)\.(.+)")
ROUTER = re.compile(r"decoder\.levels\.\d+\.moe\.router\.")
ROWS = re.compile(
    r"decoder\.levels\.\d+\.moe\.router\."
    r"(gate\.(weight|bias)|bias_E|logit_norm\.running_(mean|var))"
)
LISTED = 12
"""Parts of the model that a line names."""
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


def start_from(model: CamoXpert, source: Checkpoint, *, keep_rgb: bool = False) -> None:
    """Copy the evaluated weights of another model as far as they fit, and print what does not.

    Experts are matched by kind, not by number, and the router's outputs with them. A single expert
    becomes many: see ``copies_of_one``.

    Raises:
        CheckpointError: nothing fits.
        ConfigError: noise was asked for, and no expert is copied; or with ``keep_rgb`` something
            of the photograph model does not fit: it would stay as random as it starts.
    """
    weights: Mapping[str, Tensor] = source.evaluated_weights
    own = model.state_dict()
    old, new = source.config.model, model.config
    if old.router_norm != "none" and new.router_norm == "none":
        weights = without_logit_norm(weights)
    copies = copies_of_one(own, weights, old, new)
    if new.upcycle_noise and not copies:
        raise ConfigError(
            f"model.upcycle_noise {new.upcycle_noise:g} is for the copies of a single expert, and "
            f"none is copied: {source.path} has {_describe(old)}, this model {_describe(new)}. "
            f"Leave it out."
        )
    taken = copies | _fitting(own, weights, old, new)
    learned = {name for name, _ in model.named_parameters()}
    if not taken.keys() & learned:
        raise CheckpointError(
            f"--init-from: nothing in {source.path} fits this model; its backbone is "
            f"{source.config.model.backbone} and its width {source.config.model.width}."
        )
    # The class memory is made of a run's own references.
    memory = {f"guidance.{name}" for name in RESIZED}
    new_names = [name for name in own if name not in taken and name not in memory]
    lacking = _parts(name for name in new_names if not name.startswith(PART))
    if keep_rgb and lacking:
        raise ConfigError(
            f"--keep-rgb trains the parts of the modalities alone, and {source.path} lacks others "
            f"of this model: {shorten(lacking, LISTED)}. They would stay as they start, at random. "
            f"Give the settings of that model, or leave --keep-rgb out."
        )
    model.load_state_dict(own | taken)
    if model.presence is not None:
        # That of the other model holds for its weights; this one is calibrated when it is trained.
        model.presence.calibration.set(1.0, 0.0, 0)
    console.decide("init", f"{len(taken)} of {len(own)} tensors from {source.path}")
    if copies:
        _decide_copies(_kinds(old)[0], new)
    fresh = _parts(new_names)
    if fresh:
        console.decide(
            "", f"not in it, or of another kind or size, and new here: {shorten(fresh, LISTED)}"
        )
        console.decide("", f"taken: {shorten(_parts(n for n in own if n in taken), LISTED)}")
    if any(name.startswith("backbone.net.") for name in own.keys() - taken.keys()):
        console.decide("", f"its backbone is {source.config.model.backbone}")


def without_logit_norm(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return weights that decide the same without standardising the logits of the routers."""
    made = {name: tensor for name, tensor in weights.items() if ".logit_norm." not in name}
    for name, mean_E in weights.items():
        if name.endswith(".logit_norm.running_mean"):
            root = name.removesuffix("logit_norm.running_mean")
            made[f"{root}gate.weight"], made[f"{root}gate.bias"] = folded(
                weights[f"{root}gate.weight"], mean_E, weights[f"{root}logit_norm.running_var"]
            )
    return made


def copies_of_one(
    own: Mapping[str, Tensor], weights: Mapping[str, Tensor], old: ModelConfig, new: ModelConfig
) -> dict[str, Tensor]:
    """Return own name -> tensor of all experts that start as a copy of the single one of a level.

    Empty unless the other model has one expert per level, this one several of them of its kind, and
    every tensor fits. With equal experts the mixture computes what the single one did, whatever the
    new router decides, if its gates sum to 1. Each copy gets noise of its own:
    ``model.upcycle_noise`` times the standard deviation of the tensor. Source: Komatsuzaki et al.,
    Sparse Upcycling, ICLR 2023.
    """
    if not _is_upcycled(old, new):
        return {}
    kinds = _kinds(new)
    taken: dict[str, Tensor] = {}
    for name, tensor in own.items():
        expert = EXPERT.fullmatch(name)
        if expert is not None and kinds[int(expert[2])] == _kinds(old)[0]:
            source = weights.get(f"{expert[1]}experts.0.{expert[3]}")
            if source is None or source.shape != tensor.shape:
                return {}
            if new.upcycle_noise:
                spread = source.float().std(correction=0)
                noise = torch.randn(source.shape, device=source.device)
                source = (source + new.upcycle_noise * spread * noise).to(source.dtype)
            taken[name] = source
    return taken


def _is_upcycled(old: ModelConfig, new: ModelConfig) -> bool:
    """Return whether a single expert meets several of its kind."""
    # Like experts in stacked weights differ in their receptive field: they are no copies.
    unlike = old.expert_family == new.expert_family == "specialist"
    return unlike and old.num_experts == 1 and _kinds(new).count(_kinds(old)[0]) > 1


def _decide_copies(kind: str, new: ModelConfig) -> None:
    """Print that experts start as copies."""
    number = _kinds(new).count(kind)
    noise = f", with noise of {new.upcycle_noise:g} x its spread" if new.upcycle_noise else ""
    console.decide(
        "upcycle",
        f"{number} of {new.num_experts} experts of a level start as copies of its single {kind} "
        f"expert{noise}; the routers are new",
    )
    if new.top_k == 1:
        console.decide(
            "",
            f"--top-k 1 scales them by their probability, at first 1/{new.num_experts}; with 2 and "
            f"more the mixture starts as the single expert",
        )


def _describe(model: ModelConfig) -> str:
    return f"{count(model.num_experts, 'expert')} ({', '.join(dict.fromkeys(_kinds(model)))})"


def _fitting(
    own: Mapping[str, Tensor], weights: Mapping[str, Tensor], old: ModelConfig, new: ModelConfig
) -> dict[str, Tensor]:
    """Return own name -> tensor to copy; without the experts and routers of an upcycled model."""
    upcycled = _is_upcycled(old, new)
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
        elif upcycled and (expert is not None or ROUTER.match(name)):
            source = None
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
