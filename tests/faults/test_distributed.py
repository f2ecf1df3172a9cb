"""Several processes that train one model: the same result as one, and no rank left behind."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.runs import KILLED, Runner, command, ending, events, weights_of

from camoxpert.config import load_config
from camoxpert.errors import ConfigError
from camoxpert.files import read_jsonl
from camoxpert.runs.checkpoint import load_checkpoint
from camoxpert.runs.store import CheckpointFolder
from camoxpert.runtime import processes as distributed
from camoxpert.runtime.processes import is_peer_loss, join, join_generation
from camoxpert.synthesis.toy import generate_toy
from camoxpert.training.batching import Batching, keep_effective
from camoxpert.training.prepare import prepare
from camoxpert.training.validate import validate

PEER_GONE = 6


@pytest.fixture(scope="module")
def even(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a data set of 24 images, which two processes share equally."""
    root = tmp_path_factory.mktemp("even")
    generate_toy(root, num_train=24, num_test=2, size=32, difficulty=0.1, seed=0)
    return root


def short(data: Path, out: Path, *words: str, batch: int = 4) -> list[str]:
    """Return the arguments of a run over all images, without accumulation."""
    base = ("--val-fraction", "0", "--accumulation-steps", "1", "--epochs", "2")
    return command(data, out, *base, "--expert-family", "specialist", *words, batch=batch)


