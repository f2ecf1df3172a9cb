"""The loss on images without an object, and that of the presence head."""

import math

import pytest
import torch

from camoxpert.config import build_config
from camoxpert.losses import has_object, presence_loss, segmentation_loss, total_loss
from camoxpert.models.camoxpert import ModelOutput

LOGIT = math.log(3)  # probability 3/4


def _batch() -> tuple[torch.Tensor, torch.Tensor]:
    """Return constant logits and the masks of an image with an object and one without."""
    logits = torch.full((2, 1, 32, 32), LOGIT)
    mask = torch.zeros(2, 1, 32, 32)
    mask[0, :, :8] = 1
    return logits, mask


def test_empty_masks_get_cross_entropy_alone() -> None:
    logits, mask = _batch()
    loss = build_config({"loss.side_weight": 0.0}).loss
    objects = has_object(mask)
    assert objects.tolist() == [1, 0]
    both = segmentation_loss(logits, mask, loss, object_B=objects)
    alone = segmentation_loss(logits[:1], mask[:1], loss)
    # The edge weight of an empty mask is 1: plain cross entropy, -log(1/4).
    assert both.item() == pytest.approx((alone.item() + math.log(4)) / 2, rel=1e-5)
    # The control: as it is without, 1 - 1 / (sum of p + 1) comes on top.
    before = segmentation_loss(logits, mask, loss).item()
    assert before - both.item() == pytest.approx((1 - 1 / (0.75 * 32 * 32 + 1)) / 2, rel=1e-4)


@pytest.mark.parametrize("kind", ["iou", "dice"])
def test_overlap_losses_alone_become_cross_entropy_there(kind: str) -> None:
    logits, mask = _batch()
    loss = build_config({"loss.structure": 0.0, f"loss.{kind}": 2.0}).loss
    both = segmentation_loss(logits, mask, loss, object_B=has_object(mask)).item()
    alone = segmentation_loss(logits[:1], mask[:1], loss).item()
    assert both == pytest.approx((alone + 2 * math.log(4)) / 2, rel=1e-5)


def test_side_losses_alike_and_off_unless_asked_for() -> None:
    logits, mask = _batch()
    output, loss = ModelOutput(logits, (logits[..., ::2, ::2],), ()), build_config({}).loss
    plain = total_loss(output, mask, loss).terms
    alone = total_loss(output, mask, loss, empty_alone=True).terms
    for name in ("mask", "side"):
        assert alone[name] < plain[name] - 0.1
    assert "presence" not in plain
    full = torch.ones(2, 1, 32, 32)
    assert torch.equal(
        total_loss(output, full, loss, empty_alone=True).total, total_loss(output, full, loss).total
    )


def test_presence_by_hand_and_void_says_nothing() -> None:
    logits, mask = torch.tensor([LOGIT, LOGIT, -LOGIT]), torch.zeros(3, 1, 8, 8)
    mask[0, 0, 0, 0] = 1
    expected = (-math.log(0.75) - math.log(0.25) - math.log(0.75)) / 3
    assert presence_loss(logits, mask).item() == pytest.approx(expected, rel=1e-5)
    known = torch.ones_like(mask)
    known[1, 0, 0, :4] = 0
    # An object may be in the pixels that nobody labelled: the second image says nothing.
    expected = (-math.log(0.75) - math.log(0.75)) / 3
    assert presence_loss(logits, mask, known).item() == pytest.approx(expected, rel=1e-5)
    # An object in void pixels alone is none.
    mask[1, 0, 0, :4] = 1
    assert has_object(mask, known).tolist() == [1, 0, 0]
    assert torch.isfinite(presence_loss(torch.tensor([1e4, -1e4, 1e4]), mask))


def test_the_term_is_weighted_and_reaches_the_logit_alone() -> None:
    logits, mask = _batch()
    presence = torch.zeros(2, requires_grad=True)
    output = ModelOutput(logits.requires_grad_(), (), (), presence)
    found = total_loss(output, mask, build_config({"loss.presence": 0.5}).loss)
    assert found.terms["presence"].item() == pytest.approx(0.5 * math.log(2), rel=1e-5)
    found.total.backward()
    assert presence.grad is not None
    assert presence.grad.tolist() == pytest.approx([-0.125, 0.125])
    off = total_loss(output, mask, build_config({"loss.presence": 0.0}).loss)
    # Distributed training needs a gradient for every parameter.
    assert off.terms["presence"] == 0 and off.total.requires_grad
