"""The run folder: records, TensorBoard, what was run, and how long each phase took."""

from __future__ import annotations

import errno
import json
import math
import os
import platform
import subprocess
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from shutil import disk_usage
from typing import Any

import numpy as np

from camoxpert.errors import CheckpointError
from camoxpert.files import append_here, write_bytes

PACKAGES = (
    "camoxpert",
    "torch",
    "torchvision",
    "timm",
    "numpy",
    "opencv-python-headless",
    "albumentations",
)


def create_run_dir(parent: Path, name: str) -> Path:
    """Create ``parent/name``, or name-2, name-3 ...: a run never overwrites another."""
    parent.mkdir(parents=True, exist_ok=True)
    number = 1
    while True:
        path = parent / (name if number == 1 else f"{name}-{number}")
        try:
            path.mkdir()
        except FileExistsError:
            number += 1
        else:
            return path


class RunLog:
    """Writes a run's records.

    Args:
        run_dir: an existing folder.
        tensorboard: also write TensorBoard events; where it is missing or fails, one warning.
        resume_step: step a run continues from; TensorBoard hides what it showed beyond it.
    """

    def __init__(self, run_dir: Path, *, tensorboard: bool, resume_step: int | None = None) -> None:
        self.path = run_dir / "metrics.jsonl"
        self._file = append_here(self.path)
        self._phases: dict[str, float] = {}
        self._writer: Any = None
        if tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter

                self._writer = SummaryWriter(str(run_dir), purge_step=resume_step)
            except Exception as error:
                # Its import fails in many ways (protobuf, setuptools, numpy); none is the run's
                # fault.
                warnings.warn(f"TensorBoard is not available: {error}", stacklevel=2)

    @property
    def phases(self) -> dict[str, float]:
        """Wall seconds per phase so far."""
        return dict(self._phases)

    def write(self, record: Mapping[str, Any]) -> None:
        """Append one record as a line of JSON; NaN and infinity become null.

        Raises:
            CheckpointError: the disk is full, or the run folder is gone.
        """
        text = json.dumps(finite(record), allow_nan=False) + "\n"
        with self._explained():
            # An open file outlives its folder, and what is written to it is lost.
            if not self.path.exists():
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
            self._file.write(text)
            self._file.flush()

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Write TensorBoard scalars."""
        with self._optional():
            for tag, value in values.items() if self._writer is not None else ():
                self._writer.add_scalar(tag, value, step)

    def image(self, tag: str, array_HWC: np.ndarray, step: int) -> None:
        """Write a TensorBoard picture, uint8 RGB (H, W, 3)."""
        with self._optional():
            if self._writer is not None:
                self._writer.add_image(tag, array_HWC, step, dataformats="HWC")

    @contextmanager
    def _optional(self) -> Iterator[None]:
        """Go on without TensorBoard where it fails, with one warning: the run is worth more."""
        try:
            yield
        except Exception as error:
            # A full disk, mostly. Not closed: that would try to write what is left.
            self._writer = None
            warnings.warn(
                f"TensorBoard events cannot be written any more ({error}); the run goes on "
                f"without, and metrics.jsonl has every number.",
                stacklevel=4,
            )

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Turn the system's refusal to write records into a paragraph."""
        try:
            yield
        except OSError as error:
            folder = self.path.parent
            state = "The folder is gone"
            if folder.is_dir():
                state = f"{disk_usage(folder).free / 1e6:.0f} MB are free there"
            raise CheckpointError(
                f"The records of the run could not be written to {self.path}: "
                f"{error.strerror or error}. {state}. The checkpoints already written are "
                f"intact; free some space or put the folder back, and run the same command again "
                f"to continue."
            ) from error

    def truncate_after(self, step: int, *, epoch_done: bool = True) -> None:
        """Drop records that a run resumed from ``step`` will write again.

        Args:
            step: records beyond it go.
            epoch_done: False where the step is the last one of an epoch whose end (routing,
                validation) is still to come: those records of this very step go, too.
        """
        self._file.close()
        kept = [
            record
            for record in read_jsonl(self.path)
            if record.get("step", 0) < step
            or (record.get("step", 0) == step and (epoch_done or record.get("kind") == "train"))
        ]
        lines = "".join(json.dumps(record) + "\n" for record in kept)
        with self._explained():
            write_bytes(self.path, lines.encode(), durable=True)
            self._file = append_here(self.path)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the wall time of the block; a phase inside another is taken off the outer one."""
        outer_before = sum(self._phases.values())
        started = time.monotonic()
        try:
            yield
        finally:
            inside = sum(self._phases.values()) - outer_before
            self.add_phase(name, time.monotonic() - started - inside)

    def add_phase(self, name: str, seconds: float) -> None:
        """Add seconds to a phase."""
        self._phases[name] = self._phases.get(name, 0.0) + seconds

    def close(self) -> None:
        """Flush and close everything; never raises: it must not hide how a run ended."""
        with suppress(OSError):
            # What a full disk refused has been said when it was written.
            self._file.close()
        with self._optional():
            if self._writer is not None:
                self._writer.close()


class SilentLog(RunLog):
    """The log of a process that leaves writing to another one; it counts its phases."""

    def __init__(self) -> None:
        self._phases = {}

    def write(self, record: Mapping[str, Any]) -> None:
        """Write nothing."""

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Write nothing."""

    def image(self, tag: str, array_HWC: np.ndarray, step: int) -> None:
        """Write nothing."""

    def truncate_after(self, step: int, *, epoch_done: bool = True) -> None:
        """Change nothing."""

    def close(self) -> None:
        """Close nothing."""


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Read records; a torn line (the process died while writing it) ends the file."""
    records: list[dict[str, Any]] = []
    if not path.is_file():
        return records
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            records.append(json.loads(line))
        except ValueError:
            break
    return records


def write_json(path: Path, value: Any) -> None:
    """Write JSON, whole or not at all; NaN and infinity become null."""
    text = json.dumps(finite(value), indent=1, allow_nan=False)
    write_bytes(path, text.encode(), durable=True)


def write_run_json(
    run_dir: Path,
    *,
    argv: Sequence[str],
    device: str,
    data_hash: str,
    phases: Mapping[str, float],
    extra: Mapping[str, Any] | None = None,
) -> None:
    """Write ``run.json``: what was run, with what, on what. No host or user name is in it."""
    info = {
        "argv": list(argv),
        "status": "running",
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "device": device,
        "platform": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        "cores": os.cpu_count(),
        "versions": versions(),
        "git_commit": git_commit(Path(__file__).parents[2]),
        "data_hash": data_hash,
        "phases": dict(phases),
        **(extra or {}),
    }
    write_json(run_dir / "run.json", info)


def update_run_json(run_dir: Path, **fields: Any) -> None:
    """Change fields of ``run.json``."""
    path = run_dir / "run.json"
    write_json(path, {**json.loads(path.read_text()), **fields})


def versions() -> dict[str, str]:
    """Return the installed versions of what matters, without importing it."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def git_commit(folder: Path) -> str | None:
    """Return the commit of the checkout the package runs from, ``-dirty`` if changed; else None."""
    if not (folder / ".git").exists():
        return None
    command = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=10"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def finite(value: Any) -> Any:
    """Return a copy that JSON can hold: NaN and infinity become None, numpy scalars Python's."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    if isinstance(value, np.generic):
        return finite(value.item())
    return value
