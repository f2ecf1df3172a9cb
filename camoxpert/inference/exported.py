"""An exported file as a network: what ``predict``, ``evaluate``, ``serve`` and the API run."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from camoxpert.config import ModelConfig, config_from_dict
from camoxpert.errors import CheckpointError, ConfigError
from camoxpert.files import file_digest
from camoxpert.inference.runtimes import Runtime, open_runtime
from camoxpert.models.camoxpert import ModelOutput
from camoxpert.models.guidance import Guidance, Reference
from camoxpert.models.modalities import Modalities
from camoxpert.models.support import NOT_GUIDED
from camoxpert.runs.checkpoint import FORMAT, Checkpoint, CheckpointValues, StateValues
from camoxpert.runs.metadata import wrong
from camoxpert.runs.origin import SharedState

MEMORY = ("prototypes_KD", "class_text", "encoder_sha256")
"""Buffers of ``Guidance`` that an exported file takes along."""
STATE: Sequence[Literal["step", "epoch", "images"]] = ("step", "epoch", "images")
"""What an exported file says of its run."""
STRIDE = 32


class ExportedNetwork(nn.Module):
    """Stands for ``CamoXpert`` where an exported graph runs.

    Images of any size are padded (their border repeated) to multiples of 32, to the shortest side
    that the file may be given, and to the one size and batch of a static graph.

    Args:
        runtime: runs the graph.
        device: where images come from and maps go to.
    """

    expert_kinds: tuple[str, ...] = ()
    moe_levels: tuple[nn.Module, ...] = ()
    mean: Tensor

    def __init__(self, runtime: Runtime, device: torch.device) -> None:
        super().__init__()
        self.runtime = runtime
        self.about = runtime.about
        self.config: ModelConfig = config_from_dict(self.about["config"]).model
        # Tells where the network is, as the buffer of this name does in ``CamoXpert``.
        self.register_buffer("mean", torch.zeros(1, device=device), persistent=False)
        self.outputs = [name for name in self.about["outputs"] if name != "probability"]
        self.static: list[int] | None = self.about.get("static")
        self.least_side: int = self.about.get("least_side") or STRIDE
        memory = self.about.get("guidance")
        self.guidance = _memory(memory) if memory else None
        self.reference_D: Tensor | None = None

    def forward(
        self,
        images_BCHW: Tensor,
        reference: Reference | None = None,
        modalities: Modalities | None = None,
    ) -> ModelOutput:
        """Segment a batch of uint8 images; no side logits and no routing.

        Raises:
            ConfigError: larger images than those of a static graph, or modalities, which are no
                part of an exported graph.
        """
        if modalities is not None:
            raise ConfigError(
                "An exported file takes photographs alone. Use the checkpoint for what other "
                "sensors saw."
            )
        height, width = images_BCHW.shape[-2:]
        batch = len(images_BCHW)
        inputs = {"images": self._padded(images_BCHW)}
        if self.guidance is not None:
            inputs["reference"] = self._told(batch, reference)
        step = self.static[0] if self.static else max(batch, 1)
        parts = []
        for start in range(0, max(batch, 1), step):
            part = {name: value[start : start + step] for name, value in inputs.items()}
            parts.append(self._run(part, step))
        found = [torch.cat(pieces) for pieces in zip(*parts, strict=True)]
        logits = found[0][:, :, :height, :width]
        # From the probability, which is calibrated in the graph.
        presence = torch.logit(found[1]) if len(found) > 1 else None
        return ModelOutput(logits, (), (), presence)

    def presence_probability(self, output: ModelOutput) -> Tensor | None:
        """Return the calibrated probabilities (B,) that an image holds any object, or None."""
        logit = output.presence_logit_B
        return None if logit is None else logit.sigmoid()

    def search_for(self, features_D: Tensor | None) -> None:
        """As ``CamoXpert.search_for``."""
        if features_D is not None:
            self.require_guidance().check(features_D)
        self.reference_D = features_D

    def require_guidance(self) -> Guidance:
        """As ``CamoXpert.require_guidance``; it remembers the classes and steers nothing."""
        if self.guidance is None:
            raise ConfigError(NOT_GUIDED)
        return self.guidance

    def describe_decoder(self) -> str:
        """Return what it is in a few words."""
        return f"exported ({self.about['format']}, {self.about['precision']})"

    def level_names(self) -> tuple[str, ...]:
        """Return nothing: routing stays inside the graph."""
        return ()

    def _run(self, part: Mapping[str, Tensor], batch: int) -> list[Tensor]:
        """Run images, with repeated ones at the end where the graph takes more."""
        number = len(part["images"])
        arrays = {}
        for name, value in part.items():
            missing = batch - number
            if missing > 0:
                value = torch.cat([value, value[-1:].expand(missing, *value.shape[1:])])
            arrays[name] = np.ascontiguousarray(value.cpu().numpy())
        found = self.runtime.run(arrays, self.outputs)
        return [torch.from_numpy(array[:number]).to(self.mean.device) for array in found]

    def _padded(self, images_BCHW: Tensor) -> Tensor:
        height, width = images_BCHW.shape[-2:]
        if self.static:
            _, rows, columns = self.static
            if height > rows or width > columns:
                raise ConfigError(
                    f"This file was exported for images of {columns} x {rows} px (--static); "
                    f"{width} x {height} do not fit. Export it without --static, or leave "
                    "--tta scales out."
                )
        else:
            rows, columns = (
                max(self.least_side, -(-side // STRIDE) * STRIDE) for side in (height, width)
            )
        if (rows, columns) == (height, width):
            return images_BCHW
        pad = (0, columns - width, 0, rows - height)
        return F.pad(images_BCHW.float(), pad, mode="replicate").to(torch.uint8)

    def _told(self, batch: int, reference: Reference | None) -> Tensor:
        """Return the features (B, D) of what images are searched for; zeros for any object."""
        if reference is not None:
            return reference.features_BD.float().where(reference.present_B[:, None], 0.0)
        assert self.guidance is not None
        if self.reference_D is None:
            return torch.zeros(batch, self.guidance.features)
        return self.reference_D.float().expand(batch, -1)


def memory_of(guidance: Guidance) -> dict[str, Any]:
    """Return what an exported file takes along of a guidance, as JSON holds it."""
    kept: dict[str, Any] = {"features": guidance.features}
    for name in MEMORY:
        array = getattr(guidance, name).cpu().numpy()
        text = base64.b64encode(np.ascontiguousarray(array).tobytes()).decode()
        kept[name] = {"shape": list(array.shape), "dtype": str(array.dtype), "base64": text}
    return kept


def _memory(kept: Mapping[str, Any]) -> Guidance:
    guidance = Guidance(int(kept["features"]), 1, (1, 1), ())
    for name in MEMORY:
        entry = kept[name]
        array = np.frombuffer(base64.b64decode(entry["base64"]), entry["dtype"])
        setattr(guidance, name, torch.from_numpy(array.reshape(entry["shape"]).copy()))
    return guidance


def open_exported(
    path: Path, device: torch.device, precision: str = "auto"
) -> tuple[Checkpoint, ExportedNetwork]:
    """Open an exported file as a checkpoint without weights, and its network.

    Args:
        path: ``.onnx``, ``.xml`` or ``.pt2``.
        device: that runs it.
        precision: auto, or the one of the file.

    Raises:
        CheckpointError: not a file that ``export`` wrote, damaged, or of a later version.
        ConfigError: another precision, a missing library, or a device that it cannot use.
    """
    runtime = open_runtime(path, device)
    about = runtime.about
    if precision not in ("auto", about["precision"]):
        raise ConfigError(
            f"--precision {precision}: {path} was exported as {about['precision']}, and its "
            "precision is fixed. Leave --precision out, or export it again."
        )
    try:
        config = config_from_dict(about["config"])
    except ConfigError as error:
        raise CheckpointError(f"{path} was made by another version: {error}") from error
    try:
        network = ExportedNetwork(runtime, device)
    except (KeyError, TypeError, ValueError) as error:
        # What it remembers of its references are arrays as text.
        raise wrong(path, "guidance", about.get("guidance"), "what export wrote") from error
    values: CheckpointValues = {
        "format": FORMAT,
        "config": about["config"],
        # Where weights are asked for their names or their hash, the file's stands for them.
        "model": {"exported.sha256": torch.tensor(list(bytes.fromhex(digest_of(path))))},
        "ema": None,
        "scores": about.get("scores") or {},
        "state": _known(about.get("state")),
    }
    return Checkpoint(path, config, values), network


def _known(state: SharedState | None) -> StateValues:
    """Return where the run of a file stood, as far as the file says."""
    found: StateValues = {}
    for key in STATE:
        value = None if state is None else state.get(key)
        if value is not None:
            found[key] = value
    return found


def digest_of(path: Path) -> str:
    """Return the hash of an exported file; of OpenVINO's of both of its files."""
    import hashlib

    digests = file_digest(path)
    weights = path.with_suffix(".bin")
    if path.suffix.lower() == ".xml" and weights.is_file():
        both = digests + file_digest(weights)
        digests = hashlib.sha256(both.encode()).hexdigest()
    return digests
