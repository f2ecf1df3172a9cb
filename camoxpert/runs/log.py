"""The log of a run: records in ``metrics.jsonl``, TensorBoard events, and seconds per phase."""

from __future__ import annotations

import errno
import json
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from shutil import disk_usage
from typing import IO, Any

import numpy as np

from camoxpert import console
from camoxpert.errors import CheckpointError
from camoxpert.files import append_here, finite, read_jsonl, write_bytes
from camoxpert.runs.records import Record


class RunLog:
    """Writes a run's records and counts its phases.

    Args:
        run_dir: an existing folder; None writes nothing, as on ranks above 0.
        tensorboard: also write TensorBoard events; if they cannot be written, warn once and
            continue without them.
        resume_step: first step of a resumed run; TensorBoard hides its older events from there on.
    """

    def __init__(
        self,
        run_dir: Path | None = None,
        *,
        tensorboard: bool = False,
        resume_step: int | None = None,
    ) -> None:
        self.path = (run_dir or Path()) / "metrics.jsonl"
        self._file: IO[str] | None = append_here(self.path) if run_dir else None
        self._phases: dict[str, float] = {}
        self._writer: Any = None
        if run_dir and tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter

                self._writer = SummaryWriter(str(run_dir), purge_step=resume_step)
            except Exception as error:
                # Its import fails in many ways (protobuf, setuptools, numpy).
                console.warn(f"TensorBoard is not available: {error}")

    @property
    def phases(self) -> dict[str, float]:
        """Wall seconds per phase so far."""
        return dict(self._phases)

    def write(self, record: Record) -> None:
        """Append one record as a line of JSON; NaN and infinity become null.

        Raises:
            CheckpointError: the disk is full, or the run folder was removed.
        """
        if self._file is None:
            return
        text = json.dumps(finite(record), allow_nan=False) + "\n"
        with self._explained():
            # Writing to an open file succeeds after its folder was removed, and the data is lost.
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

    def truncate_after(self, step: int, *, epoch_done: bool = True) -> None:
        """Drop records that a run resumed from ``step`` will write again.

        Args:
            step: records beyond it are dropped.
            epoch_done: False if the end of the epoch (routing, validation) is still to come: its
                records are dropped as well if they are of this very step.
        """
        if self._file is None:
            return
        self._file.close()
        kept = [
            record
            for record in read_jsonl(self.path)
            if record.get("step", 0) < step
            or (record.get("step", 0) == step and (epoch_done or not _of_epoch_end(record)))
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
        """Flush and close everything; never raises: that would hide how the run ended."""
        # A full disk was already reported when a write failed.
        with suppress(OSError, CheckpointError), self._optional():
            if self._writer is not None:
                self._writer.close()
        with suppress(OSError):
            if self._file is not None:
                self._file.close()

    @contextmanager
    def _optional(self) -> Iterator[None]:
        """Continue without TensorBoard if it fails, with one warning."""
        try:
            yield
        except Exception as error:
            # Mostly a full disk. Not closed: that would try to write what is left.
            self._writer = None
            console.warn(
                f"TensorBoard events can no longer be written ({error}); the run continues "
                f"without them, and metrics.jsonl has every number."
            )

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Turn an OSError of the block into a CheckpointError that says what to do."""
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


def _of_epoch_end(record: Mapping[str, Any]) -> bool:
    return record.get("kind") in ("routing", "validation") or bool(record.get("epoch_end"))
