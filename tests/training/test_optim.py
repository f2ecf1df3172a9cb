"""The plan of a run and its schedules, against values computed by hand."""

import math

import pytest
import torch

from camoxpert.config import SCHEDULERS, build_config
from camoxpert.models.backbone import BACKBONES
from camoxpert.models.camoxpert import build_model
from camoxpert.training.optim import (
    backbone_scale,
    build_optimizer,
    decayed,
    load_optimizer,
    saved_names,
    set_lr,
)
from camoxpert.training.plan import Plan, decay_factor, lr_at, make_plan

DECIDED = {"optim.lr": 2.5e-4, "train.stage1_epochs": 0}


def plan_of(num_images: int = 100, **train: object) -> Plan:
    config = build_config(DECIDED | {f"train.{k}": v for k, v in train.items()})
    return make_plan(config.train, config.optim, num_images=num_images)


def test_steps_count_the_last_short_window() -> None:
    # 100 images / 16 = 7 micro-batches; windows of 4: one of 4, one of 3.
    plan = plan_of(epochs=3, stage1_epochs=1, batch_size=16, accumulation_steps=4)
    assert [(s.number, s.epochs, s.first_step, s.batches, s.steps) for s in plan.stages] == [
        (1, 1, 0, 7, 2),
        (2, 2, 2, 7, 2),
    ]
    assert (plan.epochs, plan.steps) == (3, 6)
    assert [plan.stage_of_epoch(e).number for e in range(3)] == [1, 2, 2]
    assert [plan.stage_of_step(s).number for s in range(6)] == [1, 1, 2, 2, 2, 2]


def test_stage2_has_its_own_batch_size_and_rate() -> None:
    config = build_config(
        {
            "train.epochs": 4,
            "train.stage1_epochs": 2,
            "train.batch_size": 20,
            "train.stage2_batch_size": 10,
            "optim.lr": 2.5e-4,
            "optim.stage2_lr": 1e-5,
        }
    )
    plan = make_plan(config.train, config.optim, num_images=100)
    assert [(s.batch_size, s.steps, s.lr) for s in plan.stages] == [(20, 5, 2.5e-4), (10, 10, 1e-5)]


def test_what_the_recipe_decides_must_be_decided() -> None:
    config = build_config({})
    with pytest.raises(ValueError, match="recipe"):
        make_plan(config.train, config.optim, num_images=100)


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_every_schedule_rises_peaks_and_ends_where_it_should(scheduler: str) -> None:
    config = build_config(
        {
            **{"optim.scheduler": scheduler, "optim.lr": 1e-2, "optim.min_lr": 1e-4},
            **{"train.epochs": 10, "train.stage1_epochs": 0},
        }
    )
    plan = make_plan(config.train, config.optim, num_images=160)
    rates = [lr_at(plan, config.optim, step) for step in range(plan.steps)]
    assert rates[0] < 0.2 * max(rates)
    assert max(rates) == pytest.approx(1e-2, rel=0.01)
    if scheduler == "constant":
        assert rates[-1] == pytest.approx(1e-2)
    else:
        assert rates[-1] < 0.04 * 1e-2
    assert all(rate >= 1e-4 * 0.99 for rate in rates[10:])


def test_decay_by_hand() -> None:
    assert decay_factor("cosine", 0.5) == pytest.approx(0.5)
    assert decay_factor("poly", 0.5) == pytest.approx(0.5**0.9)
    assert decay_factor("linear", 0.25) == 0.75
    assert [decay_factor("step", p) for p in (0.4, 0.6, 0.8)] == [1.0, 0.1, 0.01]
    assert decay_factor("cosine", 2.0) == 0.0


def test_rate_is_a_function_of_the_step_and_restarts_in_stage_2() -> None:
    settings = {"train.epochs": 8, "train.stage1_epochs": 4, "optim.warmup_epochs": 1}
    config = build_config({**settings, "optim.lr": 2.5e-4})
    plan = make_plan(config.train, config.optim, num_images=160)
    first = [lr_at(plan, config.optim, step) for step in range(40)]
    second = [lr_at(plan, config.optim, step) for step in range(40, 80)]
    assert first == second
    assert lr_at(plan, config.optim, 55) == lr_at(plan, config.optim, 55)
    assert math.isclose(first[9], config.optim.lr * 10 / 11)


def test_backbone_learns_at_a_tenth_and_vectors_are_not_decayed() -> None:
    model = build_model(build_config({"model.backbone": "tiny_test", "model.width": 16}).model)
    config = build_config({"optim.weight_decay": 0.05}).optim
    assert backbone_scale(config, has_weights=True) == 0.1
    assert backbone_scale(config, has_weights=False) == 1.0
    router = model.moe_levels[0].router
    optimizer = build_optimizer(model, config, scales=[(model.backbone, 0.1), (router, 0.5)])
    set_lr(optimizer, 1e-3)
    rates = {id(p): 1e-4 for p in model.backbone.parameters()}
    rates |= {id(p): 5e-4 for p in router.parameters()}
    seen = 0
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            seen += 1
            assert group["lr"] == pytest.approx(rates.get(id(parameter), 1e-3))
            if parameter.ndim < 2:
                assert group["weight_decay"] == 0.0
    assert seen == len(list(model.parameters()))