def furthest(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    assert a.keys() == b.keys()
    return max(float((a[name].double() - b[name].double()).abs().max()) for name in a)


def test_batch_norm_is_scored_the_same_after_a_stop(
    runner: Runner, data: Path, tmp_path: Path
) -> None:
    """Each process has different statistics; the checkpoint, and so the score, has one set.

    Ten images to score, in blocks of four: both processes have some.
    """
    words = ("--backbone", "test_resnet", "--epochs", "1", "--stage1-epochs", "0")
    words = (*words, "--val-fraction", "0.5")
    a, b = (command(data, tmp_path / name, *words, batch=2) for name in "ab")
    assert runner.run(a, ranks=2) == [0, 0], runner.said()
    stop = [["[scoring]", signal.SIGTERM, None]]
    assert runner.run(b, ranks=2, signals=stop, patches=["slow_validation"]) == [143, 143]
    assert runner.run(b, ranks=2) == [0, 0], runner.said()
    assert ending(tmp_path / "a" / "r") == ending(tmp_path / "b" / "r")


def test_what_cannot_be_learned_by_heart_ends_rank_0_alone(
    runner: Runner, even: Path, tmp_path: Path
) -> None:
    """Torchrun ends the others at the first fault, and rank 0 still writes the run."""
    words = ("--overfit-batches", "1", "--epochs", "1", "--accumulation-steps", "1")
    assert runner.run(command(even, tmp_path, *words, batch=1), ranks=2) == [5, 0], runner.said()
    assert "frozen all the time" in runner.said()
    run = tmp_path / "r-quick-overfit1"
    assert json.loads((run / "run.json").read_text())["status"] == "finished"


class TestSameAsOne:
    """What a run learns does not depend on how many processes take its steps."""

    @pytest.fixture(scope="class")
    def one(self, runner: Runner, even: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
        out = tmp_path_factory.mktemp("one")
        assert runner.run(short(even, out, batch=8)) == [0], runner.said()
        return out / "r"

    def test_two_with_half_of_the_batch_end_at_the_same_weights(
        self, runner: Runner, even: Path, tmp_path: Path, one: Path
    ) -> None:
        assert runner.run(short(even, tmp_path), ranks=2) == [0, 0], runner.said()
        assert furthest(weights_of(one), weights_of(tmp_path / "r")) < 1e-5
        logs = [read_jsonl(run / "metrics.jsonl") for run in (one, tmp_path / "r")]
        losses = [[r["loss"] for r in log if r["kind"] == "train"] for log in logs]
        assert losses[0] == pytest.approx(losses[1], abs=1e-5)
        usage = [[r["levels"] for r in log if r["kind"] == "routing"] for log in logs]
        for one_epoch, two_epoch in zip(*usage, strict=True):
            for level, own in one_epoch.items():
                assert own["usage"] == pytest.approx(two_epoch[level]["usage"], abs=1e-6)

    def test_micro_batches_of_two_processes(
        self, runner: Runner, even: Path, tmp_path: Path, one: Path
    ) -> None:
        """Two processes, two micro-batches each, two images in each: the same eight per step.

        Without balance, for which a micro-batch sees the counts of the step so far.
        """
        accumulated = tmp_path / "two"
        words = ("--accumulation-steps", "2", "loss.balance=0.0")
        assert runner.run(short(even, accumulated, *words, batch=2), ranks=2) == [0, 0]
        assert runner.run(short(even, tmp_path, "loss.balance=0.0", batch=8)) == [0]
        assert furthest(weights_of(tmp_path / "r"), weights_of(accumulated / "r")) < 1e-5

    def test_a_scaled_rate_counts_the_images_of_all_processes(
        self, runner: Runner, even: Path, tmp_path: Path
    ) -> None:
        """Scaled by the images of one process it would be half as high."""
        words = ("--scale-lr", "linear", "--base-batch", "4", "--epochs", "1")
        assert runner.run(short(even, tmp_path / "one", *words, batch=8)) == [0], runner.said()
        assert runner.run(short(even, tmp_path / "two", *words), ranks=2) == [0, 0]
        assert "is 0.0005 for the 8 of a step" in runner.said()
        one, two = (weights_of(tmp_path / name / "r") for name in ("one", "two"))
        assert furthest(one, two) < 1e-5
        half = [*short(even, tmp_path / "half", "--epochs", "1", batch=8)]
        assert runner.run(half) == [0] and furthest(one, weights_of(tmp_path / "half" / "r")) > 1e-4

    def test_two_machines_with_a_process_each(
        self, runner: Runner, even: Path, tmp_path: Path, one: Path
    ) -> None:
        """Both decode into the same cache at once; only rank 0 writes the run."""
        assert runner.run(short(even, tmp_path), ranks=2, machines=2) == [0, 0], runner.said()
        assert "processes 2, 1 on this machine" in runner.said()
        assert furthest(weights_of(one), weights_of(tmp_path / "r")) < 1e-5

    def test_the_control_is_another_batch(
        self, runner: Runner, even: Path, tmp_path: Path, one: Path
    ) -> None:
        """The same shares without exchange of gradients: half of the batch."""
        assert runner.run(short(even, tmp_path)) == [0]
        assert furthest(weights_of(one), weights_of(tmp_path / "r")) > 1e-4

    @pytest.mark.parametrize(
        "words",
        [
            ("--expert-family", "uniform"),
            ("--num-experts", "1", "--top-k", "1", "--no-deep-supervision"),
            ("--routing", "fused", "--gradient-checkpointing"),
            ("--router-warmup", "1", "--progressive-unfreeze", "--router-bias-rate", "0.01"),
        ],
        ids=lambda words: words[0].strip("-"),
    )
    def test_any_network(self, runner, even: Path, tmp_path: Path, words: tuple[str, ...]) -> None:
        """Every trained parameter has a gradient, and the result is the same."""
        for name, ranks in (("one", 1), ("two", 2)):
            arguments = short(even, tmp_path / name, *words, batch=8 // ranks)
            assert set(runner.run(arguments, ranks=ranks)) == {0}, runner.said()
        # AdamW turns rounding into steps; another batch changes more than 1e-4 (the control).
        assert furthest(*(weights_of(tmp_path / name / "r") for name in ("one", "two"))) < 4e-5

    def test_validation_scores_are_those_of_one_process(
        self, runner: Runner, data: Path, tmp_path: Path
    ) -> None:
        """Ten images in blocks of four over two processes: every score is equal to the last bit."""
        words = command(data, tmp_path, "--epochs", "2", "--val-fraction", "0.5", batch=2)
        assert runner.run(words, ranks=2) == [0, 0], runner.said()
        records = read_jsonl(tmp_path / "r" / "metrics.jsonl")
        logged = [r["scores"] for r in records if r["kind"] == "validation"][-1]
        config = load_config(file=tmp_path / "r" / "config.yaml")
        run = prepare(config)
        newest, _ = CheckpointFolder(tmp_path / "r" / "checkpoints").newest()
        assert newest is not None
        run.evaluated_model.load_state_dict(newest.evaluated_weights)
        own = validate(run).scores
        assert json.loads(json.dumps(own)) == logged

    def test_one_goes_on_where_two_stopped_and_back(
        self, runner: Runner, even: Path, tmp_path: Path, one: Path
    ) -> None:
        """The images of a step stay the same, and so does the order of the rest of the epoch."""
        words = short(even, tmp_path)
        soon = [["[step 3]", signal.SIGTERM, None]]
        assert runner.run(words, ranks=2, signals=soon, patches=["slow_steps"]) == [143, 143]
        taken = load_checkpoint(max((tmp_path / "r" / "checkpoints").glob("step_*.pt")))
        assert 0 < taken.values["state"]["step"] < 6
        assert runner.run(words) == [0], runner.said()
        assert "the 8 of the run being continued, which had 2" in runner.said()
        assert furthest(weights_of(one), weights_of(tmp_path / "r")) < 1e-5

    def test_a_run_that_changed_hands_twice(
        self, runner: Runner, even: Path, tmp_path: Path, one: Path
    ) -> None:
        """One process, two, and two again after another stop: always the same images per step."""
        words = short(even, tmp_path, "--stage2-batch-size", "8", batch=8)
        for ranks, step in ((1, "[step 2]"), (2, "[step 1]")):
            soon = [[step, signal.SIGTERM, None]]
            codes = runner.run(words, ranks=ranks, signals=soon, patches=["slow_steps"])
            assert codes == [143] * ranks, runner.said()
        assert runner.run(words, ranks=2) == [0, 0], runner.said()
        assert furthest(weights_of(one), weights_of(tmp_path / "r")) < 1e-5
        assert load_config(file=tmp_path / "r" / "config.yaml").train.batch_size == 8

    def test_another_batch_of_stage_2_is_refused(self, runner, even: Path, tmp_path) -> None:
        words = short(even, tmp_path, "--stage2-batch-size", "4")
        soon = [["[step 2]", signal.SIGTERM, None]]
        assert runner.run(words, signals=soon, patches=["slow_steps"]) == [143]
        assert runner.run([*words, "--stage2-batch-size", "6"]) == [4], runner.said()
        assert "took 4 images per optimizer step and this one would take 6 (stage 2)" in (
            runner.said()
        )

    def test_another_effective_batch_is_refused(
        self, runner: Runner, even: Path, tmp_path: Path
    ) -> None:
        soon = [["[step 3]", signal.SIGTERM, None]]
        assert runner.run(short(even, tmp_path), signals=soon, patches=["slow_steps"]) == [143]
        assert runner.run(short(even, tmp_path, batch=8)) == [4]
        assert "took 4 images per optimizer step and this one would take 8" in runner.said()


class TestFaults:
    """An error or stop of one rank ends all within seconds; the same command continues."""

    @pytest.fixture(scope="class")
    def whole(self, runner: Runner, data: Path, tmp_path_factory) -> str:
        out = tmp_path_factory.mktemp("whole")
        assert runner.run(command(data, out, batch=2), ranks=2) == [0, 0], runner.said()
        return ending(out / "r")

    def goes_on(self, runner: Runner, words: list[str], run: Path, whole: str) -> None:
        assert runner.run(words, ranks=2) == [0, 0], runner.said()
        assert ending(run) == whole

    def test_a_killed_rank_ends_the_other(self, runner, data, tmp_path: Path, whole) -> None:
        words = command(data, tmp_path, batch=2)
        kill = [["[step 5]", signal.SIGKILL, 1]]
        codes = runner.run(words, ranks=2, signals=kill, patches=["slow_steps"])
        assert codes == [PEER_GONE, KILLED], runner.said()
        assert runner.seconds < 10
        assert "another process of this run ended or does not answer" in runner.said()
        self.goes_on(runner, words, tmp_path / "r", whole)

    def test_a_fault_of_one_rank_ends_the_other(self, runner, data, tmp_path, whole) -> None:
        words = command(data, tmp_path, batch=2)
        codes = runner.run(words, ranks=2, patches=["rank_1_fails"])
        assert codes == [PEER_GONE, 1] and "a fault of rank 1 alone" in runner.said()
        assert runner.seconds < 10
        self.goes_on(runner, words, tmp_path / "r", whole)

    def test_a_rank_that_hangs_is_not_waited_for_for_ever(self, runner, data, tmp_path) -> None:
        words = command(data, tmp_path, "train.process_timeout=3", batch=2)
        kill = [[8, signal.SIGKILL, 1]]
        codes = runner.run(words, ranks=2, patches=["rank_1_hangs"], signals=kill)
        assert codes == [PEER_GONE, KILLED], runner.said()
        assert runner.seconds < 1, "the first rank had left before the other one was killed"

    @pytest.mark.parametrize(
        ("during", "when"),
        [("slow_steps", "[step 5]"), ("slow_validation", "[scoring]"), ("slow_start", "device")],
    )
    def test_a_signal_to_one_rank_stops_both(
        self, runner, data, tmp_path: Path, whole, during: str, when: str
    ) -> None:
        words = command(data, tmp_path, batch=2)
        term = [[when, signal.SIGTERM, 1]]
        assert runner.run(words, ranks=2, signals=term, patches=[during]) == [143, 143]
        assert runner.said().count("Stopped (SIGTERM)") == 1
        self.goes_on(runner, words, tmp_path / "r", whole)

    def test_a_loss_that_is_no_number_on_one_rank(self, runner, data, tmp_path: Path) -> None:
        """Both skip the step, and the log names the images of both."""
        words = command(data, tmp_path, batch=2)
        assert runner.run(words, ranks=2, patches=["rank_1_sees_nan"]) == [0, 0], runner.said()
        skipped = [text for text in events(tmp_path / "r") if "skipped" in text]
        # Two ranks, two micro-batches, two images.
        assert skipped[0].startswith("step 1 skipped") and skipped[0].count(",") == 7
        assert all(bool(w.isfinite().all()) for w in weights_of(tmp_path / "r").values())

    def test_wrong_settings_are_said_once(self, runner, data, tmp_path: Path) -> None:
        words = command(data, tmp_path, "--backbone", "edgenext_bass", batch=2)
        assert runner.run(words, ranks=2) == [2, 2]
        assert runner.said().count("Did you mean edgenext_base") == 1

    def test_torchrun_starts_a_dead_rank_anew_and_the_run_goes_on(
        self, data: Path, tmp_path: Path, whole
    ) -> None:
        target = Path(__file__).with_name("torchrun_target.py")
        started = subprocess.Popen(
            [
                *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
                *("--nproc-per-node=2", "--max-restarts=2", str(target)),
                *command(data, tmp_path, batch=2),
            ],
            env=os.environ | {"OMP_NUM_THREADS": "1", "NO_ALBUMENTATIONS_UPDATE": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        try:
            out, errors = started.communicate(timeout=120)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(started.pid, signal.SIGKILL)
        assert started.returncode == 0, errors[-3000:]
        assert "resumed" in out
        assert ending(tmp_path / "r") == whole


def test_gradients_are_shared_once_per_step(toy_data: Path) -> None:
    """Of three micro-batches only the last one's backward pass exchanges gradients."""
    from camoxpert.config import build_config
    from camoxpert.losses import total_loss
    from camoxpert.training import step
    from camoxpert.training.stages import training_loader

    settings = {"model.backbone": "tiny_test", "model.pretrained": False, "model.width": 16}
    settings |= {"model.num_experts": 3, "data.img_size": 32, "data.num_workers": 0}
    settings |= {"train.batch_size": 4, "data.roots": [str(toy_data)]}
    run = prepare(build_config(settings))
    shared: list[bool] = []

    def watched(*args: Any, **options: Any):
        shared.append(run.forward.require_backward_grad_sync)
        return total_loss(*args, **options)

    run.loss = watched
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        run.forward = torch.nn.parallel.DistributedDataParallel(run.model)
        loader = training_loader(run, 4)
        loader.set_epoch(0)
        step.accumulate(run, [batch for _, batch in zip(range(3), loader, strict=False)])
    finally:
        torch.distributed.destroy_process_group()
    assert shared == [False, False, True]


def test_a_world_without_torchrun_is_one_process(monkeypatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    world = join("auto", timeout=1)
    assert (world.rank, world.size, world.first) == (0, 1, True)
    assert world.gather("x") == ["x"] and world.from_first(lambda: 3) == 3
    tensor = torch.ones(2)
    assert world.sum(tensor) is tensor
    model = torch.nn.Linear(1, 1)
    assert world.wrap(model) is model


def test_half_of_torchruns_settings(monkeypatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(ConfigError, match=r"RANK.* is not set\. Start several processes with tor"):
        join("cpu", timeout=1)
    monkeypatch.setattr(os, "environ", {**os.environ, "RANK": "0", "MASTER_ADDR": "127.0.0.1"})
    os.environ["MASTER_PORT"] = "1"
    with pytest.raises(ConfigError, match="under torchrun every process takes a device of its own"):
        join("cuda:1", timeout=1)


def test_every_life_has_a_name_of_its_own() -> None:
    """Values left in the store by earlier processes are neither used nor waited for."""
    store = torch.distributed.HashStore()
    store.set("life", "old")
    store.set("old/go", "tokens of the dead")
    names: dict[int, str] = {}

    def come(rank: int) -> None:
        names[rank] = join_generation(store, rank, 3, timeout=20)

    # The other ranks come first and must not join the old generation they find.
    late = [threading.Thread(target=come, args=(rank,)) for rank in (1, 2)]
    for thread in late:
        thread.start()
    time.sleep(0.2)
    assert not names
    come(0)
    for thread in late:
        thread.join(20)
    assert len(set(names.values())) == 1 and len(names) == 3 and names[0] != "old"
    with pytest.raises(RuntimeError, match="did not answer"):
        join_generation(store, 1, 3, timeout=0.2)


@pytest.mark.parametrize(
    ("words", "lost"),
    [
        ("[/w/gloo/transport/tcp/pair.cc:545] Read error: Connection reset by peer", True),
        ("NCCL communicator was aborted on rank 1", True),
        ("CUDA error: the launch timed out and was terminated", False),
        ("DataLoader timed out after 5 seconds", False),
    ],
)
def test_a_lost_peer_and_other_faults(words: str, lost: bool) -> None:
    assert is_peer_loss(RuntimeError(words)) is lost


def test_after_the_deadline_torchrun_has_nothing_to_restart(monkeypatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    assert distributed.restarts_left()
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "3")
    assert not distributed.restarts_left()


@pytest.mark.parametrize(
    ("size", "steps", "before", "processes", "expected"),
    [
        (8, 1, 2, 1, (8, 2)),
        (8, 1, 1, 2, (4, 1)),
        (8, 3, 2, 4, (4, 3)),
        (8, 4, 1, 2, (8, 2)),
        (6, 1, 2, 3, (4, None)),
    ],
)
def test_the_images_of_a_step_are_shared_anew(size, steps, before, processes, expected) -> None:
    from camoxpert.config import TrainConfig

    was = {"size": size, "steps": steps, "processes": before, "checkpointing": False}
    if expected[1] is None:
        made = keep_effective(TrainConfig(), was, processes)
        assert made.effective == size * steps * before
        return
    made = keep_effective(TrainConfig(), was, processes)
    assert (made.size, made.steps) == expected
    assert made.effective == size * steps * before
    with pytest.raises(ConfigError, match="cannot share them equally"):
        keep_effective(TrainConfig(), was | {"size": 7}, 16)
    assert Batching(4, 2, False, "", processes=3).effective == 24
