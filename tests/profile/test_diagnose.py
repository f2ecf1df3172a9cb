"""Verdicts on steps whose bound is known."""

from __future__ import annotations

import time

import pytest

from camoxpert.profile.diagnose import Diagnosis, Workload, advice, diagnose


def workload(*, data: float, launch: float, per_image: float) -> Workload:
    """Return a step that sleeps for its data, for its launches, and for every image."""

    def fetch() -> int:
        time.sleep(data)
        return 4

    def step(images: int) -> None:
        time.sleep(launch + images * per_image)

    return Workload(fetch, step, lambda images: 2 * images)


@pytest.mark.parametrize("repeat", range(10))
def test_verdicts_on_steps_whose_bound_is_known(repeat: int) -> None:
    """Each step sleeps for many milliseconds; scheduling adds less than one."""
    starved = diagnose(workload(data=0.03, launch=0.0, per_image=0.002), rounds=3)
    assert starved.verdict == "data"
    launching = diagnose(workload(data=0.0, launch=0.03, per_image=0.0002), rounds=3)
    assert launching.verdict == "launch"
    assert diagnose(workload(data=0, launch=0.03, per_image=0), rounds=3, syncs=8).verdict == "sync"
    busy = workload(data=0.0, launch=0.0, per_image=0.005)
    assert diagnose(busy, rounds=3).verdict == "compute"
    assert diagnose(busy, rounds=3, utilisation=0.1).verdict == "memory"
    assert diagnose(busy, rounds=3, utilisation=0.6).verdict == "compute"


def test_advice_is_ranked_by_what_the_interventions_gained() -> None:
    diagnosis = Diagnosis("data", 0.4, 0.2, 0.25, "")
    table = {"backward": 0.2, "EMA": 0.1, "copy": 0.1}
    found = advice(diagnosis, table, batch_size=8, num_workers=2, accelerator=True)
    assert [round(advised["gain"], 2) for advised in found] == [2.0, 1.6, 1.33, 1.33]
    assert "--num-workers 4" in found[0]["text"] and "--batch-size 16" in found[1]["text"]
    calm = Diagnosis("compute", 0.2, 0.2, 0.4, "")
    assert advice(calm, {"backward": 1}, batch_size=8, num_workers=2, accelerator=True) == []
