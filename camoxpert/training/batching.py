"""How many images a step takes at once, and whether it recomputes activations.

A step's peak memory is a straight line over the size of the micro-batch: weights, gradients and
optimizer state count once, activations once per image. On CUDA two measured sizes give the line,
the line gives the largest micro-batch that fits, and the choice is measured again. On a CPU memory
cannot be measured in advance: ``--batch-size auto`` takes the default and says so.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from camoxpert.config import Config, TrainConfig
from camoxpert.errors import ConfigError
from camoxpert.models.camoxpert import CamoXpert
from camoxpert.runs.records import BatchRecord
from camoxpert.runtime.device import Precision
from camoxpert.runtime.processes import World
from camoxpert.training.trial import measured_bytes, measured_rate, trial_step, unchanged

# Above this share of the device's free memory a run is one fragmented batch away from failing.
COMFORTABLE = 0.85
DEFAULT_EFFECTIVE = 16
# Sizes of the two points; small, because they are tried before anything is known.
POINTS = (2, 4)

# Peak bytes of one step with (images, recompute); None: does not fit.
Measure = Callable[[int, bool], int | None]
# Images per second of steps with (images, recompute).
Rate = Callable[[int, bool], float]


@dataclass(frozen=True)
class Batching:
    """How an optimizer step is taken.

    Attributes:
        size: images per forward pass.
        steps: forward passes per optimizer step.
        checkpointing: activations are recomputed in the backward pass.
        reason: one sentence for the user.
        predicted, measured: peak bytes of a step; None where unknown.
        processes: number of processes that take a step together.
        stage2_size: ``size`` of stage 2; None: as the settings say.
        asked: the settings it was chosen from (see ``asked_for``).
    """

    size: int
    steps: int
    checkpointing: bool
    reason: str
    predicted: int | None = None
    measured: int | None = None
    processes: int = 1
    stage2_size: int | None = None
    asked: tuple[int | None, ...] = ()

    @property
    def effective(self) -> int:
        """Images per optimizer step, over all processes."""
        return self.size * self.steps * self.processes

    def record(self) -> BatchRecord:
        """Return it as ``run.json`` holds it."""
        return {
            "size": self.size,
            "steps": self.steps,
            "checkpointing": self.checkpointing,
            "reason": self.reason,
            "predicted": self.predicted,
            "measured": self.measured,
            "processes": self.processes,
            "stage2_size": self.stage2_size,
            "asked": self.asked,
        }


@dataclass(frozen=True)
class Line:
    """Peak bytes over images: ``fixed + per_image * images``."""

    fixed: float
    per_image: float

    def at(self, images: int) -> int:
        """Return the predicted peak in bytes."""
        return round(self.fixed + self.per_image * images)


def effective_batch(train: TrainConfig, processes: int = 1) -> int:
    """Return how many images one process adds to an optimizer step, by the settings.

    ``--batch-size`` counts for each process, ``--effective-batch-size`` for all together.

    Raises:
        ConfigError: the processes cannot share the effective batch equally.
    """
    if train.batch_size is not None and train.effective_batch_size is None:
        return train.batch_size * train.accumulation_steps
    whole = train.effective_batch_size or DEFAULT_EFFECTIVE * train.accumulation_steps
    if whole % processes:
        raise ConfigError(
            f"--effective-batch-size {whole} cannot be shared equally by {processes} processes. "
            f"Use a multiple of {processes}."
        )
    return whole // processes


def micro_batch_sizes(train: TrainConfig, processes: int = 1) -> list[int]:
    """Return the micro-batch sizes to choose from, largest first: the one asked for, or with
    ``auto`` every divisor of the effective batch.

    Raises:
        ConfigError: the one asked for does not divide the effective batch.
    """
    wanted = effective_batch(train, processes)
    if train.batch_size is None:
        return [size for size in range(wanted, 0, -1) if wanted % size == 0]
    size = min(train.batch_size, wanted)
    if wanted % size:
        raise ConfigError(
            f"--effective-batch-size {wanted * processes} is not a multiple of --batch-size {size}"
            f"{f' x {processes} processes' if processes > 1 else ''}: the images of an optimizer "
            f"step would not fill whole micro-batches. Use --batch-size auto, or a divisor."
        )
    return [size]


def asked_for(train: TrainConfig) -> tuple[int | None, ...]:
    """Return the settings that decide how many images a step takes."""
    return (
        train.batch_size,
        train.accumulation_steps,
        train.effective_batch_size,
        train.stage2_batch_size,
    )


def keep_effective(train: TrainConfig, continued: BatchRecord, processes: int) -> Batching:
    """Return the batching with which another number of processes takes the steps of a stopped run.

    Args:
        train: settings, the same as those of the run.
        continued: its batching (see ``Batching``).
        processes: number of processes that continue it.

    Raises:
        ConfigError: they cannot share its steps equally.
    """
    before, size = int(continued.get("processes", 1)), int(continued["size"])
    second = int(continued.get("stage2_size") or train.stage2_batch_size or size)
    slots = int(continued["steps"]) * before
    # Fewer micro-batches per process, or smaller ones where there are not enough to share.
    shared = math.gcd(slots, processes)
    parts = processes // shared
    if size % parts or second % parts:
        raise ConfigError(
            f"The stopped run took {size * slots} images per optimizer step with {before} "
            f"processes; {processes} cannot share them equally. Use {before} processes again, or "
            f"--resume never for a new run."
        )
    reason = (
        f"{size // parts} images x {slots // shared} per step on each of {processes} processes: "
        f"the {size * slots} of the run being continued, which had {before}"
    )
    setting = train.gradient_checkpointing
    recompute = bool(continued["checkpointing"]) if setting == "auto" else setting == "on"
    return Batching(
        size // parts,
        slots // shared,
        recompute,
        reason,
        processes=processes,
        stage2_size=second // parts,
        asked=asked_for(train),
    )


def plan_batching(
    effective: int,
    sizes: Sequence[int],
    *,
    checkpointing: str,
    measure: Measure,
    free: int,
    comfortable: float = COMFORTABLE,
    rate: Rate | None = None,
) -> Batching:
    """Choose the micro-batch, and with ``checkpointing`` auto whether to recompute.

    Recomputation is a last resort: it is considered only if the largest size does not fit without
    it. If both ways fit with different sizes, ``rate`` decides; without it, not recomputing wins.

    Args:
        effective: images per optimizer step.
        sizes: candidates, largest first, each a divisor of ``effective``.
        checkpointing: auto, on or off.
        measure: peak bytes of a step; called with the sizes of POINTS (or 1 and 2), then with the
            choice, which shrinks while it does not fit.
        free: free bytes of the device.
        comfortable: share of ``free`` that may be filled.
        rate: speed of a step, called for two candidates at most.
    """
    modes = {"auto": (False, True), "on": (True,), "off": (False,)}[checkpointing]
    room = comfortable * free
    lines: dict[bool, Line] = {}
    fits: dict[bool, int] = {}
    for mode in modes:
        line = fit_line(measure, mode)
        if line is None:
            continue
        lines[mode] = line
        fitting = [size for size in sizes if line.at(size) <= room]
        if fitting:
            fits[mode] = fitting[0]
        if fits.get(mode) == sizes[0]:
            break
    why = ""
    if False in fits and True in fits and fits[True] > fits[False] and rate is not None:
        plain, saving = rate(fits[False], False), rate(fits[True], True)
        mode = saving > plain
        why = (
            f"; {fits[False]} without recomputation ran {plain:.0f} images/s, {fits[True]} with it "
            f"{saving:.0f}"
        )
    elif fits:
        mode = next(iter(fits))
    else:
        mode = modes[-1]
    remaining = [size for size in sizes if size <= fits.get(mode, sizes[-1])]
    size, measured = remaining[0], None
    for size in remaining:
        measured = measure(size, mode)
        if measured is not None:
            break
    predicted = lines[mode].at(size) if mode in lines else None
    words = f"{size} images"
    words += f" x {effective // size} per step" if effective != size else " per step"
    words += f", recomputation {'on' if mode else 'off'}: "
    words += _needs(predicted, measured, free)
    if predicted is not None and not fits:
        words += "; it may not fit (a smaller --img-size or backbone would)"
    elif size < sizes[0] and mode in lines:
        words += f"; {sizes[0]} at once would take {lines[mode].at(sizes[0]) / 1e9:.1f}"
    elif mode and checkpointing == "auto" and False in lines:
        words += f"; without it {lines[False].at(size) / 1e9:.1f}"
    return Batching(size, effective // size, mode, words + why, predicted, measured)


def agree_on_batching(
    config: Config,
    model: CamoXpert,
    device: torch.device,
    precision: Precision,
    continued: BatchRecord | None,
    world: World,
) -> Batching:
    """Choose as ``choose_batching`` does, for all processes: what fits the fullest device.

    A stopped run keeps its images per step with any number of processes, unless the settings ask
    for another batch.
    """
    asked = asked_for(config.train)
    if continued and tuple(continued.get("asked") or ()) == asked:
        before = int(continued["size"]) * int(continued["steps"]) * int(continued["processes"])
        if before != world.size * effective_batch(config.train, world.size):
            return keep_effective(config.train, continued, world.size)
    own = choose_batching(config, model, device, precision, continued, processes=world.size)
    chosen = min(world.gather(own), key=lambda other: (other.size, not other.checkpointing))
    chosen = replace(chosen, processes=world.size, asked=asked)
    if world.size == 1:
        return chosen
    shared = f"; {chosen.effective} images per step over {world.size} processes"
    return replace(chosen, reason=chosen.reason + shared)


def choose_batching(
    config: Config,
    model: CamoXpert,
    device: torch.device,
    precision: Precision,
    continued: BatchRecord | None = None,
    *,
    processes: int = 1,
) -> Batching:
    """Choose micro-batch, accumulation and recomputation; leaves no gradients behind.

    On CUDA always from measured steps, elsewhere from the settings.

    Args:
        config, model, device, precision: of the run.
        continued: batching of the stopped run that this one continues.
        processes: number of processes that train together.
    """
    train = config.train
    wanted, sizes = effective_batch(train, processes), micro_batch_sizes(train, processes)
    if train.batch_size is None and continued and wanted % int(continued["size"]) == 0:
        size, recompute = int(continued["size"]), bool(continued["checkpointing"])
        reason = f"{size} images x {wanted // size} per step, as in the run being continued"
        return Batching(size, wanted // size, recompute, reason)
    if device.type == "cuda":
        return _measured_batching(config, model, device, precision, wanted, sizes)
    auto = train.batch_size is None
    size = next(size for size in sizes if size <= DEFAULT_EFFECTIVE) if auto else sizes[0]
    recompute = train.gradient_checkpointing == "on"
    why = "as asked"
    if train.gradient_checkpointing == "auto":
        why = f"memory is not scarce on {device.type}"
    if auto:
        why = f"--batch-size auto measures memory on CUDA only; the default on {device.type}"
    reason = f"{size} images"
    reason += f" x {wanted // size} per step" if wanted != size else " per step"
    reason += f", recomputation {'on' if recompute else 'off'}: {why}"
    return Batching(size, wanted // size, recompute, reason)


def _measured_batching(
    config: Config,
    model: CamoXpert,
    device: torch.device,
    precision: Precision,
    wanted: int,
    sizes: Sequence[int],
) -> Batching:
    train = config.train
    largest = max(sizes[0], train.stage2_batch_size or 0)
    # AdamW allocates its two moments in the first step, in the dtype of the parameters.
    moments = 2 * sum(p.numel() * p.element_size() for p in model.parameters())

    def step(images: int) -> None:
        with unchanged(model, device):
            trial_step(model, config, device, precision, images)

    def measure(images: int, recompute: bool) -> int | None:
        model.set_gradient_checkpointing(recompute)
        peak = measured_bytes(step, images, device)
        return None if peak is None else peak + moments

    def rate(images: int, recompute: bool) -> float:
        model.set_gradient_checkpointing(recompute)
        try:
            return measured_rate(step, images, device)
        except torch.OutOfMemoryError:
            return 0.0

    # If sizes are given, that of stage 2 may be larger: what fits it fits both.
    chosen = plan_batching(
        wanted // sizes[0] * largest if train.batch_size else wanted,
        [largest] if train.batch_size else sizes,
        checkpointing=train.gradient_checkpointing,
        measure=measure,
        free=torch.cuda.mem_get_info(device)[0],
        rate=rate,
    )
    return replace(chosen, size=sizes[0]) if train.batch_size else chosen


def fit_line(measure: Measure, checkpointing: bool) -> Line | None:
    """Return the peak over the batch size from two points, or None where one image does not
    fit."""
    for low, high in (POINTS, (1, 2)):
        small = measure(low, checkpointing)
        large = measure(high, checkpointing) if small is not None else None
        if small is not None and large is not None:
            per_image = (large - small) / (high - low)
            return Line(small - low * per_image, per_image)
    return None


def _needs(predicted: int | None, measured: int | None, free: int) -> str:
    if predicted is None:
        return f"two images at once do not fit in {free / 1e9:.1f} GB free"
    words = f"predicted {predicted / 1e9:.1f} of {free / 1e9:.1f} GB free"
    return words if measured is None else f"{words}, measured {measured / 1e9:.1f}"
