"""Checkpoints that can be trusted: written atomically, hashed, verified when read, two kept plus
best.

``checkpoints/step_00001200.pt`` holds everything a run needs to go on; ``checkpoints/best.pt``
holds the evaluated weights and the settings, for ``evaluate`` and ``predict``.
``checkpoints/index.json`` lists them with size and sha256. Files hold tensors and plain Python only
and are read with ``weights_only=True``, so that a checkpoint made by someone else cannot run code.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from camoxpert.config import Config, config_from_dict
from camoxpert.errors import CheckpointError, ConfigError

FORMAT = 1
BEST = "best.pt"
INDEX = "index.json"


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
    values: dict[str, Any]

    @property
    def evaluated_weights(self) -> dict[str, torch.Tensor]:
        """The weights that validation scored: the EMA where there is one."""
        ema = self.values.get("ema")
        return ema["weights"] if ema else self.values["model"]


class CheckpointFolder:
    """The ``checkpoints/`` folder of one run.

    Args:
        folder: created on the first save.
        keep: how many resumable checkpoints are kept.
    """

    def __init__(self, folder: Path, *, keep: int = 2) -> None:
        self.folder = folder
        self.keep = keep
        for leftover in folder.glob("*.tmp"):
            leftover.unlink()

    def save(self, values: Mapping[str, Any], *, step: int) -> Path:
        """Write a resumable checkpoint and forget the oldest beyond ``keep``."""
        path = self._write(f"step_{step:08d}.pt", values, step=step)
        entries = self._entries()
        resumable = sorted((e for e in entries if e["file"] != BEST), key=lambda e: e["step"])
        old = resumable[: -self.keep]
        self._write_index([e for e in entries if e not in old])
        for entry in old:
            (self.folder / entry["file"]).unlink(missing_ok=True)
        return path

    def save_best(self, values: Mapping[str, Any], *, step: int) -> Path:
        """Write the evaluated weights."""
        return self._write(BEST, values, step=step)

    def newest(self) -> tuple[Checkpoint | None, list[str]]:
        """Return the newest resumable checkpoint that passes verification, and what was wrong with
        newer ones.

        Returns (None, []) where there is nothing to continue from.

        Raises:
            CheckpointError: there are checkpoints and every one of them is damaged.
        """
        entries = [e for e in self._entries() if e["file"] != BEST]
        problems: list[str] = []
        for entry in sorted(entries, key=lambda e: e["step"], reverse=True):
            try:
                return load_checkpoint(self.folder / entry["file"]), problems
            except CheckpointError as error:
                problems.append(str(error))
        if problems:
            raise CheckpointError(
                f"No checkpoint in {self.folder} can be read: {' '.join(problems)} Nothing was "
                f"deleted. Start anew with --resume never."
            )
        return None, []

    def _write(self, name: str, values: Mapping[str, Any], *, step: int) -> Path:
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / name
        temporary = path.with_suffix(".pt.tmp")
        try:
            with temporary.open("wb") as file:
                torch.save(dict(values), file)
                file.flush()
                os.fsync(file.fileno())
            digest, size = file_digest(temporary), temporary.stat().st_size
            temporary.replace(path)
        except (OSError, RuntimeError) as error:
            # torch reports a full disk as a RuntimeError about an unexpected position.
            temporary.unlink(missing_ok=True)
            free = shutil.disk_usage(self.folder).free
            raise CheckpointError(
                f"Could not write {path}: {error}. {free / 1e6:.0f} MB are free there. The "
                f"checkpoints already written are intact; free some space and run the same "
                f"command again to continue."
            ) from error
        entry = {"file": name, "step": step, "bytes": size, "sha256": digest}
        self._write_index([e for e in self._entries() if e["file"] != name] + [entry])
        return path

    def _entries(self) -> list[dict[str, Any]]:
        return read_index(self.folder)

    def _write_index(self, entries: list[dict[str, Any]]) -> None:
        temporary = self.folder / f"{INDEX}.tmp"
        with temporary.open("w") as file:
            json.dump(entries, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(self.folder / INDEX)
        # The rename itself must survive a power cut, too.
        handle = os.open(self.folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def read_index(folder: Path) -> list[dict[str, Any]]:
    """Return the entries of ``index.json``, or [] where there is none or it is damaged."""
    try:
        entries = json.loads((folder / INDEX).read_text())
    except (OSError, ValueError):
        return []
    return [e for e in entries if isinstance(e, dict) and {"file", "step", "sha256"} <= e.keys()]


def file_digest(path: Path) -> str:
    """Return the sha256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def resolve_checkpoint(path: Path) -> Path:
    """Accept a checkpoint file, its folder or a run folder; return the file (best, else newest)."""
    if path.is_file():
        return path
    if not path.exists():
        raise CheckpointError(f"There is no checkpoint at {path}. Give a run folder or a .pt file.")
    folder = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    files = [folder / BEST, *sorted(folder.glob("step_*.pt"), reverse=True)]
    for file in files:
        if file.is_file():
            return file
    raise CheckpointError(
        f"{path} holds no checkpoint (looked for {BEST} and step_*.pt in {folder})."
    )


def load_checkpoint(path: Path) -> Checkpoint:
    """Read and verify a checkpoint file.

    Raises:
        CheckpointError: missing, damaged (its hash differs from the index), of another format, or a
            pickle with code inside.
    """
    if not path.is_file():
        raise CheckpointError(f"There is no checkpoint {path}.")
    known = next((e for e in read_index(path.parent) if e["file"] == path.name), None)
    if known is not None and file_digest(path) != known["sha256"]:
        raise CheckpointError(f"{path} is damaged: it differs from what was written (sha256).")
    try:
        values = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        # torch raises half a dozen unrelated types for a damaged or hostile file.
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(
            f"{path} cannot be read as a checkpoint ({type(error).__name__}: {reason})."
        ) from error
    if not isinstance(values, dict) or "config" not in values or "model" not in values:
        raise CheckpointError(
            f"{path} is not a CamoXpert checkpoint. Backbone weights are given with --weights."
        )
    if values.get("format") != FORMAT:
        raise CheckpointError(
            f"{path} has checkpoint format {values.get('format')}; this version reads format "
            f"{FORMAT}."
        )
    try:
        config = config_from_dict(values["config"])
    except ConfigError as error:
        raise CheckpointError(f"{path} was made by another version: {error}") from error
    return Checkpoint(path, config, values)
