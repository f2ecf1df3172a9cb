"""``synthesize relight``: every source in several lights, a batch at a time.

The stages are ``mask -> albedo -> height -> light -> recombine``. The mask is a file here (see
``masks.py``). Albedo and height are the same for all lights of a source: they are computed once,
and kept by content (``stagecache.py``). They are rounded to half precision before they are used, so
that an image is the same whether they were computed or found.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from camoxpert.data.files.image_io import read_levels, read_pair
from camoxpert.errors import DataError
from camoxpert.inference.engine import Row
from camoxpert.inference.ledger import as_fields
from camoxpert.inference.plan import joined_digest, state_of
from camoxpert.inference.products import Product
from camoxpert.runs.checkpoint import file_digest
from camoxpert.runtime.device import check_architecture, choose_device
from camoxpert.synthesis.compose.difficulty import difficulty
from camoxpert.synthesis.recent import Recent
from camoxpert.synthesis.records import failed_row, write_pair
from camoxpert.synthesis.relight.albedo import FLOOR, NOMINAL, SIGMAS, log_surround
from camoxpert.synthesis.relight.colour import luminance, to_linear
from camoxpert.synthesis.relight.draw import Light, RelightSettings, draw_light
from camoxpert.synthesis.relight.height import height_from_depth, height_from_mask
from camoxpert.synthesis.relight.pipeline import relight
from camoxpert.synthesis.stagecache import OFF, StageCache, content_key, settings_key

VERSION = 1
"""Of the images: increased when the same settings give other pixels."""
ALBEDO = {"version": 1, "sigmas": SIGMAS, "nominal": NOMINAL, "floor": FLOOR}
HEIGHT = {"version": 1}
ROLES = ("image", "mask", "depth")
"""Of the files of an item, in the provenance."""
RECENT = 6
"""Sources that are kept in memory: the lights of one follow each other."""
EXAMPLE_SIDE = 512
BYTES_A_PIXEL = 24
"""Memory of a source's pixel until its image is written."""


@dataclass(frozen=True, slots=True)
class RelightItem:
    """A source in one light.

    Attributes:
        name: of the image.
        path, mask: files of the source.
        depth: file of its depth map, or None.
        any_size: the mask may have another size than the image.
        group: class of the source.
        index: of the draw.
        leak: why the source counts as a test image, "" if it does not.
        derived: how the mask came about, where it is not the ground truth.
        fault: why there is no mask, "" if there is one.
    """

    name: str
    path: Path
    mask: Path
    depth: Path | None
    any_size: bool
    group: str
    index: int
    leak: str = ""
    derived: str = ""
    fault: str = ""

    @property
    def files(self) -> tuple[Path, ...]:
        """What the image is made from."""
        return (self.path, self.mask) if self.depth is None else (self.path, self.mask, self.depth)


def index_of(name: str, variant: int) -> int:
    """Return the index of a draw: of the source's name, so that other sources change nothing."""
    digest = hashlib.sha256(f"{name}\n{variant}".encode(errors="surrogateescape")).digest()
    return int.from_bytes(digest[:6], "big")


@dataclass(eq=False)
class _Source:
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
    state: dict[str, Any]
    difficulty: float | None
    keys: dict[str, str]
    outcomes: dict[str, str]
    log_light: Tensor | None = None
    height: Tensor | None = None
    unsaved: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class RelightSample:
    """A source that was read, with its light: see ``engine.Sample``.

    Attributes:
        source, light: what it is.
        inputs: the source, for the device.
        seconds: of reading; empty where another light of the source did it.
        spent: of the stages on the device.
    """

    source: _Source
    light: Light
    inputs: tuple[Tensor, ...]
    seconds: dict[str, float]
    spent: dict[str, float] = field(default_factory=dict)

    @property
    def held_bytes(self) -> int:
        """Memory until it is finished."""
        return BYTES_A_PIXEL * self.source.mask.size


