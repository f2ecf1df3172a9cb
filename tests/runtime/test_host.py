"""Cores and memory under the limits of a container; how threads wait."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch  # noqa: F401  # one test needs it loaded

from camoxpert.runtime import host
from camoxpert.runtime.host import available_memory, usable_cores


@pytest.fixture
def cgroup(tmp_path: Path, monkeypatch) -> Path:
    monkeypatch.setattr(host, "CGROUP", tmp_path)
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
    monkeypatch.setattr(host.os, "sched_getaffinity", lambda pid: set(range(16)), raising=False)
    assert usable_cores() == 16
    (cgroup / "cpu.max").write_text("200000 100000")
    assert usable_cores() == 2
    (cgroup / "cpu.max").write_text("50000 100000")
    assert usable_cores() == 1
    (cgroup / "cpu.max").write_text("max 100000")
    assert usable_cores() == 16


class TestWaitingThreads:
    """OpenMP threads that spin while they wait make a busy machine many times slower."""

    def ask(self, code: str, **variables: str) -> list[str]:
        kept = {k: v for k, v in os.environ.items() if k not in host.WAIT_POLICIES}
        done = subprocess.run(
            [sys.executable, "-c", code],
            env={**kept, **variables},
            capture_output=True,
            text=True,
            check=True,
        )
        return done.stdout.split()

    def test_the_command_line_decides_before_torch_is_loaded(self) -> None:
        code = (
            "import os, sys; from camoxpert.cli import main; main(['--version']); "
            "print(os.environ['OMP_WAIT_POLICY'], os.environ['KMP_BLOCKTIME'], "
            "'torch' in sys.modules)"
        )
        assert self.ask(code)[-3:] == ["PASSIVE", "0", "False"]

    def test_the_python_api_does(self) -> None:
        code = (
            "import os, camoxpert\ntry: camoxpert.load('nowhere')\n"
            "except camoxpert.CheckpointError: print(os.environ['OMP_WAIT_POLICY'])"
        )
        assert self.ask(code) == ["PASSIVE"]

    @pytest.mark.parametrize("name", host.WAIT_POLICIES)
    def test_what_the_user_set_stays(self, monkeypatch, name: str) -> None:
        monkeypatch.delitem(sys.modules, "torch", raising=False)
        variables = {name: "7"}
        assert not host.wait_passively(variables) and variables == {name: "7"}
        variables = {"PATH": "7"}
        assert host.wait_passively(variables) and variables["OMP_WAIT_POLICY"] == "PASSIVE"

    def test_after_torch_was_loaded_nothing_is_claimed(self) -> None:
        variables: dict[str, str] = {}
        assert "torch" in sys.modules
        assert not host.wait_passively(variables) and not variables
