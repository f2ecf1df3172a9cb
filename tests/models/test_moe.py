"""Dispatch back ends agree in output and every gradient; the router does what it says."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from camoxpert.models.moe import DISPATCH, MoE, choose_dispatch
from camoxpert.models.router import Router, choose


class CountOps(TorchDispatchMode):
    """Counts operators and host syncs (reads of a tensor's value)."""

    def __init__(self) -> None:
        super().__init__()
        self.ops, self.syncs = 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.ops += 1
        if "_local_scalar_dense" in str(func):
            self.syncs += 1
        return func(*args, **(kwargs or {}))


def run(moe: MoE, x: torch.Tensor, dispatch: str) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    moe.dispatch = dispatch
    moe.zero_grad()
    leaf = x.clone().requires_grad_()
    y, _ = moe(leaf)
    # Not a plain sum: a weighting that differs per element catches permuted outputs.
    (y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum().backward()
    gradients = {name: p.grad.clone() for name, p in moe.named_parameters()}
    return y.detach(), gradients | {"input": leaf.grad}


@pytest.mark.parametrize(
    ("batch", "experts", "top_k", "size"),
    [
        (4, 7, 2, (6, 6)),
        (5, 4, 1, (5, 3)),
        (1, 7, 3, (4, 4)),
        (3, 3, 3, (4, 4)),
        (2, 8, 2, (3, 7)),
        (6, 1, 1, (4, 4)),
    ],
)
def test_back_ends_agree(batch: int, experts: int, top_k: int, size: tuple[int, int]) -> None:
    torch.manual_seed(batch)
    moe = MoE(16, num_experts=experts, top_k=top_k)
    moe.router.gate.weight.data.normal_(std=2.0)
    x = torch.randn(batch, 16, *size) * torch.rand(batch, 1, 1, 1) * 4
    expected, gradients = run(moe, x, "loop")
    for name in DISPATCH:
        y, own = run(moe, x, name)
        torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
        for key, gradient in gradients.items():
            torch.testing.assert_close(
                own[key], gradient, rtol=1e-4, atol=1e-5, msg=f"{name} {key}"
            )


def test_a_wrong_gate_is_noticed() -> None:
    torch.manual_seed(0)
    moe = MoE(16, num_experts=4, top_k=2)
    x = torch.randn(4, 16, 4, 4)
    routing = moe.router(x)
    right = DISPATCH["loop"](moe.experts, x, routing.gates_BK, routing.experts_BK)
    wrong = DISPATCH["sorted"](moe.experts, x, routing.gates_BK.flip(1), routing.experts_BK)
    assert not torch.allclose(right, wrong, atol=1e-4)


def test_all_images_to_one_expert_leaves_zero_not_missing_gradients() -> None:
    torch.manual_seed(0)
    moe = MoE(16, num_experts=3, top_k=1)
    moe.router.gate.bias.data = torch.tensor([9.0, 0.0, 0.0])
    for name in DISPATCH:
        _, gradients = run(moe, torch.randn(4, 16, 4, 4), name)
        idle = [g for key, g in gradients.items() if key.startswith("experts.1.")]
        assert idle and all(g.abs().max() == 0 for g in idle)


def test_sorted_needs_fewer_operators_and_syncs() -> None:
    torch.manual_seed(0)
    moe = MoE(16, num_experts=4, top_k=2)
    x = torch.randn(16, 16, 8, 8)
    counts = {}
    for name in DISPATCH:
        moe.dispatch = name
        with CountOps() as counter:
            moe(x)[0].sum().backward()
        counts[name] = counter
    assert counts["loop"].syncs >= 32
    assert counts["sorted"].syncs <= 4  # tolist() reads E counts in one copy
    assert counts["loop"].ops > 4 * counts["sorted"].ops


def test_gates_by_hand() -> None:
    logits = torch.log(torch.tensor([[0.5, 0.3, 0.2]]))
    two = choose(logits, 2)
    assert two.experts_BK.tolist() == [[0, 1]]
    torch.testing.assert_close(two.gates_BK, torch.tensor([[0.625, 0.375]]))
    one = choose(logits, 1)
    torch.testing.assert_close(one.gates_BK, torch.tensor([[0.5]]))


def test_router_gets_a_gradient_even_for_one_choice() -> None:
    torch.manual_seed(0)
    moe = MoE(16, num_experts=3, top_k=1)
    _, gradients = run(moe, torch.randn(4, 16, 4, 4), "sorted")
    assert gradients["router.gate.weight"].abs().max() > 0


def test_router_stays_in_float32_under_autocast() -> None:
    torch.manual_seed(0)
    router = Router(16, 8, 2)
    x = torch.randn(4, 16, 4, 4)
    plain = router(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = router(x)
    assert cast.logits_BE.dtype == torch.float32
    torch.testing.assert_close(cast.logits_BE, plain.logits_BE, rtol=0, atol=0)


def test_router_sees_content() -> None:
    torch.manual_seed(0)
    router = Router(16, 4, 1)
    noise = torch.randn(1, 16, 8, 8)
    # Same mean, ten times the spread: a router on means alone could not tell these apart.
    wild = noise.mean((2, 3), keepdim=True) + 10 * (noise - noise.mean((2, 3), keepdim=True))
    assert not torch.allclose(router(noise).logits_BE, router(wild).logits_BE, atol=1e-3)


def test_a_shared_expert_serves_every_image_beside_the_chosen_ones() -> None:
    torch.manual_seed(0)
    moe = MoE(16, num_experts=3, top_k=1, shared="edge")
    x = torch.randn(4, 16, 5, 5)
    y, routing = moe(x)
    h = moe.norm(x)
    routed = DISPATCH["loop"](moe.experts, h, routing.gates_BK, routing.experts_BK)
    torch.testing.assert_close(y, x + routed + moe.shared(h))
    assert MoE(16, num_experts=3, top_k=1).shared is None


def test_auto_dispatch_says_why() -> None:
    name, reason = choose_dispatch("auto")
    assert name in DISPATCH and reason
    assert choose_dispatch("loop") == ("loop", "as asked")
