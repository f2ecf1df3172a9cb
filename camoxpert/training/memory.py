"""Gradient checkpointing: on, off, or decided from the memory a step really takes."""

from __future__ import annotations

from collections.abc import Callable

import torch

# Above this share of the device's free memory a run is one fragmented batch away from failing.
COMFORTABLE = 0.85


def choose_checkpointing(
    setting: str,
    device: torch.device,
    *,
    enable: Callable[[bool], str],
    trial_step: Callable[[], None],
) -> tuple[bool, str]:
    """Resolve ``--gradient-checkpointing`` and switch it.

    Args:
        setting: auto, on or off.
        device: where the run happens.
        enable: switches recomputation and says what it covers.
        trial_step: runs one forward and backward pass of the largest micro-batch and leaves no
            gradients behind; may raise torch.OutOfMemoryError.

    Returns:
        (enabled, one sentence that says why).
    """
    if setting != "auto":
        covered = enable(setting == "on")
        return (
            setting == "on",
            f"{setting}: as asked ({covered})" if setting == "on" else "off: as asked",
        )
    enable(False)
    if device.type != "cuda":
        return False, f"off: memory is not scarce on {device.type}"
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    free, total = torch.cuda.mem_get_info(device)
    try:
        trial_step()
        peak = torch.cuda.max_memory_allocated(device) - before
    except torch.OutOfMemoryError:
        peak = None
    torch.cuda.empty_cache()
    if peak is not None and peak <= COMFORTABLE * free:
        return False, f"off: a step takes {peak / 1e9:.1f} of {free / 1e9:.1f} GB free"
    covered = enable(True)
    needs = "does not fit" if peak is None else f"takes {peak / 1e9:.1f}"
    return (
        True,
        f"on: a step {needs} of {free / 1e9:.1f} GB free (of {total / 1e9:.1f}); covers {covered}",
    )
