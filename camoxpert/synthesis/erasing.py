"""``synthesize counterfactual``: each source without its object, and with as much of its background
changed instead.

The first differs from its source in the object alone, on which presence must depend: scene, camera
and file are the same. The second is its control: filled in the same way, with the object left in. A
network that answers by traces of the filling is wrong about one of the two.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from camoxpert.inference.engine import Row
from camoxpert.inference.plan import state_of
from camoxpert.inference.products import Product
from camoxpert.runtime.host import usable_cores
from camoxpert.synthesis.erase import Erased, erase, moved_away
from camoxpert.synthesis.reading import Identity, difficulty_of, identified, read_object
from camoxpert.synthesis.recent import RECENT, Recent
from camoxpert.synthesis.records import failed_row, write_pair
from camoxpert.synthesis.sources import SourceItem

VERSION = 1
"""Of the images: increased when the same settings give other pixels."""
REMOVED, CONTROL = "removed", "control"
MADE = (REMOVED, CONTROL)
"""What is made of a source: without its object, and with a part of its background changed."""
BYTES_A_PIXEL = 40


@dataclass(frozen=True, slots=True, kw_only=True)
class EraseItem(SourceItem):
    """An image to make.

    Attributes:
        made: one of MADE.
    """

    made: str


@dataclass(frozen=True, eq=False)
class EraseSource:
    """A source that was read; shared by the images made of it.

    Attributes:
        pixels: uint8 (H, W, 3).
        mask: uint8 (H, W), 0, VOID and 255.
        known: what its files are.
        difficulty: of the source.
    """

    pixels: NDArray[np.uint8]
    mask: NDArray[np.uint8]
    known: Identity
    difficulty: float | None


@dataclass(frozen=True)
class EraseSample:
    """A source with what is made of it: see ``engine.Sample``.

    Attributes:
        item: what is made of it.
        source: as it was read.
        inputs, seconds: see ``engine.Sample``.
    """

    item: EraseItem
    source: EraseSource
    inputs: tuple[Tensor, ...]
    seconds: dict[str, float]

    @property
    def held_bytes(self) -> int:
        """Memory until it is finished."""
        return BYTES_A_PIXEL * self.source.mask.size


@dataclass(frozen=True)
class EraseSpec:
    """Builds ``EraseStages`` in whichever process works.

    Attributes:
        output, product: where files go.
        seed: of the draws.
        size: longer side of the images, or None.
        max_pixels: larger sources are refused.
    """

    output: str
    product: Product
    seed: int
    size: int | None
    max_pixels: int

    def build(self, device: str) -> EraseStages:
        """Return the stages; the work is for CPU cores, whatever the device."""
        return EraseStages(self)

    def failed(self, item: EraseItem, reason: str) -> Row:
        """Return the fields of the row of an image that no process could make."""
        return failed_row(item.files, reason)


class EraseStages:
    """Reads sources, takes regions out of them, writes images and masks.

    Args:
        spec: what is done.
    """

    def __init__(self, spec: EraseSpec) -> None:
        self.spec = spec
        self.device = torch.device("cpu")
        self.models = 0
        self._output = Path(spec.output)
        threads = max(1, min(usable_cores(), torch.get_num_threads()))
        self._threads = ThreadPoolExecutor(threads, "erase")
        self._recent: Recent[EraseSource] = Recent(RECENT)

    def read(self, item: EraseItem) -> EraseSample:
        """Return a source with what is to be made of it.

        Raises:
            DataError: it cannot be read, or nothing can be taken out of it.
        """
        seconds: dict[str, float] = {}
        source = self._recent.get(item.files, lambda: self._source(item, seconds))
        return EraseSample(item, source, (torch.empty(0),), seconds)

    def _source(self, item: EraseItem, seconds: dict[str, float]) -> EraseSource:
        started = time.monotonic()
        before = state_of(item.files)
        pixels, mask = read_object(
            item, self.spec.size, max_pixels=self.spec.max_pixels, what="take out"
        )
        known = identified(item.files, before)
        source = EraseSource(pixels, mask, known, difficulty_of(pixels, mask))
        seconds["read"] = time.monotonic() - started
        return source

    def forward(
        self, inputs: Tensor, samples: Sequence[EraseSample] = ()
    ) -> list[tuple[Erased | str, float]]:
        """Return the made images with their seconds, or why one could not be made."""
        return list(self._threads.map(self._made, samples))

    def _made(self, sample: EraseSample) -> tuple[Erased | str, float]:
        started = time.perf_counter()
        item, source = sample.item, sample.source
        rng = np.random.default_rng([self.spec.seed, item.index])
        # Unlabelled pixels may belong to the object.
        marked = source.mask > 0
        region: NDArray[np.bool_] | None = marked
        if item.made == CONTROL:
            region = moved_away(source.mask == 255, marked, rng)
        found: Erased | str
        if region is None:
            found = "there is no room for the object's shape in the background"
        else:
            try:
                found = erase(source.pixels, region, marked, rng)
            except ValueError as error:
                found = str(error)
        return found, time.perf_counter() - started

    def finish(
        self, item: EraseItem, sample: EraseSample, outputs: list[tuple[Erased | str, float]]
    ) -> Row:
        """Write an image and its mask, and return the fields of the row.

        Raises:
            DataError: they cannot be written.
        """
        ((found, seconds),) = outputs
        if isinstance(found, str):
            row = self.failed(item, f"{found[:1].upper()}{found[1:]}.")
            return row | {"seconds": {"erase": seconds}}
        started = time.monotonic()
        source = sample.source
        mask = np.zeros_like(source.mask) if item.made == REMOVED else source.mask
        files = write_pair(self.spec.product, self._output, item.name, found.image, mask)
        height, width = mask.shape
        return {
            "status": "ok",
            **source.known.state,
            "digest": source.known.digest,
            **files,
            "kind": "counterfactual",
            "made": item.made,
            "seed": self.spec.seed,
            "index": item.index,
            "parameters": {
                "erased_fraction": round(float(found.hole.mean()), 6),
                "parts": found.parts,
                "diffused": round(found.smooth, 4),
            },
            "sources": source.known.records,
            **({"test_source": item.leak} if item.leak else {}),
            **({"mask_source": item.derived} if item.derived else {}),
            "group": item.group,
            "height": height,
            "width": width,
            "object_fraction": round(float((mask == 255).mean()), 6),
            "changed_fraction": round(float((found.image != source.pixels).any(2).mean()), 6),
            "difficulty": difficulty_of(found.image, mask),
            "difficulty_source": source.difficulty,
            "seconds": {"erase": seconds, "write": time.monotonic() - started},
        }

    def failed(self, item: EraseItem, reason: str) -> Row:
        """Return the fields of the row of an image that could not be made."""
        return failed_row(item.files, reason)

    def example(self) -> Tensor:
        """Return an input to measure with; there is nothing to measure."""
        return torch.empty(1, 0)


def erase_head(spec: EraseSpec, masks: str, image_format: str) -> dict[str, Any]:
    """Return what all images of a folder depend on besides their sources.

    Args:
        spec: what is done.
        masks: where they come from.
        image_format: jpg or png.
    """
    return {
        "made by": "synthesize counterfactual",
        "version": VERSION,
        "--seed": spec.seed,
        "masks": masks,
        "--size": spec.size,
        "--format": image_format,
    }
