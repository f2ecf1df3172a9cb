"""Rates scaled to the batch, by hand and in runs: accumulated batches learn what whole ones do."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers.runs import weights_of

from camoxpert.config import build_config, load_config
from camoxpert.errors import ConfigError
from camoxpert.files import read_json
from camoxpert.synthesis.toy import generate_toy
from camoxpert.training.plan import Plan, lr_at, make_plan


def plan_of(how: str, *, processes: int = 1, **settings: object) -> Plan:
    fixed = {"optim.lr": 1e-3, "train.stage1_epochs": 0, "train.epochs": 20}
    config = build_config({**fixed, "optim.scale_lr": how, **settings})
    return make_plan(config.train, config.optim, num_images=2048, processes=processes)


@pytest.mark.parametrize(
    ("how", "rate", "warmup"),
    [("none", 1e-3, None), ("linear", 16e-3, 4.0), ("sqrt", 4e-3, 2.0)],
)
def test_the_rate_is_that_of_all_images_of_a_step(how: str, rate: float, warmup: float) -> None:
    """8 images x 4 micro-batches x 8 processes are 256, 16 times the 16 of --base-batch."""
    batches = {"train.batch_size": 8, "train.accumulation_steps": 4}
    (stage,) = plan_of(how, processes=8, **batches).stages
    assert stage.lr == pytest.approx(rate, rel=1e-12)
    assert stage.warmup_epochs == (None if warmup is None else pytest.approx(warmup))


def test_each_stage_has_the_rate_of_its_batch() -> None:
    stages = {"train.stage1_epochs": 4, "train.batch_size": 64, "train.stage2_batch_size": 8}
    one, two = plan_of("linear", **stages).stages
    assert (one.lr, two.lr) == pytest.approx((4e-3, 0.5e-3))
    # A rate that is lowered needs no longer warm-up.
    assert (one.warmup_epochs, two.warmup_epochs) == (2.0, None)


def test_the_warm_up_is_used_and_one_that_was_set_is_kept() -> None:
    def rates(**more: object) -> list[float]:
        settings = {"train.batch_size": 512, **more}
        config = build_config({"optim.lr": 1e-3, "optim.scale_lr": "linear", **settings})
        plan = plan_of("linear", **settings)
        return [lr_at(plan, config.optim, step) for step in range(plan.steps)]

    # 32 times the batch: five epochs of four steps, as in the paper.
    assert rates().index(max(rates())) == 20
    assert rates()[0] == pytest.approx(32e-3 / 21)
    own = rates(**{"optim.warmup_epochs": 0.5})
    assert own.index(max(own)) == 2


def test_more_than_32_times_the_batch_waits_no_longer() -> None:
    (stage,) = plan_of("linear", **{"train.batch_size": 2048}).stages
    assert stage.lr == pytest.approx(0.128) and stage.warmup_epochs == 5.0
    assert math.log2(2048 / 16) > 5


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"optim.scale_lr": "linear", "optim.stage2_lr": 1e-4}, "--stage2-lr 0.0001 contradicts"),
        ({"optim.base_batch": 32}, "no scaling"),
        ({"optim.scale_lr": "lin"}, "Did you mean linear"),
    ],
)
def test_contradictions(settings: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        load_config(flags=settings)


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a data set of 128 training pairs."""
    root = tmp_path_factory.mktemp("many")
    generate_toy(root, num_train=128, num_test=0, size=32, difficulty=0.1, seed=0)
    return root


def test_four_times_sixteen_images_learn_what_sixty_four_do(
    many: Path, tmp_path: Path, train: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    """The rate counts all images of a step: scaled by the micro-batch it would be a quarter."""

    def ending(name: str, *words: str) -> dict[str, torch.Tensor]:
        fixed = ["--epochs", "2", "--val-fraction", "0", "--run-name", name, "--lr", "1e-5"]
        fixed += ["--no-report", "--no-test", "--scale-lr", "linear", "--cache", "none"]
        # A micro-batch sees the balance of the step so far.
        fixed += ["loss.balance=0"]
        assert train(*fixed, *words, data=many, out=tmp_path) == 0
        return weights_of(tmp_path / name)

    whole = ending("whole", "--batch-size", "64")
    parts = ending("parts", "--batch-size", "16", "--accumulation-steps", "4")
    said = capsys.readouterr().out
    assert said.count("1e-05 for 16 images is 4e-05 for the 64 of a step") == 2
    assert "2 epochs of warm-up" in said
    wrong = ending("wrong", "--batch-size", "16", "--accumulation-steps", "4", "--base-batch", "64")

    def apart(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
        return max(float((one[k].double() - other[k].double()).abs().max()) for k in one)

    assert apart(whole, parts) < 1e-5
    assert apart(whole, wrong) > 3 * apart(whole, parts) and apart(whole, wrong) > 2e-5
    assert any(
        line.startswith("rate") for line in read_json(tmp_path / "whole" / "run.json")["decisions"]
    )


def test_a_scaled_rate_below_the_last_one_is_refused(
    train: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--scale-lr", "linear", "--base-batch", "64", "--min-lr", "1e-4", "--lr", "2e-4"]
    assert train(*words, "--epochs", "1") == 2
    assert "below --min-lr 0.0001" in " ".join(capsys.readouterr().err.split())
