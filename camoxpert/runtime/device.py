"""Which device and number format a run uses, and the sentence that says why."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from camoxpert.config import TrainConfig
from camoxpert.errors import ConfigError


@dataclass(frozen=True)
class Precision:
    """Number format of the forward pass.

    Attributes:
        dtype: autocast type, or None for float32.
        scaler: whether gradients need loss scaling (fp16 only).
        reason: one sentence for the user.
        fixed: format of an exported file, which nothing here changes; "" otherwise.
    """

    dtype: torch.dtype | None
    scaler: bool
    reason: str
    fixed: str = ""

    @property
    def name(self) -> str:
        """fp32, bf16 or fp16; of an exported file its own."""
        if self.fixed:
            return self.fixed
        return {None: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[self.dtype]

    def autocast(self, device: torch.device) -> torch.autocast:
        """Return the autocast context of this format; without a dtype it changes nothing."""
        return torch.autocast(device.type, dtype=self.dtype, enabled=self.dtype is not None)


DEVICES = ("auto", "cpu", "cuda", "mps")
"""Names of devices beside those with a number, ``cuda:N``."""


def choose_device(name: str, *, index: int = 0) -> torch.device:
    """Resolve ``auto``, ``cpu``, ``cuda``, ``cuda:N`` or ``mps``.

    Args:
        name: the setting.
        index: CUDA device to take if the setting names none.

    Raises:
        ConfigError: the device does not exist; no other one is used instead.
    """
    if name not in DEVICES and not name.removeprefix("cuda:").isdigit():
        raise ConfigError(f"--device {name}: use auto, cpu, cuda, cuda:N or mps.")
    if name == "auto":
        return torch.device("cuda", index) if torch.cuda.is_available() else torch.device("cpu")
    device = torch.device(name)
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise ConfigError(
                f"--device {name}: PyTorch {torch.__version__} sees no CUDA device. "
                "Check the driver with nvidia-smi, or use --device cpu."
            )
        count = torch.cuda.device_count()
        number = index if device.index is None else device.index
        if number >= count:
            raise ConfigError(
                f"--device {name}: there are {count} CUDA devices, cuda:0 to {count - 1}."
            )
        return torch.device("cuda", number)
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise ConfigError("--device mps: this machine has no Metal device. Use --device cpu.")
    return device


def device_name(device: torch.device) -> str:
    """Return the GPU's name, or the number of threads on a CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type}, {torch.get_num_threads()} threads"


def wait_for(device: torch.device) -> None:
    """Wait until the device has done all its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def check_architecture(device: torch.device) -> None:
    """Raise ConfigError if this build of PyTorch has no kernels for the GPU (such as a P100)."""
    if device.type != "cuda":
        return
    major, minor = torch.cuda.get_device_capability(device)
    # Kernels run on the same major version at any later minor one; PTX runs on anything later.
    built = [name.split("_") for name in torch.cuda.get_arch_list()]
    numbers = [
        (kind, int(number.rstrip("af"))) for kind, number in built if number.rstrip("af").isdigit()
    ]
    own = major * 10 + minor
    fits = any(
        (kind == "sm" and number // 10 == major and number <= own)
        or (kind == "compute" and number <= own)
        for kind, number in numbers
    )
    if numbers and not fits:
        raise ConfigError(
            f"{torch.cuda.get_device_name(device)} (compute capability {major}.{minor}) is not "
            f"supported by this build of PyTorch ({', '.join(torch.cuda.get_arch_list())}). On "
            f"Kaggle choose the T4 accelerator instead of the P100, or install a PyTorch built "
            f"for this GPU."
        )


def choose_precision(config: TrainConfig, device: torch.device) -> Precision:
    """Choose the number format from the settings and the hardware."""
    if config.precision == "fp32":
        return Precision(None, False, "fp32: as asked")
    if config.precision == "bf16":
        return Precision(torch.bfloat16, False, "bf16: as asked")
    if config.precision == "fp16":
        if device.type == "cpu":
            raise ConfigError("--precision fp16 trains on CUDA only; on a CPU use bf16 or fp32.")
        return Precision(torch.float16, True, "fp16 with loss scaling: as asked")
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        name = f"{torch.cuda.get_device_name(device)} (compute capability {major}.{minor})"
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return Precision(torch.bfloat16, False, f"bf16: {name} computes it natively")
        if major >= 7:
            reason = f"fp16 with loss scaling: {name} has tensor cores but no bf16"
            return Precision(torch.float16, True, reason)
        return Precision(None, False, f"fp32: {name} has no tensor cores")
    return Precision(
        None, False, f"fp32: the default on {device.type} (--precision bf16 may be faster)"
    )


def set_tf32(enabled: bool, device: torch.device) -> str:
    """Switch TF32 for matrix products and convolutions; return its effect on this device."""
    if device.type != "cuda":
        return "n/a"
    mode = "tf32" if enabled else "ieee"
    torch.backends.cuda.matmul.fp32_precision = mode
    # torch's annotations do not know the switch of single operators.
    torch.backends.cudnn.conv.fp32_precision = mode  # type: ignore[attr-defined]
    if not enabled:
        return "off"
    ampere = torch.cuda.get_device_capability(device)[0] >= 8
    return "on" if ampere else "no effect: this GPU has none"


@contextmanager
def full_precision() -> Iterator[None]:
    """Compute matrix products and convolutions of float32 in float32 inside the block, on every
    device: without TF32, which is the default of cuDNN, or bf16."""
    # Most of these have no types.
    backends: Any = torch.backends
    places = (
        *(backends.cuda.matmul, backends.cudnn.conv),
        *(backends.mkldnn.matmul, backends.mkldnn.conv),
    )
    before = [place.fp32_precision for place in places]
    try:
        for place in places:
            place.fp32_precision = "ieee"
        yield
    finally:
        for place, mode in zip(places, before, strict=True):
            place.fp32_precision = mode


class HostCopy:
    """A copy of a tensor on the host that is under way: only ``read`` waits, and for it alone.

    Reading a tensor on a CUDA device otherwise waits for all that was launched since it was made.

    Args:
        values: on any device; not changed afterwards.
    """

    def __init__(self, values: Tensor) -> None:
        self._event: torch.cuda.Event | None = None
        self._values = values
        if values.device.type == "cuda":
            self._values = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            self._values.copy_(values, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record(torch.cuda.current_stream(values.device))

    def read(self) -> Tensor:
        """Return the values once they are there."""
        if self._event is not None:
            self._event.synchronize()
        return self._values.cpu()


def upload(values: np.ndarray, like: Tensor) -> Tensor:
    """Return numbers as a float32 tensor on the device of another; the host does not wait."""
    tensor = torch.from_numpy(values.astype(np.float32))
    if like.device.type == "cuda":
        # From pageable memory the host would wait for the copy.
        tensor = tensor.pin_memory()
    return tensor.to(like.device, non_blocking=True)
