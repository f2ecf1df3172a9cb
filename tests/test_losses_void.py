"""Void pixels are in no loss, in no gradient and in no normaliser."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from camoxpert.config import build_config
from camoxpert.losses import (
    bce_loss,
    dice_loss,
    edge_weight,
    iou_loss,
    structure_loss,
    total_loss,
)
from camoxpert.models.camoxpert import ModelOutput

EVERY_TERM = {"loss.structure": 1.0, "loss.bce": 0.5, "loss.iou": 0.5, "loss.dice": 0.5}


def case() -> tuple[Tensor, Tensor, Tensor]:
    """Logits, a mask with an object, and what is known: an outline of the object is void."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 1, 40, 40, generator=generator)
    mask = torch.zeros(2, 1, 40, 40)
    mask[0, :, 10:22, 12:30] = 1
    mask[1, :, 5:9, 5:30] = 1
    known = torch.ones_like(mask)
    known[:, :, 9:12, 10:34] = 0
    return logits, mask * known, known


def loss_of(logits: Tensor, mask: Tensor, known: Tensor | None) -> tuple[Tensor, Tensor]:
    logits = logits.clone().requires_grad_()
    output = ModelOutput(logits, (logits * 0.5, -logits), ())
    total = total_loss(output, mask, build_config(EVERY_TERM).loss, known_B1HW=known).total
    total.backward()
    assert logits.grad is not None
    return total.detach(), logits.grad


@pytest.mark.parametrize("weighting", [True, False])
def test_what_is_predicted_in_void_changes_neither_loss_nor_gradient(weighting: bool) -> None:
    logits, mask, known = case()
    other = torch.where(known > 0, logits, torch.full_like(logits, 7.0))
    first, gradient = loss_of(logits, mask, known)
    second, same = loss_of(other, mask, known)
    assert torch.equal(first, second) and torch.equal(gradient, same)
    assert not gradient[known == 0].any() and gradient[known == 1].all()
    # What the mask says there does not matter either, nor does the weighting.
    ours = structure_loss(logits, mask, weighted=weighting, known_B1HW=known)
    assert torch.equal(ours, structure_loss(other, mask, weighted=weighting, known_B1HW=known))
    # Control: the same pixels count where they are labelled.
    assert not torch.equal(loss_of(logits, mask, None)[0], loss_of(other, mask, None)[0])


def test_by_hand() -> None:
    logits = torch.tensor([[[[0.0, 0.0, 9.0]]]])
    mask = torch.tensor([[[[1.0, 0.0, 0.0]]]])
    known = torch.tensor([[[[1.0, 1.0, 0.0]]]])
    assert bce_loss(logits, mask, known).item() == pytest.approx(0.693147, abs=1e-6)
    # Both: 1/2; sum of map and mask: 1 + 1.
    assert iou_loss(logits, mask, known).item() == pytest.approx(1 - 1.5 / 2.5)
    assert dice_loss(logits, mask, known).item() == pytest.approx(1 - 2 / 3)
    # Two known pixels in a window of 31 x 31 whose outside counts as background: the void one is
    # left out, so the mean is 1 / 960.
    weights = edge_weight(mask, known).ravel()
    assert weights.tolist() == pytest.approx([1 + 5 * (1 - 1 / 960), 1 + 5 / 960, 0], abs=1e-5)


def test_normalisers_do_not_count_void() -> None:
    """A strip of void beside the picture changes nothing but the outside of the edge's window."""
    logits, mask, known = case()
    wide = [torch.nn.functional.pad(part, (0, 24)) for part in (logits, mask, known)]
    for loss in (bce_loss, iou_loss, dice_loss):
        assert loss(*wide).item() == pytest.approx(loss(logits, mask, known).item(), rel=1e-6)


def test_all_known_is_the_plain_loss() -> None:
    logits, mask, _ = case()
    plain, gradient = loss_of(logits, mask, None)
    known, same = loss_of(logits, mask, torch.ones_like(mask))
    assert torch.allclose(plain, known, atol=1e-6) and torch.allclose(gradient, same, atol=1e-7)


def test_an_image_without_a_known_pixel_adds_nothing() -> None:
    logits, mask, known = case()
    known[1], mask[1] = 0, 0
    total, gradient = loss_of(logits, mask, known)
    assert torch.isfinite(total) and torch.isfinite(gradient).all() and not gradient[1].any()
    alone, _ = loss_of(logits[:1], mask[:1], known[:1])
    assert total.item() == pytest.approx(alone.item() / 2, rel=1e-5)
