"""The number of data workers, and the reason given."""

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


def test_cores_are_shared_between_training_processes(monkeypatch) -> None:
    monkeypatch.setattr(workers, "usable_cores", lambda: 16)
    found, why = choose_num_workers(None, seconds=4e-3, processes=4)
    assert found == 4 and "4 of 4 cores (the share of each of 4 processes)" in why
    assert choose_num_workers(None, seconds=4e-3)[0] == 8
    for processes in (16, 40):
        found, why = choose_num_workers(None, seconds=4e-3, processes=processes)
        assert found == 0 and f"of {processes} processes" in why
    assert choose_num_workers(5, processes=16)[0] == 5, "as asked"


def test_shared_memory_is_shared_between_training_processes() -> None:
    options = {"num_workers": 2, "batch_bytes": 10, "shared": 160}
    assert choose_prefetch(4, **options)[0] == 4
    assert choose_prefetch(4, processes=2, **options)[0] == 2


def test_too_little_shared_memory_for_a_single_batch_is_a_warning() -> None:
    """The warning names the memory needed, the memory free, and what to do."""
    options = {"num_workers": 2, "batch_bytes": 50_000_000}
    found, why = choose_prefetch(4, shared=64_000_000, **options)
    assert found == 1 and why.startswith("warning")
    assert "100.0 MB" in why and "64.0 MB" in why and "--num-workers 0" in why
    _, enough = choose_prefetch(4, shared=100_000_000, **options)
    assert "warning" not in enough, "it fits, barely"
