"""How many data workers, and why."""

import pytest

from camoxpert.data import workers
from camoxpert.data.workers import choose_num_workers, choose_prefetch, choose_start_method


@pytest.mark.parametrize(
    ("cores", "seconds", "device", "expected"),
    [
        (8, 4e-3, "cuda", 8),
        (64, 4e-3, "cuda", 8),
        (64, 1e-3, "cuda", 2),
        (8, 4e-3, "cpu", 1),
        (8, 2e-2, "cpu", 4),
        (8, 1e-4, "cuda", 0),
        (1, 4e-3, "cuda", 0),
    ],
)
def test_as_many_as_the_measured_sample_asks_for(
    monkeypatch, cores, seconds, device, expected
) -> None:
    monkeypatch.setattr(workers, "usable_cores", lambda: cores)
    found, why = choose_num_workers(None, seconds=seconds, device=device)
    assert found == expected
    assert cores == 1 or "a sample takes" in why


def test_as_asked() -> None:
    assert choose_num_workers(3, seconds=1.0) == (3, "as asked")
    assert choose_start_method("spawn") == ("spawn", "as asked")


def test_the_start_method_of_this_platform(monkeypatch) -> None:
    assert choose_start_method("auto")[0] in ("fork", "spawn")
    monkeypatch.setattr(workers.sys, "platform", "darwin")
    assert choose_start_method("auto")[0] == "spawn"


def test_batches_ahead_fit_into_shared_memory() -> None:
    options = {"num_workers": 2, "batch_bytes": 10}
    assert choose_prefetch(4, shared=None, **options) == (4, "")
    assert choose_prefetch(4, shared=160, **options) == (4, "")
    fewer, why = choose_prefetch(4, shared=159, **options)
    assert fewer == 3 and "3 batches ahead instead of 4" in why
    assert choose_prefetch(4, shared=1, **options)[0] == 1
    assert choose_prefetch(4, num_workers=0, batch_bytes=10, shared=1) == (4, "")


def test_news_of_a_death_while_looking_for_it() -> None:
    """torch reports a dead worker from a signal handler, in the middle of our own handling."""
    calls = []

    def interrupted() -> bool:
        calls.append(1)
        if len(calls) == 1:
            raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed.")
        return False

    assert workers._despite_watch(interrupted, True) is False and len(calls) == 2

    def always() -> bool:
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed.")

    assert workers._despite_watch(always, True) is True

    def other() -> bool:
        raise RuntimeError("something else")

    with pytest.raises(RuntimeError, match="something else"):
        workers._despite_watch(other, True)
