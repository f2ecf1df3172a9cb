"""Router health: balance over the whole step and all ranks, the bias, the alarm, the syncs."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as multiprocessing
from helpers.runs import ending

from camoxpert.config import build_config, load_config
from camoxpert.data.samples.batches import Batch
from camoxpert.errors import ConfigError
from camoxpert.losses import total_loss
from camoxpert.models.balance import balance_loss, expert_counts
from camoxpert.models.camoxpert import build_model
from camoxpert.models.router import Routing, choose, hide_one
from camoxpert.profile.syncs import SyncCounter
from camoxpert.runtime.processes import World
from camoxpert.training.prepare import prepare
from camoxpert.training.routing import RoutingMeter, StepCounts, collapse_alarm
from camoxpert.training.run import Run
from camoxpert.training.step import train_step

SETTINGS = {
    "model.backbone": "tiny_test",
    "model.pretrained": False,
    "model.width": 16,
    "model.detail_width": 8,
    "model.num_experts": 4,
    "model.top_k": 2,
    "loss.balance": 0.5,
}


def images_of(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    colour = torch.randint(0, 200, (count, 3, 1, 1), generator=generator)
    # Plain colours, stripes and noise: a router can tell them apart.
    grain = torch.randint(0, 56, (count, 3, 32, 32), generator=generator)
    stripes = 50 * (torch.arange(32) // 4 % 2).expand(count, 3, 32, 32)
    kind = (torch.arange(count) % 3)[:, None, None, None]
    images = (colour + grain * (kind == 1) + stripes * (kind == 2)).to(torch.uint8)
    masks = torch.zeros(count, 1, 32, 32)
    masks[:, :, 8:24, 8:24] = 1
    return images, masks


def model_of():
    torch.manual_seed(0)
    config = build_config(SETTINGS)
    model = build_model(config.model).train()
    for level in model.moe_levels:  # decided, and differently from image to image
        torch.nn.init.normal_(level.router.gate.weight, std=2.0)
    return config, model


def one_rank(rank: int, folder: str, ranks: int, batch: int) -> None:
    """Forward and backward on this rank's share; rank 0 saves gradients, counts and balance."""
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(29600 + os.getppid() % 300))
    if ranks > 1:
        torch.distributed.init_process_group("gloo", rank=rank, world_size=ranks)
    config, model = model_of()
    wrapped = torch.nn.parallel.DistributedDataParallel(model) if ranks > 1 else model
    images, masks = (part[rank * batch : (rank + 1) * batch] for part in images_of(ranks * batch))
    counts = StepCounts(World(rank, ranks).sum)
    output = wrapped(images)
    loss, parts = total_loss(output, masks, config.loss, counts_LE=counts.add(output.routing))
    loss.backward()
    balance = parts["balance"].clone()
    if ranks > 1:
        torch.distributed.all_reduce(balance)
    if rank == 0:
        gradients = {name: p.grad for name, p in model.named_parameters()}
        saved = {"gradients": gradients, "counts": counts.counts_LE, "balance": balance / ranks}
        torch.save(saved, Path(folder) / f"{ranks}.pt")
    if ranks > 1:
        torch.distributed.destroy_process_group()


def test_two_ranks_equal_one_process_with_both_batches(tmp_path: Path) -> None:
    multiprocessing.spawn(one_rank, (str(tmp_path), 2, 3), nprocs=2)
    one_rank(0, str(tmp_path), 1, 6)
    two, one = (torch.load(tmp_path / f"{n}.pt", weights_only=True) for n in (2, 1))
    assert torch.equal(two["counts"], one["counts"]) and one["counts"].sum() == 4 * 6 * 2
    torch.testing.assert_close(two["balance"], one["balance"])
    for name, gradient in one["gradients"].items():
        torch.testing.assert_close(two["gradients"][name], gradient, rtol=1e-4, atol=1e-6)


def test_counts_of_each_rank_alone_would_differ() -> None:
    """Negative control: per-rank shares give another balance loss."""
    _, model = model_of()
    images, _ = images_of(6)
    with torch.no_grad():
        whole = model(images).routing
        halves = [model(part).routing for part in images.split(3)]
    differences = []
    for index, level in enumerate(whole):
        own = [half[index] for half in halves]
        alone = torch.stack([balance_loss(r.probs_BE, r.experts_BK) for r in own]).mean()
        together = balance_loss(level.probs_BE, level.experts_BK)
        differences.append(abs(float(alone - together)))
        counts = expert_counts(level.experts_BK, 4)
        given = torch.stack([balance_loss(r.probs_BE, r.experts_BK, counts) for r in own]).mean()
        torch.testing.assert_close(given, together)
    assert max(differences) > 1e-3  # the ranks of the test above choose differently


