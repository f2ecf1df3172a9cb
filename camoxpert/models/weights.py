"""Weight files and the weights' host: read without running code, and never wait for a dead host."""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import socket
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch
from torch import Tensor, nn

from camoxpert import console
from camoxpert.errors import CheckpointError
from camoxpert.files import why_missing
from camoxpert.text import shorten

# Names of state dicts with averaged weights, which were the evaluated ones: taken first.
AVERAGED = (
    *("ema", "model_ema", "state_dict_ema", "ema_state_dict", "ema_model", "params_ema"),
    "teacher",
)
FILTERS = re.compile(r"(checkpoint|pretrained)_filter_fn|_filter_(fn|torchvision_pretrained)")
"""Names that timm's files give to their translations of official parameter names."""
DEEPEST = 4
"""Levels of dictionaries, and words of a prefix, that are looked through."""


@dataclass(frozen=True)
class Fit:
    """How much of a network a state dict holds.

    Attributes:
        found: the network's name -> tensor of the same shape.
        missing: names of the network that it lacks.
        wrong: names of another shape, each with both shapes.
        spare: its own names that nothing was taken from.
    """

    found: dict[str, Tensor]
    missing: list[str]
    wrong: list[str]
    spare: list[str]

    @property
    def complete(self) -> bool:
        """Whether all of the network was found."""
        return not self.missing and not self.wrong


def read_state_dicts(path: Path, *, option: str = "--weights") -> dict[str, dict[str, Tensor]]:
    """Read the state dicts of a .safetensors or torch file without running code from it.

    Args:
        path: the file.
        option: that named it, for errors.

    Returns:
        Where in the file -> tensors by name; averaged weights come first.

    Raises:
        CheckpointError: missing, damaged, without tensors, or a pickle with code inside.
    """
    if not path.is_file():
        raise CheckpointError(f"{option}: {why_missing(path, 'file')}")
    try:
        if path.suffix.lower() == ".safetensors":
            from safetensors.torch import load_file

            return {"": load_file(str(path))}
        # Official files often carry their command line, which is plain data.
        with torch.serialization.safe_globals([argparse.Namespace]):
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        # torch and safetensors raise half a dozen unrelated types for a damaged or hostile file.
        code = re.search(r"GLOBAL (\S+)", str(error))
        if code is not None:
            raise CheckpointError(
                f"{option}: {path} cannot be read as weights: it holds a Python object "
                f"({code[1]}), and opening it could run code. Where you trust it, load it yourself "
                f"and save its state_dict()."
            ) from error
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(
            f"{option}: {path} cannot be read as weights ({type(error).__name__}: {reason}). "
            "Expected a .safetensors file or a torch state dict that loads with weights_only=True."
        ) from error
    found = dict(_state_dicts(loaded))
    if not found:
        raise CheckpointError(f"{option}: {path} holds no state dict.")
    averaged = {place: d for place, d in found.items() if set(place.split(".")) & {*AVERAGED}}
    return averaged | found


def _state_dicts(node: Any, place: str = "", depth: int = 0) -> Iterator[tuple[str, Any]]:
    """Yield every dictionary with named tensors, outermost first, with its place."""
    if not isinstance(node, Mapping) or depth > DEEPEST:
        return
    named = {k: v for k, v in node.items() if isinstance(k, str)}
    tensors = {k: v for k, v in named.items() if isinstance(v, Tensor)}
    if tensors:
        yield place, tensors
    for key, value in named.items():
        # The optimizer's state has tensors as well.
        if "optim" not in key:
            yield from _state_dicts(value, f"{place}.{key}" if place else key, depth + 1)


def load_weights(
    net: nn.Module,
    path: Path,
    *,
    name: str = "",
    options: Mapping[str, Any] | None = None,
    option: str = "--weights",
    what: str = "backbone",
) -> None:
    """Load the weights of a network from a file; every parameter of it must be found there.

    The state dict may lie in other dictionaries, with any prefix; official names are translated by
    timm's own functions. Parts that the network lacks, such as a classifier, are ignored.

    Args:
        net: the network.
        path: the file.
        name, options: with which timm built ``net``; without a name nothing is translated.
        option: that named the file, for errors.
        what: the network is to its model, for errors.

    Raises:
        CheckpointError: unreadable, or of another network; the text has names of both sides.
    """
    best: tuple[str, Fit] | None = None
    for place, tensors in read_state_dicts(path, option=option).items():
        fit = best_fit(net, tensors, name=name, options=options)
        if best is None or len(fit.found) > len(best[1].found):
            best = place, fit
        if fit.complete:
            best = place, fit
            break
    assert best is not None
    place, fit = best
    if not fit.complete:
        differences = _differences(net, fit, name, what)
        raise CheckpointError(f"{option}: {path} does not fit {differences}")
    net.load_state_dict(fit.found)
    inside = f" ({place})" if place else ""
    decoder = sum(key.startswith("decoder.") for key in fit.spare)
    more = f", {len(fit.spare)} others not used" if fit.spare else ""
    console.decide("weights", f"{len(fit.found)} tensors from {path}{inside}{more}")
    if decoder:
        console.decide(
            "warning",
            f"{path} is a whole CamoXpert model and --weights takes its backbone alone: the "
            f"{decoder} tensors of its decoder are not used. --init-from {path} starts from all "
            f"of it.",
        )


