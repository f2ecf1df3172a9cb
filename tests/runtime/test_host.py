"""Cores and memory under the limits of a container."""

from pathlib import Path

import pytest

from camoxpert.runtime import host as resources
from camoxpert.runtime.host import available_memory, usable_cores


@pytest.fixture
def cgroup(tmp_path: Path, monkeypatch) -> Path:
    monkeypatch.setattr(resources, "CGROUP", tmp_path)
    return tmp_path


def test_a_container_limits_memory(cgroup: Path) -> None:
    whole = available_memory()
    assert whole is not None and whole > 1 << 20
    (cgroup / "memory.max").write_text("5000000\n")
    (cgroup / "memory.current").write_text("4000000\n")
    (cgroup / "memory.stat").write_text("anon 1\ninactive_file 300000\n")
    assert available_memory() == 1_300_000, "file caches give way"
    (cgroup / "memory.max").write_text("max\n")
    assert available_memory() == pytest.approx(whole, rel=0.2)


def test_the_older_layout(cgroup: Path) -> None:
    folder = cgroup / "memory"
    folder.mkdir()
    (folder / "memory.limit_in_bytes").write_text("9000000")
    (folder / "memory.usage_in_bytes").write_text("1000000")
    (folder / "memory.stat").write_text("total_inactive_file 0")
    assert available_memory() == 8_000_000
    (folder / "memory.limit_in_bytes").write_text(str(1 << 62))
    assert available_memory() != 8_000_000


def test_a_container_limits_cores(cgroup: Path, monkeypatch) -> None:
    monkeypatch.setattr(
        resources.os, "sched_getaffinity", lambda pid: set(range(16)), raising=False
    )
    assert usable_cores() == 16
    (cgroup / "cpu.max").write_text("200000 100000")
    assert usable_cores() == 2
    (cgroup / "cpu.max").write_text("50000 100000")
    assert usable_cores() == 1
    (cgroup / "cpu.max").write_text("max 100000")
    assert usable_cores() == 16
