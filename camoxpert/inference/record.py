"""The record of what the pictures in a folder were made from: model, settings and photos.

A later call can so tell which of them it would make again.

``predictions.jsonl`` is only appended to: a line of settings, then a line for each photo. The last
line about a photo counts; new settings end what was said before them. It is also the lock of the
folder.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from camoxpert.config import to_dict
from camoxpert.errors import ConfigError, DataError
from camoxpert.files import append_here, try_lock
from camoxpert.inference.prediction import output_path
from camoxpert.inference.sources import Photo
from camoxpert.runs.checkpoint import Checkpoint, file_digest
from camoxpert.text import bullet_list, count

RECORD = "predictions.jsonl"
COMPARED = {"model": "model", "img_size": "image size", "precision": "precision",
            "threshold": "threshold"}  # fmt: skip
"""Settings that change pictures or table, and their names in messages."""


@dataclass(frozen=True)
class Settings:
    """What the outputs depend on besides the photo.

    Attributes:
        model: hash of the weights and of the network's settings.
        checkpoint: file of the weights, for messages: copies of a model are the same model.
        img_size: side of the network's input, pixels.
        precision: number format of the forward pass.
        threshold: probability above which a pixel is object.
    """

    model: str
    checkpoint: str
    img_size: int
    precision: str
    threshold: float


@dataclass(frozen=True)
class Source:
    """A photo's file as it was when its pictures were made."""

    path: str
    size: int
    mtime_ns: int
    ctime_ns: int


@dataclass(frozen=True)
class Made:
    """The pictures of a photo that are up to date.

    Attributes:
        source: the file.
        digest: its sha256.
        kinds: the pictures made from it.
    """

    source: Source
    digest: str
    kinds: frozenset[str]


