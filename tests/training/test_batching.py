"""Micro-batch, accumulation and recomputation, from the memory a step takes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from camoxpert.config import build_config, load_config
from camoxpert.errors import ConfigError
from camoxpert.models.camoxpert import build_model
from camoxpert.runtime.device import Precision
from camoxpert.training import batching as memory
from camoxpert.training import prepare as setup
from camoxpert.training.batching import (
    Line,
    PeakCounter,
    effective_batch,
    fit_line,
    measured_bytes,
    micro_batch_sizes,
    plan_micro_batch,
    predicted_bytes,
)

CPU = torch.device("cpu")


def train_of(**values: object):
    return load_config(flags={f"train.{k}": v for k, v in values.items()}).train


def device(per_image: float, fixed: float = 1.0, *, saved: float = 4.0, limit: float = 1e9):
    """A device on which an image takes ``per_image``, ``saved`` times less with recomputation, and
    nothing above ``limit`` fits."""
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
        return plan_micro_batch(
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
        """Sixteen images are predicted to fit and do not."""
        measure, _ = device(2.0)

        def honest(images: int, recompute: bool) -> int | None:
            return None if images > 8 else measure(images, recompute)

        assert self.plan(honest).size == 16
        chosen = self.plan(honest, verify=True)
        assert (chosen.size, chosen.steps, chosen.measured) == (8, 2, 17)


class TestPrediction:
    def test_live_bytes_by_hand(self) -> None:
        with PeakCounter() as counter:
            a = torch.zeros(100)
            b = a * 2
            view = b[:10]
            assert (counter.live, counter.peak) == (800, 800)
            del a
            assert counter.live == 400
            del b
            assert counter.live == 400, "the view keeps its storage"
            del view
        assert (counter.live, counter.peak) == (0, 800)

    def test_a_linear_layer_by_hand(self) -> None:
        model = nn.Linear(10, 20, bias=False)

        def step(copied: nn.Module) -> None:
            y = copied(torch.zeros(8, 10))
            z = y + 1
            assert z.shape == (8, 20)

        # The input (320 bytes) is gone when z (640) joins y (640).
        with torch.no_grad():
            assert predicted_bytes(model, step) == 1280
        # The backward pass keeps it, and adds the gradients of the output and of the weight (800).
        taken = predicted_bytes(model, lambda m: m(torch.zeros(8, 10)).sum().backward())
        assert 320 + 800 <= taken <= 320 + 640 + 800 + 16
        assert all(p.grad is None for p in model.parameters())

    @pytest.mark.parametrize("recompute", [False, True])
    @pytest.mark.parametrize("dispatch", ["sorted", "loop", "dense"])
    def test_prediction_equals_the_count_on_real_tensors(self, recompute, dispatch) -> None:
        config = build_config(
            {"model.backbone": "tiny_test", "model.pretrained": False, "data.img_size": 64}
            | {"model.width": 16, "model.num_experts": 4, "model.dispatch": dispatch}
        )
        torch.manual_seed(0)
        model = build_model(config.model)
        model.set_gradient_checkpointing(recompute)
        precision = Precision(None, False, "fp32")

        def step(copied: nn.Module, images: int = 8) -> None:
            for level in copied.moe_levels:
                level.dispatch = "sorted" if dispatch == "loop" else dispatch
            setup.trial_step(copied, config, CPU, precision, images)

        predicted = predicted_bytes(model, step)
        with PeakCounter([*model.parameters(), *model.buffers()]) as counter:
            step(model)
        # The real router does not choose all experts equally often.
        assert predicted == pytest.approx(counter.peak, rel=0.1)
        # The line through 2 and 4 images meets the peak of 8.
        line = fit_line(lambda n, r: predicted_bytes(model, lambda m: step(m, n)), recompute)
        assert line.at(8) == pytest.approx(predicted, rel=0.02)

    def test_recomputation_saves(self) -> None:
        config = build_config(
            {"model.backbone": "edgenext_xx_small", "model.pretrained": False}
            | {"data.img_size": 64, "model.width": 16, "model.num_experts": 2}
        )
        model = build_model(config.model)
        precision = Precision(None, False, "fp32")
        peaks = []
        for recompute in (False, True):
            model.set_gradient_checkpointing(recompute)
            peaks.append(
                predicted_bytes(model, lambda m: setup.trial_step(m, config, CPU, precision, 4))
            )
        assert peaks[1] < 0.7 * peaks[0]


def constant(value: object):
    return lambda *arguments: value


def test_out_of_memory_is_an_answer(monkeypatch) -> None:
    cuda = memory.torch.cuda
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


def test_auto_on_a_cpu_follows_the_memory(toy_data: Path, monkeypatch) -> None:
    def prepared(free: int | None, **continued: object):
        monkeypatch.setattr(setup, "available_memory", lambda: free)
        values = {"model.backbone": "tiny_test", "model.pretrained": False, "data.img_size": 32}
        values |= {"data.roots": [str(toy_data)], "model.width": 16, "data.num_workers": 0}
        values |= {"train.batch_size": None, "train.effective_batch_size": 12}
        ready = setup.prepare(build_config(values), lambda text: None, **continued)
        assert all(p.grad is None for p in ready.model.parameters())
        stage = ready.plan.stages[0]
        assert stage.batch_size == ready.micro_batch.size
        assert stage.steps == 3, "36 images, 12 per step"
        return ready.micro_batch

    plenty = prepared(1 << 40)
    assert (plenty.size, plenty.steps, plenty.checkpointing) == (12, 1, False)
    tight = prepared(round((plenty.predicted - 1) / memory.COMFORTABLE_HOST))
    assert tight.size * tight.steps == 12 and tight.size < 12
    # A run goes on as it began, whatever is free that day.
    again = prepared(1 << 40, continued={"batch": {"size": 3, "checkpointing": True}})
    assert (again.size, again.steps, again.checkpointing) == (3, 4, True)
    assert prepared(None).size == 12


def test_micro_batches_do_not_change_what_is_learned(train, tmp_path: Path, monkeypatch) -> None:
    """The same effective batch in one, two and four parts: the same weights."""
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
    assert info["batch"]["size"] == 8 and info["batch"]["predicted"] > 0
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
    with setup.unchanged(model, CPU):
        setup.trial_step(model, config, CPU, Precision(None, False, "fp32"), 2)
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
        setup.trial_step(model, config, CPU, Precision(None, False, "fp32"), 2)
    assert all(p.grad is None for p in model.parameters())
