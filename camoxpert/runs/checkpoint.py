"""Reading checkpoints: verified by hash, tensors and plain Python only.

Files are read with ``weights_only=True``, so that a checkpoint made by someone else cannot run
code. ``runs/store.py`` writes them.
"""

from __future__ import annotations

import json
import zipfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict, TypeGuard, cast

import torch

from camoxpert.config import Config, ModelConfig, config_from_dict
from camoxpert.errors import CheckpointError, ConfigError
from camoxpert.files import file_digest, no_path
from camoxpert.runs.hub import WEIGHTS, fetch, hub_address, hub_name, is_hub_name
from camoxpert.runs.origin import SharedFacts

if TYPE_CHECKING:
    # Annotations are never evaluated, so Python 3.10 need not have it.
    from typing import NotRequired

FORMAT = 1
BEST = "best.pt"
INDEX = "index.json"
SHARED = WEIGHTS
PRESENCE = "presence."
"""Start of the names of the presence head's tensors."""


class StateValues(TypedDict, total=False):
    """Where a run stands: see ``training.run.TrainState``.

    Of shared weights the first keys of three alone are known, or none: then they are null there.
    """

    step: int
    epoch: int
    position: int
    images: int
    best: float | None
    best_epoch: int
    stale: int
    skipped: int
    skipped_in_a_row: int
    seconds: float
    ended: str


class EmaValues(TypedDict):
    """The averaged weights, and how often they were updated."""

    weights: dict[str, torch.Tensor]
    updates: int


class RoutingValues(TypedDict):
    """The routing of an epoch that was stopped midway: see ``training.routing``.

    The first versions counted images, the units of all levels.
    """

    chosen: torch.Tensor | None
    mass: torch.Tensor | None
    units: NotRequired[list[int]]
    images: NotRequired[int]


class RandomStates(TypedDict):
    """The random states of a process; ``cuda`` where it has a device."""

    cpu: torch.Tensor
    cuda: NotRequired[torch.Tensor]


class BatchValues(TypedDict):
    """How an optimizer step is taken."""

    size: int
    steps: int
    processes: int
    effective: dict[str, int]  # stage -> images of a step


class OverfitValues(TypedDict):
    """Losses of ``--overfit-batches``: of the steps of this epoch, and of the epochs before."""

    steps: list[float]
    losses: list[float]


class CheckpointValues(SharedFacts):
    """What ``step_*.pt`` and ``best.pt`` hold, and shared weights besides their tensors.

    Every file has the first three keys, and the next three where training wrote it. ``scores`` are
    those of evaluated weights; the rest is what a run needs to continue, and is in ``step_*.pt``
    alone. The first versions wrote neither ``files``, ``routing``, ``other_rngs`` nor ``batch``.
    """

    format: int
    config: dict[str, Any]  # nested settings
    model: dict[str, torch.Tensor]
    ema: NotRequired[EmaValues | None]
    data_hash: NotRequired[str | None]
    state: NotRequired[StateValues]
    files: NotRequired[dict[str, str]]  # sha256 of the files that settings name, by dotted path
    optimizer: NotRequired[dict[str, Any]]  # torch's
    scaler: NotRequired[dict[str, Any]]  # torch's
    routing: NotRequired[RoutingValues]
    rng: NotRequired[RandomStates]  # of rank 0
    other_rngs: NotRequired[list[RandomStates]]
    batch: NotRequired[BatchValues]
    scores: NotRequired[dict[str, float]]
    overfit: NotRequired[OverfitValues]


class IndexFacts(TypedDict, total=False):
    """What the index says of a file besides, where training wrote it.

    ``pending``: the hash of what is about to replace the file, while it does.
    """

    epoch: int
    best: float | None
    data_hash: str
    torch: str
    threads: int
    processes: int
    stays: bool  # it is never deleted
    pending: str


