"""Utilisation and memory of the GPU, read from NVML during training; ``n/a`` without a GPU."""

from __future__ import annotations

import os
import threading
from types import TracebackType
from typing import Any

from camoxpert import console

PERIOD_SECONDS = 0.5


class GpuMonitor:
    """Samples utilisation and memory of one CUDA device in a background thread.

    Nothing here can stop a run: a missing package, driver or device gives one warning, and every
    reading is None.

    Args:
        device: a torch device name; anything but cuda is not monitored.
    """

    def __init__(self, device: str) -> None:
        self._nvml: Any = None
        self._handle: Any = None
        self._samples: list[float] = []
        self._latest: float | None = None
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        if device.startswith("cuda"):
            self._start(int(device.partition(":")[2] or 0))

    def _start(self, index: int) -> None:
        try:
            import pynvml

            pynvml.nvmlInit()
            self._nvml = pynvml
            self._handle = visible_handle(pynvml, index)
        except Exception as error:
            # ImportError, NVMLError, a driver of another version: the run continues without.
            self._nvml = None
            console.warn(f"GPU utilisation is not available: {error}")
            return
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()

    def _sample(self) -> None:
        while not self._stop.wait(PERIOD_SECONDS):
            try:
                rates = self._nvml.nvmlDeviceGetUtilizationRates(self._handle)
            except Exception:
                # Training reports a lost device; the monitor only ends.
                return
            self._samples.append(float(rates.gpu))

    def utilisation(self) -> float | None:
        """Return the mean utilisation in percent since the last call, else the last known one."""
        samples, self._samples = self._samples, []
        if samples:
            self._latest = sum(samples) / len(samples)
        return self._latest

    def memory(self) -> tuple[int, int] | None:
        """Return (used, total) bytes of the device."""
        if self._nvml is None:
            return None
        try:
            info = self._nvml.nvmlDeviceGetMemoryInfo(self._handle)
        except Exception:
            return None
        return int(info.used), int(info.total)

    def text(self) -> str:
        """Return ``gpu=87%`` or ``gpu=n/a``, for the progress bar."""
        if self._samples:
            self._latest = sum(self._samples) / len(self._samples)
        return "gpu=n/a" if self._latest is None else f"gpu={self._latest:.0f}%"

    def close(self) -> None:
        """Stop sampling."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join(timeout=2)
            self._thread = None

    def __enter__(self) -> GpuMonitor:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def visible_handle(nvml: Any, index: int) -> Any:
    """Return NVML's handle of CUDA device ``index``; CUDA_VISIBLE_DEVICES changes its number."""
    visible = [
        v.strip() for v in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if v.strip()
    ]
    if index < len(visible):
        name = visible[index]
        if name.startswith(("GPU-", "MIG-")):
            return nvml.nvmlDeviceGetHandleByUUID(name)
        index = int(name)
    return nvml.nvmlDeviceGetHandleByIndex(index)
