"""Losses checked against hand-computed values."""

import math

import pytest
import torch
import torch.nn.functional as F

from camoxpert.config import build_config
from camoxpert.losses import (
    bce_loss,
    dice_loss,
    edge_weight,
    iou_loss,
    structure_loss,
    total_loss,
)
from camoxpert.models.camoxpert import build_model


def square_mask(size: int = 64) -> torch.Tensor:
    mask = torch.zeros(1, 1, size, size)
    mask[..., 20:44, 20:44] = 1
    return mask


def test_edge_weight_equals_the_square_window() -> None:
    mask = (torch.rand(2, 1, 40, 50) > 0.7).float()
    direct = 1 + 5 * (F.avg_pool2d(mask, 31, 1, 15) - mask).abs()
    torch.testing.assert_close(edge_weight(mask), direct, rtol=1e-6, atol=1e-6)
    for height, width in ((1, 1), (8, 100), (31, 32)):  # smaller than the window as well
        mask = (torch.rand(2, 1, height, width) > 0.5).float()
        direct = 1 + 5 * (F.avg_pool2d(mask, 31, 1, 15) - mask).abs()
        torch.testing.assert_close(edge_weight(mask), direct, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("settings", "times"),
    [
        ({}, 1),
        ({"loss.deep_supervision": False}, 1),
        ({"loss.structure_weighting": False}, 0),
        ({"loss.structure": 0.0, "loss.bce": 1.0}, 0),
    ],
)
def test_the_edge_weight_is_computed_once_for_the_mask_and_all_side_heads(
    settings: dict[str, object], times: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from camoxpert import losses

    model = {"model.backbone": "tiny_test", "model.pretrained": False, "model.width": 16}
    config = build_config(model | settings)
    output = build_model(config.model)(torch.rand(2, 3, 32, 32))
    mask = (torch.rand(2, 1, 32, 32) > 0.5).float()
    calls = []
    honest = edge_weight
    monkeypatch.setattr(
        losses, "edge_weight", lambda mask, known=None: calls.append(1) or honest(mask)
    )
    shared = total_loss(output, mask, config.loss)
    assert len(calls) == times
    # The same sum as with a weight of its own for every head.
    alone = losses.segmentation_loss(output.logits_B1HW, mask, config.loss)
    torch.testing.assert_close(shared.terms["mask"], alone.detach(), rtol=1e-6, atol=1e-6)


def test_structure_loss_by_hand_on_zero_logits() -> None:
    # Probability 1/2 everywhere: weighted BCE is log 2 for any weights.
    mask, weight = square_mask(), edge_weight(square_mask())
    both, total = 0.5 * (weight * mask).sum(), (weight * (0.5 + mask)).sum()
    expected = math.log(2) + 1 - float((both + 1) / (total - both + 1))
    assert float(structure_loss(torch.zeros_like(mask), mask)) == pytest.approx(expected, rel=1e-6)


def test_weighting_matters_and_can_be_left_out() -> None:
    mask = square_mask()
    near, far = torch.full_like(mask, -4.0), torch.full_like(mask, -4.0)
    near[..., 18:20, 20:44] = 4.0  # errors at the outline
    far[..., 0:2, 0:24] = 4.0  # as many errors in a corner
    assert structure_loss(near, mask) > structure_loss(far, mask) + 0.01
    unweighted = [structure_loss(x, mask, weighted=False) for x in (near, far)]
    torch.testing.assert_close(*unweighted, rtol=1e-5, atol=1e-6)


def test_plain_losses_by_hand() -> None:
    logits, mask = torch.tensor([[[[20.0, -20.0]]]]), torch.tensor([[[[1.0, 1.0]]]])
    assert float(bce_loss(logits, mask)) == pytest.approx(10.0, rel=1e-4)
    assert float(iou_loss(logits, mask)) == pytest.approx(1 - 2 / 3, rel=1e-5)
    assert float(dice_loss(logits, mask)) == pytest.approx(1 - 3 / 4, rel=1e-5)


@pytest.mark.parametrize("loss", [structure_loss, bce_loss, iou_loss, dice_loss])
@pytest.mark.parametrize("fill", [0.0, 1.0])
def test_empty_and_full_masks_are_finite(loss, fill: float) -> None:
    logits = (torch.randn(2, 1, 16, 16) * 50).requires_grad_()
    value = loss(logits, torch.full((2, 1, 16, 16), fill))
    value.backward()
    assert value.isfinite() and logits.grad.isfinite().all()


def test_losses_are_float32_under_autocast() -> None:
    logits = torch.full((1, 1, 8, 8), 40.0, dtype=torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = bce_loss(logits, torch.zeros(1, 1, 8, 8))
    assert value.dtype == torch.float32
    assert float(value) == pytest.approx(40.0)


def test_parts_sum_to_the_total_and_deep_supervision_is_effective() -> None:
    torch.manual_seed(0)
    settings = {"model.backbone": "tiny_test", "model.width": 16, "model.num_experts": 3}
    config = build_config(settings)
    output = build_model(config.model)(torch.rand(2, 3, 32, 32))
    mask = torch.rand(2, 1, 32, 32) > 0.5
    total, parts = total_loss(output, mask, config.loss)
    assert set(parts) == {"mask", "side", "balance", "router_z"}
    assert float(total.detach()) == pytest.approx(sum(float(v) for v in parts.values()), rel=1e-6)
    plain = build_config({"loss.deep_supervision": False}).loss
    assert "side" not in total_loss(output, mask, plain).terms


def test_one_expert_has_no_routing_loss() -> None:
    settings = {
        "model.backbone": "tiny_test",
        "model.width": 16,
        "model.num_experts": 1,
        "model.top_k": 1,
    }
    config = build_config(settings)
    output = build_model(config.model)(torch.rand(1, 3, 32, 32))
    assert set(total_loss(output, torch.ones(1, 1, 32, 32), config.loss).terms) == {"mask", "side"}
