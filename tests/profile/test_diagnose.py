"""Verdicts on steps whose bound is known."""

from __future__ import annotations

from dataclasses import replace
from itertools import chain, repeat

import pytest

from camoxpert.profile import diagnose as module
from camoxpert.profile.diagnose import Conditions, Diagnosis, Workload, advice, diagnose


class Clock:
    """Stands for the module ``time``: nothing takes longer than it says."""

    def __init__(self) -> None:
        self.now = 0.0

    def sleep(self, seconds: float) -> None:
        self.now += seconds

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    return clock


def workload(clock: Clock, *, data: float, launch: float, per_image: float) -> Workload:
    """Return a step that takes time for its data, for its launches, and for every image."""

    def fetch() -> int:
        clock.sleep(data)
        return 4

    return Workload(
        fetch, lambda images: clock.sleep(launch + images * per_image), lambda images: 2 * images
    )


def test_verdicts_on_steps_whose_bound_is_known(clock: Clock) -> None:
    starved = diagnose(workload(clock, data=0.03, launch=0.0, per_image=0.002), rounds=3)
    assert starved.verdict == "data" and starved.waiting == pytest.approx(0.03 / 0.038)
    assert "79% of the time is spent waiting" in starved.evidence
    launching = workload(clock, data=0.0, launch=0.03, per_image=0.0002)
    assert diagnose(launching, rounds=3).verdict == "launch"
    assert diagnose(launching, rounds=3, syncs=8).verdict == "sync"
    busy = workload(clock, data=0.0, launch=0.0, per_image=0.005)
    assert diagnose(busy, rounds=3).verdict == "compute"
    assert diagnose(busy, rounds=3, utilisation=0.1).verdict == "memory"
    assert diagnose(busy, rounds=3, utilisation=0.6).verdict == "compute"


def test_workers_that_take_the_cores_from_the_step_are_noticed(clock: Clock) -> None:
    """The step never waits, but it is slower while batches are prepared."""
    batches = chain([4], repeat(5))
    seconds = {4: 0.01, 8: 0.02, 5: 0.02}  # A batch at hand, twice it, a new one.
    shared = Workload(lambda: next(batches), lambda n: clock.sleep(seconds[n]), lambda n: 2 * n)
    found = diagnose(shared, rounds=3)
    assert found.verdict == "data" and found.waiting == 0
    assert "with preloaded data the step takes 50% as long" in found.evidence
    assert found.data_gain == pytest.approx(2.0)


class Queue:
    """Workers that need ``seconds`` for a batch and prepare up to ``ahead`` of them, on a clock."""

    def __init__(self, clock: Clock, seconds: float, ahead: int, step: float) -> None:
        self.clock, self.seconds, self.ahead, self.step_seconds = clock, seconds, ahead, step
        self.ready_at = [0.0] * ahead  # When each waiting batch was, or will be, ready.
        self.last = 0.0

    def fetch(self) -> int:
        ready = self.ready_at.pop(0)
        self.clock.now = max(self.clock.now, ready)
        # A place in the queue is free: the next batch is begun, after the one before it.
        self.last = max(self.last, self.clock.now) + self.seconds
        self.ready_at.append(self.last)
        return 4

    def step(self, images: int) -> None:
        self.clock.sleep(self.step_seconds * images / 4)

    def drain(self) -> None:
        for _ in range(self.ahead):
            self.fetch()

    def diagnosis(self, *, drained: bool = True) -> Diagnosis:
        drain = self.drain if drained else lambda: None
        return diagnose(Workload(self.fetch, self.step, lambda n: 2 * n, drain=drain), rounds=3)


def test_a_full_queue_does_not_hide_slow_data(clock: Clock) -> None:
    """A step of 1 s on data of 2.2 s waits for 55 % of its time, however full the queue was."""
    slow = Queue(clock, 2.2, ahead=8, step=1.0).diagnosis()
    assert slow.verdict == "data" and slow.waiting == pytest.approx(1.2 / 2.2)
    assert slow.data_gain == pytest.approx(2.2)
    # Control: without emptying the queue nothing is noticed.
    assert Queue(clock, 2.2, ahead=24, step=1.0).diagnosis(drained=False).waiting < 0.1
    # Data that keeps up is not blamed, although the queue was emptied.
    quick = Queue(clock, 0.9, ahead=8, step=1.0).diagnosis()
    assert quick.waiting < 0.02 and quick.verdict == "compute"


AT_WORK = Conditions(batch_size=8, steps=4, num_workers=2, cores=8, cached=True, accelerator=True)


def test_advice_is_ranked_by_what_the_interventions_gained() -> None:
    diagnosis = Diagnosis("data", 0.4, 0.5, 0.2, 0.25, "", data_gain=2.0)
    table = {"backward": 0.2, "EMA": 0.1, "copy": 0.1}
    found = advice(diagnosis, table, AT_WORK)
    assert [round(advised["gain"], 2) for advised in found] == [2.0, 1.6, 1.33, 1.33]
    assert "--num-workers 4" in found[0]["text"]
    assert "--batch-size 16 --accumulation-steps 2" in found[1]["text"]
    calm = Diagnosis("compute", 0.2, 0.0, 0.2, 0.4, "")
    assert advice(calm, {"backward": 1}, AT_WORK) == []


def test_advice_fits_the_run() -> None:
    waiting = Diagnosis("data", 0.4, 0.5, 0.2, 0.25, "", data_gain=2.0)
    found = advice(waiting, {}, replace(AT_WORK, cached=False, steps=1, cores=2))
    texts = [advised["text"] for advised in found]
    assert texts[0].startswith("--cache disk")
    assert not any("accumulation" in text for text in texts), "there is none to lower"
    assert not any("--num-workers" in text for text in texts), "there are no more cores"
