"""Counting host syncs: the moments at which the program waits for a number from the device.

One of them per step is enough to keep a fast device from running ahead. They can be counted without
a device, because it is known which calls would wait there.
"""

from __future__ import annotations

import traceback
from collections import Counter
from contextlib import ExitStack
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

# Operators that need a value on the host for their result's shape or value.
WAITING = (
    "_local_scalar_dense",
    "nonzero",
    "masked_select",
    "_unique2",
    "unique_consecutive",
    "unique_dim",
    "bincount",
    "equal",
    "repeat_interleave.Tensor",
)
# Reading a whole tensor is one sync, but on a CPU it dispatches once per element or not at all.
READERS = (torch.Tensor.tolist, torch.Tensor.numpy, torch.Tensor.__array__)


class SyncCounter:
    """Counts operators and host syncs in its block, and where the syncs come from.

    Counts what would wait on a CUDA device, on any device: reading a value (``item``, ``tolist``,
    ``bool``), copying to the host, copies from it that wait, and operators whose result's size
    depends on values. What is made on the host is only seen where the network is elsewhere.

    Attributes:
        operators: number of operators.
        places: source line -> number of its syncs.
    """

    def __init__(self) -> None:
        self.operators = 0
        self.places: Counter[str] = Counter()
        self.reading = False
        self._modes = ExitStack()

    @property
    def syncs(self) -> int:
        """Number of host syncs."""
        return sum(self.places.values())

    def __enter__(self) -> SyncCounter:
        # torch does not annotate the constructor of its dispatch modes.
        operators = _Operators()
        readers = _Readers()
        operators.counter = readers.counter = self
        self._modes.enter_context(operators)
        self._modes.enter_context(readers)
        return self

    def __exit__(self, *error: object) -> None:
        self._modes.close()

    def note(self) -> None:
        """Count one sync, at the innermost line outside of torch."""
        for frame in reversed(traceback.extract_stack(limit=40)):
            if "/torch/" not in frame.filename and frame.filename != __file__:
                self.places[f"{frame.filename}:{frame.lineno} {frame.line}"] += 1
                return
        self.places["torch"] += 1


class _Operators(TorchDispatchMode):
    """Counts every operator, and those that wait as a sync."""

    counter: SyncCounter

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Count one operator."""
        self.counter.operators += 1
        name = str(func).removeprefix("aten.")
        if not self.counter.reading and (
            any(name == waiting or name.startswith(f"{waiting}.") for waiting in WAITING)
            or _crosses(func, args, kwargs or {})
            or _selects_by_mask(name, args)
        ):
            self.counter.note()
        return func(*args, **(kwargs or {}))


class _Readers(TorchFunctionMode):
    """Counts the methods that read a whole tensor as one sync each."""

    counter: SyncCounter

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Call a function of torch; count it if it reads a whole tensor."""
        if func not in READERS:
            return func(*args, **(kwargs or {}))
        self.counter.note()
        self.counter.reading = True
        try:
            return func(*args, **(kwargs or {}))
        finally:
            self.counter.reading = False


def _crosses(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Return whether an operator copies between host and device and waits for it.

    From the host too: a copy that is not ``non_blocking`` waits until the device has done all its
    work.
    """
    name = str(func)
    if "_to_copy" in name:
        source, target = args[0].device, kwargs.get("device")
        non_blocking = bool(kwargs.get("non_blocking"))
    elif "copy_" in name and len(args) > 1 and isinstance(args[1], torch.Tensor):
        source, target = args[1].device, args[0].device
        non_blocking = bool(args[2] if len(args) > 2 else kwargs.get("non_blocking"))
    else:
        return False
    if target is None or (source.type == "cpu") == (torch.device(target).type == "cpu"):
        return False
    return source.type != "cpu" or not non_blocking


def _selects_by_mask(name: str, args: tuple[Any, ...]) -> bool:
    """Return whether an index is a mask: the result's size is the number of its ones."""
    if not name.startswith(("index.Tensor", "index_put")):
        return False
    masks = (torch.bool, torch.uint8)
    return any(isinstance(i, torch.Tensor) and i.dtype in masks for i in args[1])
