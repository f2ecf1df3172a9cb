"""The plan of a run and its schedules, against values computed by hand."""

import math

import pytest
import torch

from camoxpert.config import SCHEDULERS, build_config
from camoxpert.models.camoxpert import build_model
from camoxpert.training.optim import backbone_scale, build_optimizer, set_lr
from camoxpert.training.plan import decay_factor, lr_at, make_plan, stage1_epochs


def plan_of(num_images: int = 100, *, has_weights: bool = True, **train: object):
    config = build_config({f"train.{k}": v for k, v in train.items()})
    return make_plan(config.train, config.optim, num_images=num_images, has_weights=has_weights)


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
            "optim.stage2_lr": 1e-5,
        }
    )
    plan = make_plan(config.train, config.optim, num_images=100, has_weights=True)
    assert [(s.batch_size, s.steps, s.lr) for s in plan.stages] == [(20, 5, 2.5e-4), (10, 10, 1e-5)]


def test_stage1_default_depends_on_weights() -> None:
    train = build_config({"train.epochs": 120}).train
    assert stage1_epochs(train, has_weights=True)[0] == 30
    assert stage1_epochs(train, has_weights=False)[0] == 0
    skip = build_config({"train.skip_stage1": True}).train
    assert stage1_epochs(skip, has_weights=True) == (0, "as asked")
    asked = build_config({"train.stage1_epochs": 5}).train
    assert stage1_epochs(asked, has_weights=False)[0] == 5


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_every_schedule_rises_peaks_and_ends_where_it_should(scheduler: str) -> None:
    config = build_config(
        {"optim.scheduler": scheduler, "optim.lr": 1e-2, "optim.min_lr": 1e-4, "train.epochs": 10}
    )
    plan = make_plan(config.train, config.optim, num_images=160, has_weights=False)
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
    config = build_config({"train.epochs": 8, "train.stage1_epochs": 4, "optim.warmup_epochs": 1})
    plan = make_plan(config.train, config.optim, num_images=160, has_weights=True)
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
            assert group["weight_decay"] == (0.05 if parameter.ndim > 1 else 0.0)
    assert seen == len(list(model.parameters()))


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
