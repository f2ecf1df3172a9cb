"""Work on a CUDA device other than the first is waited for on its own stream."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch

from camoxpert.inference import engine
from camoxpert.inference.engine import Pipeline
from camoxpert.profile import regions
from camoxpert.profile.regions import ComponentTimer


class Event:
    """An event that remembers the stream it marks."""

    marked: ClassVar[list[Any]] = []

    def __init__(self, **options: Any) -> None:
        pass

    def record(self, stream: Any = "that of cuda:0") -> None:
        self.marked.append(stream)


class Batch:
    """Stands for a tensor that can go to a device this machine has not."""

    def pin_memory(self) -> Batch:
        return self

    def to(self, device: torch.device, non_blocking: bool = False) -> Batch:
        return self


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    Event.marked.clear()
    return SimpleNamespace(
        cuda=SimpleNamespace(Event=Event, current_stream=lambda device: f"that of {device}"),
        stack=lambda inputs: Batch(),
        Tensor=torch.Tensor,
    )


def test_the_engine_marks_the_stream_of_its_device(cuda, monkeypatch) -> None:
    monkeypatch.setattr(engine, "torch", cuda)
    stages = SimpleNamespace(device=torch.device("cuda:1"), forward=lambda inputs, samples: [])
    worker: Any = SimpleNamespace(
        stages=stages, batch_size=SimpleNamespace(note_clean=lambda: None)
    )
    Pipeline._start(worker, [], [])
    assert Event.marked == ["that of cuda:1"] * 2


def test_the_profile_marks_the_stream_of_its_device(cuda, monkeypatch) -> None:
    monkeypatch.setattr(regions, "torch", cuda)
    timer: Any = SimpleNamespace(device=torch.device("cuda:1"))
    ComponentTimer._event(timer)
    assert Event.marked == ["that of cuda:1"]
