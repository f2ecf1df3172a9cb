"""What the network sees of an image, ``--tile`` and ``--tta``: one input, or several whose logits
become one map."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from camoxpert import console
from camoxpert.data.files.modalities import resize_known
from camoxpert.errors import ConfigError, DataError
from camoxpert.inference.score import enlarged
from camoxpert.inference.tiles import Grid, blended, joined, make_grid, stride
from camoxpert.inference.tta import FLIP, Looked, averaged, mirrored_too, parse_tta, sides_of
from camoxpert.inference.values import finite_number, whole_number

T = TypeVar("T")
OVERLAP = 0.25
"""Share of a tile that the next one covers too, unless another is given."""
OVERLAP_LIMIT = 0.9
MOST_BYTES = 4_000_000_000
"""Memory that the inputs and logits of one image may take; one that needs more is refused."""
EXAMPLE = (3000, 4000)
"""Size (height, width) of the photo for which the cost of tiles is printed."""


@dataclass(frozen=True)
class ViewOptions:
    """How images are looked at; ``choose_views`` makes it. The default is a single input.

    Attributes:
        tile: side of the windows of large images, source pixels; None: images are not cut.
        overlap: share of a window that the next one covers too; None without tiles.
        tta: words of ``--tta`` with commas, in a fixed order; None: none.
    """

    tile: int | None = None
    overlap: float | None = None
    tta: str | None = None


ONE_VIEW = ViewOptions()


def choose_views(
    tile: int | None = None, overlap: float | None = None, tta: str | None = None
) -> ViewOptions:
    """Return the options; whether a tile is large enough for the network is found by ``Views``.

    Args:
        tile: ``--tile``; None: off.
        overlap: ``--overlap``; None: OVERLAP.
        tta: ``--tta``; None: off.

    Raises:
        ConfigError: a value is out of range, or an overlap has no tiles.
    """
    if tta is not None and not isinstance(tta, str):
        raise ConfigError(f"--tta must be flip, scales or flip,scales; got {tta!r}.")
    words = parse_tta(tta)
    tile = None if tile is None else whole_number("--tile", tile)
    if overlap is not None and not 0 <= finite_number("--overlap", overlap) < OVERLAP_LIMIT:
        raise ConfigError(
            f"--overlap must be at least 0 and less than {OVERLAP_LIMIT}; {overlap:g} is not."
        )
    if overlap is not None and tile is None:
        raise ConfigError("--overlap is of the windows of --tile: give both, or none.")
    share = None if tile is None else float(OVERLAP if overlap is None else overlap)
    return ViewOptions(tile, share, ",".join(words) or None)


class Views:
    """Turns images into inputs of the network, and their logits into one map.

    Args:
        options: windows and augmentation.
        side: of the network's input, pixels.
        logits: the network, from uint8 (B, 3, s, s).

    Raises:
        ConfigError: a tile is smaller than the network's input.
    """

    def __init__(
        self, options: ViewOptions, *, side: int, logits: Callable[[Tensor], Looked]
    ) -> None:
        if options.tile is not None and options.tile < side:
            raise ConfigError(
                f"--tile must be at least the side of the network's input, {side} px; "
                f"{options.tile} is not."
            )
        self.options, self.side = options, side
        self.words = parse_tta(options.tta)
        self.sides = sides_of(side, self.words)
        self._logits = logits

    def inputs(
        self, image_HWC: NDArray[np.uint8], planes: Sequence[NDArray[np.uint8]] = ()
    ) -> tuple[Tensor, ...]:
        """Return the inputs for an image, uint8 (3 + M, s, s) each.

        The whole image is first, then its windows row by row; each at all sizes.

        Args:
            image_HWC: RGB.
            planes: what M other sensors saw of it, (h, w) each, of any resolution; 0 where nothing
                is known.

        Raises:
            DataError: there would be too many.
        """
        size = (image_HWC.shape[0], image_HWC.shape[1])
        grid = self._grid(size)
        parts = [(image_HWC, tuple(planes))]
        if grid is not None:
            needed = (1 + len(grid)) * sum((3 + 4) * side * side for side in self.sides)
            if needed > MOST_BYTES:
                raise DataError(
                    f"An image of {size[1]} x {size[0]} pixels makes {len(grid)} tiles, which take "
                    f"{needed / 1e9:.0f} GB. Give a larger --tile or less --overlap."
                )
            whole = [resize_known(plane, size) for plane in planes]
            windows = zip(*(grid.crops(plane) for plane in whole), strict=True)
            crops = grid.crops(image_HWC)
            own = list(windows) if planes else [()] * len(crops)
            parts += [(crop, tuple(seen)) for crop, seen in zip(crops, own, strict=True)]
        return tuple(prepared(part, side, seen) for part, seen in parts for side in self.sides)

    def logits(self, images_BCHW: Tensor) -> Looked:
        """Return what the network says of inputs, on the device."""
        if FLIP in self.words:
            return mirrored_too(self._logits, images_BCHW)
        return self._logits(images_BCHW)

    def probability(self, outputs: Sequence[Any], size: tuple[int, int]) -> Tensor:
        """Return the probabilities (H, W) of an image from the logits of its inputs.

        Args:
            outputs: float32 (1, s, s) for every input, in order, or pairs of such logits and the
                presence.
            size: (height, width) of the image.
        """
        logits = [output[0] if isinstance(output, tuple) else output for output in outputs]
        whole, *tiles = self._parts(logits)
        grid = self._grid(size)
        if grid is None:
            return enlarged(averaged(whole), size)
        map_HW = blended(grid, map(averaged, tiles))
        return joined(grid, map_HW, averaged(whole)).sigmoid_()

    def presence(self, outputs: Sequence[Any]) -> float | None:
        """Return the probability that an image holds any object; None without the head.

        The mean over its sizes; of an image with windows the largest of the whole and its windows:
        what only a window shows is there as well.
        """
        if not isinstance(outputs[0], tuple):
            return None
        parts = self._parts([float(presence) for _, presence in outputs])
        return max(sum(part) / len(part) for part in parts)

    def _parts(self, values: Sequence[T]) -> list[Sequence[T]]:
        """Return the values of the whole image and of each window, one for each size."""
        number = len(self.sides)
        return [values[start : start + number] for start in range(0, len(values), number)]

    def held_bytes(self, inputs: Sequence[Tensor], size: tuple[int, int]) -> int:
        """Return the memory that an image takes beside its pixels until its map is made.

        That is its inputs, their logits, the map at its own size, and for tiles the context that is
        added to it.
        """
        logits = sum(4 * tensor[0].numel() for tensor in inputs)
        maps = 1 if self._grid(size) is None else 2
        return sum(t.nbytes for t in inputs) + logits + 4 * maps * size[0] * size[1]

    def decide(self) -> None:
        """Print what was chosen and what it costs."""
        passes = len(self.sides) * (2 if FLIP in self.words else 1)
        tile, overlap = self.options.tile, self.options.overlap
        if tile is not None and overlap is not None:
            grid = self._grid(EXAMPLE)
            number = passes * (1 if grid is None else 1 + len(grid))
            console.decide(
                "tiles",
                f"images larger than {tile} px in windows of {tile} px, a new one every "
                f"{stride(tile, overlap)}, and the whole of it: {number} forward passes for "
                f"{EXAMPLE[1]} x {EXAMPLE[0]} pixels",
            )
        if self.words:
            pixels = passes * sum(side**2 for side in self.sides) / len(self.sides) / self.side**2
            mirror = "as it is and mirrored, " if FLIP in self.words else ""
            console.decide(
                "tta",
                f"each image or tile {mirror}at {', '.join(map(str, self.sides))} px: {passes} "
                f"forward passes instead of 1, {pixels:.1f} times the pixels",
            )

    def _grid(self, size: tuple[int, int]) -> Grid | None:
        if self.options.tile is None or self.options.overlap is None:
            return None
        return make_grid(size, self.options.tile, self.options.overlap)


def prepared(
    image_HWC: NDArray[np.uint8], side: int, planes: Sequence[NDArray[np.uint8]] = ()
) -> Tensor:
    """Return an RGB uint8 image (H, W, 3) and planes of other sensors (h, w) as an input of the
    network, uint8 (3 + M, side, side)."""
    shrink = min(image_HWC.shape[:2]) > side
    resized = cv2.resize(
        image_HWC, (side, side), interpolation=cv2.INTER_AREA if shrink else cv2.INTER_LINEAR
    )
    channels = np.ascontiguousarray(resized.transpose(2, 0, 1))
    if not planes:
        return torch.from_numpy(channels)
    seen = [resize_known(plane, (side, side)) for plane in planes]
    return torch.from_numpy(np.concatenate([channels, np.stack(seen)]))
