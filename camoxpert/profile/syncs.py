"""Counting host syncs: the moments at which the program waits for a number from the device.

One of them in every step is enough to keep a fast device from running ahead. They can be counted
without
a device: what would wait there is known by name.
"""

from __future__ import annotations

import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

# Operators whose result's shape or value the host must know.
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
READERS = ("tolist", "numpy")


class SyncCounter(TorchDispatchMode):
    """Counts operators and host syncs in its block; ``places`` says where the syncs come from.

    Counts what would wait on a CUDA device, on any device: reading a value (``item``, ``tolist``,
    ``bool``), copying to the host, and operators whose result's size depends on values.
    """

    def __init__(self) -> None:
        super().__init__()
        self.operators = 0
        self.places: Counter[str] = Counter()
        self._inside_reader = False
        self._originals: dict[str, Callable[..., Any]] = {}

    @property
    def syncs(self) -> int:
        """Number of host syncs."""
        return sum(self.places.values())

    def __enter__(self) -> SyncCounter:
        # Reading a whole tensor is one sync, but on a CPU it dispatches once per element or not at
        # all: these methods are counted by name.
        for name in READERS:
            original = getattr(torch.Tensor, name)
            self._originals[name] = original
            setattr(torch.Tensor, name, self._counted(original))
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        for name, original in self._originals.items():
            setattr(torch.Tensor, name, original)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Count one operator."""
        self.operators += 1
        name = str(func).removeprefix("aten.")
        if not self._inside_reader and (
            any(name == waiting or name.startswith(f"{waiting}.") for waiting in WAITING)
            or _to_host(func, args, kwargs or {})
            or _selects_by_mask(name, args)
        ):
            self._note()
        return func(*args, **(kwargs or {}))

    def _counted(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def read(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            if not self._inside_reader:
                self._note()
            inside, self._inside_reader = self._inside_reader, True
            try:
                return original(tensor, *args, **kwargs)
            finally:
                self._inside_reader = inside

        return read

    def _note(self) -> None:
        for frame in reversed(traceback.extract_stack(limit=40)):
            if "/torch/" not in frame.filename and not frame.filename.endswith("syncs.py"):
                self.places[f"{frame.filename}:{frame.lineno} {frame.line}"] += 1
                return
        self.places["torch"] += 1


def _to_host(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    if "_to_copy" in str(func):
        target = kwargs.get("device")
        source = args[0].device
        return target is not None and source.type != "cpu" and torch.device(target).type == "cpu"
    if "copy_" in str(func) and len(args) > 1 and isinstance(args[1], torch.Tensor):
        return bool(args[1].device.type != "cpu" and args[0].device.type == "cpu")
    return False


def _selects_by_mask(name: str, args: tuple[Any, ...]) -> bool:
    """Whether an index holds a mask: the number of its ones is the result's size."""
    if not name.startswith(("index.Tensor", "index_put")):
        return False
    masks = (torch.bool, torch.uint8)
    return any(isinstance(i, torch.Tensor) and i.dtype in masks for i in args[1])


@contextmanager
def count_syncs() -> Iterator[SyncCounter]:
    """Count the host syncs of a block."""
    with SyncCounter() as counter:
        yield counter