@dataclass(frozen=True)
class RelightSpec:
    """Builds ``RelightStages`` in whichever process works.

    Attributes:
        output, product: where files go.
        seed, settings: of the lights.
        size: longer side of the images; larger sources are shrunk. None: as they are.
        max_pixels: larger sources are refused.
        cache: folder of the stages' results, or None.
        depth: a description of the depth maps; "": heights from masks.
    """

    output: str
    product: Product
    seed: int
    settings: RelightSettings
    size: int | None
    max_pixels: int
    cache: str | None
    depth: str = ""

    def build(self, device: str) -> RelightStages:
        """Return the stages on a device."""
        where = choose_device(device)
        check_architecture(where)
        return RelightStages(self, where)

    def failed(self, item: RelightItem, reason: str) -> Row:
        """Return the fields of the row of an image that no process could make."""
        return failed_row(item.files, reason)

    def caches(self) -> dict[str, StageCache]:
        """Return the cache of each stage."""
        folder = None if self.cache is None else Path(self.cache)
        return {
            "albedo": StageCache(folder, "albedo", settings_key(ALBEDO)),
            "height": StageCache(folder, "height", settings_key(HEIGHT | {"depth": self.depth})),
        }


class RelightStages:
    """Reads sources, relights them, writes images and masks.

    Args:
        spec: what is done.
        device: where.
    """

    def __init__(self, spec: RelightSpec, device: torch.device) -> None:
        self.spec, self.device = spec, device
        self.models = 0
        self._output = Path(spec.output)
        self._caches = spec.caches()
        self._recent: Recent[_Source] = Recent(RECENT)
        self._threads = _single_threads() if device.type == "cpu" else None

    def read(self, item: RelightItem) -> RelightSample:
        """Return a source with its light.

        Raises:
            DataError: it cannot be read.
        """
        seconds: dict[str, float] = {}
        source = self._recent.get(item.files, lambda: read_source(item, self.spec, seconds))
        light = draw_light(self.spec.seed, item.index, self.spec.settings)
        return RelightSample(source, light, (source.stacked,), seconds)

    def forward(
        self, inputs: Tensor, samples: Sequence[RelightSample] = ()
    ) -> tuple[Tensor, Tensor]:
        """Return the images, uint8 (B, 3, H, W), and how many pixels changed (B,).

        On a CPU every image is computed by one thread, and several at a time: then their bytes
        depend neither on the batch nor on the number of threads.
        """
        if not samples:
            light = draw_light(0, 1, self.spec.settings)
            return self._relit(inputs, [light] * len(inputs), None, None, None)
        if self._threads is None:
            for number, sample in enumerate(samples):
                self._complete(sample.source, inputs[number : number + 1], sample.spent)
            return self._lit(inputs, samples)
        ones = list(inputs.split(1))
        # The lights of a source share what is computed here.
        first = {id(sample.source): n for n, sample in enumerate(samples)}.values()
        for _ in self._threads.map(
            lambda n: self._complete(samples[n].source, ones[n], samples[n].spent), first
        ):
            pass
        parts = self._threads.map(
            lambda n: self._lit(ones[n], samples[n : n + 1]), range(len(ones))
        )
        images, changed = zip(*parts, strict=True)
        return torch.cat(images), torch.cat(changed)

    @torch.inference_mode()
    def _lit(self, inputs: Tensor, samples: Sequence[RelightSample]) -> tuple[Tensor, Tensor]:
        """Return sources of which all is known in their lights."""
        sources = [sample.source for sample in samples]
        # Synchronising a GPU to tell stages apart would cost more than it tells.
        seconds: dict[str, float] | None = None if self._threads is None else {}
        found = self._relit(
            inputs,
            [sample.light for sample in samples],
            self._stacked([source.log_light for source in sources]),
            self._stacked([source.height for source in sources]),
            seconds,
        )
        for stage, value in (seconds or {}).items():
            for sample in samples:
                sample.spent[stage] = sample.spent.get(stage, 0.0) + value / len(samples)
        return found

    def _stacked(self, parts: Sequence[Tensor | None]) -> Tensor:
        # Those from the cache are on the host, those that were computed on the device.
        return torch.stack([part.to(self.device) for part in parts if part is not None])

    @torch.inference_mode()
    def _complete(self, source: _Source, inputs: Tensor, seconds: dict[str, float]) -> None:
        """Compute what is not known of a source: the light in it, and its height."""
        started = time.perf_counter()
        images, inside = inputs[:, :3], (inputs[:, 3:] > 127).float()
        if source.log_light is None:
            # What the albedo follows from: one channel instead of three.
            source.log_light = log_surround(luminance(to_linear(images)))[0].half()
            source.unsaved.append("albedo")
        computed = time.perf_counter()
        if source.height is None:
            if source.depth is None:
                height = height_from_mask(inside)
            else:
                depth = torch.from_numpy(source.depth).to(self.device)[None, None]
                height = height_from_depth(depth, inside)
            source.height = height[0].half()
            source.unsaved.append("height")
        if self._threads is not None:
            seconds["albedo"] = computed - started
            seconds["height"] = time.perf_counter() - computed

    def _relit(
        self,
        inputs: Tensor,
        lights: Sequence[Light],
        log_lights: Tensor | None,
        heights: Tensor | None,
        seconds: dict[str, float] | None,
    ) -> tuple[Tensor, Tensor]:
        images, masks = inputs[:, :3], inputs[:, 3:]
        albedos = None
        if log_lights is not None:
            albedos = to_linear(images) * (-log_lights.float()).exp()
        relit = relight(
            images,
            masks,
            lights,
            heights_B1HW=None if heights is None else heights.float(),
            albedos_B3HW=albedos,
            seconds=seconds,
        )
        return relit.images_B3HW, relit.changed_B1HW.sum((1, 2, 3))

    def finish(
        self, item: RelightItem, sample: RelightSample, outputs: list[tuple[Tensor, Tensor]]
    ) -> Row:
        """Write an image and its mask, keep what the stages found, return the fields of the row.

        Raises:
            DataError: they cannot be written.
        """
        started = time.monotonic()
        ((image_3HW, changed),) = outputs
        source, light = sample.source, sample.light
        pixels = np.ascontiguousarray(image_3HW.permute(1, 2, 0).numpy())
        self._keep(source)
        files = write_pair(self.spec.product, self._output, item.name, pixels, source.mask)
        written = time.monotonic() - started
        height, width = source.mask.shape
        return {
            "status": "ok",
            **source.state,
            "digest": source.digest,
            **files,
            "kind": "relight",
            "seed": light.seed,
            "index": light.index,
            "parameters": light.to_record(),
            "sources": source.records,
            **({"test_source": item.leak} if item.leak else {}),
            **({"mask_source": item.derived} if item.derived else {}),
            "group": item.group,
            "height": height,
            "width": width,
            "object_fraction": round(float((source.mask == 255).mean()), 6),
            "changed_fraction": round(float(changed) / source.mask.size, 6),
            "difficulty": difficulty_of(pixels, source.mask),
            "difficulty_source": source.difficulty,
            "cache": source.outcomes if sample.seconds else {},
            "seconds": sample.spent | {"write": written},
        }

    def _keep(self, source: _Source) -> None:
        """Keep results of stages; the first image of a source that is written does it."""
        while source.unsaved:
            try:
                stage = source.unsaved.pop()
            except IndexError:
                # Another thread was faster.
                return
            found = source.log_light if stage == "albedo" else source.height
            assert found is not None
            self._caches[stage].keep(source.keys[stage], found.cpu().numpy())

    def failed(self, item: RelightItem, reason: str) -> Row:
        """Return the fields of the row of an image that could not be made."""
        return failed_row(item.files, reason)

    def example(self) -> Tensor:
        """Return a grey picture with a square object."""
        one = torch.full((1, 4, EXAMPLE_SIDE, EXAMPLE_SIDE), 128, dtype=torch.uint8)
        one[:, 3] = 0
        one[:, 3, 128:384, 128:384] = 255
        return one.to(self.device)


