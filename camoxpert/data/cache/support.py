"""Features of reference images, kept on disk by what they depend on.

An entry is ``DIR/support/IMAGE[:2]/IMAGE-MASK.ENCODER.DEVICE.bin``: hashes of the contents of image
and mask, and of all that the encoder's features depend on (name, weights, image size, version of
the code; ``encoders/ENCODER.json`` holds them, to say why an entry does not fit). It holds the
seconds that computing took and the features. Renaming or moving files changes nothing; another
crop, mask or encoder is another entry. The features of a file never change while the encoder is
frozen; while any of its weights is trained the cache is not used.
"""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from camoxpert import console, stop
from camoxpert.data.cache.stages import CORRUPT, NOT_MADE, OTHER_SETTINGS, StageCache
from camoxpert.data.files.image_io import MAX_PIXELS, read_pair
from camoxpert.errors import DataError
from camoxpert.files import file_digest, read_json, write_json
from camoxpert.runs.scores import CacheCounts
from camoxpert.text import count

STAGE = "support"
TRAINED = "miss: weights of the encoder are being trained"
FACTS = {
    "encoder": "another encoder",
    "weights": "other weights of the encoder",
    "side": "another image size",
    "version": "another version of the code",
}
"""What features depend on besides the reference, and what a miss is called that differs in it."""


class Encoder(Protocol):
    """The part of ``models.support.SupportEncoder`` that the cache uses."""

    @property
    def width(self) -> int:
        """Number of features D."""

    @property
    def device(self) -> torch.device:
        """Where it runs."""

    @property
    def digest(self) -> str:
        """Hash of ``facts``, hexadecimal."""

    @property
    def facts(self) -> Any:
        """What its features depend on: a named tuple of ``FACTS``."""

    @property
    def frozen(self) -> bool:
        """Whether no weight of it is trained."""

    def encode(self, images_NCHW: Sequence[Tensor], masks_N1HW: Sequence[Tensor]) -> Tensor:
        """Return the features (N, D) of references."""


@dataclass(frozen=True)
class Reference:
    """An image and a mask that show what to look for.

    Attributes:
        image, mask: files.
        any_size: the mask may have another size than the image; it is resized.
    """

    image: Path
    mask: Path
    any_size: bool = False


class NothingMarked(DataError):
    """The mask of a reference marks nothing as object."""


@dataclass
class SupportStats:
    """What the cache did.

    Attributes:
        hits: features that were found.
        misses: reason -> features that were computed.
        found_seconds: spent on hashing files and reading entries.
        encoded_seconds: spent on decoding and encoding what was not found.
        saved_seconds: that computing the found ones took when they were made.
    """

    hits: int = 0
    misses: Counter[str] = field(default_factory=Counter)
    found_seconds: float = 0.0
    encoded_seconds: float = 0.0
    saved_seconds: float = 0.0

    @property
    def total(self) -> int:
        """Features that were asked for."""
        return self.hits + self.misses.total()

    def short(self) -> str:
        """Return the text of the bar."""
        return f"cache {self.hits}/{self.total}"

    def describe(self) -> str:
        """Return counts, reasons and times, for the user."""
        missed = self.misses.total()
        text = f"{count(self.hits, 'hit')}, {count(missed, 'miss')}"
        if missed:
            reasons = [
                f"{n} {why.removeprefix('miss: ')}" for why, n in sorted(self.misses.items())
            ]
            text += f" ({', '.join(reasons)}), encoded in {_time(self.encoded_seconds)}"
        if self.hits:
            text += (
                f"; looked up in {_time(self.found_seconds)}, which saved "
                f"{_time(max(self.saved_seconds - self.found_seconds, 0))}"
            )
        return text

    def to_dict(self) -> CacheCounts:
        """Return it for ``run.json`` and other files."""
        return {
            "hits": self.hits,
            "misses": dict(self.misses),
            "found_seconds": self.found_seconds,
            "encoded_seconds": self.encoded_seconds,
            "saved_seconds": self.saved_seconds,
        }


