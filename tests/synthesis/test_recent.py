"""Something that several threads need is made once."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from camoxpert.synthesis.recent import Recent


def test_threads_that_ask_at_once_share_one_making() -> None:
    recent: Recent[int] = Recent(2)
    together = threading.Barrier(4)
    made: list[int] = []

    def ask(_: int) -> int:
        together.wait()
        return recent.get("key", lambda: made.append(1) or len(made))

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(ask, range(4))) == [1] * 4
    assert made == [1]


def test_errors_are_kept_and_the_oldest_is_forgotten() -> None:
    recent: Recent[int] = Recent(2)
    calls: list[str] = []

    def fail() -> int:
        calls.append("failed")
        raise ValueError("damaged")

    for _ in range(2):
        with pytest.raises(ValueError, match="damaged"):
            recent.get("a", fail)
    assert calls == ["failed"]
    assert [recent.get(key, lambda: 7) for key in ("b", "c")] == [7, 7]
    assert recent.get("a", lambda: 5) == 5