def best_fit(
    net: nn.Module,
    tensors: Mapping[str, Tensor],
    *,
    name: str = "",
    options: Mapping[str, Any] | None = None,
) -> Fit:
    """Return the fit of a state dict under the prefix, and the translation, that fit best."""
    fits = []
    for prefix in _prefixes(tensors, len(net.state_dict())):
        inside = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
        outside = [k for k in tensors if not k.startswith(prefix)]
        for translated in _translations(inside, name, options or {}):
            fit = _fit(net, translated, outside)
            if fit.complete:
                return fit
            fits.append(fit)
    return max(fits, key=lambda fit: len(fit.found))


def _prefixes(tensors: Mapping[str, Tensor], size: int) -> list[str]:
    """Return the prefixes under which as many names lie as the network has, nearly; "" first."""
    counts: Counter[str] = Counter()
    for key in tensors:
        words = key.split(".")
        counts.update(".".join(words[:n]) + "." for n in range(1, min(len(words), DEEPEST + 1)))
    return ["", *(prefix for prefix, number in counts.items() if 2 * number >= size)]


def _translations(
    tensors: dict[str, Tensor], name: str, options: Mapping[str, Any]
) -> Iterator[dict[str, Tensor]]:
    """Yield the tensors as they are, then as timm translates official names of the network."""
    yield tensors
    import timm

    if not timm.is_model(name):
        return
    module = sys.modules[timm.model_entrypoint(name).__module__]
    filters = [value for key, value in vars(module).items() if FILTERS.fullmatch(key)]
    if not filters:
        return
    with torch.device("meta"):
        whole = timm.create_model(name, pretrained=False, **options)
    for translate in filters:
        # Made for the official files alone: on others it fails in its own way, or changes nothing.
        with contextlib.suppress(Exception):
            translated = translate(dict(tensors), whole)
            yield {k: v for k, v in translated.items() if isinstance(v, Tensor)}


def _fit(net: nn.Module, tensors: Mapping[str, Tensor], outside: list[str]) -> Fit:
    own = net.state_dict()
    source: dict[str, Tensor] = {}
    spare = list(outside)
    for key, tensor in tensors.items():
        place = next((spelled for spelled in _spellings(key) if spelled in own), None)
        if place is None:
            spare.append(key)
        else:
            source[place] = tensor
    # A count of batches that some files lack; only a running mean without momentum reads it.
    for key, tensor in own.items():
        if key.endswith("num_batches_tracked"):
            source.setdefault(key, tensor)
    wrong = [
        f"{key} {tuple(source[key].shape)} in the file, {tuple(own[key].shape)} here"
        for key in own
        if key in source and source[key].shape != own[key].shape
    ]
    found = {k: v for k, v in source.items() if v.shape == own[k].shape}
    return Fit(found, [key for key in own if key not in source], wrong, spare)


def _differences(net: nn.Module, fit: Fit, name: str, what: str) -> str:
    """Return what a file lacks and what it has, in words."""
    total = len(net.state_dict())
    text = f"this {what}{f' ({name})' if name else ''}: of {total} tensors "
    parts = []
    if fit.missing:
        parts.append(f"{len(fit.missing)} are missing ({shorten(fit.missing, 3)})")
    if fit.wrong:
        parts.append(f"{len(fit.wrong)} have another shape ({shorten(fit.wrong, 2)})")
    text += " and ".join(parts)
    spare = f" The file also has {shorten(fit.spare, 3)}." if fit.spare else ""
    return f"{text}.{spare} Is it the file of another {what}?"


def _spellings(key: str) -> list[str]:
    """Return the spellings of a timm name: features_only turns the first dots into underscores, or
    puts the network into a module of its own."""
    parts = key.split(".")
    flat = [".".join(["_".join(parts[:n]), *parts[n:]]) for n in range(1, min(len(parts), 4) + 1)]
    return [*flat, f"model.{key}", *(f"body.{name}" for name in flat)]


@contextmanager
def offline_if_unreachable() -> Iterator[None]:
    """Let the hub client use only its cache inside the block if its host cannot be reached.

    Otherwise it retries for most of a minute before it raises an error.
    """
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = before or not hub_reachable()
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def hub_reachable(*, seconds: float = 3.0) -> bool:
    """Return whether the weights' host answers; assumed behind a proxy."""
    if any(name.lower() in ("https_proxy", "all_proxy") for name in os.environ):
        return True
    address = urlsplit(os.environ.get("HF_ENDPOINT") or "https://huggingface.co")
    try:
        port = address.port or (80 if address.scheme == "http" else 443)
        socket.create_connection((address.hostname or "", port), timeout=seconds).close()
    except (OSError, ValueError):
        return False
    return True
