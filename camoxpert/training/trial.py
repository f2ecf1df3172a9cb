"""Trial steps on made-up images: their memory and time; they change nothing."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from camoxpert.config import Config
from camoxpert.data.samples.augment import training_sides
from camoxpert.losses import total_loss
from camoxpert.models.camoxpert import CamoXpert
from camoxpert.runtime.device import Precision


@contextmanager
def unchanged(model: CamoXpert, device: torch.device) -> Iterator[None]:
    """Restore buffers (batch norm statistics), random state and routing after the block."""
    kept = [buffer.clone() for buffer in model.buffers()]
    training, active = model.training, [level.router.top_k for level in model.moe_levels]
    devices = [device] if device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        with torch.no_grad():
            for buffer, value in zip(model.buffers(), kept, strict=True):
                buffer.copy_(value)
        model.train(training)
        for level, top_k in zip(model.moe_levels, active, strict=True):
            level.router.top_k = top_k


def trial_step(
    model: CamoXpert,
    config: Config,
    device: torch.device,
    precision: Precision,
    batch_size: int,
) -> None:
    """Run one forward and backward pass on made-up images; leaves no gradients behind."""
    size = max(training_sides(config.data))
    images = torch.zeros(batch_size, 3, size, size, dtype=torch.uint8, device=device)
    masks = torch.zeros(batch_size, 1, size, size, device=device)
    model.train()
    # The first epochs may use all experts: that is the step that has to fit.
    warm = config.train.router_warmup > 0
    model.set_active_experts(config.model.num_experts if warm else config.model.top_k)
    try:
        with precision.autocast(device):
            shown: tuple[object, ...] = ()
            if model.guidance is not None:
                shown = (model.guidance.trial(batch_size),)
            elif model.modalities is not None:
                shown = (None, model.modalities.trial(batch_size, size, device))
            output = model(images, *shown)
        loss, _ = total_loss(
            output, masks, config.loss, teacher_B1HW=masks if config.data.teacher else None
        )
        loss.backward()
    finally:
        # Also if memory ran out halfway.
        model.zero_grad(set_to_none=True)


def measured_bytes(step: Callable[[int], None], images: int, device: torch.device) -> int | None:
    """Run ``step`` on a CUDA device; return its peak bytes beyond those allocated before, or None
    if it did not fit."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    try:
        step(images)
        peak = torch.cuda.max_memory_allocated(device) - before
    except torch.OutOfMemoryError:
        peak = None
    # After the handler: the traceback holds the tensors that did not fit.
    torch.cuda.empty_cache()
    return peak


def measured_rate(step: Callable[[int], None], images: int, device: torch.device) -> float:
    """Return the images per second of three steps after one that does not count."""
    step(images)
    torch.cuda.synchronize(device)
    started = time.perf_counter()
    for _ in range(3):
        step(images)
    torch.cuda.synchronize(device)
    return 3 * images / (time.perf_counter() - started)
