"""``--router-norm batch``: logits standardised over images, so that content decides."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from camoxpert.config import build_config, load_config
from camoxpert.errors import ConfigError
from camoxpert.export.forced import force
from camoxpert.export.graph import ExportGraph
from camoxpert.models.camoxpert import CamoXpert, build_model
from camoxpert.models.moe import MoE
from camoxpert.models.router import LogitNorm, Router, choose

NORM = {"model.router_norm": "batch"}
TINY = {
    "model.backbone": "tiny_test",
    "model.pretrained": False,
    "model.width": 16,
    "model.detail_width": 8,
    "model.num_experts": 4,
}


def model_of(**settings: object) -> CamoXpert:
    torch.manual_seed(0)
    return build_model(build_config(TINY | settings).model).eval()


def images_of(count: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    colour = torch.randint(0, 200, (count, 3, 1, 1), generator=generator)
    grain = torch.randint(0, 56, (count, 3, 32, 32), generator=generator)
    return (colour + grain).to(torch.uint8)


def features_of(count: int) -> Tensor:
    torch.manual_seed(0)
    return torch.randn(count, 16, 6, 6) * torch.rand(count, 16, 1, 1)


def test_a_batch_by_hand() -> None:
    norm = LogitNorm(2)
    raw = torch.tensor([[1.0, 10.0], [3.0, 10.0]])
    # The first expert's mean is 2 and its spread 1. The second is far ahead for all images alike.
    torch.testing.assert_close(norm(raw), torch.tensor([[-1.0, 0.0], [1.0, 0.0]]))
    # Running statistics move by a tenth; their variance is that of a sample (n - 1), from 1e-3.
    torch.testing.assert_close(norm.running_mean, torch.tensor([0.2, 1.0]))
    torch.testing.assert_close(norm.running_var, torch.tensor([0.2 + 0.0009, 0.0009]))
    norm.eval()
    expected = (3 - 0.2) / (0.2009**0.5)
    assert norm(raw)[1, 0].item() == pytest.approx(expected, rel=1e-5)


def test_one_image_is_judged_by_the_running_statistics() -> None:
    """It has no spread: torch's own batch norm refuses it."""
    norm, raw = LogitNorm(2), torch.tensor([[1.0, -1.0]])
    before = {name: tensor.clone() for name, tensor in norm.state_dict().items()}
    alone = norm(raw)
    assert all(torch.equal(tensor, before[name]) for name, tensor in norm.state_dict().items())
    assert torch.equal(alone, norm.eval()(raw))


def test_an_expert_ahead_for_all_images_no_longer_serves_all_of_them() -> None:
    x = features_of(64)
    busiest = []
    for standardise in (False, True):
        torch.manual_seed(0)
        router = Router(16, 4, 1, standardise=standardise)
        router.hidden.bias.data.fill_(1.0)
        router.gate.weight.data[2] += 0.1
        for _ in range(60):
            router(x)
        for _ in range(2):  # in training, and in evaluation
            choices = router(x).experts_BK[:, 0]
            busiest.append(choices.bincount(minlength=4).max().item())
            router.eval()
    assert busiest[:2] == [64, 64] and max(busiest[2:]) < 32


def test_learning_cannot_put_an_expert_ahead() -> None:
    """The gradient of a wish that holds for all images alike is 0; negative control: without."""
    x = features_of(16)
    sizes = []
    for standardise in (False, True):
        torch.manual_seed(0)
        router = Router(16, 4, 2, standardise=standardise)
        router(x).logits_BE[:, 2].sum().backward()
        assert router.gate.weight.grad is not None
        sizes.append(router.gate.weight.grad.abs().max().item())
    assert sizes[0] > 0.1 and sizes[1] < 1e-2


def trained(**settings: object) -> tuple[CamoXpert, Tensor]:
    """Return a model whose statistics have followed images, and these images."""
    model, images = model_of(**NORM, **settings), images_of(12)
    for level in model.moe_levels:
        level.router.gate.weight.data[1] += 0.5
        level.router.train()
    with torch.no_grad():
        for _ in range(30):
            model(images)
    return model.eval(), images


@pytest.mark.parametrize("family", ["specialist", "uniform"])
def test_an_exported_graph_has_no_statistics_and_decides_the_same(family: str) -> None:
    model, images = trained(**{"model.expert_family": family})
    graph = ExportGraph(model)
    assert not any("logit_norm" in name for name in graph.state_dict())
    assert all(level.router.logit_norm is not None for level in model.moe_levels), "it is a copy"
    with torch.no_grad():
        expected, found = model(images), graph.run(images)
    assert max(own.experts_BK.unique(dim=0).shape[0] for own in expected.routing) > 1
    for own, exported in zip(expected.routing, found.routing, strict=True):
        torch.testing.assert_close(exported.logits_BE, own.logits_BE, rtol=1e-3, atol=1e-3)
        assert torch.equal(exported.experts_BK, own.experts_BK)
    torch.testing.assert_close(found.logits_B1HW, expected.logits_B1HW, rtol=1e-3, atol=1e-3)
    with torch.no_grad():
        forced = force(graph, [[3, 0]] * 4)[0].run(images)
        around = force(ExportGraph.around(model), [[3, 0]] * 4)[0].run(images)
    for routing in (*forced.routing, *around.routing):
        assert (routing.experts_BK == torch.tensor([3, 0])).all()


def test_back_ends_agree() -> None:
    x = features_of(6)
    outputs = []
    for name in ("loop", "sorted", "dense"):
        torch.manual_seed(0)
        moe = MoE(16, num_experts=4, top_k=2, standardise=True, dispatch=name)
        outputs.append(moe(x)[0])
    for output in outputs[1:]:
        torch.testing.assert_close(output, outputs[0], rtol=1e-5, atol=1e-5)


def test_regions_are_standardised_over_all_cells() -> None:
    torch.manual_seed(0)
    moe = MoE(16, num_experts=4, top_k=1, grid=2, standardise=True)
    logits_BE = moe.route(torch.randn(2, 16, 12, 12)).logits_BE
    assert len(logits_BE) == 8
    torch.testing.assert_close(logits_BE.mean(0), torch.zeros(4), rtol=0, atol=1e-5)
    torch.testing.assert_close(logits_BE.var(0, correction=0), torch.ones(4), rtol=1e-2, atol=0)


def test_without_it_a_model_is_what_it_was() -> None:
    plain, own = model_of().state_dict(), model_of(**NORM).state_dict()
    assert not any("logit_norm" in name for name in plain)
    # Nothing random is drawn for it: networks start equal, but for a bias that the mean would take.
    for name, tensor in plain.items():
        assert name.endswith("router.gate.bias") or torch.equal(tensor, own[name]), name
    assert not any(name.endswith("router.gate.bias") for name in own)


def test_gates_follow_the_standardised_logits() -> None:
    norm = LogitNorm(3)
    raw = torch.tensor([[9.0, 1.0, 0.0], [7.0, 1.2, 0.02], [8.0, 1.1, 0.01]])
    # The first expert is 6 ahead for the second image: less than for the others.
    assert choose(raw, 1).experts_BK[1].item() == 0
    assert choose(norm(raw), 1).experts_BK[1].item() != 0


def test_a_single_expert_has_nothing_to_standardise() -> None:
    with pytest.raises(ConfigError, match="--num-experts 1 there is none"):
        load_config(overrides=["model.router_norm=batch", "model.num_experts=1", "model.top_k=1"])
