"""Dispatch back ends agree in output and every gradient; the router decides as documented."""

import pytest
import torch

from camoxpert.config import build_config, load_config
from camoxpert.errors import ConfigError
from camoxpert.models.camoxpert import build_model
from camoxpert.models.moe import DISPATCH, MoE, choose_dispatch, read_counts
from camoxpert.models.router import Router, choose
from camoxpert.models.stacked import FIELDS, UniformExperts
from camoxpert.profile.syncs import SyncCounter

BACK_ENDS = {"specialist": ("loop", "sorted", "dense"), "uniform": tuple(DISPATCH)}


def run(
    moe: MoE, x: torch.Tensor, dispatch: str, dtype: torch.dtype | None = None
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    moe.dispatch = dispatch
    moe.zero_grad()
    leaf = x.clone().requires_grad_()
    with torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
        y, _ = moe(leaf)
    # A weight per element instead of a plain sum: permuted outputs are noticed.
    y = y.float()
    (y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum().backward()
    gradients = {name: p.grad.clone() for name, p in moe.named_parameters()}
    return y.detach(), gradients | {"input": leaf.grad}


@pytest.mark.parametrize("family", ["specialist", "uniform"])
@pytest.mark.parametrize(
    ("batch", "experts", "top_k", "width", "size"),
    [
        (4, 7, 2, 16, (6, 6)),
        (5, 4, 1, 16, (5, 3)),
        (1, 7, 3, 16, (4, 4)),
        (3, 3, 3, 16, (4, 4)),
        (2, 8, 2, 16, (3, 7)),
        (6, 1, 1, 16, (4, 4)),
        (3, 9, 4, 10, (1, 1)),
        (9, 2, 1, 7, (8, 2)),
    ],
)
def test_back_ends_agree(family, batch, experts, top_k, width, size) -> None:
    torch.manual_seed(batch)
    moe = MoE(width, num_experts=experts, top_k=top_k, family=family)
    moe.router.gate.weight.data.normal_(std=2.0)
    x = torch.randn(batch, width, *size) * torch.rand(batch, 1, 1, 1) * 4
    expected, gradients = run(moe, x, "loop")
    for name in BACK_ENDS[family]:
        y, own = run(moe, x, name)
        torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
        for key, gradient in gradients.items():
            torch.testing.assert_close(
                own[key], gradient, rtol=1e-4, atol=1e-5, msg=f"{name} {key}"
            )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["specialist", "uniform"])
def test_back_ends_agree_in_half_precision(family, dtype) -> None:
    """Within 2 % of the output's norm and 10 % of a gradient's: sums run in another order."""
    torch.manual_seed(0)
    moe = MoE(16, num_experts=4, top_k=2, family=family)
    x = torch.randn(6, 16, 8, 8)
    expected, gradients = run(moe, x, "loop", dtype)
    for name in BACK_ENDS[family][1:]:
        y, own = run(moe, x, name, dtype)
        assert (y - expected).norm() <= 0.02 * expected.norm()
        for key, gradient in gradients.items():
            assert (own[key] - gradient).norm() <= 0.1 * gradient.norm() + 1e-4, f"{name} {key}"


@pytest.mark.parametrize("family", ["specialist", "uniform"])
def test_a_wrong_gate_is_noticed(family) -> None:
    torch.manual_seed(0)
    moe = MoE(16, num_experts=4, top_k=2, family=family)
    x = torch.randn(4, 16, 4, 4)
    routing = moe.router(x)
    right = DISPATCH["loop"](moe.experts, x, routing, None)
    swapped = routing._replace(gates_BK=routing.gates_BK.flip(1))
    for name in BACK_ENDS[family][1:]:
        wrong = DISPATCH[name](moe.experts, x, swapped, None)
        assert not torch.allclose(right, wrong, atol=1e-4)


@pytest.mark.parametrize("family", ["specialist", "uniform"])
def test_all_images_to_one_expert_leaves_zero_not_missing_gradients(family) -> None:
    torch.manual_seed(0)
    moe = MoE(16, num_experts=3, top_k=1, family=family)
    moe.router.gate.bias.data = torch.tensor([9.0, 0.0, 0.0])
    for name in BACK_ENDS[family]:
        _, gradients = run(moe, torch.randn(4, 16, 4, 4), name)
        own = {k: g for k, g in gradients.items() if k.startswith("experts.")}
        if family == "uniform":
            assert all(g[0].abs().max() > 0 and g[1:].abs().max() == 0 for g in own.values())
        else:
            idle = [g for key, g in own.items() if key.startswith("experts.1.")]
            assert idle and all(g.abs().max() == 0 for g in idle)


def counted(moe: MoE, x: torch.Tensor, dispatch: str) -> SyncCounter:
    """Count forward and backward of the dispatch alone: router and norm are the same for all."""
    moe.zero_grad()
    routing = moe.router(x)
    routing = routing._replace(gates_BK=routing.gates_BK.detach().requires_grad_())
    leaf = x.clone().requires_grad_()
    with SyncCounter() as counter:
        DISPATCH[dispatch](moe.experts, leaf, routing, None).sum().backward()
    return counter


def test_operators_and_host_syncs() -> None:
    """B = 16, E = 4, k = 2, forward and backward: the reason for this project."""
    torch.manual_seed(0)
    x = torch.randn(16, 16, 8, 8)
    uniform = MoE(16, num_experts=4, top_k=2, family="uniform")
    special = MoE(16, num_experts=4, top_k=2)
    for moe in (special, uniform):
        loop, by_expert = counted(moe, x, "loop"), counted(moe, x, "sorted")
        assert loop.syncs == 32  # one for each image and choice
        assert by_expert.syncs == 1
        assert loop.operators >= 7 * by_expert.operators
        assert counted(moe, x, "dense").syncs == 0
    gathered = counted(uniform, x, "gathered")
    assert gathered.syncs == 0
    assert counted(uniform, x, "loop").operators >= 18 * gathered.operators


def test_operators_do_not_grow_with_the_batch() -> None:
    torch.manual_seed(0)
    for family, name in (("specialist", "sorted"), ("uniform", "gathered")):
        moe = MoE(16, num_experts=4, top_k=2, family=family)
        few, many = (counted(moe, torch.randn(b, 16, 5, 5), name).operators for b in (8, 64))
        assert few == many


def test_gathered_is_one_graph_and_the_loop_is_not() -> None:
    torch.manual_seed(0)
    moe = MoE(16, num_experts=4, top_k=2, family="uniform", dispatch="gathered")
    x = torch.randn(4, 16, 5, 5)
    torch._dynamo.reset()
    whole = torch.compile(moe, backend="eager", fullgraph=True)
    torch.testing.assert_close(whole(x)[0], moe(x)[0])
    slow = MoE(16, num_experts=4, top_k=2, dispatch="loop")
    torch._dynamo.reset()
    with pytest.raises(Exception, match=r"(?i)graph break|data.dependent|unsupported|guard"):
        torch.compile(slow, backend="eager", fullgraph=True)(x)
    torch._dynamo.reset()


def model_of(**settings: object):
    torch.manual_seed(0)
    values = {"model.backbone": "tiny_test", "model.pretrained": False, "model.width": 16}
    values |= {f"model.{key}": value for key, value in settings.items()}
    return build_model(build_config(values).model).eval()


@pytest.mark.parametrize(
    ("settings", "syncs"),
    [
        ({}, 1),
        ({"routing": "fused"}, 4),
        ({"expert_family": "uniform"}, 0),
        ({"expert_family": "uniform", "dispatch": "sorted"}, 1),
        ({"num_experts": 1, "top_k": 1}, 0),
        ({"dispatch": "dense"}, 0),
    ],
)
def test_host_syncs_of_the_whole_model(settings, syncs) -> None:
    model = model_of(**settings)
    with SyncCounter() as counter:
        model(torch.zeros(2, 3, 32, 32, dtype=torch.uint8))
    assert counter.syncs == syncs, counter.places


@pytest.mark.parametrize("routing", ["lateral", "fused"])
def test_reading_the_counts_ahead_changes_nothing(routing) -> None:
    model = model_of(routing=routing)
    images = torch.randint(0, 256, (5, 3, 32, 32), dtype=torch.uint8)
    results = []
    for name in ("sorted", "loop"):
        for level in model.moe_levels:
            level.dispatch = name
        results.append(model(images))
    torch.testing.assert_close(results[0].logits_B1HW, results[1].logits_B1HW, atol=1e-5, rtol=1e-4)
    for a, b in zip(results[0].routing, results[1].routing, strict=True):
        assert torch.equal(a.experts_BK, b.experts_BK)


def test_counts_of_several_levels_in_one_read() -> None:
    levels = [torch.tensor([[0, 2], [2, 1]]), torch.tensor([[1, 1], [1, 1]])]
    with SyncCounter() as counter:
        assert read_counts(levels, 4) == [[1, 1, 2, 0], [0, 4, 0, 0]]
    assert counter.syncs == 1


def test_uniform_experts_keep_to_their_receptive_fields() -> None:
    torch.manual_seed(0)
    experts = UniformExperts(len(FIELDS), 8, 8)
    assert experts.kinds == tuple(FIELDS)
    x = torch.randn(1, 8, 9, 9, requires_grad=True)
    for index, name in enumerate(FIELDS):
        (gradient,) = torch.autograd.grad(experts[index](x)[0, :, 4, 4].sum(), x)
        reach = gradient.abs().sum((0, 1)) > 0
        expected = torch.zeros(9, 9, dtype=torch.bool)
        expected[1:8, 1:8] = FIELDS[name] > 0
        assert torch.equal(reach, expected), name
    assert UniformExperts(9, 8, 8).kinds[7] == "3x3"


def test_gathered_needs_stacked_weights() -> None:
    moe = MoE(16, num_experts=3, top_k=1, dispatch="gathered")
    with pytest.raises(ConfigError, match="--expert-family uniform"):
        moe(torch.randn(2, 16, 4, 4))
    with pytest.raises(ConfigError, match="--expert-family uniform"):
        load_config(overrides=["model.dispatch=gathered"])
    with pytest.raises(ConfigError, match="specialist kinds"):
        load_config(overrides=["model.expert_family=uniform", "model.experts=[edge]"])


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
    # Same mean, ten times the spread: a router that sees means alone cannot distinguish them.
    wild = noise.mean((2, 3), keepdim=True) + 10 * (noise - noise.mean((2, 3), keepdim=True))
    assert not torch.allclose(router(noise).logits_BE, router(wild).logits_BE, atol=1e-3)


def test_a_shared_expert_serves_every_image_beside_the_chosen_ones() -> None:
    torch.manual_seed(0)
    moe = MoE(16, num_experts=3, top_k=1, shared="edge")
    x = torch.randn(4, 16, 5, 5)
    y, routing = moe(x)
    h = moe.norm(x)
    routed = DISPATCH["loop"](moe.experts, h, routing, None)
    torch.testing.assert_close(y, x + routed + moe.shared(h))
    assert MoE(16, num_experts=3, top_k=1).shared is None


def test_auto_dispatch_says_why() -> None:
    chosen = {
        name: choose_dispatch("auto", **settings)
        for name, settings in {
            "sorted": {"family": "specialist", "num_experts": 4, "top_k": 2},
            "gathered": {"family": "uniform", "num_experts": 4, "top_k": 2},
            "dense": {"family": "specialist", "num_experts": 4, "top_k": 4},
        }.items()
    }
    assert all(name == own and reason for name, (own, reason) in chosen.items())
    assert choose_dispatch("loop") == ("loop", "as asked")


def test_auto_follows_the_active_experts() -> None:
    """During router warm-up every expert is active: nothing to sort."""
    moe = MoE(16, num_experts=3, top_k=1)
    assert moe.dispatch == "sorted"
    moe.router.top_k = 3
    assert moe.dispatch == "dense"
    moe.dispatch = "loop"
    assert moe.dispatch == "loop"
