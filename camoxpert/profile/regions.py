"""Where the time of a step goes, by component.

Times are exclusive: the time of a part is subtracted from the component that contains it, so that
the rows of a table add up to the wall time of the step.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from camoxpert.models.camoxpert import CamoXpert
from camoxpert.models.decoder import Decoder, Level
from camoxpert.models.stacked import UniformExperts
from camoxpert.runtime.regions import listening

OTHER, BACKWARD, RECOMPUTED = "other", "backward", "backward: recomputed"


@dataclass
class _Region:
    name: str
    started: float
    first: torch.cuda.Event | None = None
    last: torch.cuda.Event | None = None
    inner_seconds: float = 0.0
    inner: list[_Region] = field(default_factory=list)


class ComponentTimer:
    """Charges time to components, on the host and, on a CUDA device, on its own clock.

    Args:
        device: where the work happens. Host time is what it takes to queue a component's work;
            on a CUDA device events on the stream measure how long the work itself takes.
        clock: returns the host's time in seconds.
    """

    def __init__(
        self, device: torch.device, *, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self.device = device
        self.host: dict[str, list[float]] = defaultdict(list)
        self.on_device: dict[str, list[float]] = defaultdict(list)
        self._clock = clock
        self._stack: list[_Region] = []
        self._step: dict[str, float] = {}
        self._handles: list[RemovableHandle] = []

    @property
    def active(self) -> bool:
        """Whether a step is being timed."""
        return bool(self._stack)

    def enter(self, name: str) -> None:
        """Begin a component; a module that runs inside the backward pass is recomputed."""
        if not self._stack and name != OTHER:
            return
        if any(outer.name == BACKWARD for outer in self._stack):
            name = RECOMPUTED
        region = _Region(name, self._clock(), first=self._event())
        self._stack.append(region)

    def leave(self) -> None:
        """End the component begun last."""
        if not self._stack:
            return
        region = self._stack.pop()
        region.last = self._event()
        seconds = self._clock() - region.started
        self._step[region.name] = self._step.get(region.name, 0.0) + seconds - region.inner_seconds
        if self._stack:
            self._stack[-1].inner_seconds += seconds
            self._stack[-1].inner.append(region)
        elif region.first is not None:
            self._read_device(region)

    @contextmanager
    def region(self, name: str) -> Iterator[None]:
        """Charge the block to a component."""
        self.enter(name)
        try:
            yield
        finally:
            self.leave()

    @contextmanager
    def step(self) -> Iterator[None]:
        """Time one whole step; the rest, which no component claims, is charged to ``other``."""
        self._step = {}
        with listening(self.region), self.region(OTHER):
            yield
        for name, seconds in self._step.items():
            self.host[name].append(seconds)

    def watch(self, module: nn.Module, name: str) -> None:
        """Charge a module's forward pass to a component, until ``close``."""

        def before(module: nn.Module, inputs: Any) -> None:
            self.enter(name)

        def after(module: nn.Module, inputs: Any, outputs: Any) -> None:
            self.leave()

        self._handles.append(module.register_forward_pre_hook(before))
        self._handles.append(module.register_forward_hook(after, always_call=True))

    def close(self) -> None:
        """Remove all hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def table(self, *, device: bool = False) -> dict[str, float]:
        """Return component -> mean seconds per step; the values add up to the mean step."""
        source = self.on_device if device else self.host
        steps = max((len(values) for values in source.values()), default=0)
        return {name: sum(values) / steps for name, values in source.items()}

    def _event(self) -> torch.cuda.Event | None:
        if self.device.type != "cuda":
            return None
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event

    def _read_device(self, root: _Region) -> None:
        torch.cuda.synchronize(self.device)
        totals: dict[str, float] = defaultdict(float)

        def walk(region: _Region) -> float:
            assert region.first is not None and region.last is not None
            seconds: float = region.first.elapsed_time(region.last) / 1e3
            totals[region.name] += seconds - sum(walk(inner) for inner in region.inner)
            return seconds

        walk(root)
        for name, seconds in totals.items():
            self.on_device[name].append(seconds)


@contextmanager
def watched(model: CamoXpert, timer: ComponentTimer) -> Iterator[None]:
    """Charge the forward pass of every part of the model to its component inside the block."""
    timer.watch(model.backbone, "backbone")
    timer.watch(model.decoder, "decoder")
    if model.guidance is not None:
        timer.watch(model.guidance, "guidance")
    if isinstance(model.decoder, Decoder):
        _watch_levels(model, model.decoder, timer)
    try:
        yield
    finally:
        timer.close()


def _watch_levels(model: CamoXpert, decoder: Decoder, timer: ComponentTimer) -> None:
    if decoder.checkpointing:
        # timm recomputes the backbone block by block.
        for part in model.backbone.modules():
            for block in part if isinstance(part, nn.Sequential) else ():
                timer.watch(block, "backbone")
    for level in decoder.levels:
        assert isinstance(level, Level)
        timer.watch(level, "decoder")
        timer.watch(level.head, "heads")
    if decoder.detail is not None:
        timer.watch(decoder.detail, "heads")
    for moe in model.moe_levels:
        timer.watch(moe.router, "router")
        if not isinstance(moe.experts, UniformExperts):
            for kind, expert in zip(moe.kinds, moe.experts, strict=True):
                timer.watch(expert, f"expert {kind}")
        else:
            # Only one back end calls the stacked experts as one module.
            block = moe.experts if moe.dispatch == "gathered" else moe
            timer.watch(block, f"experts ({moe.dispatch})")
        if moe.shared is not None:
            timer.watch(moe.shared, "expert shared")
