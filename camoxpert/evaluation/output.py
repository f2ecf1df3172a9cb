"""Where an evaluation writes: all of it or nothing, and never over what is not its own."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path
from types import TracebackType

from camoxpert.errors import ConfigError, DataError
from camoxpert.files import leads_outside

MARKER = "scores.json"
"""Lists, under "files", what an evaluation wrote; only that may be replaced."""


class OutputFolder:
    """Collects files in an unfinished folder and puts them in place at the end.

    The unfinished folder lies on the same disk as the final one: inside it if that exists (it may
    be a mount point), else beside it. Left in any way but ``finish``, it disappears.

    Args:
        target: final folder. It may exist if it is empty or holds an earlier evaluation, whose
            files are then replaced. None takes ``evaluation``, ``evaluation-2`` ... in the working
            directory.

    Raises:
        ConfigError: the target is a file, holds something else, or cannot be written.
    """

    def __init__(self, target: Path | None) -> None:
        self.target = target
        self._replaces = target is not None and target.is_dir()
        if target is not None and target.exists() and not target.is_dir():
            raise ConfigError(f"--output {target} is a file. Name a folder.")
        self._old = self._own_files(target) if target is not None and self._replaces else []
        place = target if target is not None and self._replaces else _parent(target)
        try:
            place.mkdir(parents=True, exist_ok=True)
            self.unfinished = Path(tempfile.mkdtemp(dir=place, prefix=".evaluation-"))
        except OSError as error:
            raise ConfigError(f"--output: {place} cannot be written: {error.strerror}.") from error

    def __enter__(self) -> OutputFolder:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.unfinished.exists() and not isinstance(error, _NotMovedError):
            shutil.rmtree(self.unfinished, ignore_errors=True)

    def files(self) -> list[str]:
        """Return what was written so far, relative to the folder, sorted."""
        root = self.unfinished
        return sorted(p.relative_to(root).as_posix() for p in root.rglob("*") if p.is_file())

    def finish(self) -> Path:
        """Put everything in place; return the final folder.

        Raises:
            DataError: that failed; the finished files are kept, and the message says where.
        """
        try:
            if self.target is not None and self._replaces:
                return self._replace(self.target)
            # mkdtemp makes private folders; results are meant to be read by others.
            self.unfinished.chmod(0o755)
            if self.target is not None:
                self.unfinished.rename(self.target)
                return self.target
            return self._rename_to_free_name()
        except OSError as error:
            raise _NotMovedError(
                f"The results are complete but could not be put in place ({error}). They are in "
                f"{self.unfinished}."
            ) from error

    def _rename_to_free_name(self) -> Path:
        number = 1
        while True:
            target = Path("evaluation" if number == 1 else f"evaluation-{number}")
            # Renaming onto an empty folder would succeed: mkdir decides who has the name.
            try:
                target.mkdir()
            except FileExistsError:
                number += 1
                continue
            self.unfinished.rename(target)
            return target

    def _replace(self, target: Path) -> Path:
        for name in self._old:
            (target / name).unlink(missing_ok=True)
        for folder in sorted({(target / name).parent for name in self._old}, reverse=True):
            while folder != target and folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()
                folder = folder.parent
        for name in self.files():
            place = target / name
            if place.exists() or leads_outside(target, place):
                raise OSError(f"{place} is in the way")
            place.parent.mkdir(parents=True, exist_ok=True)
            (self.unfinished / name).rename(place)
        shutil.rmtree(self.unfinished)
        return target

    @staticmethod
    def _own_files(target: Path) -> list[str]:
        """Return the files of the evaluation that the target holds; [] if it is empty."""
        present = [p for p in target.iterdir() if not p.name.startswith(".evaluation-")]
        if not present:
            return []
        try:
            listed = json.loads((target / MARKER).read_text(encoding="utf-8"))["files"]
            names = [str(name) for name in listed]
        except (OSError, ValueError, KeyError, TypeError):
            raise ConfigError(
                f"--output {target} holds other files ({present[0].name} ...). Name a new or empty "
                "folder, or that of an earlier evaluation."
            ) from None
        root = os.path.abspath(target)
        for name in names:
            # A list that was tampered with must not reach outside.
            if not os.path.abspath(target / name).startswith(root + os.sep):
                raise ConfigError(f"{target / MARKER} names a file outside of it: {name}.")
            if leads_outside(target, target / name):
                raise ConfigError(
                    f"--output {target}: {Path(name).parent} is a link. Name another folder."
                )
        return names


class _NotMovedError(DataError):
    """The results are complete, but not where they belong."""


def _parent(target: Path | None) -> Path:
    return Path() if target is None else Path(os.path.abspath(target)).parent
