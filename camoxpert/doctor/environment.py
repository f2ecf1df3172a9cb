"""Check interpreter, packages, devices, memory and disk."""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

from camoxpert.data.cache.choice import default_folder
from camoxpert.doctor.finding import Finding
from camoxpert.runtime.host import available_memory, free_shared_memory, usable_cores

PACKAGES = ("torch", "torchvision", "timm", "albumentations", "opencv-python-headless", "numpy")
# Workers pass batches through shared memory; containers often have only 64 MB.
SMALL_SHARED_MEMORY = 1 << 28
SMALL_DISK = 5 << 30


def check_environment(device: str = "auto") -> list[Finding]:
    """Return findings about interpreter, packages, devices, memory and disk."""
    findings: list[Finding] = []

    def add(level: str, check: str, text: str) -> None:
        findings.append(Finding(level, check, text))

    versions = {name: _version(name) for name in PACKAGES}
    shown = ", ".join(f"{name} {version}" for name, version in versions.items() if version)
    add("note", "packages", f"Python {platform.python_version()}, {shown}.")
    if _version("opencv-python") and _version("opencv-python-headless"):
        add(
            "warning",
            "packages",
            "opencv-python and opencv-python-headless are both installed and overwrite each "
            "other's files: uninstall both, then install opencv-python-headless.",
        )
    _check_devices(add, device)
    memory = available_memory()
    words = f"{memory / 1e9:.1f} GB of memory free" if memory is not None else "memory unknown"
    add("note", "host", f"{usable_cores()} usable cores, {words}.")
    shared = free_shared_memory()
    if shared is not None and shared < SMALL_SHARED_MEMORY:
        add(
            "warning",
            "host",
            f"/dev/shm has {shared / 1e6:.0f} MB free: data workers pass batches through it "
            f"and die when it is full. Start the container with --shm-size=1g, or use "
            f"--num-workers 0.",
        )
    for name, folder in (("here", Path.cwd()), ("for caches", default_folder())):
        place = next(path for path in (folder, *folder.parents) if path.exists())
        free = shutil.disk_usage(place).free
        level = "warning" if free < SMALL_DISK else "note"
        writable = "" if os.access(place, os.W_OK) else ", not writable"
        add(level, "disk", f"{free / 1e9:.1f} GB free {name} ({folder}{writable}).")
    caches = sorted(default_folder().glob("*/pixels.u8"))
    if caches:
        size = sum(path.stat().st_size for path in caches)
        add(
            "note",
            "disk",
            f"{len(caches)} caches of decoded data take {size / 1e9:.2f} GB in {default_folder()}; "
            f"any of them can be deleted.",
        )
    return findings


def _check_devices(add: Callable[[str, str, str], None], device: str) -> None:
    import torch

    driver = _driver_devices()
    seen = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if driver and not seen:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        why = f" CUDA_VISIBLE_DEVICES is {visible!r}." if visible is not None else ""
        reason = "the driver is too old or the device is blocked"
        if torch.version.cuda is None:
            reason = "this build of PyTorch is for CPUs only"
        add(
            "error" if device.startswith("cuda") else "warning",
            "devices",
            f"The driver reports {len(driver)} GPUs ({', '.join(driver)}), but PyTorch sees none: "
            f"{reason}.{why}",
        )
    elif len(driver) > seen:
        add("warning", "devices", f"PyTorch sees only {seen} of the driver's {len(driver)} GPUs.")
    if not seen:
        add("note", "devices", "No CUDA device: training runs on the CPU.")
    for index in range(seen):
        name = torch.cuda.get_device_name(index)
        major, minor = torch.cuda.get_device_capability(index)
        free, total = torch.cuda.mem_get_info(index)
        add(
            "note",
            "devices",
            f"cuda:{index} is {name} (compute capability {major}.{minor}), {free / 1e9:.1f} of "
            f"{total / 1e9:.1f} GB free.",
        )


def _driver_devices() -> list[str]:
    """Return the names of the GPUs that the driver reports; [] without a driver."""
    try:
        import pynvml

        pynvml.nvmlInit()
        try:
            names = []
            for index in range(pynvml.nvmlDeviceGetCount()):
                name = pynvml.nvmlDeviceGetName(pynvml.nvmlDeviceGetHandleByIndex(index))
                names.append(name.decode() if isinstance(name, bytes) else str(name))
            return names
        finally:
            pynvml.nvmlShutdown()
    except Exception:
        # No library, no driver or no permission: there is nothing to compare with.
        return []


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return ""
