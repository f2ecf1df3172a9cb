"""``synthesize compose``: objects before backgrounds that resemble them.

Each image is a pure function of its number and of all objects and backgrounds; what is drawn names
the files that are read for it. Images of a batch are made in threads.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from camoxpert.inference.engine import Row
from camoxpert.inference.ledger import as_fields
from camoxpert.inference.plan import state_of
from camoxpert.inference.products import Product
from camoxpert.runtime.host import usable_cores
from camoxpert.synthesis.compose.backgrounds import BackgroundIndex
from camoxpert.synthesis.compose.draw import draw_composition
from camoxpert.synthesis.compose.library import ObjectLibrary
from camoxpert.synthesis.compose.pipeline import Material, compose_one, read_material
from camoxpert.synthesis.compose.records import Composed, ComposeSettings, Composition
from camoxpert.synthesis.records import failed_row, write_pair

VERSION = 1
"""Of the images: increased when the same settings give other pixels."""
BYTES_A_PIXEL = 12


@dataclass(frozen=True, slots=True)
class ComposeItem:
    """An image to make, by its number.

    Attributes:
        name: of the image.
        index: of the draw.
    """

    name: str
    index: int

    @property
    def path(self) -> Path:
        """What stands for it in messages."""
        return Path(self.name)

    @property
    def files(self) -> tuple[Path, ...]:
        """None: which files it is made from is drawn; the head of the ledger has all of them."""
        return ()


@dataclass(frozen=True)
class SourceFile:
    """What is known of a file that images are made from.

    Attributes:
        sha256: of its content.
        group: class of its object.
        leak: why it counts as a test image, "" if it does not.
    """

    sha256: str
    group: str = ""
    leak: str = ""


@dataclass(frozen=True)
class ComposeSample:
    """What an image is made from: see ``engine.Sample``."""

    composition: Composition
    material: Material
    inputs: tuple[Tensor, ...]
    seconds: dict[str, float]

    @property
    def held_bytes(self) -> int:
        """Memory until it is finished."""
        material = self.material
        parts = (material.background_RGB, material.object_RGBA, material.texture_RGB)
        made = BYTES_A_PIXEL * self.composition.height * self.composition.width
        return made + sum(part.nbytes for part in parts if part is not None)


@dataclass(frozen=True)
class ComposeSpec:
    """Builds ``ComposeStages`` in whichever process works.

    Attributes:
        output, product: where files go.
        seed, settings: of the draws.
        objects, backgrounds: what there is.
        files: path -> what is known of it.
        derived: how the masks came about, where they are not the ground truth.
    """

    output: str
    product: Product
    seed: int
    settings: ComposeSettings
    objects: ObjectLibrary
    backgrounds: BackgroundIndex
    files: Mapping[str, SourceFile]
    derived: str = ""

    def build(self, device: str) -> ComposeStages:
        """Return the stages; the work is for CPU cores, whatever the device."""
        return ComposeStages(self)

    def failed(self, item: ComposeItem, reason: str) -> Row:
        """Return the fields of the row of an image that no process could make."""
        return failed_row(item.files, reason)


class ComposeStages:
    """Reads objects and backgrounds, composes them, writes images and masks.

    Args:
        spec: what is done.
    """

    def __init__(self, spec: ComposeSpec) -> None:
        self.spec = spec
        self.device = torch.device("cpu")
        self.models = 0
        self._output = Path(spec.output)
        threads = max(1, min(usable_cores(), torch.get_num_threads()))
        self._threads = ThreadPoolExecutor(threads, "compose")

    def read(self, item: ComposeItem) -> ComposeSample:
        """Return what an image is made from.

        Raises:
            DataError: a file cannot be read.
        """
        started = time.monotonic()
        spec = self.spec
        composition = draw_composition(
            spec.seed, item.index, spec.settings, spec.objects, spec.backgrounds
        )
        drawn = time.monotonic()
        material = read_material(composition, spec.objects, spec.backgrounds)
        seconds = {"look up": drawn - started, "read": time.monotonic() - drawn}
        return ComposeSample(composition, material, (torch.empty(0),), seconds)

    def forward(self, inputs: Tensor, samples: Sequence[ComposeSample] = ()) -> list[Composed]:
        """Return the made images."""
        return list(self._threads.map(_compose, samples))

    def finish(self, item: ComposeItem, sample: ComposeSample, outputs: list[Composed]) -> Row:
        """Write an image and its mask, and return the fields of the row.

        Raises:
            DataError: they cannot be written.
        """
        started = time.monotonic()
        (made,) = outputs
        composition, product = sample.composition, self.spec.product
        as_jpeg = product.suffixes["image"] == ".jpg" and made.encoded
        files = write_pair(
            product, self._output, item.name, made.encoded if as_jpeg else made.image, made.mask
        )
        sources = self._sources(composition)
        leaks = [f"{s['path']}: {s['test']}" for s in sources if "test" in s]
        facts = made.row()
        height, width = made.mask.shape
        return {
            "status": "ok",
            **as_fields(state_of(())),
            "digest": None,
            **files,
            "kind": "compose",
            "made": composition.kind,
            "seed": composition.seed,
            "index": composition.index,
            "parameters": composition.row() | {k: v for k, v in facts.items() if k != "difficulty"},
            "sources": sources,
            **({"test_source": "; ".join(leaks)} if leaks else {}),
            **({"mask_source": self.spec.derived} if self.spec.derived else {}),
            "group": self._group(composition),
            "height": height,
            "width": width,
            "object_fraction": round(float((made.mask == 255).mean()), 6),
            "difficulty": facts["difficulty"],
            "seconds": made.seconds | {"write": time.monotonic() - started},
        }

    def _sources(self, composition: Composition) -> list[dict[str, str]]:
        paste = composition.paste
        named = {
            "object": paste.source,
            "object mask": paste.mask,
            "background": composition.background_source,
            "background mask": composition.background_mask,
            "distractor": composition.distractor_source,
        }
        found = []
        for role, path in named.items():
            if path:
                known = self.spec.files[path]
                row = {"role": role, "path": str(Path(path).resolve()), "sha256": known.sha256}
                found.append(row | ({"test": known.leak} if known.leak else {}))
        return found

    def _group(self, composition: Composition) -> str:
        if composition.kind != "object":
            return ""
        return self.spec.files[composition.paste.source].group

    def failed(self, item: ComposeItem, reason: str) -> Row:
        """Return the fields of the row of an image that could not be made."""
        return failed_row(item.files, reason)

    def example(self) -> Tensor:
        """Return an input to measure with; there is nothing to measure."""
        return torch.empty(1, 0)


def _compose(sample: ComposeSample) -> Composed:
    material = sample.material
    return compose_one(
        sample.composition,
        material.object_RGBA,
        material.background_RGB,
        background_mask=material.background_mask,
        texture_RGB=material.texture_RGB,
    )


def compose_head(spec: ComposeSpec, sources: str, image_format: str) -> dict[str, Any]:
    """Return what all images of a folder depend on.

    Args:
        spec: what is done.
        sources: a description of all sources, with a hash of their contents.
        image_format: jpg or png.
    """
    return {
        "made by": "synthesize compose",
        "version": VERSION,
        "--seed": spec.seed,
        "sources": sources,
        "masks": spec.derived or "ground truth",
        "--format": image_format,
        "composition": asdict(spec.settings),
    }
