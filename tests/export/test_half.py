"""What an fp16 file keeps in float32: sums over thousands of pixels overflow in fp16."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from camoxpert.export import write
from camoxpert.models.experts import AttentionExpert

pytest.importorskip("onnxscript")
onnxruntime = pytest.importorskip("onnxruntime")


class Net(nn.Module):
    """An expert where an exported network has it."""

    def __init__(self, expert: nn.Module) -> None:
        super().__init__()
        self.network = nn.ModuleList([expert])

    def forward(self, maps_BCHW: Tensor) -> Tensor:
        return self.network[0](maps_BCHW)


def answer(model: object, maps_BCHW: Tensor) -> np.ndarray:
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    (found,) = session.run(None, {session.get_inputs()[0].name: maps_BCHW.numpy()})
    return found


@pytest.mark.slow
def test_attention_over_many_pixels_does_not_overflow(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    expert = AttentionExpert(16, 16).eval()
    with torch.no_grad():
        # Squares of 5 in the mean, as in trained models; times 176 x 176 that is 150 000.
        expert.project.weight.mul_(3)
    maps = torch.randn(1, 16, 176, 176)
    with write.quiet():
        written = torch.onnx.export(
            Net(expert), (maps,), dynamo=True, opset_version=write.OPSET, verbose=False
        )
    assert written is not None
    exact = answer(written.model_proto, maps)
    with torch.no_grad():
        assert np.abs(exact - expert(maps).numpy()).max() < 1e-3
    halved = answer(write.half(written.model_proto), maps)
    assert np.isfinite(halved).all() and np.abs(halved - exact).max() < 0.02
    # Control: without the rule the same file is finite and wrong.
    parts = tuple(part for part in write.FP32_PARTS if part != ".cosines")
    monkeypatch.setattr(write, "FP32_PARTS", parts)
    wrong = answer(write.half(written.model_proto), maps)
    assert np.isfinite(wrong).all() and np.abs(wrong - exact).max() > 0.1