def model_digest(checkpoint: Checkpoint) -> str:
    """Return a hash of the evaluated weights and the network's settings, hexadecimal."""
    network = {
        key: value
        for key, value in to_dict(checkpoint.config)["model"].items()
        # At its default a setting that was added later changes nothing.
        if key not in ("pretrained", "weights", "upcycle_noise")
        and (key, value) != ("routing_grid", 1)
    }
    digest = hashlib.sha256(json.dumps(network, sort_keys=True, default=str).encode())
    for name, weight in sorted(checkpoint.evaluated_weights.items()):
        digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}\n".encode())
        digest.update(weight.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def source_of(path: Path) -> Source | None:
    """Return the present state of a file; None if there is none."""
    try:
        found = path.stat()
    except OSError:
        return None
    return Source(os.path.abspath(path), found.st_size, found.st_mtime_ns, found.st_ctime_ns)


@dataclass
class Record:
    """The record of one folder, open for appending.

    Attributes:
        folder: of the outputs.
        settings: of this call.
        earlier: settings of the pictures in the folder; None: it has no record.
        made: up-to-date photos by name.
    """

    folder: Path
    settings: Settings
    earlier: Settings | None = None
    made: dict[str, Made] = field(default_factory=dict)

    @property
    def is_new(self) -> bool:
        """Whether what the record holds was not made with the settings of this call."""
        return self.earlier is None or bool(differences(self.earlier, self.settings))

    def require_same(self) -> None:
        """Raise ConfigError if the folder holds pictures made with other settings."""
        changed = differences(self.earlier, self.settings) if self.earlier else []
        if changed and self.made:
            raise ConfigError(
                f"{self.folder} holds the results of {count(len(self.made), 'photo')} made with "
                f"other settings: {'; '.join(changed)}. Name another folder with -o, or add "
                "--overwrite to predict again."
            )

    def restart(self) -> None:
        """Forget everything and note the settings of this call."""
        self.made = {}
        self.earlier = self.settings
        self._append({"settings": asdict(self.settings)})

    def left_to_do(
        self, photos: Sequence[Photo], kinds: Sequence[str], in_table: set[str]
    ) -> tuple[list[Photo], list[Photo]]:
        """Return the photos to predict, and those of them that were replaced since.

        Raises:
            ConfigError: pictures of which nothing is known would be overwritten.
            DataError: a photo has the name of another one, whose results would be lost.
        """
        todo, replaced, unknown, taken = [], [], [], []
        for photo in photos:
            paths = [output_path(self.folder, kind, photo.name) for kind in kinds]
            present = [path for path in paths if path.is_file() and not path.is_symlink()]
            made = self.made.get(photo.name)
            if made is None:
                todo.append(photo)
                if present and self.earlier is None:
                    unknown.append(str(present[0]))
            elif not _is_same(made, photo.path):
                todo.append(photo)
                replaced.append(photo)
                first = Path(made.source.path)
                if first != Path(os.path.abspath(photo.path)) and _is_same(made, first):
                    taken.append(f"{photo.path} ({photo.name!r} is {first})")
            elif (
                len(present) < len(paths)
                or photo.name not in in_table
                or not made.kinds.issuperset(kinds)
            ):
                todo.append(photo)
        if unknown:
            raise ConfigError(
                f"{self.folder} holds pictures of {count(len(unknown), 'photo')} "
                f"({unknown[0]}), and no {RECORD} that says which model made them. Name another "
                "folder with -o, or add --overwrite to replace them."
            )
        if taken:
            raise DataError(
                f"{self.folder} holds results of other photos under the same names:\n"
                f"{bullet_list(taken)}\nName another folder with -o, or add --overwrite to replace "
                "them."
            )
        return todo, replaced

    def note(self, photo: Photo, before: Source | None, kinds: Sequence[str]) -> None:
        """Record that pictures of a photo were written.

        Args:
            photo: whose pictures.
            before: its file before it was read; nothing is recorded if it changed since.
            kinds: the pictures.
        """
        digest = _digest(photo.path)
        if before is None or digest is None or source_of(photo.path) != before:
            return
        earlier = self.made.get(photo.name)
        same = earlier is not None and earlier.digest == digest
        known = earlier.kinds if earlier is not None and same else frozenset()
        made = Made(before, digest, known | set(kinds))
        self.made[photo.name] = made
        line = {**asdict(before), "digest": digest, "kinds": sorted(made.kinds)}
        self._append({"image": photo.name, **line})

    def _append(self, line: dict[str, Any]) -> None:
        try:
            with append_here(self.folder / RECORD) as file:
                file.write(json.dumps(line) + "\n")
        except OSError as error:
            raise DataError(
                f"{self.folder / RECORD} could not be written: {error.strerror or error}. Make "
                "room, or name another folder with -o; the same call does what is missing."
            ) from error


@contextmanager
def open_record(folder: Path, settings: Settings) -> Iterator[Record]:
    """Read the record of a folder and keep other calls out of it during the block.

    Raises:
        DataError: another process predicts into the folder, or it cannot be written.
    """
    path = folder / RECORD
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if path.is_symlink():
            path.unlink()
        held = try_lock(path)
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise DataError(
            f"{folder} cannot be written: {error.strerror or error}. Name another folder with -o."
        ) from error
    if held is None:
        raise DataError(
            f"Another process is predicting into {folder}. Wait for it, or name another folder "
            "with -o."
        )
    try:
        record = Record(folder, settings, *_read(text))
        if text and not text.endswith("\n"):
            # A killed call left half a line: new ones must not be joined to it.
            with append_here(path) as file:
                file.write("\n")
        yield record
    finally:
        held.release()


def differences(earlier: Settings, now: Settings) -> list[str]:
    """Return a text for each setting that differs and changes pictures or table."""
    texts = []
    for key, name in COMPARED.items():
        before, after = getattr(earlier, key), getattr(now, key)
        if before != after and key == "model":
            texts.append(f"model {earlier.checkpoint} ({before[:8]}), now {now.checkpoint} "
                         f"({after[:8]})")  # fmt: skip
        elif before != after:
            texts.append(f"{name} {before}, now {after}")
    return texts


def _read(text: str) -> tuple[Settings | None, dict[str, Made]]:
    """Return the last settings of a record and the photos made with them; skip damaged lines."""
    settings: Settings | None = None
    made: dict[str, Made] = {}
    for line in text.splitlines():
        try:
            entry = json.loads(line)
            if "settings" in entry:
                settings, made = Settings(**entry["settings"]), {}
            else:
                source = Source(*(entry[key] for key in ("path", "size", "mtime_ns", "ctime_ns")))
                made[entry["image"]] = Made(source, entry["digest"], frozenset(entry["kinds"]))
        except (ValueError, TypeError, KeyError):
            continue
    return settings, made


def _is_same(made: Made, path: Path) -> bool:
    """Return whether a file still has the content that pictures were made from."""
    source = source_of(path)
    if source is None or source.size != made.source.size:
        return False
    # Copying a data set changes the times and not the photos.
    return replace(source, path=made.source.path) == made.source or _digest(path) == made.digest


def _digest(path: Path) -> str | None:
    try:
        return file_digest(path)
    except OSError:
        return None