def _single_threads() -> ThreadPoolExecutor:
    """Return as many threads as torch may use, in each of which torch uses one."""
    number = torch.get_num_threads()
    return ThreadPoolExecutor(number, "relight", initializer=torch.set_num_threads, initargs=(1,))


def read_source(item: RelightItem, spec: RelightSpec, seconds: dict[str, float]) -> _Source:
    """Return a source with what is cached of it.

    Args:
        item: one of its lights.
        spec: what is done.
        seconds: gets the seconds of reading.

    Raises:
        DataError: a file cannot be read, or the mask shows no object.
    """
    if item.fault:
        raise DataError(f"No mask: {item.fault}")
    started = time.monotonic()
    before = state_of(item.files)
    pixels, mask = read_pair(
        item.path, item.mask, max_pixels=spec.max_pixels, any_size=item.any_size
    )
    pixels, mask = fitted(pixels, mask, spec.size)
    if not (mask == 255).any():
        raise DataError(f"The mask {item.mask} shows no object: there is nothing to relight.")
    depth = None if item.depth is None else read_depth(item.depth, mask.shape)
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
    for stage, cache in spec.caches().items():
        found[stage], outcome = cache.find(keys[stage])
        if outcome != OFF:
            outcomes[stage] = outcome
    digests = [file_digest(path) for path in item.files]
    records = [
        {"role": role, "path": str(path.resolve()), "sha256": digest}
        for role, path, digest in zip(ROLES, item.files, digests, strict=False)
    ]
    seconds |= {"read": decoded - started, "look up": time.monotonic() - decoded}
    return _Source(
        pixels=pixels,
        mask=mask,
        stacked=torch.from_numpy(np.ascontiguousarray(stacked)),
        depth=depth,
        records=records,
        # A file that changes while it is read has no known content.
        digest=joined_digest(digests),
        state=as_fields(before if state_of(item.files) == before else None),
        difficulty=difficulty_of(pixels, mask),
        keys=keys,
        outcomes=outcomes,
        log_light=_tensor(found["albedo"]),
        height=_tensor(found["height"]),
    )


