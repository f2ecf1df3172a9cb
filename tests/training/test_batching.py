"""Micro-batch, accumulation and recomputation, from the memory a step takes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from camoxpert.config import build_config, load_config
from camoxpert.errors import ConfigError
from camoxpert.models.camoxpert import build_model
from camoxpert.runtime.device import Precision
from camoxpert.training.batching import (
    Line,
    effective_batch,
    fit_line,
    micro_batch_sizes,
    plan_batching,
)
from camoxpert.training.prepare import prepare
from camoxpert.training.trial import measured_bytes, trial_step, unchanged

CPU = torch.device("cpu")


def train_of(**values: object):
    return load_config(flags={f"train.{k}": v for k, v in values.items()}).train


def device(per_image: float, fixed: float = 1.0, *, saved: float = 4.0, limit: float = 1e9):
    """Return a measurement of a device on which an image takes ``per_image``, ``saved`` times less
    with recomputation, and nothing above ``limit`` fits."""
    calls = []

    def measure(images: int, recompute: bool) -> int | None:
        calls.append((images, recompute))
        taken = fixed + images * per_image / (saved if recompute else 1)
        return None if taken > limit else round(taken)

    return measure, calls


class TestWhatIsAsked:
    def test_effective_batch(self) -> None:
        assert effective_batch(train_of()) == 16
        assert effective_batch(train_of(batch_size=32, accumulation_steps=4)) == 128
        assert effective_batch(train_of(batch_size="auto")) == 16
        assert effective_batch(train_of(batch_size="auto", effective_batch_size=24)) == 24

    def test_sizes(self) -> None:
        sizes = micro_batch_sizes(train_of(batch_size="auto", effective_batch_size=24))
        assert sizes == [24, 12, 8, 6, 4, 3, 2, 1]
        assert micro_batch_sizes(train_of(batch_size=8, effective_batch_size=24)) == [8]
        assert micro_batch_sizes(train_of(effective_batch_size=8)) == [8]
        with pytest.raises(ConfigError, match="not a multiple of --batch-size 16"):
            micro_batch_sizes(train_of(effective_batch_size=24))

    @pytest.mark.parametrize(
        "values",
        [
            {"batch_size": "auto", "accumulation_steps": 4},
            {"effective_batch_size": 32, "accumulation_steps": 4},
            {"batch_size": "auto", "stage2_batch_size": 4},
        ],
    )
    def test_contradictions(self, values) -> None:
        with pytest.raises(ConfigError, match="contradicts it"):
            train_of(**values)


class TestPlan:
    def plan(
        self, measure, *, free: float = 100, setting: str = "auto", sizes=(16, 8, 4, 2, 1), **k
    ):
        return plan_batching(
            16, sizes, checkpointing=setting, measure=measure, free=free, comfortable=0.5, **k
        )

    def test_line_by_hand(self) -> None:
        measure, calls = device(3.0, 5.0)
        assert fit_line(measure, False) == Line(5.0, 3.0)
        assert calls == [(2, False), (4, False)]
        assert Line(5.0, 3.0).at(10) == 35

    def test_smaller_points_where_four_images_do_not_fit(self) -> None:
        measure, calls = device(3.0, 5.0, limit=11)
        assert fit_line(measure, False) == Line(5.0, 3.0)
        assert calls == [(2, False), (4, False), (1, False), (2, False)]
        assert fit_line(device(3.0, limit=1)[0], False) is None

    def test_the_whole_batch_where_it_fits_without_looking_at_recomputation(self) -> None:
        measure, calls = device(3.0)
        chosen = self.plan(measure)
        assert (chosen.size, chosen.steps, chosen.checkpointing) == (16, 1, False)
        assert chosen.predicted == 49 and not any(recompute for _, recompute in calls)

    def test_the_largest_divisor_that_fits(self) -> None:
        chosen = self.plan(device(6.0)[0])
        assert (chosen.size, chosen.steps, chosen.checkpointing) == (8, 2, False)
        assert "8 images x 2 per step" in chosen.reason and "16 at once" in chosen.reason

    @pytest.mark.parametrize(("recomputing", "size"), [(50.0, 16), (10.0, 8)])
    def test_the_faster_way_where_both_fit(self, recomputing, size) -> None:
        asked = []

        def rate(images: int, recompute: bool) -> float:
            asked.append((images, recompute))
            return recomputing if recompute else 20.0

        chosen = self.plan(device(6.0)[0], rate=rate)
        assert chosen.size == size and chosen.checkpointing is (size == 16)
        assert asked == [(8, False), (16, True)]

    def test_recomputation_where_one_size_was_asked_for_and_does_not_fit_without(self) -> None:
        chosen = self.plan(device(6.0)[0], sizes=(16,))
        assert (chosen.size, chosen.checkpointing) == (16, True)
        assert "without it" in chosen.reason
        assert self.plan(device(6.0)[0], sizes=(16,), setting="off").checkpointing is False
        assert self.plan(device(1.0)[0], sizes=(16,), setting="on").checkpointing is True

    def test_nothing_fits(self) -> None:
        chosen = self.plan(device(600.0)[0])
        assert (chosen.size, chosen.steps, chosen.checkpointing) == (1, 16, True)
        assert "may not fit" in chosen.reason

    def test_a_wrong_prediction_is_found_by_measuring(self) -> None:
        """Sixteen images are predicted to fit, but do not."""
        measure, _ = device(2.0)

        def honest(images: int, recompute: bool) -> int | None:
            return None if images > 8 else measure(images, recompute)

        assert self.plan(measure).size == 16
        chosen = self.plan(honest)
        assert (chosen.size, chosen.steps, chosen.measured) == (8, 2, 17)


def constant(value: object):
    return lambda *arguments: value


def test_out_of_memory_is_an_answer(monkeypatch) -> None:
    cuda = torch.cuda
    values = {"memory_allocated": 10, "max_memory_allocated": 70}
    for name in ("empty_cache", "reset_peak_memory_stats", *values):
        monkeypatch.setattr(cuda, name, constant(values.get(name)))
    taken = []

    def step(images: int) -> None:
        taken.append(images)
        if images > 4:
            raise torch.OutOfMemoryError("injected")

    assert measured_bytes(step, 4, torch.device("cuda", 0)) == 60
    assert measured_bytes(step, 8, torch.device("cuda", 0)) is None


def test_auto_on_a_cpu_takes_the_default_and_says_so(toy_data: Path) -> None:
    def prepared(effective: int, **continued: object):
        values = {"model.backbone": "tiny_test", "model.pretrained": False, "data.img_size": 32}
        values |= {"data.roots": [str(toy_data)], "model.width": 16, "data.num_workers": 0}
        values |= {"train.batch_size": None, "train.effective_batch_size": effective}
        ready = prepare(build_config(values), **continued)
        assert all(p.grad is None for p in ready.model.parameters())
        assert ready.plan.stages[0].batch_size == ready.batching.size
        assert ready.plan.stages[0].steps == -(-36 // effective)
        return ready.batching

    small = prepared(12)
    assert (small.size, small.steps, small.checkpointing) == (12, 1, False)
    assert "--batch-size auto measures memory on CUDA only" in small.reason
    large = prepared(40)
    assert (large.size, large.steps) == (10, 4), "the largest divisor up to the default of 16"
    # A run continues with its first choice, whatever memory is free now.
    again = prepared(12, continued={"batch": {"size": 3, "checkpointing": True}})
    assert (again.size, again.steps, again.checkpointing) == (3, 4, True)


def test_micro_batches_do_not_change_what_is_learned(train, tmp_path: Path, monkeypatch) -> None:
    """The same effective batch in one, two and four parts gives the same weights."""
    weights = {}
    for size, effective in ((8, 8), (4, 8), (2, 8), (4, 4)):
        name = f"{size}-{effective}"
        words = ["--batch-size", str(size), "--effective-batch-size", str(effective)]
        words += ["--run-name", name, "--no-test", "--no-report", "--val-fraction", "0"]
        assert train(*words, "--epochs", "1") == 0
        path = tmp_path / name / "checkpoints" / "best.pt"
        model = torch.load(path, weights_only=True)["model"]
        weights[name] = torch.cat([value.flatten().double() for value in model.values()])
    apart = {name: float((value - weights["8-8"]).norm()) for name, value in weights.items()}
    # AdamW's first steps follow a gradient's sign, so rounding moves the smallest of them.
    assert apart["4-8"] < 0.01 * apart["4-4"] and apart["2-8"] < 0.01 * apart["4-4"]


def test_a_stopped_auto_run_goes_on_with_its_own_micro_batch(
    train, stopped, tmp_path: Path, capsys
) -> None:
    import json

    words = ["--batch-size", "auto", "--effective-batch-size", "8", "--run-name", "auto"]
    words += ["--no-test", "--no-report", "--epochs", "2"]
    assert stopped(*words) == 75
    path = tmp_path / "auto" / "run.json"
    info = json.loads(path.read_text())
    assert info["batch"]["size"] == 8
    info["batch"] |= {"size": 4, "steps": 2}
    path.write_text(json.dumps(info))
    capsys.readouterr()
    assert train(*words) == 0
    assert "4 images x 2 per step, as in the run being continued" in capsys.readouterr().out


def test_trying_a_step_changes_nothing() -> None:
    """Batch norm's statistics, random state, routing and gradients are as before, whatever
    happens."""
    config = build_config(
        {"model.backbone": "resnet18", "model.pretrained": False, "data.img_size": 32}
        | {"model.width": 16, "model.num_experts": 3, "train.router_warmup": 1}
    )
    model = build_model(config.model)
    model.eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    with unchanged(model, CPU):
        trial_step(model, config, CPU, Precision(None, False, "fp32"), 2)
        torch.rand(5)
    assert torch.equal(torch.rand(2), expected)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not model.training and model.moe_levels[0].router.top_k == config.model.top_k


def test_running_out_of_memory_leaves_no_gradients(monkeypatch) -> None:
    config = build_config(
        {"model.backbone": "tiny_test", "model.pretrained": False, "data.img_size": 32}
    )
    model = build_model(config.model)
    last = next(iter(model.backbone.parameters()))

    def full(gradient: torch.Tensor) -> None:
        raise torch.OutOfMemoryError("injected")

    last.register_hook(full)
    with pytest.raises(torch.OutOfMemoryError):
        trial_step(model, config, CPU, Precision(None, False, "fp32"), 2)
    assert all(p.grad is None for p in model.parameters())