MATRICES = {"weight", "enter_EDC", "filter_EDHW", "leave_ECD"}
OTHERS = {
    *("bias", "gamma", "gamma_xca", "gain", "temperature"),
    *("enter_bias_ED", "filter_bias_ED", "leave_bias_EC"),
}


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("family", ["specialist", "uniform"])
def test_what_is_decayed_by_name(family: str, backbone: str) -> None:
    """Every parameter of every family: matrices and filters, and nothing else of any shape."""
    settings = {"backbone": backbone, "pretrained": False, "expert_family": family}
    settings |= {"shared_expert": "attention", "num_experts": 7, "width": 16}
    config = build_config({f"model.{name}": value for name, value in settings.items()})
    with torch.device("meta"):
        model = build_model(config.model)
    decay = decayed(model)
    seen = set()
    for name, parameter in model.named_parameters():
        last = name.rpartition(".")[2]
        seen.add(last)
        assert last in MATRICES | OTHERS, f"{name}: say whether it is decayed"
        expected = last in MATRICES and parameter.ndim > 1
        assert (name in decay) == expected, name
    wanted = {"temperature", "weight", "bias"}
    wanted |= {"gain"} if family == "specialist" else OTHERS - {"gain", "gamma", "gamma_xca"}
    assert wanted <= seen, "the shared attention expert has a temperature in both families"
    optimizer = build_optimizer(model, config.optim)
    for group in optimizer.param_groups:
        assert {name in decay for name in group["names"]} == {group["weight_decay"] > 0}


def test_position_tables_and_layer_scales_of_any_timm_network_are_not_decayed() -> None:
    import timm

    with torch.device("meta"):
        nets = [timm.create_model(name) for name in ("swin_s3_tiny_224", "xcit_nano_12_p8_224")]
    for net in nets:
        left = {n for n, p in net.named_parameters() if p.ndim > 1} - decayed(net)
        assert left
        assert {name.rpartition(".")[2] for name in left} <= {
            *("relative_position_bias_table", "cls_token", "pos_embed", "temperature"),
        }


@pytest.mark.parametrize("family", ["specialist", "uniform"])
def test_the_state_of_groups_without_names_finds_its_parameters(family: str) -> None:
    """Checkpoints of earlier versions grouped by the number of dimensions, without names."""
    settings = {"model.backbone": "tiny_test", "model.width": 16, "model.expert_family": family}
    config = build_config(settings | {"model.pretrained": False})
    model = build_model(config.model)
    scales = [(model.backbone, 0.1), (model.moe_levels[0].router, 0.5)]
    of = {id(p): scale for part, scale in scales for p in part.parameters()}
    groups: dict[tuple[float, bool], list[torch.nn.Parameter]] = {}
    for parameter in model.parameters():
        groups.setdefault((of.get(id(parameter), 1.0), parameter.ndim > 1), []).append(parameter)
    old = torch.optim.AdamW(
        [{"params": group, "scale": scale} for (scale, _), group in groups.items()], fused=True
    )
    for number, parameter in enumerate(model.parameters()):
        parameter.grad = torch.full_like(parameter, float(number + 1))
    old.step()
    saved = old.state_dict()
    new = build_optimizer(model, config.optim, scales=scales)
    load_optimizer(new, saved, saved_names(saved, model, scales))
    for parameter in model.parameters():
        for key, value in old.state[parameter].items():
            assert torch.equal(value, new.state[parameter][key])
    assert {g["weight_decay"] for g in new.param_groups} == {0.0, config.optim.weight_decay}
    # From now on by name: other scales make other groups, and every moment finds its place.
    named = new.state_dict()
    other = build_optimizer(model, config.optim)
    load_optimizer(other, named, saved_names(named, model, ()))
    for parameter in model.parameters():
        assert torch.equal(old.state[parameter]["exp_avg"], other.state[parameter]["exp_avg"])


def test_fused_adamw_skips_where_told() -> None:
    """The training step relies on this: found_inf = 1 leaves weights and moments unchanged."""
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([weight], lr=0.1, fused=True)
    for skip, moved in ((1.0, False), (0.0, True)):
        before = weight.detach().clone()
        weight.grad = torch.full((3,), float("nan") if skip else 1.0)
        optimizer.grad_scale = None
        optimizer.found_inf = torch.tensor(skip)
        optimizer.step()
        assert torch.equal(before, weight.detach()) != moved
    assert float(optimizer.state[weight]["step"]) == 1
