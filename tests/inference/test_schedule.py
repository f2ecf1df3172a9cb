"""Who gets which chunk."""

from __future__ import annotations

from inference.fakes import Thing

from camoxpert.inference.engine import ChunkResult
from camoxpert.inference.schedule import Schedule


def schedule_of(items: int, size: int) -> Schedule:
    return Schedule(spec=None, items=[Thing(f"i{n}") for n in range(items)], size=size)  # type: ignore[arg-type]


def take_all(schedule: Schedule, worker: str, workers: int = 2) -> list[int]:
    """Return the numbers of the chunks that a worker may have now."""
    taken = []
    while (chunk := schedule.next_for(worker, workers=workers)) is not None:
        taken.append(chunk.number)
    return taken


def finish(schedule: Schedule, worker: str, number: int, items: int) -> None:
    rows = [{"item": "x"} for _ in range(items)]
    assert len(list(schedule.done(worker, ChunkResult(number, rows, worker)))) == 1


def test_the_last_chunks_are_shared_out() -> None:
    """One worker is a little ahead: of six chunks each does three, not four and two."""
    schedule = schedule_of(items=12, size=2)
    assert take_all(schedule, "a") == [1, 2] and take_all(schedule, "b") == [3, 4]
    finish(schedule, "a", 1, 2)
    # Two chunks are left for two workers, and this one still has something to do.
    assert take_all(schedule, "a") == []
    finish(schedule, "a", 2, 2)
    assert take_all(schedule, "a") == [5]
    finish(schedule, "b", 3, 2)
    finish(schedule, "b", 4, 2)
    assert take_all(schedule, "b") == [6]
    finish(schedule, "a", 5, 2)
    finish(schedule, "b", 6, 2)
    assert schedule.finished


def test_before_that_a_worker_reads_ahead() -> None:
    schedule = schedule_of(items=100, size=2)
    assert take_all(schedule, "a") == [1, 2]
    finish(schedule, "a", 1, 2)
    assert take_all(schedule, "a") == [3]


def test_a_single_worker_reads_ahead_to_the_end() -> None:
    schedule = schedule_of(items=5, size=2)
    assert take_all(schedule, "a", workers=1) == [1, 2]
    finish(schedule, "a", 1, 2)
    assert take_all(schedule, "a", workers=1) == [3]
    finish(schedule, "a", 2, 2)
    finish(schedule, "a", 3, 1)
    assert schedule.finished