class SupportCache:
    """Describes references with an encoder, and keeps what it said.

    Args:
        encoder: a ``models.support.SupportEncoder``.
        folder: of the caches of stages; None: nothing is kept on disk.
        max_pixels: larger images are refused.

    Attributes:
        stats: of all calls.
    """

    def __init__(
        self, encoder: Encoder, folder: Path | None, *, max_pixels: int = MAX_PIXELS
    ) -> None:
        self.encoder, self.folder, self.max_pixels = encoder, folder, max_pixels
        self.stats = SupportStats()
        # Hashes of files as they were, and entries that were found: a caller may search for one
        # thing after another.
        self._hashes: dict[tuple[object, ...], str] = {}
        self._entries: dict[str, NDArray[np.float32]] = {}

    def features(self, references: Sequence[Reference], *, title: str = "references") -> Tensor:
        """Return the features of references, float32 (N, D) on the CPU.

        A reference is encoded on its own: the rounding of a convolution depends on how many images
        it takes, and the features of a file must not.

        Args:
            references: any number.
            title: of the progress bar.

        Raises:
            NothingMarked: a mask marks nothing.
            DataError: an image or mask cannot be read.
            Stopped: the command was asked to stop.
        """
        found = torch.empty(len(references), self.encoder.width)
        with console.progress(title, total=len(references)) as bar:
            for number, reference in enumerate(references):
                found[number] = torch.from_numpy(self._feature(reference))
                bar.set_postfix_str(self.stats.short(), refresh=False)
                bar.update()
                stop.check()
        return found

    def drawn(self, reference: Reference, *, unreadable: str) -> Tensor | None:
        """Return the features (D,) of a reference that nobody named, but that was drawn from data.

        Args:
            reference: of the data.
            unreadable: ``error`` or ``skip``.

        Returns:
            None for one that is left out: its mask marks nothing, or it cannot be read and
            ``unreadable`` is ``skip``.

        Raises:
            DataError: it cannot be read.
        """
        try:
            return torch.from_numpy(self._feature(reference))
        except NothingMarked:
            return None
        except DataError:
            if unreadable != "skip":
                raise
            return None

    def digests(self, references: Sequence[Reference]) -> list[str]:
        """Return a hash of the contents of each reference: what its features are kept under."""
        return ["-".join(self._contents(reference)) for reference in references]

    def _feature(self, reference: Reference) -> NDArray[np.float32]:
        started = time.perf_counter()
        entry, why, cache, key = None, TRAINED, None, ""
        if self.encoder.frozen:
            image, mask = self._contents(reference)
            cache = StageCache(self.folder, STAGE, settings=self._settings(mask))
            key = image[:32]
            entry, why = self._entries.get(f"{key}-{cache.settings}"), ""
            if entry is None:
                entry, why = self._find(cache, key)
        looked_up = time.perf_counter()
        if entry is not None:
            self.stats.hits += 1
            self.stats.found_seconds += looked_up - started
            self.stats.saved_seconds += float(entry[0])
            return entry[1:]
        feature = self._encoded(reference)
        seconds = time.perf_counter() - looked_up
        self.stats.misses[why] += 1
        self.stats.encoded_seconds += seconds
        if cache is not None:
            cache.keep(key, np.insert(feature, 0, seconds))
            self._keep_facts()
        return feature

    def _find(self, cache: StageCache, key: str) -> tuple[NDArray[np.float32] | None, str]:
        """Return an entry, or None and why there is none."""
        entry, why = cache.find(key)
        if entry is not None and not _is_entry(entry, self.encoder.width):
            return None, CORRUPT
        if entry is not None:
            self._entries[f"{key}-{cache.settings}"] = entry
        if why == OTHER_SETTINGS and self.folder is not None:
            names = [path.stem for path in cache.path(key).parent.glob(f"{key}-*.bin")]
            why = self._difference(cache.settings, [name.partition("-")[2] for name in names])
        return entry, why

    def _difference(self, settings: str, others: Sequence[str]) -> str:
        """Return in what the most similar entry of the same image differs."""
        own = settings.split(".")
        kept = [parts for parts in (other.split(".") for other in others) if len(parts) == 3]
        if not kept:
            return NOT_MADE
        # Of equally similar ones not the first on the disk, which is another one on each disk.
        nearest = min((self._differences(own, parts) for parts in kept), key=lambda d: (len(d), d))
        return f"miss: {' and '.join(nearest)}"

    def _differences(self, own: Sequence[str], kept: Sequence[str]) -> list[str]:
        """Return in what an entry differs, both given as mask, encoder and device."""
        differs = ["another mask"] if own[0] != kept[0] else []
        if own[1] != kept[1]:
            facts, then = self.encoder.facts._asdict(), read_json(self._facts_file(kept[1]))
            changed = [
                text for key, text in FACTS.items() if facts[key] != then.get(key, facts[key])
            ]
            differs += changed or ["another encoder or other weights"]
        if own[2] != kept[2]:
            differs.append("another kind of device")
        return differs

    def _facts_file(self, encoder: str) -> Path:
        assert self.folder is not None
        return self.folder / STAGE / "encoders" / f"{encoder}.json"

    def _keep_facts(self) -> None:
        """Write what the encoder's digest stands for, once; only messages are made of it."""
        if self.folder is None or self._facts_file(self._encoder).is_file():
            return
        with contextlib.suppress(OSError):
            write_json(self._facts_file(self._encoder), self.encoder.facts._asdict(), durable=False)

    def _encoded(self, reference: Reference) -> NDArray[np.float32]:
        image_HWC, mask_HW = read_pair(
            reference.image,
            reference.mask,
            max_pixels=self.max_pixels,
            any_size=reference.any_size,
        )
        height, width = image_HWC.shape[:2]
        if mask_HW.shape != (height, width):
            mask_HW = cv2.resize(mask_HW, (width, height), interpolation=cv2.INTER_NEAREST)
        image = torch.from_numpy(np.ascontiguousarray(image_HWC.transpose(2, 0, 1)))
        # Void pixels are not known to be the object.
        mask = torch.from_numpy(mask_HW == 255)[None]
        if not mask.any():
            raise NothingMarked(
                f"The mask {reference.mask} of the reference {reference.image} marks nothing as "
                "object. Name a reference that shows what to look for."
            )
        feature: NDArray[np.float32] = self.encoder.encode([image], [mask])[0].float().cpu().numpy()
        return feature

    def _contents(self, reference: Reference) -> tuple[str, str]:
        """Return the hashes of a reference's files.

        Raises:
            DataError: one cannot be read.
        """
        try:
            return self._hash(reference.image), self._hash(reference.mask)
        except OSError as error:
            raise DataError(
                f"The reference {reference.image} with the mask {reference.mask} cannot be read: "
                f"{error.strerror or error}."
            ) from error

    def _hash(self, path: Path) -> str:
        found = path.stat()
        state = (path, found.st_size, found.st_mtime_ns, found.st_ctime_ns)
        if state not in self._hashes:
            self._hashes[state] = file_digest(path)
        return self._hashes[state]

    @property
    def _encoder(self) -> str:
        return self.encoder.digest[:24]

    def _settings(self, mask: str) -> str:
        """Return what an entry depends on besides the image."""
        return f"{mask[:32]}.{self._encoder}.{self.encoder.device.type}"


def _time(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds >= 1 else f"{1e3 * seconds:.1f} ms"


def _is_entry(entry: NDArray[Any], width: int) -> bool:
    """Return whether an array is seconds and features of the encoder."""
    return (
        entry.shape == (1 + width,) and entry.dtype == np.float32 and bool(np.isfinite(entry).all())
    )