def _tensor(found: NDArray[Any] | None) -> Tensor | None:
    return None if found is None else torch.from_numpy(found)


def fitted(
    pixels: NDArray[np.uint8], mask: NDArray[np.uint8], size: int | None
) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Return image and mask of one size, the longer side at most ``size``; levels stay exact."""
    height, width = pixels.shape[:2]
    scale = 1.0 if size is None else min(1.0, size / max(height, width))
    shape = (max(1, round(width * scale)), max(1, round(height * scale)))
    if shape != (width, height):
        pixels = np.asarray(cv2.resize(pixels, shape, interpolation=cv2.INTER_AREA), np.uint8)
    if mask.shape != pixels.shape[:2]:
        nearest = cv2.resize(mask, shape, interpolation=cv2.INTER_NEAREST_EXACT)
        mask = np.asarray(nearest, np.uint8)
    return pixels, mask


def read_depth(path: Path, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """Return a depth map, whose larger values are nearer, at the size of its image.

    Raises:
        DataError: it cannot be read, or holds a single value.
    """
    levels = read_levels(path).levels.astype(np.float32)
    if levels.max() <= levels.min():
        raise DataError(f"The depth map {path} holds a single value.")
    if levels.shape != shape:
        resized = cv2.resize(levels, (shape[1], shape[0]), interpolation=cv2.INTER_LINEAR)
        levels = np.asarray(resized, np.float32)
    return np.ascontiguousarray(levels)


def difficulty_of(pixels: NDArray[np.uint8], mask: NDArray[np.uint8]) -> float | None:
    """Return how hard an object is to see, 0..1; None without an object or surroundings."""
    inside = mask == 255
    try:
        return round(difficulty(pixels, inside, (mask > 0) & ~inside), 4)
    except ValueError:
        return None


def relight_head(spec: RelightSpec, masks: str, image_format: str) -> dict[str, Any]:
    """Return what all images of a folder depend on besides their sources.

    Args:
        spec: what is done.
        masks: where they come from.
        image_format: jpg or png.
    """
    return {
        "made by": "synthesize relight",
        "version": VERSION,
        "--seed": spec.seed,
        "masks": masks,
        "heights": spec.depth or "from masks",
        "--size": spec.size,
        "--format": image_format,
        "light": {key: value for key, value in asdict(spec.settings).items()},
    }
