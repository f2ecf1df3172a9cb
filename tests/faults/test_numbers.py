"""NaN and infinity: they never reach the weights, and the run reports the steps it skipped."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.printed import complained
from helpers.runs import TINY_SETTINGS, train_in, weights_of

from camoxpert.config import build_config
from camoxpert.errors import ConfigError, NumericError
from camoxpert.files import read_jsonl
from camoxpert.losses import total_loss
from camoxpert.runs.store import CheckpointFolder
from camoxpert.training import step, trainer
from camoxpert.training.checkpoints import require_finite
from camoxpert.training.prepare import prepare
from camoxpert.training.run import Run

SETTINGS = {
    **TINY_SETTINGS,
    "data.cache": "ram",
    "train.batch_size": 8,
    "train.epochs": 2,
    "run.log_every": 1,
    "run.save_every": 1,
    "run.tensorboard": False,
}


@pytest.fixture
def run(toy_data: Path) -> Run:
    config = build_config({**SETTINGS, "data.roots": [str(toy_data)]})
    return prepare(config)


def go(run: Run, folder: Path) -> Any:
    return train_in(run, folder)


def break_steps(run: Run, chosen: Callable[[int], bool], factor: float) -> list[int]:
    """Multiply the loss of chosen steps (from 1) by NaN or infinity."""
    seen: list[int] = []

    def broken(*args: Any, **options: Any):
        loss, parts = total_loss(*args, **options)
        seen.append(1)
        return (loss * factor if chosen(len(seen)) else loss), parts

    run.loss = broken
    return seen


def test_a_skipped_step_names_its_images_and_what_they_are_like(run: Run, tmp_path: Path) -> None:
    break_steps(run, lambda number: number == 3, float("nan"))
    summary = go(run, tmp_path / "run")
    assert summary.state.skipped == 1 and summary.state.skipped_in_a_row == 0
    records = read_jsonl(tmp_path / "run" / "metrics.jsonl")
    event = next(r for r in records if "skipped: non-finite" in r.get("text", ""))
    assert event["step"] == 3 and event["loss"] is None and len(event["images"]) == 8
    for image in event["images"]:
        assert image["name"] in event["text"] or event["text"].endswith("...")
        assert 0 < image["mean"] < 255 and 0 < image["object"] < 1
    texts = [r.get("text", "") for r in records]
    assert texts.count("not saved at step 3: its last step was skipped") == 1


@pytest.mark.parametrize("ema", [True, False])
def test_a_skipped_step_leaves_batch_norms_as_they_were(
    toy_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ema: bool
) -> None:
    """A forward pass moves their averages before its loss is known not to be finite."""
    own = {"model.backbone": "mobilenetv3_small_050", "data.roots": [str(toy_data)]}
    run = prepare(build_config({**SETTINGS, **own, "train.use_ema": ema, "train.epochs": 1}))
    number = 0

    def overflow(module: torch.nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        return output * torch.inf if number == 3 else output

    stem = next(m for m in run.model.backbone.modules() if isinstance(m, torch.nn.Conv2d))
    stem.register_forward_hook(overflow)
    honest = trainer.train_step
    seen = []

    def watched(*args: Any, **options: Any) -> Any:
        nonlocal number
        number += 1
        before = [buffer.clone() for buffer in run.model.buffers() if buffer.is_floating_point()]
        values = honest(*args, **options)
        after = [buffer for buffer in run.model.buffers() if buffer.is_floating_point()]
        seen.append(all(torch.equal(*pair) for pair in zip(before, after, strict=True)))
        return values

    monkeypatch.setattr(trainer, "train_step", watched)
    result = go(run, tmp_path / "run")
    assert result.state.skipped == 1 and seen == [n == 3 for n in range(1, len(seen) + 1)]
    for model in (run.model, run.evaluated_model):
        assert all(b.isfinite().all() for b in model.buffers() if b.is_floating_point())


def test_buffers_that_are_not_finite_are_not_saved(run: Run) -> None:
    require_finite(run)
    next(b for b in run.model.buffers() if b.is_floating_point()).fill_(torch.inf)
    with pytest.raises(NumericError, match="no longer finite"):
        require_finite(run)


def test_a_save_that_was_owed_follows_the_next_good_step(
    toy_data: Path, tmp_path: Path, monkeypatch
) -> None:
    """Steps 2 to 4 are skipped and step 2 was due: step 5 is saved instead."""
    values = {**SETTINGS, "data.roots": [str(toy_data)], "run.save_every": 2, "train.epochs": 1}
    run = prepare(build_config(values))
    break_steps(run, lambda number: number in (2, 3, 4), float("nan"))
    saved = []
    honest = CheckpointFolder.save

    def save(folder: CheckpointFolder, *args: Any, **options: Any) -> Path:
        saved.append(options["step"])
        return honest(folder, *args, **options)

    monkeypatch.setattr(CheckpointFolder, "save", save)
    go(run, tmp_path / "run")
    assert saved == [5, 5]  # the late save, and the end of the epoch


class TestHalfPrecision:
    """The loss scale of fp16, on a CPU: an overflow lowers it and leaves the weights unchanged."""

    def scaled(self, run: Run, scale: float) -> Run:
        run.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        return run

    def test_an_overflow_halves_the_scale_and_moves_nothing(
        self, run: Run, tmp_path: Path, monkeypatch
    ) -> None:
        break_steps(run, lambda number: number <= 3, float("inf"))
        self.scaled(run, 65536.0)
        before = copy.deepcopy(run.model.state_dict())
        average = copy.deepcopy(run.evaluated_model.state_dict())
        scales = []
        honest = trainer.train_step

        def watched(*args: Any, **options: Any):
            values = honest(*args, **options)
            scales.append(run.scaler.get_scale())
            if len(scales) == 3:
                assert run.ema is not None and float(run.ema.updates) == 0
                for name, weight in run.model.state_dict().items():
                    assert torch.equal(weight, before[name]), name
                    assert torch.equal(run.evaluated_model.state_dict()[name], average[name])
            return values

        monkeypatch.setattr(trainer, "train_step", watched)
        summary = go(run, tmp_path / "run")
        assert scales[:4] == [32768.0, 16384.0, 8192.0, 8192.0]
        assert summary.state.skipped == 3 and summary.state.step == 10
        assert run.ema is not None and float(run.ema.updates) == 7
        moved = any(not torch.equal(w, before[n]) for n, w in run.model.state_dict().items())
        assert moved, "the control: later steps do move the weights"
        records = read_jsonl(tmp_path / "run" / "metrics.jsonl")
        assert [r["scale"] for r in records if "scale" in r] == [32768.0, 16384.0, 8192.0]

    def test_an_infinite_loss_with_finite_gradients(self, run: Run) -> None:
        """The scaler checks gradients only; weights and EMA must both skip the step."""
        from camoxpert.training.stages import training_loader

        self.scaled(run, 1024.0)

        def infinite(*args: Any, **options: Any):
            loss, parts = total_loss(*args, **options)
            return loss + float("inf"), parts

        run.loss = infinite
        before = copy.deepcopy(run.model.state_dict())
        loader = training_loader(run, 8)
        loader.set_epoch(0)
        values = step.train_step(run, [next(iter(loader))])
        assert float(values["skipped"]) == 1 and run.scaler.get_scale() == 512
        for name, weight in run.model.state_dict().items():
            assert torch.equal(weight, before[name]), name

    def test_an_epoch_that_ends_on_an_overflow_is_kept(self, run: Run, tmp_path: Path) -> None:
        break_steps(run, lambda number: number in (5, 10), float("inf"))
        go(self.scaled(run, 65536.0), tmp_path / "run")
        newest, _ = CheckpointFolder(tmp_path / "run" / "checkpoints").newest()
        assert newest is not None and newest.values["state"]["epoch"] == 2

    def test_gradients_that_no_scale_saves(self, run: Run, tmp_path: Path) -> None:
        break_steps(run, lambda number: True, float("inf"))
        with pytest.raises(NumericError, match=r"the loss scale fell to 0\.5 after 3 skipped"):
            go(self.scaled(run, 4.0), tmp_path / "run")


class TestDivergence:
    """A learning rate of 1e20."""

    @pytest.mark.parametrize("save_every", ["0", "1"])
    def test_the_last_finite_checkpoint_stays_the_newest(
        self, train, stopped, tmp_path: Path, capsys, save_every: str
    ) -> None:
        words = ("--run-name", "x", "--epochs", "9", "--no-test", "--no-report")
        assert stopped(*words, steps=2) == 75
        before = weights_of(tmp_path / "x")
        wild = ("--lr", "1e20", "--warmup-epochs", "0", "--clip-grad-norm", "0")
        assert train(*words, *wild, "--save-every", save_every) == 5
        said = " ".join(capsys.readouterr().err.split())
        assert "Lower --lr" in said and "Traceback" not in said
        newest, _ = CheckpointFolder(tmp_path / "x" / "checkpoints").newest()
        assert newest is not None and newest.values["state"]["step"] == 2
        for name, weight in newest.values["model"].items():
            assert torch.equal(weight, before[name]) and bool(weight.isfinite().all())
        assert json.loads((tmp_path / "x" / "run.json").read_text())["status"] == "failed"

    def test_steps_without_the_protection_poison_the_weights(self, run: Run) -> None:
        """Control: after one such update the norm of the weights is infinite."""
        optimizer = torch.optim.AdamW(run.model.parameters(), lr=1e20)
        sum(p.square().sum() for p in run.model.parameters()).backward()
        optimizer.step()
        norms = torch.stack(torch._foreach_norm([p.detach() for p in run.model.parameters()]))
        assert not norms.isfinite().all()


class TestOutOfMemory:
    """Out of memory anywhere: an error message, and the gradients are freed."""

    def test_in_the_optimizer(self, train, tmp_path: Path, monkeypatch, capsys) -> None:
        def full(*args: Any, **options: Any) -> None:
            raise torch.OutOfMemoryError("injected")

        monkeypatch.setattr(torch.optim.AdamW, "step", full)
        assert train("--epochs", "1", "--no-test", "--no-report") == 2
        assert "Out of memory on cpu: 8 images of 32 px" in complained(capsys)

    def test_in_the_validation(self, run: Run, tmp_path: Path, monkeypatch) -> None:
        from camoxpert.inference import score as validation

        def full(*args: Any, **options: Any) -> None:
            raise torch.OutOfMemoryError("injected")

        monkeypatch.setattr(validation, "probability_maps", full)
        with pytest.raises(ConfigError, match="The checkpoints already written are intact"):
            go(run, tmp_path / "run")
        newest, _ = CheckpointFolder(tmp_path / "run" / "checkpoints").newest()
        assert newest is not None and newest.values["state"]["position"] > 0

    def test_what_did_not_fit_is_let_go(self, run: Run) -> None:
        """No reference cycle or traceback keeps the graph while smaller parts are tried."""
        import weakref

        from camoxpert.training.stages import training_loader

        kept: list[weakref.ref[torch.Tensor]] = []
        alive: list[bool] = []

        def cramped(output: Any, *args: Any, **options: Any):
            alive.append(any(ref() is not None for ref in kept))
            if len(output.logits_B1HW) > 2:
                kept.append(weakref.ref(output.logits_B1HW))
                raise torch.OutOfMemoryError("injected")
            return total_loss(output, *args, **options)

        run.loss = cramped
        loader = training_loader(run, 8)
        loader.set_epoch(0)
        values = step.train_step(run, [next(iter(loader))])
        assert run.split == 4 and len(kept) == 2 and not any(alive)
        assert float(values["skipped"]) == 0


def test_a_validation_map_that_is_not_finite_is_told_and_ends_nothing(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In fp16 a forward pass may overflow that training never took."""

    def spoil(module: torch.nn.Module, given: Any, output: Any) -> None:
        output.logits_B1HW[0, :, 2, 3] = float("nan")

    handle = run.evaluated_model.register_forward_hook(spoil)
    go(run, tmp_path / "run")
    handle.remove()
    first = run.data.validation.pairs[0].name
    records = read_jsonl(tmp_path / "run" / "metrics.jsonl")
    events = [r for r in records if "output is not finite" in r.get("text", "")]
    assert [event["epoch"] for event in events] == [1, 2] and f"({first})" in events[0]["text"]
    assert "count as if nothing was found" in complained(capsys)
    assert [r["epoch"] for r in records if r["kind"] == "validation"] == [1, 2]