def test_counts_add_up_over_the_micro_batches_of_a_step() -> None:
    _, model = model_of()
    images, _ = images_of(6)
    counts = StepCounts()
    for _ in range(2):
        counts.start()
        for part in images.split(2):
            with torch.no_grad():
                last = counts.add(model(part).routing)
    assert last is not None and last.sum() == 4 * 6 * 2


def test_balance_loss_by_hand() -> None:
    probs = torch.tensor([[0.7, 0.3], [0.5, 0.5]])
    chosen = torch.tensor([[0], [0]])
    assert balance_loss(probs, chosen) == pytest.approx(2 * 0.6)
    assert balance_loss(probs, chosen, torch.tensor([1.0, 3.0])) == pytest.approx(
        2 * (0.6 * 0.25 + 0.4 * 0.75)
    )


def test_a_hidden_expert_is_never_chosen_and_top_k_are_left() -> None:
    logits = torch.log(torch.tensor([[0.5, 0.3, 0.2], [0.5, 0.3, 0.2]]))
    hidden = torch.tensor([[True, False, False], [False, False, False]])
    # A bias for the choice does not bring it back.
    routing = choose(logits, 2, torch.tensor([0.9, 0.0, 0.0]), hidden)
    assert routing.experts_BK.tolist() == [[1, 2], [0, 1]]
    torch.testing.assert_close(routing.probs_BE[0], torch.tensor([0.0, 0.6, 0.4]))
    torch.testing.assert_close(routing.gates_BK[0], torch.tensor([0.6, 0.4]))
    torch.testing.assert_close(routing.logits_BE, logits)
    drawn = torch.cat([hide_one(torch.zeros(500, 4), 0.4) for _ in range(4)])
    assert drawn.sum(1).max() == 1
    assert float(drawn.any(1).float().mean()) == pytest.approx(0.4, abs=0.05)
    assert drawn.sum(0).min() > 0.2 * drawn.sum()
    assert hide_one(torch.zeros(50, 4), 1.0).any(1).all() and not hide_one(logits, 0.0).any()


def test_expert_dropout_is_of_training_and_spares_top_k() -> None:
    config, model = model_of()
    images, masks = images_of(6)
    chosen = model(images).routing
    model.set_expert_dropout(1.0)
    output = model(images)
    assert any(
        not torch.equal(a.experts_BK, b.experts_BK)
        for a, b in zip(chosen, output.routing, strict=True)
    )
    for level in output.routing:
        assert (level.probs_BE == 0).sum(1).tolist() == [1] * 6
        # A hidden expert has no share of the gates.
        assert (level.probs_BE.gather(1, level.experts_BK) > 0).all()
    total_loss(output, masks, config.loss).total.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
    before = torch.get_rng_state()
    model.set_active_experts(4)
    assert all((level.probs_BE > 0).all() for level in model(images).routing), "warm-up"
    model.set_active_experts(2)
    model.eval()
    for a, b in zip(chosen, model(images).routing, strict=True):
        assert torch.equal(a.experts_BK, b.experts_BK)
    model.train().set_expert_dropout(0.0)
    model(images)
    assert torch.equal(torch.get_rng_state(), before), "nothing is drawn where nothing is hidden"
    with pytest.raises(ConfigError, match="can spare none"):
        load_config(overrides=["train.expert_dropout=0.1", "model.num_experts=2"])


def test_a_resumed_run_repeats_the_hidden_experts(train, stopped, tmp_path: Path, capsys) -> None:
    words = ("--epochs", "1", "--stage1-epochs", "0", "--no-test", "--no-report", "--run-name", "r")
    words += ("--top-k", "1", "--expert-family", "uniform")
    ends = {}
    for rate in ("0.5", "0"):
        whole, parts = tmp_path / f"whole {rate}", tmp_path / f"parts {rate}"
        assert train(*words, f"train.expert_dropout={rate}", out=whole) == 0
        if rate == "0.5":
            assert "each level hides one expert at random from 50%" in capsys.readouterr().out
            assert stopped(*words, f"train.expert_dropout={rate}", steps=2, out=parts) == 75
            assert train(*words, f"train.expert_dropout={rate}", out=parts) == 0
            assert ending(parts / "r") == ending(whole / "r")
        ends[rate] = ending(whole / "r")
    assert ends["0.5"] != ends["0"], "negative control"


