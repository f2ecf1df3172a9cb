"""``--init-from`` of a model with one expert per level: a mixture of its copies."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import SPECIALISTS

from camoxpert.cli import main
from camoxpert.config import build_config, load_config
from camoxpert.errors import ConfigError
from camoxpert.models.camoxpert import CamoXpert, build_model
from camoxpert.training.initial import start_from

TINY = {
    "model.backbone": "tiny_test",
    "model.pretrained": False,
    "model.width": 16,
    "model.detail_width": 8,
}


def model_of(seed: int, **settings: Any) -> tuple[CamoXpert, Any]:
    """Return a model with random weights, and a checkpoint of it as far as it is read."""
    torch.manual_seed(seed)
    config = build_config(TINY | {f"model.{name}": value for name, value in settings.items()})
    model = build_model(config.model).eval()
    for level in model.moe_levels:
        torch.nn.init.normal_(level.router.gate.weight, std=2.0)
    return model, SimpleNamespace(
        evaluated_weights=model.state_dict(), config=config, path=Path("dense.pt")
    )


def mixture_of(**settings: Any) -> CamoXpert:
    return model_of(1, **settings)[0]


DENSE = {"num_experts": 1, "top_k": 1, "experts": ["hybrid"]}
FOUR = {"num_experts": 4, "top_k": 2, "experts": ["hybrid"]}


def images() -> torch.Tensor:
    return torch.randint(0, 256, (5, 3, 32, 32), generator=torch.Generator().manual_seed(2))


def test_a_mixture_of_copies_computes_what_the_single_expert_did(capsys) -> None:
    dense, source = model_of(0, **DENSE)
    mixture = mixture_of(**FOUR)
    fresh = {name: tensor.clone() for name, tensor in mixture.state_dict().items()}
    shot = images().to(torch.uint8)
    with torch.no_grad():
        expected, before = dense(shot).logits_B1HW, mixture(shot).logits_B1HW
        start_from(mixture, source)
        output = mixture(shot)
    torch.testing.assert_close(output.logits_B1HW, expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(before, expected, atol=1e-2), "negative control"
    assert output.routing[0].experts_BK.unique().numel() > 1, "and images use other experts"
    for name, tensor in mixture.state_dict().items():
        if ".router." in name:
            assert torch.equal(tensor, fresh[name]), "the router is new"
    said = " ".join(capsys.readouterr().out.split())
    assert "4 of 4 experts of a level start as copies of its single hybrid expert;" in said
    said, _, taken = said.partition(" taken: ")
    assert "moe.experts.3 (" in taken
    assert "decoder.levels.0.moe.router" in said and "moe.experts" not in said


def test_noise_is_measured_in_the_spread_of_a_tensor() -> None:
    _, source = model_of(0, **DENSE)
    mixture = mixture_of(**FOUR, upcycle_noise=0.1)
    torch.manual_seed(7)
    start_from(mixture, source)
    own, weights = mixture.state_dict(), source.evaluated_weights
    first = "decoder.levels.0.moe.experts."
    name = "enter.0.weight"
    changes = [own[f"{first}{n}.{name}"] - weights[f"{first}0.{name}"] for n in range(4)]
    for change in changes:
        assert float(change.std() / weights[f"{first}0.{name}"].std()) == pytest.approx(0.1, 0.25)
    assert not torch.equal(changes[0], changes[1]), "each copy has noise of its own"
    again = mixture_of(**FOUR, upcycle_noise=0.1)
    torch.manual_seed(7)
    start_from(again, source)
    assert all(torch.equal(tensor, own[key]) for key, tensor in again.state_dict().items())
    # Without noise nothing random is drawn: the rest of the run is that of an earlier version.
    torch.manual_seed(7)
    start_from(mixture_of(**FOUR), source)
    drawn = torch.rand(1)
    torch.manual_seed(7)
    mixture_of(**FOUR)
    assert torch.equal(torch.rand(1), drawn)


def test_other_kinds_are_new_and_other_sizes_are_not_copied(capsys) -> None:
    dense, source = model_of(0, **DENSE)
    mixed = mixture_of(num_experts=3, top_k=1, experts=["hybrid", "edge", "hybrid"])
    start_from(mixed, source)
    said = " ".join(capsys.readouterr().out.split())
    assert "2 of 3 experts of a level start as copies" in said and "at first 1/3" in said
    said, _, taken = said.partition(" taken: ")
    assert "moe.experts.0 (" in taken and "moe.experts.1 (" not in taken
    assert "decoder.levels.0.moe.experts.1 (" in said and "moe.experts.0" not in said
    own = mixed.moe_levels[0].experts
    for place in (0, 2):
        torch.testing.assert_close(
            own[place].state_dict(), dense.moe_levels[0].experts[0].state_dict(), rtol=0, atol=0
        )
    start_from(mixture_of(**FOUR, expert_expansion=2.0), source)
    said = " ".join(capsys.readouterr().out.split())
    assert "copies" not in said and "decoder.levels.0.moe.experts.1 (" in said
    # A single expert continued as a single one is no mixture: all of it is taken.
    one = model_of(1, **DENSE)[0]
    start_from(one, source)
    torch.testing.assert_close(one.state_dict(), source.evaluated_weights, rtol=0, atol=0)


def test_noise_without_copies_is_an_error() -> None:
    _, several = model_of(0, **FOUR)
    with pytest.raises(ConfigError, match=r"has 4 experts \(hybrid\), this model 4 experts"):
        start_from(mixture_of(**FOUR, upcycle_noise=0.1), several)
    with pytest.raises(ConfigError, match="no model is named"):
        load_config(overrides=["model.upcycle_noise=0.1"])


def test_from_the_command_line(train, tmp_path: Path, capsys) -> None:
    words = (*SPECIALISTS, "--epochs", "1", "--stage1-epochs", "0", "--no-test", "--no-report")
    kind = "model.experts=[texture]"
    assert train(*words, "--num-experts", "1", "--top-k", "1", kind, "--run-name", "one") == 0
    capsys.readouterr()
    more = ("--init-from", str(tmp_path / "one"), "--run-name", "many", "model.upcycle_noise=0.01")
    assert train(*words, "--num-experts", "4", kind, *more) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "single texture expert, with noise of 0.01 x its spread; the routers are new" in said
    out = str(tmp_path / "scores")
    test = str(next(tmp_path.glob("one"))), "-o", out, "--gallery", "0"
    assert main(["evaluate", *test]) == 0
    assert "expert that each level chose" not in capsys.readouterr().out, "one expert: no table"


def normalised(**settings: Any) -> tuple[CamoXpert, Any]:
    """Return a mixture whose routers standardise their logits, and a checkpoint of it."""
    model, source = model_of(0, num_experts=4, router_norm="batch", **settings)
    for level in model.moe_levels:
        level.router.train()
    with torch.no_grad():
        for _ in range(30):
            model(images().to(torch.uint8))
    return model.eval(), source


def test_standardised_logits_become_weights_where_they_are_not_standardised() -> None:
    old, source = normalised()
    shot = images().to(torch.uint8)
    plain = mixture_of(num_experts=4)
    start_from(plain, source)
    with torch.no_grad():
        expected, found = old(shot).routing, plain(shot).routing
    for own, other in zip(expected, found, strict=True):
        torch.testing.assert_close(other.logits_BE, own.logits_BE, rtol=1e-3, atol=1e-3)
    assert any("logit_norm" in name for name in source.evaluated_weights), "it is a copy"


def test_statistics_move_with_their_experts() -> None:
    kinds = ["hybrid", "edge", "texture", "semantic"]
    old, source = normalised(experts=kinds)
    new = mixture_of(num_experts=3, router_norm="batch", experts=kinds[:0:-1])
    start_from(new, source)
    for one, other in zip(old.moe_levels, new.moe_levels, strict=True):
        was, now = one.router.logit_norm, other.router.logit_norm
        assert was is not None and now is not None
        assert torch.equal(now.running_mean, was.running_mean[[3, 2, 1]])
        assert torch.equal(now.running_var, was.running_var[[3, 2, 1]])
    fresh = mixture_of(num_experts=4, router_norm="batch", experts=kinds)
    start_from(fresh, model_of(0, num_experts=4, experts=kinds)[1])
    for level in fresh.moe_levels:
        assert level.router.logit_norm is not None
        assert not level.router.logit_norm.running_mean.any()
