"""The routing terms, checked against hand-computed values; they must train the router."""

import math

import pytest
import torch

from camoxpert.models.balance import balance_loss, router_z_loss


def test_balance_by_hand() -> None:
    uniform = torch.full((4, 4), 0.25)
    even = torch.tensor([[0], [1], [2], [3]])
    assert float(balance_loss(uniform, even)) == pytest.approx(1.0)
    skewed = torch.tensor([[0.7, 0.1, 0.1, 0.1]]).expand(4, 4)
    collapsed = torch.zeros(4, 1, dtype=torch.long)
    assert float(balance_loss(skewed, collapsed)) == pytest.approx(4 * 0.7)


def test_balance_pushes_the_favourite_down() -> None:
    logits = torch.tensor([[2.0, 0.0, 0.0]] * 4, requires_grad=True)
    balance_loss(logits.softmax(-1), torch.zeros(4, 1, dtype=torch.long)).backward()
    assert (logits.grad[:, 0] > 0).all() and (logits.grad[:, 1:] < 0).all()


def test_router_z_by_hand() -> None:
    assert float(router_z_loss(torch.zeros(2, 4))) == pytest.approx(math.log(4) ** 2)
