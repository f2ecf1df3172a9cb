"""How many inputs a forward pass takes: given, or as many as fit and still pay; less after running
out of memory."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from camoxpert import console

ON_CPU = 8
"""Inputs of a forward pass on a CPU; 8 give 1.2 (224 px) to 2 (128 px) times the speed of one."""
LARGEST = 512
MEMORY_SHARE = 0.85
"""Share of the free memory of a device that a batch may take."""
PAYS = 1.03
"""A batch twice as large must give this many times the images per second."""
REPEATS = 3
CLEAN_BATCHES = 50
"""Batches without a fault after which a halved size is doubled again, once."""


@dataclass
class BatchSize:
    """The present batch size of a worker.

    Attributes:
        value: inputs of a forward pass.
        halvings: how often it ran out of memory.
    """

    value: int
    halvings: int = 0
    _clean: int = 0
    _before: int = 0
    _grown: bool = False

    def halve(self, tried: int) -> None:
        """Note that ``tried`` inputs did not fit."""
        if not self._before:
            self._before = max(self.value, tried)
        self.halvings += 1
        self._clean = 0
        smaller = max(1, tried // 2)
        if smaller < self.value:
            self.value = smaller
            console.warn(
                f"{tried} images do not fit into the memory of the device; continuing with "
                f"{self.value}"
            )

    def note_clean(self) -> None:
        """Note a batch that fitted; after many of them try one larger size, once."""
        if not self._before or self._grown:
            return
        self._clean += 1
        if self._clean >= CLEAN_BATCHES:
            self.value = min(self._before, 2 * self.value)
            self._grown = True


@torch.inference_mode()
def choose_batch_size(
    forward: Callable[[Tensor], object], one: Tensor, device: torch.device
) -> tuple[int, str]:
    """Return a batch size and the reason for it.

    On CUDA sizes are doubled while they fit into a share of the free memory and make images
    cheaper.

    Args:
        forward: the forward pass.
        one: an input (1, ...) on the device.
        device: of the pass.
    """
    if device.type != "cuda":
        return ON_CPU, f"the default on {device.type}"
    best, best_rate, size = 1, 0.0, 1
    free = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    free -= torch.cuda.memory_allocated(device)
    reason = f"the largest that is tried is {LARGEST}"
    while size <= LARGEST:
        try:
            rate, taken = _measure(forward, one.expand(size, *one.shape[1:]), device)
        except torch.OutOfMemoryError:
            reason = f"{size} do not fit"
            break
        finally:
            torch.cuda.empty_cache()
        if rate > best_rate * PAYS:
            best, best_rate = size, rate
        elif size > 2 * best:
            reason = "larger ones are not faster"
            break
        if 2 * taken > MEMORY_SHARE * free:
            reason = f"{2 * size} would take over {MEMORY_SHARE:.0%} of the free memory"
            break
        size *= 2
    return best, f"{best_rate:.0f} images/s on {device}; {reason}"


def _measure(
    forward: Callable[[Tensor], object], batch: Tensor, device: torch.device
) -> tuple[float, int]:
    """Return images per second and the bytes that the pass took."""
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    inputs = batch.contiguous()
    forward(inputs)
    torch.cuda.synchronize(device)
    seconds = []
    for _ in range(REPEATS):
        started = time.monotonic()
        forward(inputs)
        torch.cuda.synchronize(device)
        seconds.append(time.monotonic() - started)
    taken = torch.cuda.max_memory_allocated(device) - before
    return len(batch) / sorted(seconds)[REPEATS // 2], taken
