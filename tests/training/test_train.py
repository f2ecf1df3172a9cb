"""Whole runs of a tiny model: learning, stages, out of memory, skipped steps, resuming."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from helpers.runs import TINY_SETTINGS, records, train_in

from camoxpert.config import build_config
from camoxpert.errors import ConfigError, NumericError
from camoxpert.losses import total_loss
from camoxpert.runs.checkpoint import load_checkpoint
from camoxpert.stop import Stop
from camoxpert.synthesis.toy import generate_toy
from camoxpert.training import trainer
from camoxpert.training.prepare import prepare
from camoxpert.training.run import Run
from camoxpert.training.stages import set_trainable, training_loader
from camoxpert.training.step import train_step, windows

BASE = {
    **TINY_SETTINGS,
    "train.batch_size": 8,
    "train.epochs": 2,
    "optim.lr": 3e-3,
    "run.tensorboard": False,
}


def run_of(data: Path, **settings: object) -> Run:
    values = {**BASE, "data.roots": [str(data)]}
    values |= {key.replace("__", "."): value for key, value in settings.items()}
    return prepare(build_config(values))


def batches_of(run: Run) -> list:
    loader = training_loader(run, run.plan.stages[0].batch_size)
    loader.set_epoch(0)
    return list(loader)


@pytest.mark.slow
def test_it_learns_and_the_control_does_not(tmp_path: Path) -> None:
    """Trained on its masks it beats the same model trained on the masks of other images."""
    generate_toy(tmp_path / "data", num_train=120, num_test=0, size=32, difficulty=0.0, seed=1)
    scores = {}
    kinds = ("rotate", "scale", "translate", "brightness", "contrast", "saturation", "hue")
    still = {f"data__augment__{kind}": 0.0 for kind in kinds}
    for name in ("right", "shuffled"):
        run = run_of(
            tmp_path / "data",
            **still,
            data__cache="none",
            train__batch_size=16,
            train__epochs=16,
            train__validate_every=16,
            train__ema_decay=0.9,
            optim__lr=1e-2,
            model__width=32,
            model__num_experts=2,
        )
        if name == "shuffled":
            pairs = run.data.train.pairs
            swapped = [
                pair.__class__(**{**pair.__dict__, "mask": pairs[(i + 7) % len(pairs)].mask})
                for i, pair in enumerate(pairs)
            ]
            run.data.train = run.data.train.__class__(
                **{**run.data.train.__dict__, "pairs": tuple(swapped)}
            )
        train_in(run, tmp_path / name)
        scores[name] = run.state.best
    assert scores["right"] > scores["shuffled"] + 0.2


def test_settings_take_effect_in_what_is_built(toy_data: Path) -> None:
    run = run_of(
        toy_data,
        model__num_experts=5,
        model__top_k=3,
        model__dispatch="loop",
        data__img_size=64,
        data__num_workers=1,
        train__batch_size=4,
        train__ema_decay=0.5,
        train__precision="bf16",
        train__gradient_checkpointing="on",
        train__device="cpu",
        optim__weight_decay=0.07,
        optim__betas=[0.8, 0.9],
    )
    moe = run.model.moe_levels[0]
    assert (len(moe.experts), moe.router.top_k, moe.dispatch) == (5, 3, "loop")
    assert run.ema.decay == 0.5 and run.precision.name == "bf16"
    assert run.model.decoder.checkpointing and run.device.type == "cpu"
    assert {g["weight_decay"] for g in run.optimizer.param_groups} == {0.0, 0.07}
    assert run.optimizer.param_groups[0]["betas"] == (0.8, 0.9)
    assert run.data.loading.num_workers == 1 and run.plan.stages[0].batch_size == 4
    loader = training_loader(run, 4)
    assert next(iter(loader)).images.shape == (4, 3, 64, 64)
    loader.close()
    assert run_of(toy_data, train__use_ema=False).ema is None
    assert not run_of(toy_data, train__amp=False, train__precision="auto").scaler.is_enabled()


def test_out_of_memory_says_what_to_lower(toy_data: Path, tmp_path: Path, monkeypatch) -> None:
    def full(*args: object, **options: object) -> None:
        raise torch.OutOfMemoryError("injected")

    monkeypatch.setattr(trainer, "train_step", full)
    with pytest.raises(ConfigError, match="--batch-size 4 --accumulation-steps 2"):
        train_in(run_of(toy_data), tmp_path / "run")


def test_out_of_memory_halves_the_micro_batch_and_changes_nothing_else(
    toy_data: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    """Only two images fit: 8 are taken in pairs, with the weights and records of all at once."""
    refused = []

    def cramped(output, *args: object, **counts: object):
        if len(output.logits_B1HW) > 2:
            refused.append(len(output.logits_B1HW))
            raise torch.OutOfMemoryError("injected")
        return total_loss(output, *args, **counts)

    # In float64 only the order of sums differs, except for balance, which sees the step so far.
    runs = {}
    for name in ("roomy", "cramped"):
        run = run_of(toy_data, loss__balance=0.0, train__epochs=1, optim__lr=1e-4)
        run.loss = cramped if name == "cramped" else total_loss
        train_in(run, tmp_path / name)
        runs[name] = (run, records(tmp_path / name, "routing"), capsys.readouterr().out)
    assert refused == [8, 4]  # learned once, kept for the rest of the run
    (roomy, routing, _), (small, small_routing, said) = runs["roomy"], runs["cramped"]
    for a, b in zip(roomy.model.parameters(), small.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=3e-4)
    # No image is counted twice: every expert's share is that of the other run, but for a few
    # images near a tie.
    for name, level in routing[0]["levels"].items():
        own = small_routing[0]["levels"][name]["usage"]
        assert own == pytest.approx(level["usage"], abs=0.06)
    assert "in 4 parts from step 1 on" in said
    assert any("out of memory" in r["text"] for r in records(tmp_path / "cramped", "event"))


def test_a_batch_splits_in_order_and_loses_nothing(toy_data: Path) -> None:
    loader = training_loader(run_of(toy_data), 7)
    loader.set_epoch(0)
    batch = next(iter(loader))
    assert batch.split(1) == [batch]
    for parts in (2, 3, 4, 8, 16):
        pieces = batch.split(parts)
        assert [name for piece in pieces for name in piece.names] == batch.names
        assert torch.equal(torch.cat([piece.images for piece in pieces]), batch.images)
        assert torch.equal(torch.cat([piece.masks for piece in pieces]), batch.masks)
        assert max(len(p.names) for p in pieces) == max(1, -(-7 // parts))


def test_stage_1_leaves_the_backbone_alone(toy_data: Path) -> None:
    run = run_of(toy_data, model__backbone="resnet18", train__stage1_epochs=1)
    assert set_trainable(run, run.plan.stages[0], 0).startswith("decoder only")
    before = copy.deepcopy(run.model.state_dict())
    train_step(run, batches_of(run)[:1])
    moved = {k for k, v in run.model.state_dict().items() if not torch.equal(v, before[k])}
    # Batch norm statistics count: frozen means frozen.
    assert moved and not any(key.startswith("backbone.") for key in moved)
    assert set_trainable(run, run.plan.stages[1], 1) == "everything"
    train_step(run, batches_of(run)[:1])
    moved = {k for k, v in run.model.state_dict().items() if not torch.equal(v, before[k])}
    assert any(key.startswith("backbone.") and "running_mean" in key for key in moved)


def test_progressive_unfreeze_frees_the_deepest_first(toy_data: Path) -> None:
    run = run_of(
        toy_data, train__epochs=10, train__stage1_epochs=2, train__progressive_unfreeze=True
    )
    stage = run.plan.stages[1]
    free = []
    for epoch in range(2, 10):
        set_trainable(run, stage, epoch)
        levels = run.model.backbone.parameter_levels()
        free.append([all(p.requires_grad for p in level) for level in levels])
    assert free[0] == [False, False, False, True]
    assert free[1] == [False, False, True, True]
    assert free[4:] == [[True] * 4] * 4


def test_accumulated_micro_batches_equal_one_batch(toy_data: Path) -> None:
    """Micro-batches of 3, 3 and 2 images give the gradient of the 8 together."""
    gradients = []
    run = run_of(toy_data, loss__balance=0.0, optim__clip_grad_norm=0.0)
    batch = batches_of(run)[0]

    def part(a: int, b: int):
        return batch.__class__(
            images=batch.images[a:b],
            masks=batch.masks[a:b],
            names=batch.names[a:b],
            sizes=batch.sizes[a:b],
            indices=batch.indices[a:b],
        )

    for window in ([batch], [part(0, 3), part(3, 6), part(6, 8)]):
        kept = {}

        def keep(*args: object, kept=kept, **kwargs: object) -> None:
            kept.update({n: p.grad.clone() for n, p in run.model.named_parameters()})

        original, run.optimizer.step = run.optimizer.step, keep
        train_step(run, window)
        run.optimizer.step = original
        gradients.append(kept)
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-3, atol=1e-5, msg=name)


def test_windows_keep_the_last_short_one() -> None:
    assert list(windows(iter("abcdefg"), 3)) == [["a", "b", "c"], ["d", "e", "f"], ["g"]]


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_non_finite_step_changes_nothing(toy_data: Path, where: str) -> None:
    run = run_of(toy_data)
    window = batches_of(run)[:1]
    train_step(run, window)
    before = copy.deepcopy(run.model.state_dict())
    average = copy.deepcopy(run.evaluated_model.state_dict())

    def broken(*args: object, **counts: object):
        loss, parts = total_loss(*args, **counts)
        if where == "loss":
            return loss * float("nan"), parts
        return loss + (loss - loss.detach()) * float("inf"), parts

    run.loss = broken
    values = train_step(run, window)
    assert float(values["skipped"]) == 1
    for name, value in run.model.state_dict().items():
        assert torch.equal(value, before[name]), name
        assert torch.equal(run.evaluated_model.state_dict()[name], average[name]), name
    run.loss = total_loss
    assert float(train_step(run, window)["skipped"]) == 0
    moved = any(not torch.equal(v, before[k]) for k, v in run.model.state_dict().items())
    assert moved


def test_endless_non_finite_steps_end_the_run(toy_data: Path, tmp_path: Path) -> None:
    run = run_of(toy_data, train__max_skipped_steps=2, train__epochs=3)

    def broken(*args: object, **counts: object):
        loss, parts = total_loss(*args, **counts)
        return loss * float("nan"), parts

    run.loss = broken
    with pytest.raises(NumericError, match="3 optimizer steps in a row"):
        train_in(run, tmp_path / "run")
    events = [r["text"] for r in records(tmp_path / "run", "event")]
    assert sum("skipped" in text for text in events) == 3


class StopAt(Stop):
    """Requests a stop after a number of checks."""

    def __init__(self, looks: int) -> None:
        super().__init__()
        self.looks = looks

    def code(self) -> int:
        self.looks -= 1
        return 143 if self.looks < 0 else 0


@pytest.mark.parametrize("workers", [0, 2])
def test_stop_and_resume_is_bitwise_the_same(toy_data: Path, tmp_path: Path, workers: int) -> None:
    """Stopped in the middle of an epoch and continued: weights, EMA, optimizer and log agree."""
    from camoxpert.errors import Stopped
    from camoxpert.runs.store import CheckpointFolder

    settings = {
        "data__num_workers": workers,
        "train__epochs": 3,
        "train__stage1_epochs": 1,
        "train__accumulation_steps": 2,
        "run__log_every": 1,
    }
    train_in(run_of(toy_data, **settings), tmp_path / "whole")
    with pytest.raises(Stopped) as stopped:
        run = run_of(toy_data, **settings)
        run.stop = StopAt(5)
        train_in(run, tmp_path / "parts")
    assert stopped.value.exit_code == 143
    checkpoint, _ = CheckpointFolder(tmp_path / "parts" / "checkpoints").newest()
    assert checkpoint is not None and checkpoint.values["state"]["position"] > 0
    train_in(run_of(toy_data, **settings), tmp_path / "parts", resume=checkpoint)

    last = [max((tmp_path / name / "checkpoints").glob("step_*.pt")) for name in ("whole", "parts")]
    assert last[0].name == last[1].name
    whole, parts = (load_checkpoint(path).values for path in last)
    for key in ("model", "ema", "optimizer"):
        assert_same(whole[key], parts[key])
    logs = [
        [(r["step"], r["loss"], r["grad_norm"]) for r in records(tmp_path / name, "train")]
        for name in ("whole", "parts")
    ]
    assert logs[0] == logs[1]

    # Negative control: another seed is another run, whoever loads the images.
    if workers:
        return
    other = train_in(run_of(toy_data, **settings, train__seed=1), tmp_path / "other")
    other_path = max((tmp_path / "other" / "checkpoints").glob("step_*.pt"))
    with pytest.raises(AssertionError):
        assert_same(whole["model"], load_checkpoint(other_path).values["model"])
    assert other.state.epoch == 3


def assert_same(a: object, b: object) -> None:
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_same(x, y)
    else:
        assert a == b


@pytest.mark.parametrize(("every", "best", "last"), [(1, 1, 3), (3, 3, 6)])
def test_early_stopping_ends_a_stale_run(
    toy_data: Path, tmp_path: Path, every: int, best: int, last: int
) -> None:
    """It counts epochs, however often they are validated."""
    run = run_of(
        toy_data,
        train__epochs=9,
        train__early_stopping=2,
        train__validate_every=every,
        optim__lr=1e-12,
        optim__min_lr=0.0,
        train__use_ema=False,
    )
    train_in(run, tmp_path / "run")
    assert (run.state.epoch, run.state.best_epoch) == (last, best)
    assert any("early stopping" in r["text"] for r in records(tmp_path / "run", "event"))


def test_without_a_validation_split_the_last_weights_are_shipped(
    toy_data: Path, tmp_path: Path
) -> None:
    run = run_of(toy_data, data__val_fraction=0.0)
    train_in(run, tmp_path / "run")
    assert run.state.best is None
    best = load_checkpoint(tmp_path / "run" / "checkpoints" / "best.pt")
    assert_same(dict(best.values["model"]), dict(run.evaluated_model.state_dict()))


def test_active_experts_are_bounded(toy_data: Path) -> None:
    model = run_of(toy_data).model
    model.set_active_experts(3)
    images = torch.zeros(2, 3, 32, 32, dtype=torch.uint8)
    assert all(record.experts_BK.shape == (2, 3) for record in model(images).routing)
    with pytest.raises(ValueError, match="4 of 3 experts"):
        model.set_active_experts(4)
