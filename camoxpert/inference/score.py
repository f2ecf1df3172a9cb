"""Score a model on a set of images at their original size, with the metric engine."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from camoxpert import stop
from camoxpert.data.files.labels import split_void
from camoxpert.data.samples.batches import EvalBatch
from camoxpert.errors import NumericError
from camoxpert.metrics import Evaluator
from camoxpert.metrics.device import DeviceScorer
from camoxpert.metrics.scoring import Row
from camoxpert.models.camoxpert import ModelOutput
from camoxpert.models.guidance import Reference
from camoxpert.models.modalities import Modalities, all_there_is
from camoxpert.models.router import Routing, first_choices
from camoxpert.runtime.device import HostCopy, Precision
from camoxpert.text import count, shorten

WHERE_FROM = (
    "In fp16 it may have overflowed: --precision fp32 tells. If not, the weights have diverged."
)

FORWARD_BATCH = {"cpu": 4}
"""Images per forward pass by device type. On a CPU 4 take 1.3 to 1.8 times the images per second of
single ones (128 and 224 px, two cores)."""
FORWARD_BATCH_ELSEWHERE = 16


@dataclass(frozen=True)
class Item:
    """One image to score.

    Attributes:
        name: unique in its data set.
        image: uint8 (3, S, S), resized.
        size: (height, width) of the original.
        mask: uint8 (H, W), 0 or 255, VOID on pixels that are not scored.
        original: uint8 RGB (H, W, 3), or None if the loader does not keep it.
        planes: uint8 (M, S, S), what other sensors saw, 0 where nothing is known; None: nothing is
            read beside the images.
    """

    name: str
    image: Tensor
    size: tuple[int, int]
    mask: NDArray[np.uint8]
    original: NDArray[np.uint8] | None
    planes: Tensor | None = None


Seen = Callable[[Item, Callable[[], NDArray[np.uint8]], Row], None]
"""Called with an image, a function that returns its uint8 map, and its score row."""
Routed = Callable[[Sequence[Item], Tensor], None]
"""Called with images and the experts that they use most, (levels, images), on the device."""
Judged = Callable[[Sequence[Item], Tensor], None]
"""Called with images and the calibrated probabilities (images,) that they hold any object, on the
device."""


class Maps(NamedTuple):
    """What a model says of a batch.

    Attributes:
        maps: one probability map per image at its own size, float32 (H, W) in 0..1.
        routing: as in ``ModelOutput``.
        presence_B: calibrated probabilities that the images hold any object; None without a head.
    """

    maps: list[Tensor]
    routing: tuple[Routing, ...]
    presence_B: Tensor | None


Shown = Callable[[Modalities], Modalities]
"""Called with all that there is of the images of a forward pass; returns what of it counts."""
References = Callable[[Sequence[Item]], Reference]
"""Called with the images of a forward pass."""


@torch.inference_mode()
def probability_maps(
    model: nn.Module,
    images_BCHW: Tensor,
    sizes: Sequence[tuple[int, int]],
    *,
    precision: Precision | None = None,
    reference: Reference | None = None,
    modalities: Modalities | None = None,
) -> Maps:
    """Return one probability map per image at its own size, the routing, and the presence.

    The logits are resized (bilinear, align_corners=False), then the sigmoid is taken.

    Args:
        model: returns a ModelOutput; its mode is not changed.
        images_BCHW: uint8 images on the model's device.
        sizes: (height, width) of every original image.
        precision: number format of the forward pass; None: the format of the weights.
        reference: what each image is searched for; None: what the model was told, if anything.
        modalities: what other sensors saw; None: nothing.

    Returns:
        Tensors on the device.
    """
    with nullcontext() if precision is None else precision.autocast(images_BCHW.device):
        more = () if reference is None and modalities is None else (reference, modalities)
        output = model(images_BCHW, *more)
    logits = output.logits_B1HW.float()
    maps = [enlarged(logits[i], size) for i, size in enumerate(sizes)]
    return Maps(maps, output.routing, presence_of(model, output))


def presence_of(model: nn.Module, output: ModelOutput) -> Tensor | None:
    """Return the calibrated probabilities (B,) that images hold any object; None without a head."""
    if output.presence_logit_B is None:
        return None
    # A plain module has no such method; only networks that have it return such a logit.
    judge: Callable[[ModelOutput], Tensor] = model.presence_probability  # type: ignore[assignment]
    return judge(output)


def enlarged(logits_1HW: Tensor, size: tuple[int, int]) -> Tensor:
    """Return the probabilities (H, W) of float32 logits (1, h, w) at an image's own size."""
    resized = F.interpolate(logits_1HW[None], size=size, mode="bilinear", align_corners=False)
    return resized.sigmoid()[0, 0]


