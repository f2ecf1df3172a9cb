"""The teacher's loss: numbers by hand, which pixels count, and what images without a mask add."""

from __future__ import annotations

import math

import pytest
import torch

from camoxpert.config import build_config
from camoxpert.losses import segmentation_loss, teacher_loss, total_loss
from camoxpert.models.camoxpert import build_model

LN2 = math.log(2)


def row(*values: float) -> torch.Tensor:
    return torch.tensor([[[values]]], dtype=torch.float32)


PROBS, MASK = row(0.9, 0.2, 0.6, 0.5), row(1, 0, 0, 1)
"""Confidences .8, .6, .2 and 0; the teacher contradicts the third pixel."""


def test_by_hand_on_zero_logits() -> None:
    """The cross entropy is log 2 whatever p is; the third pixel does not count."""
    loss = teacher_loss(row(0, 0, 0, 0), PROBS, MASK)
    assert float(loss) == pytest.approx(LN2 * (0.8 + 0.6) / 4, rel=1e-6)
    # The control: had the teacher's answers been the mask's opposite, only p = 1/2 would agree,
    # whose confidence is 0.
    assert float(teacher_loss(row(0, 0, 0, 0), PROBS, row(0, 1, 1, 1))) == pytest.approx(
        LN2 * 0.2 / 4, rel=1e-6
    )


def test_by_hand_on_other_logits() -> None:
    logits = row(2, -1, 3, 1)
    first = math.log1p(math.exp(2)) - 0.9 * 2
    second = math.log1p(math.exp(-1)) - 0.2 * -1
    assert float(teacher_loss(logits, PROBS, MASK)) == pytest.approx(
        (0.8 * first + 0.6 * second) / 4, rel=1e-6
    )


def test_every_pixel_of_an_image_without_a_mask_counts() -> None:
    unlabeled = torch.tensor([True])
    void = torch.zeros_like(MASK)
    for mask, known in ((MASK, None), (1 - MASK, None), (MASK, void)):
        loss = teacher_loss(row(0, 0, 0, 0), PROBS, mask, known_B1HW=known, unlabeled_B=unlabeled)
        assert float(loss) == pytest.approx(LN2 * (0.8 + 0.6 + 0.2) / 4, rel=1e-6)


def test_void_pixels_of_a_mask_do_not_count() -> None:
    known = row(0, 1, 1, 1)
    loss = teacher_loss(row(0, 0, 0, 0), PROBS, MASK, known_B1HW=known)
    assert float(loss) == pytest.approx(LN2 * 0.6 / 4, rel=1e-6)


def test_images_have_the_same_weight_however_a_batch_is_divided() -> None:
    torch.manual_seed(0)
    logits, probs = torch.randn(4, 1, 8, 8), torch.rand(4, 1, 8, 8)
    mask = (torch.rand(4, 1, 8, 8) > 0.5).float()
    unlabeled = torch.tensor([False, True, False, True])
    whole = teacher_loss(logits, probs, mask, unlabeled_B=unlabeled)
    alone = [
        teacher_loss(
            logits[i : i + 1], probs[i : i + 1], mask[i : i + 1], unlabeled_B=unlabeled[i : i + 1]
        )
        for i in range(4)
    ]
    torch.testing.assert_close(whole, torch.stack(alone).mean())


def test_the_gradient_leads_to_the_map_and_stops_where_they_disagree() -> None:
    logits = row(0, 0, 0, 0).requires_grad_()
    teacher_loss(logits, PROBS, MASK).backward()
    # Confidence x (sigmoid - p) / pixels.
    expected = row(0.8 * (0.5 - 0.9), 0.6 * (0.5 - 0.2), 0, 0) / 4
    torch.testing.assert_close(logits.grad, expected)


def test_float32_and_finite_on_saturated_logits() -> None:
    logits = torch.full((1, 1, 4, 4), 40.0, dtype=torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = teacher_loss(logits, torch.zeros(1, 1, 4, 4), torch.zeros(1, 1, 4, 4))
    assert loss.dtype == torch.float32 and float(loss) == pytest.approx(40.0)


@pytest.mark.parametrize("name", ["structure", "bce", "iou", "dice"])
def test_an_image_without_a_mask_adds_no_mask_loss(name: str) -> None:
    weights = {f"loss.{other}": 0.0 for other in ("structure", "bce", "iou", "dice")}
    config = build_config(weights | {f"loss.{name}": 1.0}).loss
    logits = torch.randn(1, 1, 16, 16, requires_grad=True)
    nobody = torch.zeros(1, 1, 16, 16)
    loss = segmentation_loss(logits, nobody, config, known_B1HW=nobody)
    loss.backward()
    assert float(loss.detach()) == 0 and not logits.grad.any()
    # The control: the same mask, labelled, does.
    assert float(segmentation_loss(logits, nobody, config)) > 0


def test_weight_0_changes_no_bit_and_the_terms_sum_to_the_total() -> None:
    values = {"model.backbone": "tiny_test", "model.pretrained": False, "model.width": 16}
    config = build_config(values)
    output = build_model(config.model)(torch.rand(2, 3, 32, 32))
    mask, probs = (torch.rand(2, 1, 32, 32) > 0.5).float(), torch.rand(2, 1, 32, 32)
    plain = total_loss(output, mask, config.loss)
    off = build_config(values | {"loss.teacher": 0.0}).loss
    unused = total_loss(output, mask, off, teacher_B1HW=probs)
    assert torch.equal(plain.total, unused.total) and plain.terms.keys() == unused.terms.keys()
    twice = build_config(values | {"loss.teacher": 2.0}).loss
    taught = total_loss(output, mask, twice, teacher_B1HW=probs)
    alone = teacher_loss(output.logits_B1HW, probs, mask)
    torch.testing.assert_close(taught.terms["teacher"], 2 * alone.detach())
    torch.testing.assert_close(taught.total, plain.total + 2 * alone)
    torch.testing.assert_close(taught.total.detach(), sum(taught.terms.values()))
