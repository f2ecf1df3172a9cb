"""Read the sources of ``synthesize relight``, with what is cached of them."""

from __future__ import annotations

import hashlib
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from camoxpert.data.cache.stages import OFF, StageCache, content_key, settings_key
from camoxpert.data.files.image_io import MAX_PIXELS, read_levels
from camoxpert.errors import DataError
from camoxpert.inference.plan import state_of
from camoxpert.runs.jobs import SourceFacts
from camoxpert.synthesis.reading import difficulty_of, identified, read_object
from camoxpert.synthesis.relight.albedo import FLOOR, NOMINAL, SIGMAS
from camoxpert.synthesis.sources import SourceItem

ALBEDO = {"version": 1, "sigmas": SIGMAS, "nominal": NOMINAL, "floor": FLOOR}
HEIGHT = {"version": 1}


@dataclass(frozen=True, slots=True, kw_only=True)
class RelightItem(SourceItem):
    """A source in one light.

    Attributes:
        depth: file of its depth map, or None.
    """

    depth: Path | None

    @property
    def files(self) -> tuple[Path, ...]:
        """What the image is made from."""
        return (self.path, self.mask) if self.depth is None else (self.path, self.mask, self.depth)


@dataclass(frozen=True)
class Reading:
    """How sources are read.

    Attributes:
        size: longer side of the images; larger sources are shrunk. None: as they are.
        max_pixels: larger sources are refused.
        cache: folder of the stages' results, or None.
        depth: where heights come from; "": from masks.
    """

    size: int | None
    max_pixels: int
    cache: str | None
    depth: str = ""

    def caches(self) -> dict[str, StageCache]:
        """Return the cache of each stage."""
        folder = None if self.cache is None else Path(self.cache)
        return {
            "albedo": StageCache(folder, "albedo", settings_key(ALBEDO)),
            "height": StageCache(folder, "height", settings_key(HEIGHT | {"depth": self.depth})),
        }


@dataclass(eq=False)
class LightSource:
    """A source that was read; shared by its lights.

    Attributes:
        pixels: uint8 (H, W, 3).
        mask: uint8 (H, W), 0, VOID and 255.
        stacked: uint8 (4, H, W), both, for the device.
        depth: float32 (H, W), or None.
        records: path and hash of each file.
        digest, state: of the files together, for the ledger.
        difficulty: of the source, or None without an object.
        keys: stage -> key of its cached result.
        outcomes: stage -> hit, or why not.
        log_light, height: half (1, H, W); the stages' results, once they are known.
        unsaved: stages whose results are to be kept.
    """

    pixels: NDArray[np.uint8]
    mask: NDArray[np.uint8]
    stacked: Tensor
    depth: NDArray[np.float32] | None
    records: list[dict[str, str]]
    digest: str | None
    state: SourceFacts
    difficulty: float | None
    keys: dict[str, str]
    outcomes: dict[str, str]
    log_light: Tensor | None = None
    height: Tensor | None = None
    unsaved: list[str] = field(default_factory=list)


def read_source(item: RelightItem, how: Reading, seconds: dict[str, float]) -> LightSource:
    """Return a source with what is cached of it.

    Args:
        item: one of its lights.
        how: sources are read.
        seconds: gets the seconds of reading.

    Raises:
        DataError: a file cannot be read, or the mask shows no object.
    """
    started = time.monotonic()
    before = state_of(item.files)
    pixels, mask = read_object(item, how.size, max_pixels=how.max_pixels, what="relight")
    depth = None
    if item.depth is not None:
        depth = read_depth(item.depth, mask.shape, max_pixels=how.max_pixels)
    decoded = time.monotonic()
    stacked = np.concatenate([pixels.transpose(2, 0, 1), mask[None]])
    content = [hashlib.sha256(part.tobytes()).hexdigest() for part in (pixels, mask)]
    keys = {
        "albedo": content_key(content[0], *mask.shape),
        "height": content_key(
            content[1],
            *mask.shape,
            "" if depth is None else hashlib.sha256(depth.tobytes()).hexdigest(),
        ),
    }
    found, outcomes = {}, {}
    for stage, cache in how.caches().items():
        found[stage], outcome = cache.find(keys[stage])
        if outcome != OFF:
            outcomes[stage] = outcome
    known = identified(item.files, before)
    seconds |= {"read": decoded - started, "look up": time.monotonic() - decoded}
    return LightSource(
        pixels=pixels,
        mask=mask,
        stacked=torch.from_numpy(np.ascontiguousarray(stacked)),
        depth=depth,
        records=known.records,
        digest=known.digest,
        state=known.state,
        difficulty=difficulty_of(pixels, mask),
        keys=keys,
        outcomes=outcomes,
        log_light=_tensor(found["albedo"]),
        height=_tensor(found["height"]),
    )


def _tensor(found: NDArray[Any] | None) -> Tensor | None:
    return None if found is None else torch.from_numpy(found)


def read_depth(
    path: Path, shape: tuple[int, ...], *, max_pixels: int = MAX_PIXELS
) -> NDArray[np.float32]:
    """Return a depth map, whose larger values are nearer, at the size of its image.

    What is not a number or infinite is as far away as what is farthest: nobody measured it.

    Raises:
        DataError: it cannot be read, or holds a single value.
    """
    levels = read_levels(path, max_pixels=max_pixels).levels.astype(np.float32)
    known = np.isfinite(levels)
    if known.any():
        levels = np.where(known, levels, levels[known].min())
    if not known.any() or levels.max() <= levels.min():
        raise DataError(f"The depth map {path} holds a single value.")
    if levels.shape != shape:
        resized = cv2.resize(levels, (shape[1], shape[0]), interpolation=cv2.INTER_LINEAR)
        levels = np.asarray(resized, np.float32)
    return np.ascontiguousarray(levels)
