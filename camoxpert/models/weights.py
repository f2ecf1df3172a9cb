"""Weight files and the weights' host: read without running code, and never wait for a dead host."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import torch
from torch import Tensor, nn

from camoxpert.errors import CheckpointError


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """Read tensors from a .safetensors or torch file without running code from it.

    Raises:
        CheckpointError: missing, damaged, not a state dict, or a pickle with code inside.
    """
    if not path.is_file():
        raise CheckpointError(f"--weights: there is no file {path}.")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(str(path))
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        # torch and safetensors raise half a dozen unrelated types for a damaged or hostile file.
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(
            f"--weights: {path} cannot be read as weights ({type(error).__name__}: {reason}). "
            "Expected a .safetensors file or a torch state dict that loads with weights_only=True."
        ) from error
    for key in ("ema", "model", "state_dict", "state_dict_ema"):
        if isinstance(loaded, dict) and isinstance(loaded.get(key), dict):
            loaded = loaded[key]
            break
    tensors = (
        {k: v for k, v in loaded.items() if isinstance(v, Tensor)}
        if isinstance(loaded, dict)
        else {}
    )
    if not tensors:
        raise CheckpointError(f"--weights: {path} holds no state dict.")
    return tensors


def load_weights(net: nn.Module, path: Path) -> None:
    """Load backbone weights from a file; every parameter of the backbone must be found in it.

    Accepts timm's names, CamoXpert checkpoints and the usual prefixes. The classifier of a
    classification checkpoint is ignored.
    """
    own = net.state_dict()
    source: dict[str, Tensor] = {}
    for key, tensor in read_state_dict(path).items():
        for prefix in ("module.", "_orig_mod.", "model.", "backbone.", "net.", "encoder."):
            key = key.removeprefix(prefix)
        source[next((name for name in _flattened(key) if name in own), key)] = tensor
    missing = [name for name in own if name not in source]
    wrong = [name for name in own if name in source and source[name].shape != own[name].shape]
    if missing or wrong:
        name = (missing or wrong)[0]
        raise CheckpointError(
            f"--weights: {path} does not fit this backbone: of {len(own)} tensors {len(missing)} "
            f"are missing and {len(wrong)} have another shape (first: {name}). Is it the file of "
            f"another backbone?"
        )
    net.load_state_dict({name: source[name] for name in own})


def _flattened(key: str) -> list[str]:
    """Return the spellings of a timm name: features_only turns the first dots into underscores."""
    parts = key.split(".")
    return [".".join(["_".join(parts[:n]), *parts[n:]]) for n in range(1, min(len(parts), 4) + 1)]


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
