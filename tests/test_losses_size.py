"""Images weighted by the size of their object, and the loss that asks for a decision."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from camoxpert.config import build_config
from camoxpert.losses import (
    bce_loss,
    dice_loss,
    iou_loss,
    size_weights,
    structure_loss,
    total_loss,
    uncertainty_loss,
    uncertainty_ramp,
)
from camoxpert.models.camoxpert import ModelOutput
from camoxpert.training.plan import Plan, Stage

LOSSES = (structure_loss, bce_loss, iou_loss, dice_loss)


def masks(*pixels: int) -> Tensor:
    """Masks of 10 x 10 pixels with so many of the object."""
    return torch.stack([(torch.arange(100) < n).float().view(1, 10, 10) for n in pixels])


def test_sizes_by_hand() -> None:
    # 0 of 100: no object to be small. 2 % and 80 % themselves are ordinary.
    weights = size_weights(masks(0, 1, 2, 50, 80, 81, 100), 0.5)
    assert weights.tolist() == [1, 1.5, 1, 1, 1, 1.5, 1.5]
    # Of 40 known pixels 1 is 2.5 %; of 100 it is 1 %. All 40 are the whole.
    known = (torch.arange(100) < 40).float().view(1, 1, 10, 10)
    assert size_weights(masks(1), 1.0, known).tolist() == [1]
    assert size_weights(masks(100), 1.0, known).tolist() == [2]
    assert size_weights(masks(100), 1.0, torch.zeros_like(known)).tolist() == [1]


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("void", [False, True])
def test_image_weights_weigh_images(loss, void: bool) -> None:
    torch.manual_seed(0)
    logits, mask = torch.randn(3, 1, 10, 10), masks(1, 50, 90)
    known = (torch.rand(3, 1, 10, 10) > 0.3).float() if void else None
    mask = mask if known is None else mask * known
    weights = torch.tensor([2.0, 0.5, 0.5])
    alone = [
        loss(*pair, known_B1HW=None if known is None else known[i : i + 1])
        for i, pair in enumerate(zip(logits.split(1), mask.split(1), strict=True))
    ]
    expected = sum(w * value for w, value in zip(weights, alone, strict=True)) / 3
    ours = loss(logits, mask, known_B1HW=known, image_weight_B=weights)
    torch.testing.assert_close(ours, expected)


def total(settings: dict[str, float], logits: Tensor, mask: Tensor, **options) -> Tensor:
    output = ModelOutput(logits, (logits * 0.5,), ())
    return total_loss(output, mask, build_config(settings).loss, **options).total


def test_the_mean_weight_is_one_and_side_heads_have_the_same() -> None:
    torch.manual_seed(0)
    logits, mask = torch.randn(4, 1, 10, 10), masks(1, 30, 40, 50)
    balanced = total({"loss.size_balance": 1.0}, logits, mask)
    # 2, 1, 1, 1 over their mean of 5/4.
    weights = torch.tensor([1.6, 0.8, 0.8, 0.8])
    expected = sum(w * total({}, logits[i : i + 1], mask[i : i + 1]) for i, w in enumerate(weights))
    torch.testing.assert_close(balanced, expected / 4)
    # All of one size: nothing to balance.
    same = masks(1, 1, 1, 1)
    torch.testing.assert_close(
        total({"loss.size_balance": 3.0}, logits, same), total({}, logits, same)
    )


def test_a_step_in_parts_is_the_step_in_one() -> None:
    torch.manual_seed(0)
    logits, mask = torch.randn(4, 1, 10, 10), masks(1, 30, 40, 90)
    settings = {"loss.size_balance": 1.0}
    mean = size_weights(mask, 1.0).mean()
    parts = [total(settings, logits[p], mask[p], size_mean=mean) for p in (slice(1), slice(1, 4))]
    whole = total(settings, logits, mask)
    torch.testing.assert_close(parts[0] / 4 + parts[1] * 3 / 4, whole)
    # Control: each part by its own mean is another loss.
    apart = [total(settings, logits[p], mask[p]) for p in (slice(1), slice(1, 4))]
    assert not torch.isclose(apart[0] / 4 + apart[1] * 3 / 4, whole, rtol=1e-3)


def test_at_0_both_leave_no_trace() -> None:
    torch.manual_seed(0)
    logits, mask = torch.randn(2, 1, 10, 10), masks(1, 90)
    off = {"loss.size_balance": 0.0, "loss.uncertainty": 0.0}
    plain = total({}, logits, mask)
    assert torch.equal(total(off, logits, mask, size_mean=torch.tensor(9.0), progress=0.7), plain)
    output = ModelOutput(logits, (logits,), ())
    assert set(total_loss(output, mask, build_config(off).loss).terms) == {"mask", "side"}
    assert not torch.equal(total({"loss.size_balance": 1.0}, logits, masks(1, 50)), plain)


def test_uncertainty_by_hand() -> None:
    # p = 1/2, 3/4, 0, 1: 1, 1 - 1/4, 0, 0.
    logits = torch.tensor([0.0, math.log(3), -200.0, 200.0]).view(1, 1, 2, 2)
    assert uncertainty_loss(logits).item() == pytest.approx(1.75 / 4)
    p = torch.randn(2, 1, 5, 5)
    torch.testing.assert_close(uncertainty_loss(p), (1 - (2 * p.sigmoid() - 1).abs() ** 2).mean())
    assert uncertainty_loss(logits.bfloat16()).dtype == torch.float32
    # Its gradient pushes away from 1/2, and vanishes where the map is sure.
    leaf = torch.tensor([0.5, -0.5, 0.0, 300.0]).view(1, 1, 2, 2).requires_grad_()
    uncertainty_loss(leaf).backward()
    pushed = leaf.grad.ravel()
    assert pushed[0] < 0 < pushed[1] and pushed[2] == pushed[3] == 0


def test_void_is_in_neither_sum_nor_normaliser() -> None:
    logits = torch.tensor([0.0, 0.0, 300.0, 0.0]).view(1, 1, 2, 2)
    known = torch.tensor([1.0, 0.0, 1.0, 0.0]).view(1, 1, 2, 2)
    assert uncertainty_loss(logits, known).item() == pytest.approx(1 / 2)
    assert uncertainty_loss(logits, torch.zeros_like(known)).item() == 0
    leaf = (logits + 1).requires_grad_()
    uncertainty_loss(leaf, known).backward()
    assert not leaf.grad[known == 0].any() and leaf.grad.isfinite().all()


def test_the_ramp_follows_the_step() -> None:
    assert [uncertainty_ramp(x) for x in (-1, 0, 0.5, 1, 2)] == pytest.approx([0, 0, 0.5, 1, 1])
    plan = Plan((Stage(1, 0, 1, 0, 8, 4, 4, 1e-3), Stage(2, 1, 3, 4, 8, 4, 4, 1e-3)))
    assert [plan.progress(step) for step in (0, 4, 8, 16, 99)] == [0, 0.25, 0.5, 1, 1]


def test_the_uncertainty_is_a_term_of_the_loss() -> None:
    torch.manual_seed(0)
    logits, mask = torch.randn(2, 1, 10, 10), masks(0, 100)
    output, loss = ModelOutput(logits, (), ()), build_config({"loss.uncertainty": 2.0}).loss
    for progress, share in ((0.0, 0.0), (0.5, 0.5), (1.0, 1.0)):
        terms = total_loss(output, mask, loss, progress=progress).terms
        assert terms["uncertainty"].item() == pytest.approx(
            2 * share * uncertainty_loss(logits).item()
        )
