"""Checkpoints that can be trusted: written whole, hashed, verified when read, the last two and the
best kept.

``checkpoints/step_00001200.pt`` holds everything a run needs to go on; ``checkpoints/best.pt``
holds the evaluated weights and the settings, for ``evaluate`` and ``predict``.
``checkpoints/index.json`` lists them with size and sha256. Files hold tensors and plain Python only
and are read with ``weights_only=True``, so that a checkpoint made by someone else cannot run code.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from camoxpert.config import Config, config_from_dict
from camoxpert.errors import CheckpointError, ConfigError
from camoxpert.files import write_bytes

FORMAT = 1
BEST = "best.pt"
INDEX = "index.json"
SHARED = "model.safetensors"


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
    """The ``checkpoints/`` folder of one run, which this process owns.

    Args:
        folder: created on the first save; what a killed write left behind is removed.
        keep: how many resumable checkpoints are kept, besides those marked to stay.
    """

    def __init__(self, folder: Path, *, keep: int = 2) -> None:
        self.folder = folder
        self.keep = keep
        for leftover in folder.glob("*.tmp"):
            leftover.unlink()

    def save(
        self,
        values: Mapping[str, Any],
        *,
        step: int,
        stays: bool = False,
        about: Mapping[str, Any] | None = None,
    ) -> Path:
        """Write a resumable checkpoint and forget the oldest beyond ``keep``.

        Args:
            values: tensors and plain Python.
            step: optimizer step; a checkpoint of the same step is replaced.
            stays: never forget this one.
            about: more for its entry in the index.
        """
        more = {**(about or {}), **({"stays": True} if stays else {})}
        path = self._write(f"step_{step:08d}.pt", values, step=step, about=more)
        entries = read_index(self.folder)
        # In the order of writing: a run that went back to an earlier step goes on from there.
        resumable = [e for e in entries if e["file"] != BEST and not e.get("stays")]
        old = resumable[: -self.keep]
        self._write_index([e for e in entries if e not in old])
        for entry in old:
            (self.folder / entry["file"]).unlink(missing_ok=True)
        self._forget_strays()
        return path

    def _forget_strays(self) -> None:
        """Remove what a process left that died between writing the index and removing a file.

        Not while the index is new: where it was lost, those files are what is left.
        """
        listed = {e["file"] for e in read_index(self.folder)}
        if len(listed - {BEST}) >= self.keep:
            for path in self.folder.glob("step_*.pt"):
                if path.name not in listed:
                    path.unlink(missing_ok=True)

    def save_best(
        self, values: Mapping[str, Any], *, step: int, about: Mapping[str, Any] | None = None
    ) -> Path:
        """Write the evaluated weights."""
        return self._write(BEST, values, step=step, about=about or {})

    def newest(self) -> tuple[Checkpoint | None, list[str]]:
        """Return the newest resumable checkpoint that passes verification, and what was wrong with
        newer ones.

        Files of the index come first, last written first; then those that are in the folder alone
        (the index was lost, or the process died before it was written).

        Returns (None, []) where there is nothing to continue from.

        Raises:
            CheckpointError: there are checkpoints and every one of them is damaged.
        """
        names = [e["file"] for e in reversed(read_index(self.folder)) if e["file"] != BEST]
        alone = sorted((p.name for p in self.folder.glob("step_*.pt")), reverse=True)
        names += [name for name in alone if name not in names]
        problems: list[str] = []
        for name in names:
            try:
                return load_checkpoint(self.folder / name), problems
            except CheckpointError as error:
                problems.append(str(error))
        if problems:
            raise CheckpointError(
                f"No checkpoint in {self.folder} can be read: {' '.join(problems)} Nothing was "
                f"deleted. Start anew with --resume never."
            )
        return None, []

    def require_space(self, size: int, *, others: int = 0) -> None:
        """Raise CheckpointError where the checkpoints of a run will not fit its disk.

        Args:
            size: bytes of a resumable checkpoint.
            others: of them that stay besides.
        """
        # The kept ones, the one being written before the oldest goes, and the best weights.
        needed = size * (self.keep + 1 + others) + size // 3
        there = sum(path.stat().st_size for path in self.folder.glob("*.pt"))
        place = next(p for p in (self.folder, *self.folder.parents) if p.exists())
        free = shutil.disk_usage(place).free
        if needed > free + there:
            raise CheckpointError(
                f"No space for checkpoints: {self.folder} needs {needed / 1e6:.0f} MB and has "
                f"{(free + there) / 1e6:.0f} MB. Free some, or give another place with "
                f"--checkpoint-dir."
            )

    def _write(
        self, name: str, values: Mapping[str, Any], *, step: int, about: Mapping[str, Any]
    ) -> Path:
        if not self.folder.parent.is_dir():
            raise CheckpointError(
                f"The run folder {self.folder.parent} is gone: step {step} cannot be saved. It was "
                f"moved or deleted while the run was writing to it."
            )
        self.folder.mkdir(exist_ok=True)
        path = self.folder / name
        temporary = path.with_suffix(".pt.tmp")
        needed = tensor_bytes(values)
        try:
            free = shutil.disk_usage(self.folder).free
            if needed > free:
                raise OSError(errno.ENOSPC, "No space left on device")
            with temporary.open("wb") as file:
                torch.save(dict(values), file)
                file.flush()
                os.fsync(file.fileno())
            digest, size = file_digest(temporary), temporary.stat().st_size
            entries = read_index(self.folder)
            before = next((e for e in entries if e["file"] == name), None)
            if before is not None:
                # Killed between the two renames, the new content is as good as the old one.
                before["pending"] = digest
                self._write_index(entries)
            temporary.replace(path)
            entry = {"file": name, "step": step, "bytes": size, "sha256": digest, **about}
            self._write_index([e for e in read_index(self.folder) if e["file"] != name] + [entry])
        except (OSError, RuntimeError) as error:
            # torch reports a full disk as a RuntimeError about an unexpected position.
            if self.folder.is_dir():
                temporary.unlink(missing_ok=True)
                free = shutil.disk_usage(self.folder).free
            raise CheckpointError(
                f"Could not write {path}: {error}. It needs {needed / 1e6:.1f} MB and "
                f"{free / 1e6:.1f} MB are free there. The checkpoints already written are intact; "
                f"put that right and run the same command again to continue."
            ) from error
        return path

    def _write_index(self, entries: list[dict[str, Any]]) -> None:
        write_bytes(self.folder / INDEX, json.dumps(entries, indent=1).encode(), durable=True)
        # The renames themselves must survive a power cut, too.
        handle = os.open(self.folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def tensor_bytes(value: Any) -> int:
    """Return the bytes of all tensors in nested dictionaries and lists."""
    if isinstance(value, torch.Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, Mapping):
        return sum(tensor_bytes(item) for item in value.values())
    if isinstance(value, (list, tuple)):
        return sum(tensor_bytes(item) for item in value)
    return 0


def read_index(folder: Path) -> list[dict[str, Any]]:
    """Return the entries of ``index.json``, or [] where there is none or it is damaged."""
    try:
        entries = json.loads((folder / INDEX).read_text())
    except (OSError, ValueError):
        return []
    if not isinstance(entries, list):
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
    """Accept a checkpoint file, its folder, a run folder or a folder of shared weights; return the
    file (best, else newest)."""
    if path.is_file():
        return path
    if not path.exists():
        raise CheckpointError(f"There is no checkpoint at {path}. Give a run folder or a .pt file.")
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
            # torch does not look at the checksums of its own container.
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


def verified(path: Path, values: Any) -> Checkpoint:
    """Return what was read as a checkpoint; raises CheckpointError where it is something else."""
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