def to_uint8(probability_HW: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Return the 0..255 map that is saved and scored: truncated, as the field does."""
    return (probability_HW * 255).astype(np.uint8)


def score(
    model: nn.Module,
    batches: Iterable[EvalBatch],
    *,
    device: torch.device,
    evaluator: Evaluator,
    groups: Mapping[str, str] | None = None,
    precision: Precision | None = None,
    seen: Seen | None = None,
    routed: Routed | None = None,
    judged: Judged | None = None,
    on_device: bool | None = None,
    broken: Callable[[list[str]], None] | None = None,
    references: References | None = None,
    shown: Shown | None = None,
) -> None:
    """Score a model on evaluation batches into ``evaluator``.

    The forward pass always takes the same number of images, whatever the loader's batch size: how a
    convolution rounds depends on it, and a score must not. The last images are repeated to fill
    their pass.

    On a CUDA device the maps are scored there, and the host waits once per batch, while the next
    one is being computed.

    Args:
        model: put into evaluation mode during the call.
        batches: evaluation batches with images, original-size masks, names and sizes.
        device: the model's device.
        evaluator: receives one map per image.
        groups: image name -> label of its row.
        precision: number format of the forward pass; None: the format of the weights.
        seen: called for every image, in order.
        routed: called for every forward pass, before ``seen``.
        judged: called for every forward pass of a model with a presence head, before ``seen``.
        references: gives the images of a forward pass what they are searched for.
        shown: which modalities of the images count; None: all that are in the batches.
        on_device: score the maps with the torch path; None: only on CUDA devices.
        broken: called with names of images whose map is not finite, which then count as if nothing
            was found; None: they are an error.

    Raises:
        Stopped: the command was asked to stop.
        NumericError: a map is not finite, unless ``broken`` is told.
    """
    training = model.training
    model.eval()
    use_torch = device.type == "cuda" if on_device is None else on_device
    scorer = DeviceScorer(evaluator, HostCopy) if use_torch else None
    waiting: list[tuple[Item, Tensor]] = []
    finite: HostCopy | None = None
    size = forward_batch(device)
    labels = groups or {}

    def finish(done: list[tuple[Item, Tensor]]) -> None:
        if finite is not None:
            check_finite([item.name for item, _ in done], finite.read(), broken or refuse)
        if scorer is not None:
            rows = scorer.flush()
        else:
            rows = []
            for item, map_HW in done:
                mask, void = split_void(item.mask)
                label = labels.get(item.name, "")
                rows.append(
                    evaluator.add(item.name, _on_host(map_HW), mask, void=void, group=label)
                )
        if seen is not None:
            for (item, map_HW), row in zip(done, rows, strict=True):
                seen(item, partial(_on_host, map_HW), row)

    try:
        for items in chunks(batches, size):
            stop.check()
            filled = [*items, *[items[-1]] * (size - len(items))]
            images = torch.stack([item.image for item in filled]).to(device)
            sizes = [item.size for item in items]
            told = None if references is None else references(filled)
            seen_too = modalities_of(filled, device)
            if shown is not None and seen_too is not None:
                seen_too = shown(seen_too)
            maps, routing, presence = probability_maps(
                model, images, sizes, precision=precision, reference=told, modalities=seen_too
            )
            if routed is not None:
                chosen = torch.stack([first_choices(level, size) for level in routing])
                routed(items, chosen[:, : len(items)])
            if judged is not None and presence is not None:
                judged(items, presence[: len(items)])
            finish(waiting)
            finite = HostCopy(torch.stack([map_HW.isfinite().all() for map_HW in maps]))
            waiting = [(i, (m * 255).to(torch.uint8)) for i, m in zip(items, maps, strict=True)]
            if scorer is not None:
                for item, map_HW in waiting:
                    mask, void = split_void(item.mask)
                    label = labels.get(item.name, "")
                    scorer.add(item.name, map_HW, mask, void=void, group=label)
                scorer.send()
        finish(waiting)
    finally:
        model.train(training)


def check_finite(
    names: Sequence[str], finite_B: Tensor, broken: Callable[[list[str]], None]
) -> None:
    """Tell of images whose map is not finite: it would score as if nothing had been found.

    Args:
        names: of the images of a forward pass.
        finite_B: whether the map of each is finite, on the host.
        broken: is called with the names of those whose map is not, if there are any.
    """
    found = [name for name, fine in zip(names, finite_B.numpy(), strict=True) if not fine]
    if found:
        broken(found)


def refuse(names: list[str]) -> None:
    """Raise NumericError for images whose map is not finite."""
    raise NumericError(
        f"The network's output is not finite for {count(len(names), 'image')} ({shorten(names)}). "
        f"{WHERE_FROM}"
    )


def modalities_of(items: Sequence[Item], device: torch.device) -> Modalities | None:
    """Return all that other sensors saw of images, on the device; None where nothing was read."""
    planes = [item.planes for item in items if item.planes is not None]
    return all_there_is(torch.stack(planes).to(device)) if planes else None


def forward_batch(device: torch.device) -> int:
    """Return how many images a forward pass takes."""
    return FORWARD_BATCH.get(device.type, FORWARD_BATCH_ELSEWHERE)


def _on_host(map_HW: Tensor) -> NDArray[np.uint8]:
    on_host: NDArray[np.uint8] = map_HW.cpu().numpy()
    return on_host


def chunks(batches: Iterable[EvalBatch], size: int) -> Iterator[list[Item]]:
    """Regroup the images of evaluation batches into lists of ``size``; the last may be shorter."""
    ready: list[Item] = []
    for batch in batches:
        for index, name in enumerate(batch.names):
            original = batch.originals[index] if batch.originals else None
            mask = batch.full_masks[index]
            planes = None if batch.planes is None else batch.planes[index]
            ready.append(
                Item(name, batch.images[index], batch.sizes[index], mask, original, planes)
            )
            if len(ready) == size:
                yield ready
                ready = []
    if ready:
        yield ready
