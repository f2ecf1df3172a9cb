"""Layers that take another way to the same numbers where gradients are computed on a CPU."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from camoxpert.models import layers
from camoxpert.models.experts import AttentionExpert, EdgeExpert, SemanticExpert
from camoxpert.models.moe import MoE

SIZES = [(12, 12), (13, 17), (3, 9), (1, 1)]


def gradients(y: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    torch.manual_seed(1)
    return [y.detach(), *torch.autograd.grad(y, inputs, torch.randn(y.shape))]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("kernel", "dilation"), [(3, 1), (3, 2), (3, 4), ((1, 11), 1), (5, 3)])
def test_depthwise_is_the_plain_convolution(size, kernel, dilation) -> None:
    torch.manual_seed(0)
    conv = layers.depthwise(8, kernel, dilation=dilation).double()
    x = torch.randn(2, 8, *size, dtype=torch.float64, requires_grad=True)
    plain = F.conv2d(x, conv.weight, conv.bias, 1, conv.padding, conv.dilation, conv.groups)
    inputs = [x, conv.weight, conv.bias]
    for here, there in zip(gradients(conv(x), inputs), gradients(plain, inputs), strict=True):
        torch.testing.assert_close(here, there)
    conv(x[:0]).sum().backward()
    assert conv.weight.grad is not None and conv.weight.grad.abs().max() == 0


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dilation", [1, 2, 3])
def test_a_fixed_filter_is_the_plain_convolution(size, dilation) -> None:
    torch.manual_seed(0)
    kernel = torch.randn(5, 5, dtype=torch.float64)
    x = torch.randn(2, 4, *size, dtype=torch.float64, requires_grad=True)
    padded = F.pad(x, (2 * dilation,) * 4, mode="replicate")
    plain = F.conv2d(padded, kernel.expand(4, 1, 5, 5), groups=4, dilation=dilation)
    here = layers.fixed_depthwise(x, kernel, dilation=dilation)
    for one, other in zip(gradients(here, [x]), gradients(plain, [x]), strict=True):
        torch.testing.assert_close(one, other)


def test_no_convolution_with_gradients_has_gaps_and_none_without_is_rearranged(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    conv, calls = layers.depthwise(4, 3, dilation=2), []
    honest = layers.dilated
    monkeypatch.setattr(layers, "dilated", lambda *given: calls.append(1) or honest(*given))
    x = torch.randn(1, 4, 12, 12)
    trained = conv(x)
    assert calls == [1]
    with torch.no_grad():
        torch.testing.assert_close(conv(x), trained.detach())
    assert calls == [1]


def test_attention_is_that_of_unit_vectors_head_by_head() -> None:
    torch.manual_seed(0)
    expert = AttentionExpert(16, 8)
    nn.init.uniform_(expert.temperature, 1, 3)
    x = torch.randn(2, 16, 6, 5, requires_grad=True)
    query, key, value = expert.project(expert.norm(x)).chunk(3, 1)
    value = value + expert.local(value)
    query, key, value = (maps.reshape(2, 4, 2, 30) for maps in (query, key, value))
    scores = F.normalize(query, dim=-1) @ F.normalize(key, dim=-1).transpose(-1, -2)
    attended = (scores * expert.temperature).softmax(-1) @ value
    plain = expert.leave(attended.reshape(2, 8, 6, 5))
    inputs = [x, *expert.parameters()]
    for here, there in zip(gradients(expert(x), inputs), gradients(plain, inputs), strict=True):
        torch.testing.assert_close(here, there, rtol=1e-4, atol=1e-5)


def test_attention_to_nothing_has_finite_gradients() -> None:
    expert = AttentionExpert(16, 8)
    nn.init.zeros_(expert.project.weight)
    nn.init.zeros_(expert.project.bias)
    y = expert(torch.randn(1, 16, 3, 3))
    y.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in expert.parameters())


def test_attention_of_large_features_does_not_overflow_in_half_precision() -> None:
    torch.manual_seed(0)
    expert = AttentionExpert(16, 16)
    with torch.no_grad():
        expert.project.weight.mul_(100)
    x = torch.randn(1, 16, 32, 32)
    with torch.autocast("cpu", dtype=torch.float16):
        assert expert(x).isfinite().all()


@pytest.mark.parametrize("size", [(9, 13), (1, 1), (40, 40)])
def test_the_scene_context_is_that_of_enlarged_cells(size) -> None:
    torch.manual_seed(0)
    expert = SemanticExpert(16, 8)
    x = torch.randn(2, 16, *size, requires_grad=True)
    h = expert.enter(x)
    context = [
        layers.resize(cell(F.adaptive_avg_pool2d(h, grid)), h.shape[-2:])
        for grid, cell in zip(expert.grids, expert.cells, strict=True)
    ]
    plain = expert.leave(torch.cat([expert.refine(h), *context], 1))
    inputs = [x, *expert.parameters()]
    for here, there in zip(gradients(expert(x), inputs), gradients(plain, inputs), strict=True):
        # Sums over 3200 pixels that nearly cancel: 2e-5 apart on some processors.
        torch.testing.assert_close(here, there, rtol=1e-4, atol=1e-4)


def test_the_edge_operators_share_one_padding(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    honest = F.pad
    monkeypatch.setattr(
        F, "pad", lambda *given, **named: calls.append(1) or honest(*given, **named)
    )
    EdgeExpert(8, 8)(torch.randn(1, 8, 9, 9))
    assert len(calls) == 1


def test_maps_reach_every_expert_channels_last() -> None:
    """Otherwise each expert turns its maps around twice: its first norm wants the channels last."""
    torch.manual_seed(0)
    moe, seen = MoE(16, num_experts=4, top_k=2), []
    for expert in moe.experts:
        expert.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    x = torch.randn(8, 16, 6, 6).contiguous(memory_format=torch.channels_last)
    y, _ = moe(x)
    used = [maps for maps in seen if len(maps)]
    assert used and all(m.is_contiguous(memory_format=torch.channels_last) for m in used)
    assert y.is_contiguous(memory_format=torch.channels_last)
