"""``synthesize relight``: every source in several lights, a batch at a time.

The stages are ``mask -> albedo -> height -> light -> recombine``. The mask is a file here (see
``masks.py``). Albedo and height are the same for all lights of a source: they are computed once,
and kept by content (``data.cache.stages``). They are rounded to half precision before they are
used, so that an image is the same whether they were computed or found.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from camoxpert.inference.engine import Row
from camoxpert.inference.products import Product
from camoxpert.runtime.device import check_architecture, choose_device
from camoxpert.synthesis.lightsource import (
    LightSource,
    Reading,
    RelightItem,
    read_source,
)
from camoxpert.synthesis.reading import difficulty_of
from camoxpert.synthesis.recent import RECENT, Recent
from camoxpert.synthesis.records import failed_row, write_pair
from camoxpert.synthesis.relight.albedo import log_surround
from camoxpert.synthesis.relight.colour import luminance, to_linear
from camoxpert.synthesis.relight.draw import Light, RelightSettings, draw_light
from camoxpert.synthesis.relight.height import height_from_depth, height_from_mask
from camoxpert.synthesis.relight.pipeline import relight

if TYPE_CHECKING:
    from camoxpert.synthesis.relight.depth import DepthModel

VERSION = 1
"""Of the images: increased when the same settings give other pixels."""
EXAMPLE_SIDE = 512
BYTES_A_PIXEL = 24
"""Memory of a source's pixel until its image is written."""


@dataclass(frozen=True)
class RelightSample:
    """A source that was read, with its light: see ``engine.Sample``.

    Attributes:
        source, light: what it is.
        inputs: the source, for the device.
        seconds: of reading; empty where another light of the source did it.
        spent: of the stages on the device.
    """

    source: LightSource
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
        reading: how sources are read.
        depth_model: folder of a network that estimates depth, or "".
    """

    output: str
    product: Product
    seed: int
    settings: RelightSettings
    reading: Reading
    depth_model: str = ""

    def build(self, device: str) -> RelightStages:
        """Return the stages on a device.

        Raises:
            ConfigError, CheckpointError: the network for depth cannot be loaded.
        """
        where = choose_device(device)
        check_architecture(where)
        model = None
        if self.depth_model:
            from camoxpert.synthesis.relight.depth import load_depth_model

            model = load_depth_model(self.depth_model, where)
        return RelightStages(self, where, model)

    def failed(self, item: RelightItem, reason: str) -> Row:
        """Return the fields of the row of an image that no process could make."""
        return failed_row(item.files, reason)


class RelightStages:
    """Reads sources, relights them, writes images and masks.

    Args:
        spec: what is done.
        device: where.
        depth: estimates depth, or None.
    """

    def __init__(
        self, spec: RelightSpec, device: torch.device, depth: DepthModel | None = None
    ) -> None:
        self.spec, self.device = spec, device
        self.models = 0 if depth is None else 1
        self._depth = depth
        self._output = Path(spec.output)
        self._caches = spec.reading.caches()
        self._recent: Recent[LightSource] = Recent(RECENT)
        self._threads = _single_threads() if device.type == "cpu" else None

    def read(self, item: RelightItem) -> RelightSample:
        """Return a source with its light.

        Raises:
            DataError: it cannot be read.
        """
        seconds: dict[str, float] = {}
        source = self._recent.get(item.files, lambda: read_source(item, self.spec.reading, seconds))
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
    def _complete(self, source: LightSource, inputs: Tensor, seconds: dict[str, float]) -> None:
        """Compute what is not known of a source: the light in it, and its height."""
        started = time.perf_counter()
        images, inside = inputs[:, :3], (inputs[:, 3:] > 127).float()
        if source.log_light is None:
            # What the albedo follows from: one channel instead of three.
            source.log_light = log_surround(luminance(to_linear(images)))[0].half()
            source.unsaved.append("albedo")
        computed = time.perf_counter()
        if source.height is None:
            if source.depth is not None:
                depth = torch.from_numpy(source.depth).to(self.device)[None, None]
                height = height_from_depth(depth, inside)
            elif self._depth is not None:
                height = height_from_depth(self._depth.depths(images), inside)
            else:
                height = height_from_mask(inside)
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

    def _keep(self, source: LightSource) -> None:
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
        "heights": spec.reading.depth or "from masks",
        "--size": spec.reading.size,
        "--format": image_format,
        "light": {key: value for key, value in asdict(spec.settings).items()},
    }
