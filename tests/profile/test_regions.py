"""The timer's arithmetic, on a clock that the tests move."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from camoxpert.config import build_config
from camoxpert.models.camoxpert import build_model
from camoxpert.profile.regions import ComponentTimer, watched
from camoxpert.runtime.regions import listening, region


class Clock:
    """A clock that moves only when a test moves it."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def pass_time(self, seconds: float) -> None:
        self.now += seconds


def on_clock() -> tuple[Clock, ComponentTimer]:
    clock = Clock()
    return clock, ComponentTimer(torch.device("cpu"), clock=clock)


def test_times_are_exclusive_and_add_up() -> None:
    clock, timer = on_clock()
    for _ in range(2):
        with timer.step():
            clock.pass_time(1)
            with timer.region("decoder"):
                clock.pass_time(2)
                with timer.region("expert"):
                    clock.pass_time(4)
                with timer.region("expert"):
                    clock.pass_time(8)
                clock.pass_time(16)
            clock.pass_time(32)
    assert timer.table() == {"decoder": 18, "expert": 12, "other": 33}
    assert sum(timer.table().values()) == 63


def test_a_step_that_misses_a_component_counts_as_nothing() -> None:
    clock, timer = on_clock()
    for number in range(4):
        with timer.step():
            clock.pass_time(1)
            if number == 0:
                with timer.region("expert"):
                    clock.pass_time(8)
    assert timer.table() == {"other": 1, "expert": 2}


def test_modules_and_regions_are_charged_until_the_timer_is_closed() -> None:
    clock, timer = on_clock()
    inner = torch.nn.Identity()
    outer = torch.nn.Sequential(inner)
    inner.register_forward_hook(lambda *a: clock.pass_time(3))
    timer.watch(outer, "outer")
    timer.watch(inner, "inner")

    def work() -> None:
        with region("work"):
            clock.pass_time(5)

    work()  # outside of a step nothing is charged
    with timer.step():
        outer(torch.zeros(1))
        work()
    work()
    assert timer.table() == {"inner": 3, "outer": 0, "work": 5, "other": 0}
    timer.close()
    assert not outer._forward_pre_hooks and not outer._forward_hooks


def test_modules_inside_the_backward_pass_are_recomputed() -> None:
    clock, timer = on_clock()
    part = torch.nn.Linear(2, 2)
    timer.watch(part, "part")
    # Before the forward pass: recomputing ends in the middle of it.
    part.register_forward_pre_hook(lambda *a: clock.pass_time(3))
    with timer.step():
        y = checkpoint(part, torch.zeros(1, 2, requires_grad=True), use_reentrant=False)
        with region("backward"):
            y.sum().backward()
            clock.pass_time(4)
    assert timer.table() == {"part": 3, "backward: recomputed": 3, "backward": 4, "other": 0}


def test_regions_reach_the_listener_of_their_block_alone() -> None:
    seen: list[str] = []

    def listener(label: str) -> Callable[[str], AbstractContextManager[object]]:
        return lambda name: nullcontext(seen.append(f"{label} {name}"))

    def visit(name: str) -> None:
        with region(name):
            pass

    with listening(listener("outer")):
        visit("a")
        with listening(listener("inner")):
            visit("b")
        visit("c")
    visit("d")
    assert seen == ["outer a", "inner b", "outer c"]


@pytest.mark.parametrize(
    ("settings", "experts"),
    [
        ({}, {"expert texture", "expert attention", "expert hybrid"}),
        ({"model.shared_expert": "edge", "model.experts": ["hybrid"]},
         {"expert hybrid", "expert shared"}),
        ({"model.expert_family": "uniform"}, {"experts (gathered)"}),
        ({"model.expert_family": "uniform", "model.dispatch": "sorted"}, {"experts (sorted)"}),
    ],
)  # fmt: skip
def test_every_part_of_a_model_is_charged(settings, experts) -> None:
    values = {"model.backbone": "tiny_test", "model.num_experts": 3, "model.width": 16}
    model = build_model(build_config(values | settings).model)
    timer = ComponentTimer(torch.device("cpu"))
    with watched(model, timer), timer.step():
        model(torch.zeros(2, 3, 32, 32))
    table = timer.table()
    assert set(table) == {"backbone", "router", "decoder", "heads", "other"} | experts
    assert all(seconds > 0 for seconds in table.values())
    assert not any(module._forward_hooks for module in model.modules())


def test_an_error_leaves_the_timer_balanced() -> None:
    _, timer = on_clock()
    with pytest.raises(ValueError), timer.step(), timer.region("x"):
        raise ValueError
    assert not timer.active
