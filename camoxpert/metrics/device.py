"""The torch path of the metric engine: maps are scored on their device, and the host reads the
results of a whole batch at once, one batch later.

Only 2048 counts and one number per image are copied to the host. The code of the numpy path then
derives the measures from the counts, so that both paths agree to the last bit; weighted F, which
needs pixels, is computed on the device in float64 and agrees to rounding (1e-12).

Shape letters: H, W height and width; L 256 grey levels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from camoxpert.errors import ConfigError
from camoxpert.metrics.evaluator import Evaluator
from camoxpert.metrics.histogram import JointHistogram, level_values, split_point, void_counts
from camoxpert.metrics.inputs import check_same_size, checked_mask, checked_void
from camoxpert.metrics.scoring import Row, assemble, count_objects, digest_mask
from camoxpert.metrics.weighted import EPS, GAUSSIAN, NEIGHBOURS, PAD, RADIUS

CHUNK_ELEMENTS = 1 << 26
"""Distances in memory at a time: 256 MiB of int32."""


class Copy(Protocol):
    """A copy that is under way."""

    def read(self) -> Tensor:
        """Return it, on the host, once it is there."""


class CopyWhenRead:
    """Copies when it is read, which waits for all that was launched until then."""

    def __init__(self, values: Tensor) -> None:
        self._values = values

    def read(self) -> Tensor:
        """Return the values on the host."""
        return self._values.cpu()


@dataclass
class _Pending:
    name: str
    group: str
    prediction_HW: Tensor
    mask_HW: NDArray[np.bool_]
    void_HW: NDArray[np.bool_] | None
    split: tuple[int, int]
    numbers: Tensor

    def labelled_pixels(self) -> NDArray[np.uint8]:
        """Return the map on the host; with void, the labelled pixels as one list."""
        on_host: NDArray[np.uint8] = self.prediction_HW.cpu().numpy()
        return on_host if self.void_HW is None else on_host[~self.void_HW]


class DeviceScorer:
    """Scores maps on their device and adds the scores to an Evaluator.

    ``add`` only queues work; ``flush`` waits once for everything that was queued. Call ``flush``
    after queueing the next batch's forward pass, so that the device never idles.

    Args:
        evaluator: receives the scores; its options apply. Of the measures that need pixels, only
            wFmeasure is available here.
        copy: starts to copy a tensor to the host, so that reading it waits for it alone.

    Raises:
        ConfigError: the evaluator's measures include BoundaryIoU or HCE.
    """

    def __init__(self, evaluator: Evaluator, copy: Callable[[Tensor], Copy] | None = None) -> None:
        missing = {"BoundaryIoU", "HCE"} & set(evaluator.keys)
        if missing:
            raise ConfigError(
                f"{' and '.join(sorted(missing))} cannot be computed on a device. Score the saved"
                " maps instead."
            )
        self.evaluator = evaluator
        self._pending: list[_Pending] = []
        self._copy = copy or CopyWhenRead
        self._sent: Copy | None = None

    def add(
        self,
        name: str,
        prediction_HW: Tensor,
        mask: NDArray[Any],
        *,
        void: NDArray[Any] | None = None,
        group: str = "",
    ) -> None:
        """Queue one image.

        Args:
            name: unique within the data set.
            prediction_HW: uint8 (H, W) on any device.
            mask: (H, W) on the host, as ``Evaluator.add`` takes it.
            void: bool (H, W) on the host, as ``Evaluator.add`` takes it.
            group: free label of the row.
        """
        mask_HW = checked_mask(name, mask)
        check_same_size(name, tuple(prediction_HW.shape), mask_HW)
        void_HW = checked_void(name, void, mask_HW)
        split = split_point(mask_HW)
        left_out = None
        if void_HW is not None:
            left_out = torch.from_numpy(void_HW).to(prediction_HW.device, non_blocking=True)
            prediction_HW = prediction_HW.masked_fill(left_out, 0)
        on_device = torch.from_numpy(mask_HW).to(prediction_HW.device, non_blocking=True)
        counts = joint_counts(prediction_HW, on_device, split).double().ravel()
        if "wFmeasure" in self.evaluator.keys:
            values_L = _level_values(
                prediction_HW, left_out, normalise=self.evaluator.protocol == "pysod"
            )
            weighted = weighted_fmeasure(prediction_HW, values_L, on_device)
            counts = torch.cat([counts, weighted[None]])
        self._pending.append(_Pending(name, group, prediction_HW, mask_HW, void_HW, split, counts))

    def send(self) -> None:
        """Start to copy the numbers of the queued images to the host.

        ``flush`` then waits for them alone, and not for what is launched in between.
        """
        if self._pending:
            self._sent = self._copy(torch.stack([item.numbers for item in self._pending]))

    def flush(self) -> list[Row]:
        """Wait for the queued images, add them to the evaluator and return their rows, in order.

        Raises:
            DataError: a name was already added.
        """
        if self._sent is None:
            self.send()
        waiting, self._pending = self._pending, []
        sent, self._sent = self._sent, None
        if sent is None:
            return []
        numbers = sent.read().numpy()
        return [self._score(item, row) for item, row in zip(waiting, numbers, strict=True)]

    def _score(self, item: _Pending, numbers: NDArray[np.float64]) -> Row:
        evaluator = self.evaluator
        counts = numbers[:2048].astype(np.int64).reshape(4, 2, 256)
        height, width = item.mask_HW.shape
        num_void = 0
        if item.void_HW is not None:
            # The map is 0 there, which counts as background.
            counts[:, 0, 0] -= void_counts(item.void_HW, item.split)
            num_void = int(np.count_nonzero(item.void_HW))
        histogram = JointHistogram(
            counts=counts, shape=(height, width), split=item.split, num_void=num_void
        )
        score = assemble(
            item.name,
            histogram,
            level_values(histogram, normalise=evaluator.protocol == "pysod"),
            {"wFmeasure": float(numbers[2048])} if len(numbers) > 2048 else {},
            pixels=item.labelled_pixels,
            group=item.group,
            empty_gt=evaluator.empty_gt,
            keys=evaluator.keys,
            mask_digest=digest_mask(item.mask_HW, void_HW=item.void_HW),
            num_objects=count_objects(item.mask_HW),
        )
        skipped = evaluator.empty_gt == "skip" and not score.claim.present
        return evaluator.skip(score) if skipped else evaluator.add_score(score)


def joint_counts(prediction_HW: Tensor, mask_HW: Tensor, split: tuple[int, int]) -> Tensor:
    """Count levels per block and class on the device; see ``joint_histogram``.

    Args:
        prediction_HW: uint8.
        mask_HW: bool.
        split: first row and column of the lower right block.

    Returns:
        int64 (4, 2, 256) on the device. Nothing is read back to the host.
    """
    keys_HW = prediction_HW.long() + (mask_HW.long() << 8)
    row, column = split
    keys_HW[row:] += 2 << 9
    keys_HW[:, column:] += 1 << 9
    counts = torch.zeros(2048, dtype=torch.int64, device=keys_HW.device)
    # Not bincount, which reads the largest key back and therefore waits for the device.
    flat = keys_HW.ravel()
    return counts.scatter_add_(0, flat, torch.ones_like(flat)).view(4, 2, 256)


def _level_values(prediction_HW: Tensor, void_HW: Tensor | None, *, normalise: bool) -> Tensor:
    """Return ``level_values`` without reading the histogram on the host, float64 (256,).

    Args:
        prediction_HW: uint8, 0 on void pixels.
        void_HW: bool, True on void pixels; None if there are none.
        normalise: as there.
    """
    values = torch.arange(256, dtype=torch.float64, device=prediction_HW.device) / 255
    if not normalise:
        return values
    low, high = torch.aminmax(prediction_HW)
    if void_HW is not None:
        low = prediction_HW.masked_fill(void_HW, 255).amin()
    low, high = low.double() / 255, high.double() / 255
    stretched = ((values - low) / torch.where(high > low, high - low, 1.0)).clamp(0, 1)
    return torch.where(high > low, stretched, values)


def weighted_fmeasure(prediction_HW: Tensor, values_L: Tensor, mask_HW: Tensor) -> Tensor:
    """Return the weighted F-measure as a float64 scalar on the device; see ``weighted.py``.

    Args:
        prediction_HW: uint8 (H, W).
        values_L: float64 (256,) value of each grey level.
        mask_HW: bool (H, W).
    """
    error_HW = (values_L[prediction_HW.long()] - mask_HW.double()).abs()
    squared_HW = squared_distance(mask_HW)
    num_foreground = mask_HW.sum()

    # From the farthest neighbour to the nearest, so that the nearest one writes last.
    padded_mask = F.pad(mask_HW, [PAD] * 4)
    padded_error = F.pad(error_HW, [PAD] * 4)
    spread_HW = torch.where(mask_HW, error_HW, 0.0)
    height, width = mask_HW.shape
    for distance, offsets in reversed(NEIGHBOURS.items()):
        here_HW = squared_HW == distance
        for row, column in reversed(offsets.tolist()):
            part = (slice(PAD + row, PAD + row + height), slice(PAD + column, PAD + column + width))
            spread_HW = torch.where(here_HW & padded_mask[part], padded_error[part], spread_HW)
    gaussian = torch.from_numpy(GAUSSIAN).to(error_HW.device, non_blocking=True)
    smooth = F.conv2d(spread_HW[None, None], gaussian.view(1, 1, -1, 1), padding=(RADIUS, 0))
    smooth = F.conv2d(smooth, gaussian.view(1, 1, 1, -1), padding=(0, RADIUS))[0, 0]
    object_error = torch.where(mask_HW, torch.minimum(error_HW, smooth), 0.0).sum()

    weights_HW = 2 - torch.exp(squared_HW.double().sqrt() * (np.log(0.5) / 5))
    false_alarms = torch.where(mask_HW, 0.0, error_HW * weights_HW).sum()
    hits = num_foreground - object_error
    recall = 1 - object_error / num_foreground.clamp_min(1)
    precision = hits / (hits + false_alarms + EPS)
    score = 2 * recall * precision / (recall + precision + EPS)
    return torch.where(num_foreground > 0, score, 0.0)


def squared_distance(mask_HW: Tensor) -> Tensor:
    """Return the exact squared distance of every pixel to the nearest object pixel, int32 (H, W).

    Columns first, by running maxima, then rows, by comparing every pair of columns: O(H W^2), all
    of it parallel. Without an object the values are large and meaningless.
    """
    height, width = mask_HW.shape
    device = mask_HW.device
    rows_H1 = torch.arange(height, device=device, dtype=torch.int32)[:, None]
    # Farther than any real distance, and its square is still an int32.
    nowhere = height + width
    above = torch.where(mask_HW, rows_H1, -nowhere).cummax(0).values
    below = torch.where(mask_HW, rows_H1, height + nowhere).flip(0).cummin(0).values.flip(0)
    vertical_HW = torch.minimum(rows_H1 - above, below - rows_H1).clamp_max(nowhere)
    vertical_HW = vertical_HW * vertical_HW
    columns = torch.arange(width, device=device, dtype=torch.int32)
    horizontal_WW = (columns[:, None] - columns[None, :]).square()
    step = max(1, CHUNK_ELEMENTS // (width * width))
    return torch.cat(
        [(part[:, None, :] + horizontal_WW).amin(-1) for part in vertical_HW.split(step)]
    )
