"""What is left to do in a folder of results, from its settings and the photos that changed.

A later call keeps what it would have made itself, and refuses to mix it with anything else.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from camoxpert import console
from camoxpert.config import to_dict
from camoxpert.errors import ConfigError, DataError
from camoxpert.inference.ledger import FAILED, LEDGER, Ledger, source_of
from camoxpert.inference.prediction import FOLDERS, KINDS, TIMES, output_path
from camoxpert.inference.sources import Photo
from camoxpert.runs.checkpoint import Checkpoint, file_digest
from camoxpert.text import bullet_list, count

COMPARED = {"model": "model", "img_size": "image size", "precision": "precision",
            "threshold": "threshold", "tile": "--tile", "overlap": "--overlap",
            "tta": "--tta", "zoom": "--zoom"}  # fmt: skip
"""Settings that change pictures or table, and their names in messages."""
TEMPORARY = re.compile(r"\.\w+\.tmp")
"""Names of files that are not written to the end: see ``files.write_whole``."""


@dataclass(frozen=True)
class Settings:
    """What the outputs depend on besides the photo: the head of the ledger.

    Attributes:
        model: hash of the weights and of the network's settings.
        checkpoint: file of the weights, for messages: copies of a model are the same model.
        img_size: side of the network's input, pixels.
        precision: number format of the forward pass.
        threshold: probability above which a pixel is object.
        tile, overlap, tta: see ``views.ViewOptions``; None, and absent in an older head: off.
        zoom: whether images are looked at in two sizes; None: no.
    """

    model: str
    checkpoint: str
    img_size: int
    precision: str
    threshold: float
    tile: int | None = None
    overlap: float | None = None
    tta: str | None = None
    zoom: bool | None = None

    def differences(self, earlier: dict[str, Any]) -> list[str]:
        """Return a text for each setting of an earlier call that changes pictures or table."""
        texts = []
        now = asdict(self)
        for key, name in COMPARED.items():
            before, after = earlier.get(key), now[key]
            if before != after and key == "model":
                texts.append(
                    f"model {earlier.get('checkpoint')} ({str(before)[:8]}), now "
                    f"{self.checkpoint} ({self.model[:8]})"
                )
            elif before != after:
                before, after = ("off" if value is None else value for value in (before, after))
                texts.append(f"{name} {before}, now {after}")
        return texts


@dataclass
class Plan:
    """What a call does with its photos.

    Attributes:
        todo: to predict, in order.
        replaced: those of them whose file changed since they were predicted.
        skipped: photos with up-to-date results.
        failed: photos that failed before, in a call that was stopped; not tried again in this one.
    """

    todo: list[Photo] = field(default_factory=list)
    replaced: int = 0
    skipped: int = 0
    failed: list[Photo] = field(default_factory=list)


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


def make_plan(
    ledger: Ledger,
    settings: Settings,
    photos: Sequence[Photo],
    kinds: Sequence[str],
    *,
    overwrite: bool,
    others: Iterable[Photo] = (),
) -> Plan:
    """Return what is left to do; restart the ledger where its settings are not those of the call.

    A photo is up to date if the ledger has it, its file did not change, and its pictures are listed
    in their folders: a directory is read once, no picture is looked at. Photos that failed are
    tried again, but not by the call that finishes a stopped one: that does what is missing.

    Args:
        ledger: of the folder.
        settings: of this call.
        photos: of this call.
        kinds: pictures to write.
        overwrite: predict all photos, and replace what was made with other settings.
        others: items of this call that are planned elsewhere.

    Raises:
        ConfigError: the folder holds results of other settings, or of unknown origin.
        DataError: a photo has the name of another one, whose results would be lost.
    """
    changed = settings.differences(ledger.earlier) if ledger.earlier is not None else []
    if overwrite:
        if changed:
            _warn_of_others(ledger, [*photos, *others])
        plan = Plan(list(photos))
    else:
        made = len(ledger.made) if changed else 0
        if made:
            raise ConfigError(
                f"{ledger.folder} holds the results of {count(made, 'photo')} made with "
                f"other settings: {'; '.join(changed)}. Name another folder with -o, or add "
                "--overwrite to predict again."
            )
        plan = _left_to_do(ledger, photos, kinds) if not changed else Plan(list(photos))
    if ledger.earlier is None or changed:
        ledger.restart(asdict(settings))
    return plan


def not_merged(
    folder: Path, settings: Settings, photos: Sequence[Photo], kinds: Sequence[str]
) -> list[Photo]:
    """Return the photos of a divided job without results from an earlier one that was merged."""
    whole = Ledger(folder, KINDS, table=False)
    if whole.earlier is None or settings.differences(whole.earlier):
        return list(photos)
    return _left_to_do(whole, photos, kinds).todo


def _warn_of_others(ledger: Ledger, photos: Iterable[Photo]) -> None:
    names = {photo.name for photo in photos}
    others = sum(name not in names for name in ledger.made)
    if others:
        console.warn(
            f"{ledger.folder} still holds pictures of {count(others, 'photo')} made with other "
            "settings"
        )


def _left_to_do(ledger: Ledger, photos: Sequence[Photo], kinds: Sequence[str]) -> Plan:
    plan, taken = Plan(), []
    index = ledger.index
    present = [_Pictures(ledger, kind) for kind in kinds]
    for photo in photos:
        status = index.status(photo.name)
        if not status:
            if ledger.earlier is None:
                _require_known(ledger, photo, kinds, present)
            plan.todo.append(photo)
        elif status == FAILED:
            if ledger.finished or has_changed(ledger, photo):
                plan.todo.append(photo)
            else:
                plan.failed.append(photo)
        elif has_changed(ledger, photo):
            plan.todo.append(photo)
            plan.replaced += 1
            earlier = Path(ledger.row(photo.name)["source"])
            if earlier != Path(os.path.abspath(photo.path)) and _is_same(
                ledger, photo.name, earlier
            ):
                taken.append(f"{photo.path} ({photo.name!r} is {earlier})")
        elif not index.has_kinds(photo.name).issuperset(kinds) or any(
            photo.name not in names for names in present
        ):
            plan.todo.append(photo)
        else:
            plan.skipped += 1
    if taken:
        raise DataError(
            f"{ledger.folder} holds results of other photos under the same names:\n"
            f"{bullet_list(taken)}\nName another folder with -o, or add --overwrite to replace "
            "them."
        )
    return plan


def _require_known(
    ledger: Ledger, photo: Photo, kinds: Sequence[str], present: Sequence[_Pictures]
) -> None:
    """Raise ConfigError if a photo has pictures of which nothing is known."""
    for kind, names in zip(kinds, present, strict=True):
        if photo.name in names:
            raise ConfigError(
                f"{output_path(ledger.folder, kind, photo.name)} is there already, and no {LEDGER} "
                f"in {ledger.folder} says which model made it. Name another folder with -o, or add "
                "--overwrite to replace such files."
            )


class _Pictures:
    """Which pictures of one kind are in their folder, from one reading of the directory.

    Links do not count. Of items that the ledger has a bit is kept, of others the name.
    """

    def __init__(self, ledger: Ledger, kind: str) -> None:
        self._index = ledger.index
        self._known = bytearray(len(ledger.index))
        self._others: set[str] = set()
        waiting = [(str(ledger.folder / FOLDERS[kind]), "")]
        while waiting:
            place, prefix = waiting.pop()
            try:
                entries = os.scandir(place)
            except OSError:
                continue
            with entries:
                for entry in entries:
                    if entry.is_dir(follow_symlinks=False):
                        waiting.append((entry.path, f"{prefix}{entry.name}/"))
                    elif entry.is_file(follow_symlinks=False):
                        self._add(prefix + entry.name.rpartition(".")[0])

    def _add(self, name: str) -> None:
        slot = self._index.slot(name)
        if slot is None:
            self._others.add(name)
        else:
            self._known[slot] = 1

    def __contains__(self, name: str) -> bool:
        slot = self._index.slot(name)
        return name in self._others if slot is None else bool(self._known[slot])


def remove_unfinished(folder: Path) -> None:
    """Remove the files that killed processes did not write to the end.

    The caller holds the lock of the folder, and no process of its own writes.
    """
    for name in (*FOLDERS.values(), TIMES):
        for path in (folder / name).rglob(".*.tmp"):
            if TEMPORARY.fullmatch(path.name):
                path.unlink(missing_ok=True)


def has_changed(ledger: Ledger, photo: Photo) -> bool:
    """Return whether the file of a photo is another one than its row was made from."""
    return not _is_same(ledger, photo.name, photo.path)


def _is_same(ledger: Ledger, name: str, path: Path) -> bool:
    """Return whether a file still has the content that an item was made from."""
    source = source_of(path)
    if source is None:
        # Still missing, where it was missing before.
        return ledger.index.stamp(name) == 0 and ledger.index.status(name) == FAILED
    if source.stamp == ledger.index.stamp(name):
        return True
    # Copying a data set changes the times and not the photos.
    row = ledger.row(name)
    return row.get("size") == source.size and row.get("digest") == _digest(path)


def _digest(path: Path) -> str | None:
    try:
        return file_digest(path)
    except OSError:
        return None