def test_a_resumed_run_goes_on_with_its_statistics(train, stopped, tmp_path: Path, capsys) -> None:
    words = ("--epochs", "1", "--stage1-epochs", "0", "--no-test", "--no-report", "--run-name", "r")
    norm = ("--router-norm", "batch")
    assert train(*words, *norm, out=tmp_path / "whole") == 0
    assert (
        "logits of each expert are standardised over the 8 images of a micro-batch"
        in capsys.readouterr().out
    )
    assert stopped(*words, *norm, steps=2, out=tmp_path / "parts") == 75
    assert train(*words, *norm, out=tmp_path / "parts") == 0
    assert train(*words, out=tmp_path / "plain") == 0
    ends = [ending(tmp_path / name / "r") for name in ("whole", "parts", "plain")]
    assert ends[0] == ends[1]
    assert ends[0] != ends[2], "negative control"


def test_what_is_computed_again_moves_no_statistics_again(toy_data: Path) -> None:
    ends = []
    for recompute in ("off", "on"):
        settings = {"model.router_norm": "batch", "model.routing": "fused", "loss.balance": 0.0}
        run = run_of(toy_data, **settings, **{"train.gradient_checkpointing": recompute})
        assert run.batching.checkpointing == (recompute == "on")
        torch.manual_seed(0)
        for level in run.model.moe_levels:
            torch.nn.init.normal_(level.router.gate.weight, std=0.1)
        for _ in range(3):
            train_step(run, [batch_of()])
        norms = [level.router.logit_norm for level in run.model.moe_levels]
        ends.append(
            [tensor for norm in norms if norm for tensor in (norm.running_mean, norm.running_var)]
        )
    assert len(ends[0]) == 8
    for one, other in zip(*ends, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_a_micro_batch_of_one_image_has_nothing_to_compare(toy_data: Path, capsys) -> None:
    settings = {"model.router_norm": "batch", "train.accumulation_steps": 8}
    with pytest.raises(ConfigError, match="here it has one"):
        run_of(toy_data, **settings, **{"train.batch_size": 1})
    run_of(toy_data, **settings, **{"train.batch_size": 1, "model.routing_grid": 2})
    capsys.readouterr()
    run_of(toy_data, **settings, **{"train.batch_size": 4})
    assert "over the 4 images of a micro-batch; under 8" in capsys.readouterr().out


def test_a_skipped_step_leaves_the_statistics_alone(toy_data: Path) -> None:
    run = run_of(toy_data, **{"model.router_norm": "batch"})
    train_step(run, [batch_of()])
    ends = []
    for factor in (float("nan"), 1.0):
        with torch.no_grad():
            next(run.model.decoder.parameters())[0] *= factor
        buffers = [b for b in run.model.buffers() if b.is_floating_point()]
        before = [buffer.clone() for buffer in buffers]
        values = train_step(run, [batch_of()])
        ends.append(float(values["skipped"]))
        same = [torch.equal(a, b) for a, b in zip(before, buffers, strict=True)]
        assert all(same) == (ends[-1] == 1)
        next(run.model.decoder.parameters()).data.nan_to_num_()
    assert ends == [1, 0]


def test_the_bias_moves_the_choice_and_not_the_gates() -> None:
    logits = torch.log(torch.tensor([[0.5, 0.3, 0.2]]))
    biased = choose(logits, 2, torch.tensor([-0.4, 0.0, 0.0]))
    assert biased.experts_BK.tolist() == [[1, 2]]
    torch.testing.assert_close(biased.gates_BK, torch.tensor([[0.6, 0.4]]))
    torch.testing.assert_close(biased.probs_BE, choose(logits, 2).probs_BE)


def run_of(toy_data: Path, **settings: object) -> Run:
    values = {**SETTINGS, "data.roots": [str(toy_data)], "data.img_size": 32}
    values |= {"data.num_workers": 0, "train.batch_size": 8, "train.epochs": 1}
    return prepare(build_config(values | settings))


def batch_of(count: int = 8) -> Batch:
    images, masks = images_of(count)
    names = [str(i) for i in range(count)]
    return Batch(images, (masks * 255).to(torch.uint8), names, [(32, 32)] * count, range(count))


def test_both_ways_to_spread_the_choices(toy_data: Path) -> None:
    usages = []
    for settings in ({}, {"optim.router_bias_rate": 0.02}, {"model.router_norm": "batch"}):
        run = run_of(toy_data, **{"loss.balance": 0.0, "model.top_k": 1, **settings})
        for level in run.model.moe_levels:
            gate = level.router.gate
            (gate.weight if gate.bias is None else gate.bias).data[0] += 1  # chosen by every image
        meter = run.meter
        for step in range(40):
            if step == 30:
                meter.reset()
            train_step(run, [batch_of()])
        usages.append([max(level["usage"]) for level in meter.summary().values()])
    assert min(usages[0]) > 0.9
    assert max(usages[1]) < 0.7
    assert max(usages[2]) < 0.7


@pytest.mark.parametrize(
    ("settings", "syncs"),
    [
        ({}, 1),
        ({"model.router_norm": "batch"}, 1),
        ({"model.expert_family": "uniform"}, 0),
        ({"model.num_experts": 1, "model.top_k": 1}, 0),
        ({"model.routing": "fused"}, 4),
    ],
)
def test_host_syncs_of_a_training_step(toy_data: Path, settings, syncs) -> None:
    """The whole step: forward, loss, backward, clipping, optimizer, EMA."""
    run = run_of(toy_data, **settings)
    train_step(run, [batch_of()])  # the optimizer makes its state in the first step
    with SyncCounter() as counter:
        train_step(run, [batch_of()])
    assert counter.syncs == syncs, counter.places


def record_of(choices: list[int], count: int = 4) -> Routing:
    experts = torch.tensor(choices)[:, None]
    probs = torch.nn.functional.one_hot(experts[:, 0], count).float()
    return Routing(probs, probs, experts, torch.ones(len(choices), 1))


def alarm_for(choices: list[int], images: int = 600) -> str:
    meter = RoutingMeter(["stride 4"], list("abcd"))
    meter.update([record_of(choices)])
    meter.units = [images] * len(meter.levels)
    return collapse_alarm(meter.summary(), meter.experts, top_k=1)


def test_the_summary_by_hand() -> None:
    meter = RoutingMeter(["stride 4"], list("abcd"))
    meter.update([record_of([0, 0, 1, 2])])
    meter.update([record_of([0, 0, 1, 2])])
    (level,) = meter.summary().values()
    assert level["usage"] == pytest.approx([0.5, 0.25, 0.25, 0])
    assert level["max_violation"] == pytest.approx(1.0)
    assert level["entropy"] == pytest.approx(1.5 / 2)
    assert meter.units == [8] and level["units"] == 8
    meter.reset()
    assert meter.summary() == {} and meter.units == [0]


def test_the_alarm_names_the_level_the_expert_and_what_helps() -> None:
    even = [0, 1, 2, 3] * 10
    assert alarm_for(even) == ""
    idle = alarm_for([0, 1, 2] * 10)
    assert "stride 4: d hardly used" in idle and "--router-warmup" in idle
    busy = alarm_for([0] * 22 + [1] * 6 + [2] * 6 + [3] * 6)
    assert "stride 4: a has 55% of the choices" in busy
    assert alarm_for([0] * 40, images=99) == ""  # too few to judge
    assert "stride 4: b, c, d hardly used" in alarm_for([0] * 40, images=100)
    meter = RoutingMeter(["stride 4"], list("ab"))
    meter.update([record_of([0, 1, 1, 0], 2)])
    assert collapse_alarm(meter.summary(), meter.experts, top_k=2) == ""


def test_the_alarm_reaches_the_log_and_the_console(toy_data: Path, tmp_path: Path, capsys) -> None:
    from camoxpert.cli import main
    from camoxpert.files import read_jsonl
    from camoxpert.training import routing

    words = [
        "train", "--dataset-path", str(toy_data), "--checkpoint-dir", str(tmp_path), "--backbone",
        "tiny_test", "--no-pretrained", "--img-size", "32", "--num-workers", "0", "--epochs", "2",
        "--run-name", "ill", "--no-tensorboard", "--no-test", "model.width=16", "--top-k", "1",
        "loss.balance=0",
    ]  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(routing, "ALARM_UNITS", 10)
        patch.setattr(routing, "LOW_ENTROPY", 1.1)
        assert main(words) == 0
    assert capsys.readouterr().err.count("the router favours few experts") == 1
    events = [r["text"] for r in read_jsonl(tmp_path / "ill" / "metrics.jsonl") if "text" in r]
    assert sum("--router-warmup" in text for text in events) == 2, "every epoch is in the log"


def test_one_uneven_epoch_is_not_worth_a_warning(toy_data: Path, tmp_path: Path, capsys) -> None:
    """Most routers start out uneven: a demo began with this warning."""
    from camoxpert.cli import main
    from camoxpert.training import steplog

    alarms = iter(["the router favours few experts (first)", "", "the router favours few (third)"])
    words = [
        "train", "--dataset-path", str(toy_data), "--checkpoint-dir", str(tmp_path), "--backbone",
        "tiny_test", "--no-pretrained", "--img-size", "32", "--num-workers", "0", "--epochs", "3",
        "--no-tensorboard", "--no-test", "--no-report", "model.width=16", "--top-k", "1",
    ]  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(steplog, "collapse_alarm", lambda *words, **more: next(alarms))
        assert main(words) == 0
    assert "the router favours" not in capsys.readouterr().err
