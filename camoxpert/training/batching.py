"""How many images a step takes at once, and whether it recomputes: decided from the memory that a
step takes.

A step's peak is a straight line over the size of the micro-batch: weights, gradients and optimizer
state are there once, activations per image. Two sizes give the line; the line gives the largest
micro-batch that fits. On CUDA the two points are measured and the choice is measured again;
elsewhere they are counted on tensors without values (``predicted_bytes``), which costs seconds and
no memory.
"""

from __future__ import annotations

import copy
import math
import time
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.weak import WeakIdKeyDictionary

from camoxpert.config import TrainConfig
from camoxpert.errors import ConfigError

# Above this share of the device's free memory a run is one fragmented batch away from failing.
COMFORTABLE = 0.85
# On a CPU the count misses what kernels borrow and the allocator keeps: the process grew by 1.2
# times the count without and 1.8 times with recomputation (edgenext_small, 4 images of 352 px). And
# where a GPU raises an error, a host kills the process.
COMFORTABLE_HOST = 0.45
DEFAULT_EFFECTIVE = 16
# Sizes of the two points; small ones, because they are tried before anything is known.
POINTS = (2, 4)

# Peak bytes of one step with (images, recompute); None: does not fit.
Measure = Callable[[int, bool], int | None]
# Images per second of steps with (images, recompute).
Rate = Callable[[int, bool], float]


@dataclass(frozen=True)
class MicroBatch:
    """How an optimizer step is taken.

    Attributes:
        size: images per forward pass.
        steps: forward passes per optimizer step.
        checkpointing: activations are recomputed in the backward pass.
        reason: one sentence for the user.
        predicted, measured: peak bytes of a step; None where unknown.
        processes: that take such steps together.
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


@dataclass(frozen=True)
class Line:
    """Peak bytes over images: ``fixed + per_image * images``."""

    fixed: float
    per_image: float

    def at(self, images: int) -> int:
        """Return the predicted peak in bytes."""
        return round(self.fixed + self.per_image * images)


def effective_batch(train: TrainConfig, processes: int = 1) -> int:
    """Return the images that one process adds to an optimizer step, as the settings ask for.

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
    """Return the micro-batches to choose from, largest first: the one asked for, or with ``auto``
    every divisor of the effective batch.

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


def keep_effective(train: TrainConfig, continued: Mapping[str, Any], processes: int) -> MicroBatch:
    """Return the micro-batch with which another number of processes takes the steps of a stopped
    run.

    Args:
        train: settings, the same as those of the run.
        continued: what the run did (see ``MicroBatch``).
        processes: of the run that goes on.

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
    return MicroBatch(
        size // parts,
        slots // shared,
        recompute,
        reason,
        processes=processes,
        stage2_size=second // parts,
        asked=asked_for(train),
    )


def plan_micro_batch(
    effective: int,
    sizes: Sequence[int],
    *,
    checkpointing: str,
    measure: Measure,
    free: int,
    comfortable: float = COMFORTABLE,
    rate: Rate | None = None,
    verify: bool = False,
) -> MicroBatch:
    """Choose the micro-batch, and with ``checkpointing`` auto whether to recompute.

    Recomputation is a last resort: it is considered only where the largest size does not fit
    without.
    Where both ways fit with different sizes, ``rate`` decides; without it, not recomputing wins.

    Args:
        effective: images per optimizer step.
        sizes: candidates, largest first, each a divisor of ``effective``.
        checkpointing: auto, on or off.
        measure: peak bytes of a step; called with the sizes of POINTS (or 1 and 2), and with the
            choice where ``verify``.
        free: bytes the step may use.
        comfortable: share of ``free`` that may be filled.
        rate: speed of a step, called for two candidates at most.
        verify: measure the choice, too, and go down while it does not fit.
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
    if verify:
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
    return MicroBatch(size, effective // size, mode, words + why, predicted, measured)


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


def measured_bytes(step: Callable[[int], None], images: int, device: torch.device) -> int | None:
    """Run ``step`` on a CUDA device; return what it took beyond what was there, or None if it did
    not fit."""
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


def predicted_bytes(model: nn.Module, step: Callable[[nn.Module], None]) -> int:
    """Count the peak bytes of the tensors that ``step`` makes, without computing or storing one.

    The model is copied to tensors that have a shape and no values; ``step`` is called with the
    copy and must make its own inputs. What kernels borrow inside themselves is not counted.
    ``torch.distributed``'s MemTracker counts the same, module by module: 4 images of 352 px through
    edgenext_small took it 71 s, and this 6 s, on one busy core.
    """
    mode = FakeTensorMode()
    with FakeCopyMode(mode):
        fake = copy.deepcopy(model)
    with mode, PeakCounter([*fake.parameters(), *fake.buffers()]) as counter:
        step(fake)
    return counter.peak


class PeakCounter(TorchDispatchMode):
    """Counts the bytes of every storage made inside it while it lives.

    Args:
        existing: tensors that are there already; views of them are nothing new.

    Attributes:
        live, peak: bytes now, and at most.
    """

    def __init__(self, existing: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known = WeakIdKeyDictionary()
        for tensor in existing:
            self._known[tensor.untyped_storage()] = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operator and look at what came out."""
        out = func(*args, **(kwargs or {}))
        for value in tree_iter(out):
            if isinstance(value, Tensor):
                self._add(value.untyped_storage())
        return out

    def _add(self, storage: Any) -> None:
        if storage in self._known:
            return
        size = storage.nbytes()
        self._known[storage] = size
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._remove, size)

    def _remove(self, size: int) -> None:
        self.live -= size
