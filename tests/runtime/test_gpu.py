"""Readings of the GPU: optional; they never stop a run."""

from __future__ import annotations

import sys
import time
import types

import pytest

from camoxpert import console
from camoxpert.runtime import gpu
from camoxpert.runtime.gpu import GpuMonitor, visible_handle


class FakeNvml(types.ModuleType):
    def __init__(self) -> None:
        super().__init__("pynvml")
        self.asked: list[object] = []

    def nvmlInit(self) -> None: ...

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        self.asked.append(index)
        return index

    def nvmlDeviceGetHandleByUUID(self, name: str) -> str:
        self.asked.append(name)
        return name

    def nvmlDeviceGetUtilizationRates(self, handle: object) -> types.SimpleNamespace:
        return types.SimpleNamespace(gpu=87)

    def nvmlDeviceGetMemoryInfo(self, handle: object) -> types.SimpleNamespace:
        return types.SimpleNamespace(used=1, total=2)


class TestGpuMonitor:
    def test_a_cpu_has_none_and_nothing_is_said(self) -> None:
        said: list[str] = []
        with console.heard_by(said.append), GpuMonitor("cpu") as monitor:
            assert monitor.utilisation() is None and monitor.memory() is None
            assert monitor.text() == "gpu=n/a" and not said

    def test_a_missing_package_is_one_warning(self, monkeypatch) -> None:
        monkeypatch.setitem(sys.modules, "pynvml", None)
        said: list[str] = []
        with console.heard_by(said.append):
            monitor = GpuMonitor("cuda:0")
        assert monitor.text() == "gpu=n/a" and monitor.memory() is None
        assert len(said) == 1 and "not available" in said[0]

    def test_readings(self, monkeypatch) -> None:
        monkeypatch.setitem(sys.modules, "pynvml", FakeNvml())
        monkeypatch.setattr(gpu, "PERIOD_SECONDS", 0.01)
        with GpuMonitor("cuda:0") as monitor:
            deadline = time.monotonic() + 5
            while monitor.text() == "gpu=n/a" and time.monotonic() < deadline:
                time.sleep(0.01)
            assert monitor.text() == "gpu=87%" and monitor.utilisation() == 87.0
            assert monitor.memory() == (1, 2)

    @pytest.mark.parametrize(
        ("mask", "index", "asked"), [("", 1, 1), ("3,5", 1, 5), ("GPU-abc", 0, "GPU-abc")]
    )
    def test_masked_devices_are_mapped(self, monkeypatch, mask, index, asked) -> None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", mask)
        nvml = FakeNvml()
        visible_handle(nvml, index)
        assert nvml.asked == [asked]
