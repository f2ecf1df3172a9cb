"""What is left to do in a folder of results, from its settings and the photos that changed.

A later call keeps what it would have made itself, and refuses to mix it with anything else.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import torch

from camoxpert import console
from camoxpert.config import to_dict
from camoxpert.errors import ConfigError, DataError
from camoxpert.files import file_digest
from camoxpert.inference.ledger import FAILED, Ledger, Source, source_of
from camoxpert.inference.prediction import KINDS, PREDICTIONS
from camoxpert.inference.products import Product
from camoxpert.inference.sources import Photo
from camoxpert.runs.checkpoint import Checkpoint
from camoxpert.text import bullet_list, count

COMPARED = {"model": "model", "img_size": "image size", "precision": "precision",
            "threshold": "threshold", "tile": "--tile", "overlap": "--overlap",
            "tta": "--tta", "zoom": "--zoom", "min_presence": "--min-presence",
            "reference": "reference", "modalities": "--modality"}  # fmt: skip
"""Settings that change pictures or table, and their names in messages."""
TEMPORARY = re.compile(r"\.\w+\.tmp")
"""Names of files that are not written to the end: see ``files.write_whole``."""


class Made(Protocol):
    """An item: something that outputs are made from."""

    @property
    def name(self) -> str:
        """Unique name of the item and of its outputs."""

    @property
    def path(self) -> Path:
        """The file that stands for it."""

    @property
    def files(self) -> tuple[Path, ...]:
        """Every file that its outputs are made from, ``path`` first."""


class Head(Protocol):
    """What all outputs of a folder depend on: the head of its ledger."""

    def fields(self) -> dict[str, Any]:
        """Return it as plain values."""

    def differences(self, earlier: dict[str, Any]) -> list[str]:
        """Return a text for each setting of an earlier call that changes the outputs."""


AnyMade = TypeVar("AnyMade", bound=Made)


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
        presence: whether the model has the presence head; None: no.
        min_presence: maps of images whose presence is lower are empty; None: every map stays.
        reference: name of what is searched for, see ``references.Target``; None: any object.
        modalities: what the photos come with, by name; None: nothing.
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
    presence: bool | None = None
    min_presence: float | None = None
    reference: str | None = None
    modalities: list[str] | None = None

    def fields(self) -> dict[str, Any]:
        """Return the head of the ledger."""
        return asdict(self)

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
class Plan(Generic[AnyMade]):
    """What a call does with its items.

    Attributes:
        todo: to do, in order.
        replaced: those of them whose files changed since they were done.
        skipped: items with up-to-date results.
        failed: items that failed before, in a call that was stopped; not tried again in this one.
    """

    todo: list[AnyMade] = field(default_factory=list)
    replaced: int = 0
    skipped: int = 0
    failed: list[AnyMade] = field(default_factory=list)


def model_digest(checkpoint: Checkpoint) -> str:
    """Return a hash of the evaluated weights and the network's settings, hexadecimal."""
    network = {
        key: value
        for key, value in to_dict(checkpoint.config)["model"].items()
        # At its default a setting that was added later changes nothing.
        # Whether there is a presence head is seen by its weights; they also hold the hash of the
        # support encoder.
        if key not in ("pretrained", "weights", "upcycle_noise", "presence", "support")
        and (key, value) not in (("routing_grid", 1), ("router_norm", "none"))
    }
    digest = hashlib.sha256(json.dumps(network, sort_keys=True, default=str).encode())
    for name, weight in sorted(checkpoint.evaluated_weights.items()):
        digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}\n".encode())
        digest.update(weight.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def make_plan(
    ledger: Ledger,
    settings: Head,
    items: Sequence[AnyMade],
    kinds: Sequence[str],
    *,
    overwrite: bool,
    others: Iterable[Made] = (),
    product: Product = PREDICTIONS,
    also: Ledger | None = None,
) -> Plan[AnyMade]:
    """Return what is left to do; restart the ledger where its settings are not those of the call.

    An item is up to date if the ledger has it, its files did not change, and its pictures are
    listed in their folders: a directory is read once, no picture is looked at. Items that failed
    are tried again, but not by the call that finishes a stopped one: that does what is missing.

    Args:
        ledger: of the folder.
        settings: of this call.
        items: of this call.
        kinds: pictures to write.
        overwrite: do all items, and replace what was made with other settings.
        others: items of this call that are planned elsewhere.
        product: what is made of the items.
        also: another ledger that knows of files in the folder.

    Raises:
        ConfigError: the folder holds results of other settings, or of unknown origin.
        DataError: an item has the name of another one, whose results would be lost.
    """
    changed = settings.differences(ledger.earlier) if ledger.earlier is not None else []
    if overwrite:
        if changed:
            _warn_of_others(ledger, [*items, *others], product.item)
        plan = Plan(list(items))
    else:
        made = len(ledger.made) if changed else 0
        if made:
            raise ConfigError(
                f"{ledger.folder} holds the results of {count(made, product.item)} made with "
                f"other settings: {'; '.join(changed)}. Name another folder with -o, or add "
                f"--overwrite to {product.again}."
            )
        plan = Plan(list(items))
        if not changed:
            plan = _left_to_do(ledger, items, kinds, product, also)
    if ledger.earlier is None or changed:
        ledger.restart(settings.fields())
    return plan


def merged_ledger(folder: Path, settings: Settings) -> Ledger | None:
    """Return the ledger of a divided job that was merged, if it has the same settings."""
    whole = Ledger(folder, KINDS, table=None)
    same = whole.earlier is not None and not settings.differences(whole.earlier)
    return whole if same else None


def not_merged(whole: Ledger, photos: Sequence[Photo], kinds: Sequence[str]) -> list[Photo]:
    """Return the photos of a divided job without results in a merged ledger."""
    # Files that it does not know are judged by the ledger of the part.
    return _left_to_do(whole, photos, kinds, PREDICTIONS, whole, orderly=False).todo


def _warn_of_others(ledger: Ledger, items: Iterable[Made], noun: str) -> None:
    names = {item.name for item in items}
    others = sum(name not in names for name in ledger.made)
    if others:
        console.warn(
            f"{ledger.folder} still holds pictures of {count(others, noun)} made with other "
            "settings"
        )


def _left_to_do(
    ledger: Ledger,
    items: Sequence[AnyMade],
    kinds: Sequence[str],
    product: Product,
    also: Ledger | None,
    *,
    orderly: bool | None = None,
) -> Plan[AnyMade]:
    plan: Plan[AnyMade] = Plan()
    taken = []
    index = ledger.index
    present = [_Pictures(ledger, product.folders[kind]) for kind in kinds]
    # A call that was killed may have left files that no row lists yet. What is made of sources has
    # a folder of its own.
    if orderly is None:
        orderly = ledger.earlier is None or (ledger.finished and product is PREDICTIONS)
    for item in items:
        status = index.status(item.name)
        # One that was done more than once may have pictures from before its file changed.
        if orderly and index.attempts(item.name) <= 1 and status != FAILED:
            known = index.has_kinds(item.name)
            if also is not None:
                known |= also.index.has_kinds(item.name)
            _require_known(ledger, item, set(kinds) - known, kinds, present, product)
        if not status:
            plan.todo.append(item)
        elif status == FAILED:
            if ledger.finished or has_changed(ledger, item):
                plan.todo.append(item)
            else:
                plan.failed.append(item)
        elif has_changed(ledger, item):
            plan.todo.append(item)
            plan.replaced += 1
            # Without one the file changed while it was read: nobody knows which one it was.
            source = ledger.row(item.name)["source"]
            earlier = Path(os.path.abspath(item.path) if source is None else source)
            if earlier != Path(os.path.abspath(item.path)) and _is_same(
                ledger, item.name, (earlier, *item.files[1:])
            ):
                taken.append(f"{item.path} ({item.name!r} is {earlier})")
        elif not index.has_kinds(item.name).issuperset(kinds) or any(
            item.name not in names for names in present
        ):
            plan.todo.append(item)
        else:
            plan.skipped += 1
    if taken:
        raise DataError(
            f"{ledger.folder} holds results of other {product.item}s under the same names:\n"
            f"{bullet_list(taken)}\nName another folder with -o, or add --overwrite to replace "
            "them."
        )
    return plan


def _require_known(
    ledger: Ledger,
    item: Made,
    unknown: Collection[str],
    kinds: Sequence[str],
    present: Sequence[_Pictures],
    product: Product,
) -> None:
    """Raise ConfigError if an item has pictures of the kinds of which nothing is known."""
    for kind, names in zip(kinds, present, strict=True):
        if kind in unknown and item.name in names:
            raise ConfigError(
                f"{product.path(ledger.folder, kind, item.name)} is there already, and no "
                f"{product.ledger} in {ledger.folder} says how it was made. Name another folder "
                "with -o, or add --overwrite to replace such files."
            )


class _Pictures:
    """Which pictures of one kind are in their folder, from one reading of the directory.

    Links do not count. Of items that the ledger has a bit is kept, of others the name.
    """

    def __init__(self, ledger: Ledger, folder: str) -> None:
        self._index = ledger.index
        self._known = bytearray(len(ledger.index))
        self._others: set[str] = set()
        waiting = [(str(ledger.folder / folder), "")]
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


def remove_unfinished(folder: Path, product: Product = PREDICTIONS) -> None:
    """Remove the files that killed processes did not write to the end.

    The caller holds the lock of the folder, and no process of its own writes.
    """
    found = [folder.glob(".*.tmp")]  # Of the table and of what is said about the call.
    found += [(folder / n).rglob(".*.tmp") for n in (*product.folders.values(), *product.scratch)]
    for path in (path for paths in found for path in paths):
        if TEMPORARY.fullmatch(path.name):
            path.unlink(missing_ok=True)


def has_changed(ledger: Ledger, item: Made) -> bool:
    """Return whether the files of an item are other ones than its row was made from."""
    return not _is_same(ledger, item.name, item.files)


def _is_same(ledger: Ledger, name: str, files: Sequence[Path]) -> bool:
    """Return whether files still have the content that an item was made from."""
    source = state_of(files)
    if source is None:
        # Still missing, where it was missing before.
        return ledger.index.stamp(name) == 0 and ledger.index.status(name) == FAILED
    if source.stamp == ledger.index.stamp(name):
        return True
    # Copying a data set changes the times and not the photos.
    row = ledger.row(name)
    return row.get("size") == source.size and row.get("digest") == digest_of(files)


def digest_of(files: Sequence[Path]) -> str | None:
    """Return a hash of the contents of an item's files; None if one cannot be read."""
    try:
        digests = [file_digest(path) for path in files]
    except OSError:
        return None
    return joined_digest(digests)


def state_of(paths: Sequence[Path]) -> Source | None:
    """Return the present state of the files of an item as one: their bytes, the latest times.

    Args:
        paths: the file that names the item, then the others.

    Returns:
        None if one is missing.
    """
    if not paths:
        # What the item is made from is known by the head of the ledger.
        return Source("", 0, 0, 0)
    found = [source_of(path) for path in paths]
    known = [source for source in found if source is not None]
    if len(known) < len(found):
        return None
    return Source(
        known[0].source,
        sum(source.size for source in known),
        max(source.mtime_ns for source in known),
        max(source.ctime_ns for source in known),
    )


def joined_digest(digests: Sequence[str]) -> str:
    """Return one hash for those of several files; that of a single file stays as it is."""
    if len(digests) == 1:
        return digests[0]
    return hashlib.sha256("".join(digests).encode()).hexdigest()
