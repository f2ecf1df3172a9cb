"""Writing checkpoints: atomic and hashed; the last two and the best are kept.

``checkpoints/step_00001200.pt`` holds everything a run needs to continue; ``checkpoints/best.pt``
holds the evaluated weights and the settings, for ``evaluate`` and ``predict``.
``checkpoints/index.json`` lists them with size and sha256.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from camoxpert.errors import CheckpointError
from camoxpert.files import file_digest, write_bytes
from camoxpert.runs.checkpoint import (
    BEST,
    INDEX,
    Checkpoint,
    CheckpointValues,
    IndexEntry,
    IndexFacts,
    load_checkpoint,
    read_index,
)

NUMBERED = re.compile(r"step_\d{8,}\.pt")
"""Names of resumable checkpoints; others are the user's."""


class CheckpointFolder:
    """The ``checkpoints/`` folder of one run, which this process owns.

    Args:
        folder: created on the first save.
        keep: how many resumable checkpoints are kept, besides those marked to stay.
    """

    def __init__(self, folder: Path, *, keep: int = 2) -> None:
        self.folder = folder
        self.keep = keep

    def clean(self) -> None:
        """Remove what a killed write left behind; for the process that owns the folder."""
        for leftover in self.folder.glob("*.tmp"):
            leftover.unlink(missing_ok=True)

    def save(
        self,
        values: CheckpointValues,
        *,
        step: int,
        stays: bool = False,
        about: IndexFacts | None = None,
    ) -> Path:
        """Write a resumable checkpoint and delete the oldest beyond ``keep``.

        Args:
            values: tensors and plain Python.
            step: optimizer step; a checkpoint of the same step is replaced.
            stays: never delete this one.
            about: further fields of its entry in the index.
        """
        more = IndexFacts() if about is None else about.copy()
        if stays:
            more["stays"] = True
        path = self._write(f"step_{step:08d}.pt", values, step=step, about=more)
        entries = read_index(self.folder)
        # In the order of writing: a run that went back to an earlier step continues from there.
        resumable = [e for e in entries if e["file"] != BEST and not e.get("stays")]
        old = resumable[: -self.keep]
        self._write_index([e for e in entries if e not in old])
        for entry in old:
            (self.folder / entry["file"]).unlink(missing_ok=True)
        self._forget_strays()
        return path

    def _adopt(self) -> None:
        """List the files of a lost index, old ones for good: it knew which of them were to stay."""
        if read_index(self.folder):
            return
        entries: list[IndexEntry] = [
            {
                "file": path.name,
                "step": int(path.stem.removeprefix("step_")),
                "bytes": path.stat().st_size,
                "sha256": file_digest(path),
            }
            for path in self._numbered()
        ]
        for entry in entries[: -self.keep]:
            entry["stays"] = True
        if entries:
            self._write_index(entries)

    def _numbered(self) -> list[Path]:
        """Return the files whose names this class gives to resumable checkpoints, by step."""
        return sorted(p for p in self.folder.glob("step_*.pt") if NUMBERED.fullmatch(p.name))

    def _forget_strays(self) -> None:
        """Remove files left by a process that died between writing the index and deleting them."""
        listed = {e["file"] for e in read_index(self.folder)}
        for path in self._numbered():
            if path.name not in listed:
                path.unlink(missing_ok=True)

    def save_best(
        self, values: CheckpointValues, *, step: int, about: IndexFacts | None = None
    ) -> Path:
        """Write the evaluated weights."""
        return self._write(BEST, values, step=step, about=about or {})

    def save_weights(
        self,
        name: str,
        values: CheckpointValues,
        *,
        step: int,
        about: IndexFacts | None = None,
    ) -> Path:
        """Write evaluated weights under a name of their own, in a folder without resumable ones."""
        return self._write(name, values, step=step, about=about or {})

    def newest(self) -> tuple[Checkpoint | None, list[str]]:
        """Return the newest resumable checkpoint that passes verification, and what was wrong with
        newer ones.

        Files of the index come first, last written first; then files that the index does not list
        (it was lost, or the process died before it was written).

        Returns (None, []) if there is nothing to continue from.

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
                f"deleted. Start a new run with --resume never."
            )
        return None, []

    def set_best_aside(self, step: int) -> str:
        """Rename the best weights if they are of a later step than the one a run goes back to.

        The run may never be as good again, and they are not of what it learns from now on. Without
        a checkpoint as late as they, nothing goes back: the process died before it wrote that.

        Args:
            step: of the checkpoint that the run continues from.

        Returns:
            The new name, or "" if they stay.
        """
        entries = read_index(self.folder)
        best = next((e for e in entries if e["file"] == BEST), None)
        later = [
            path for path in self.folder.glob("step_*.pt") if path.name > f"step_{step:08d}.pt"
        ]
        path = self.folder / BEST
        if best is None or best["step"] <= step or not later or not path.is_file():
            return ""
        name = f"best_of_step_{best['step']:08d}.pt"
        path.replace(self.folder / name)
        self._write_index([e for e in entries if e["file"] != BEST])
        return name

    def require_space(self, size: int, *, others: int = 0) -> None:
        """Raise CheckpointError if the checkpoints of a run will not fit on its disk.

        Args:
            size: bytes of a resumable checkpoint.
            others: number of checkpoints that are never deleted.
        """
        # Those kept, the one written before the oldest is deleted, and the best weights.
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

    def _write(self, name: str, values: CheckpointValues, *, step: int, about: IndexFacts) -> Path:
        if not self.folder.parent.is_dir():
            raise CheckpointError(
                f"The run folder {self.folder.parent} is gone: step {step} cannot be saved. It was "
                f"moved or deleted while the run was writing to it."
            )
        self.folder.mkdir(exist_ok=True)
        self.clean()
        self._adopt()
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
                # If killed between the two renames, both the old and the new content are valid.
                before["pending"] = digest
                self._write_index(entries)
            temporary.replace(path)
            entry: IndexEntry = {
                "file": name,
                "step": step,
                "bytes": size,
                "sha256": digest,
                **about,
            }
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

    def _write_index(self, entries: list[IndexEntry]) -> None:
        write_bytes(self.folder / INDEX, json.dumps(entries, indent=1).encode(), durable=True)
        # The renames themselves must survive a power cut as well.
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