class IndexEntry(IndexFacts):
    """An entry of ``index.json``; only files of other programs lack ``bytes``."""

    file: str
    step: int
    sha256: str
    bytes: NotRequired[int]


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint in memory, on the CPU.

    Attributes:
        path: where it came from.
        config: the settings of its run.
        values: everything that was saved.
    """

    path: Path
    config: Config
    values: CheckpointValues

    @property
    def evaluated_weights(self) -> dict[str, torch.Tensor]:
        """The weights that validation scored: the EMA where there is one."""
        ema = self.values.get("ema")
        return ema["weights"] if ema else self.values["model"]

    @property
    def model_config(self) -> ModelConfig:
        """The settings that build its network: no weights are read from elsewhere, and what its run
        decided (``model.presence=auto``) is as the weights have it."""
        has_head = any(name.startswith(PRESENCE) for name in self.evaluated_weights)
        return replace(
            self.config.model,
            pretrained=False,
            weights="",
            presence="on" if has_head else "off",
        )


def resolve_checkpoint(path: Path) -> Path:
    """Return the checkpoint file that a model's name stands for; every command's names end here.

    Args:
        path: a checkpoint file, its folder, a run folder, a folder of shared weights (best, else
            newest), or ``hf:USER/NAME@REVISION``, a model on the Hub (see ``hub.fetch``).

    Raises:
        CheckpointError: there is none, or it cannot be had.
        ConfigError: the name of a model on the Hub that cannot be one.
    """
    if is_hub_name(path):
        return fetch(hub_name(path))
    if path.is_file():
        return path
    if not path.exists():
        address = hub_address(path)
        if address:
            raise CheckpointError(
                f"{path} is a page. For the model on it write {address}, which downloads it once."
            )
        raise CheckpointError(
            no_path(path, "run folder or .pt file")
            or f"There is no checkpoint at {path}. Give a run folder or a .pt file."
        )
    folder = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    newest = sorted(folder.glob("step_*.pt"), reverse=True)
    for file in (folder / BEST, *newest, folder / SHARED):
        if file.is_file():
            return file
    raise CheckpointError(
        f"{path} holds no checkpoint (looked for {BEST}, step_*.pt and {SHARED} in {folder})."
    )


def load_checkpoint(path: Path) -> Checkpoint:
    """Read and verify a checkpoint file, or shared weights (``.safetensors``).

    Raises:
        CheckpointError: missing, damaged (its hash differs from the index, or its own checksums
            fail), of another format, or a pickle with code inside.
    """
    if not path.is_file():
        raise CheckpointError(f"There is no checkpoint {path}.")
    if path.suffix == ".safetensors":
        from camoxpert.runs.share import read_shared

        return read_shared(path)
    known = next((e for e in read_index(path.parent) if e["file"] == path.name), None)
    if known is not None and file_digest(path) not in (known["sha256"], known.get("pending")):
        raise CheckpointError(f"{path} is damaged: it differs from what was written (sha256).")
    try:
        if known is None:
            # torch does not verify the checksums of its zip container.
            with zipfile.ZipFile(path) as container:
                damaged = container.testzip()
            if damaged is not None:
                raise CheckpointError(f"{path} is damaged: the checksum of {damaged} is wrong.")
        values = torch.load(path, map_location="cpu", weights_only=True)
    except CheckpointError:
        raise
    except Exception as error:
        # torch raises half a dozen unrelated types for a damaged or hostile file.
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(
            f"{path} cannot be read as a checkpoint ({type(error).__name__}: {reason})."
        ) from error
    return verified(path, values)


def verified(path: Path, values: object) -> Checkpoint:
    """Return what was read as a checkpoint; raises CheckpointError if it is not one."""
    if not _holds_weights(values):
        raise CheckpointError(
            f"{path} is not a CamoXpert checkpoint. Backbone weights are given with --weights."
        )
    if values.get("format") != FORMAT:
        raise CheckpointError(
            f"{path} has checkpoint format {values.get('format')}; this version reads format "
            f"{FORMAT}."
        )
    ema: Any = values.get("ema") or {"weights": {}}
    held = (values["model"], ema.get("weights") if isinstance(ema, dict) else None)
    if not all(isinstance(w, dict) and all(map(torch.is_tensor, w.values())) for w in held):
        raise CheckpointError(f"{path} is damaged: its weights are not tensors with names.")
    try:
        config = config_from_dict(values["config"])
    except ConfigError as error:
        raise CheckpointError(f"{path} was made by another version: {error}") from error
    return Checkpoint(path, config, values)


def read_index(folder: Path) -> list[IndexEntry]:
    """Return the entries of ``index.json``, or [] where there is none or it is damaged."""
    try:
        entries = json.loads((folder / INDEX).read_text())
    except (OSError, ValueError):
        return []
    if not isinstance(entries, list):
        return []
    return [entry for entry in entries if _is_entry(entry)]


def _is_entry(entry: object) -> TypeGuard[IndexEntry]:
    return isinstance(entry, dict) and {"file", "step", "sha256"} <= entry.keys()


def facts_of(entry: IndexEntry) -> IndexFacts:
    """Return what an entry says of its file, to be said of the one that replaces it."""
    known = ("file", "step", "bytes", "sha256", "pending")
    # mypy cannot follow which keys are left.
    return cast("IndexFacts", {key: value for key, value in entry.items() if key not in known})


def _holds_weights(values: object) -> TypeGuard[CheckpointValues]:
    return isinstance(values, dict) and "config" in values and "model" in values
