"""A compiler that fails: the run continues without it, and says why."""

from __future__ import annotations

import pytest
import torch


@pytest.mark.parametrize("where", ["forward", "backward"])
@pytest.mark.parametrize("family", ["specialist", "uniform"])
def test_a_failing_compiler_is_left_out(
    where: str, family: str, train, monkeypatch, capsys
) -> None:
    from torch._dynamo.backends.common import aot_autograd

    def fails(graph, inputs):
        raise AssertionError("cannot lower replication_pad2d")

    def works(graph, inputs):
        return graph.forward

    backend = fails
    if where == "backward":
        backend = aot_autograd(fw_compiler=works, bw_compiler=fails)
    honest = torch.nn.Module.compile
    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda m, **options: honest(m, **options, backend=backend)
    )
    torch._dynamo.reset()
    words = ("--compile", "--epochs", "1", "--expert-family", family, "--no-test", "--no-report")
    assert train(*words, "--stage1-epochs", "0") == 0
    torch._dynamo.reset()
    said = " ".join("".join(capsys.readouterr()).split())
    assert "--compile failed and is off from here on" in said
    assert "replication_pad2d" in said and "Traceback" not in said
