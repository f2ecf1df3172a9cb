"""Checkpoints on disk: damage, full disks, resuming, changed settings, sharing, old formats."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.runs import Runner, command, digest_of, ending, train_in

from camoxpert.cli import main
from camoxpert.config import Config, load_config, to_dict
from camoxpert.errors import CheckpointError, NumericError
from camoxpert.files import read_jsonl
from camoxpert.losses import total_loss
from camoxpert.runs import checkpoint as checkpoints
from camoxpert.runs import store
from camoxpert.runs.checkpoint import (
    BEST,
    FORMAT,
    load_checkpoint,
    read_index,
    resolve_checkpoint,
)
from camoxpert.runs.share import write_shared
from camoxpert.runs.store import CheckpointFolder
from camoxpert.training.checkpoints import restore, snapshot
from camoxpert.training.prepare import prepare
from camoxpert.training.run import Run

GOLDEN = Path(__file__).parents[1] / "golden"


def values(number: float = 1.0) -> dict[str, Any]:
    model = {"w": torch.full((100,), number)}
    return {"format": FORMAT, "config": to_dict(Config()), "model": model, "ema": None}


class TestFolder:
    """Which checkpoint a run continues from, whatever happened to the folder."""

    def test_without_its_index_the_newest_good_file_counts(self, tmp_path: Path) -> None:
        folder = CheckpointFolder(tmp_path)
        for step in (1, 2):
            folder.save(values(step), step=step)
        (tmp_path / "index.json").write_text('[{"file": "step_')
        newest, problems = CheckpointFolder(tmp_path).newest()
        assert newest is not None and newest.values["model"]["w"][0] == 2 and not problems

    def test_a_flipped_bit_is_seen_without_the_index(self, tmp_path: Path) -> None:
        folder = CheckpointFolder(tmp_path)
        for step in (1, 2):
            path = folder.save(values(float(step)), step=step)
        (tmp_path / "index.json").unlink()
        data = bytearray(path.read_bytes())
        # In the middle of the weights: the value 2.0 a hundred times.
        place = data.index(torch.full((100,), 2.0).numpy().tobytes()) + 200
        data[place] ^= 1
        path.write_bytes(data)
        newest, problems = CheckpointFolder(tmp_path).newest()
        assert newest is not None and newest.values["model"]["w"][0] == 1
        assert "the checksum of" in problems[0]
        # Control: torch reads it without an error.
        read = torch.load(path, weights_only=True)["model"]["w"]
        assert not torch.equal(read, torch.full((100,), 2.0))

    def test_some_stay_for_ever(self, tmp_path: Path) -> None:
        folder = CheckpointFolder(tmp_path)
        for step in range(1, 7):
            folder.save(values(step), step=step, stays=step % 2 == 0, about={"epoch": step})
        kept = sorted(p.name for p in tmp_path.glob("step_*.pt"))
        assert kept == [f"step_{step:08d}.pt" for step in (2, 3, 4, 5, 6)]
        assert {e["epoch"] for e in read_index(tmp_path)} == {2, 3, 4, 5, 6}

    def test_killed_between_a_file_and_its_index_the_file_counts(self, tmp_path: Path) -> None:
        """The same step is saved twice if an epoch ends on a step that was due anyway."""
        folder = CheckpointFolder(tmp_path)
        folder.save(values(1.0), step=1)
        honest, renamed = Path.replace, []

        def killed(path: Path, target: Any) -> Path:
            if renamed:
                raise KeyboardInterrupt
            if str(target).endswith(".pt"):
                renamed.append(target)
            return honest(path, target)

        with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(Path, "replace", killed)
            folder.save(values(2.0), step=1)
        newest, problems = CheckpointFolder(tmp_path).newest()
        assert newest is not None and newest.values["model"]["w"][0] == 2 and not problems

    def test_strays_go_and_the_last_ones_of_a_lost_index_stay(self, tmp_path: Path) -> None:
        folder = CheckpointFolder(tmp_path)
        folder.save(values(), step=1, stays=True)
        for step in (2, 3):
            folder.save(values(), step=step)
        (tmp_path / "step_mine.pt").write_bytes(b"x")
        (tmp_path / "index.json").unlink()
        # At the end of an epoch the best weights come first.
        folder.save_best(values(), step=4)
        for step in (4, 5, 6):
            folder.save(values(), step=step)
            kept = sorted(int(p.stem[5:]) for p in tmp_path.glob("step_0*.pt"))
            # Which of the old ones were to stay is not known any more: the oldest do.
            assert kept == [1, step - 1, step]
        (tmp_path / "step_00000002.pt").write_bytes(b"of a process that died")
        folder.save(values(), step=7)
        kept = sorted(int(p.stem[5:]) for p in tmp_path.glob("step_0*.pt"))
        assert kept == [1, 6, 7] and (tmp_path / "step_mine.pt").is_file()

    def test_after_going_back_the_run_goes_on_from_there(self, tmp_path: Path) -> None:
        """Steps 1 to 3, then again from 1: the old step 3 no longer counts."""
        folder = CheckpointFolder(tmp_path, keep=3)
        for step in (1, 2, 3):
            folder.save(values(float(step)), step=step)
        folder = CheckpointFolder(tmp_path)
        folder.save(values(20.0), step=2)
        newest, _ = folder.newest()
        assert newest is not None and newest.values["model"]["w"][0] == 20
        assert {e["step"] for e in read_index(tmp_path)} == {2, 3}
        folder.save(values(30.0), step=3)
        assert [
            float(load_checkpoint(tmp_path / e["file"]).values["model"]["w"][0])
            for e in read_index(tmp_path)
        ] == [20.0, 30.0]

    def test_going_back_sets_later_best_weights_aside(self, tmp_path: Path) -> None:
        folder = CheckpointFolder(tmp_path, keep=3)
        for step in (10, 20, 30):
            folder.save(values(step), step=step)
        folder.save_best(values(20), step=20)
        assert folder.set_best_aside(30) == folder.set_best_aside(20) == ""
        assert folder.set_best_aside(10) == "best_of_step_00000020.pt"
        names = sorted(path.name for path in tmp_path.glob("best*"))
        assert names == ["best_of_step_00000020.pt"]
        assert float(load_checkpoint(tmp_path / names[0]).values["model"]["w"][0]) == 20
        assert not [entry for entry in read_index(tmp_path) if entry["file"] == "best.pt"]

    def test_best_weights_of_the_step_that_was_not_saved_any_more_stay(
        self, tmp_path: Path
    ) -> None:
        """Killed between the two, the run goes back to the step before and repeats it."""
        folder = CheckpointFolder(tmp_path)
        folder.save(values(10), step=10)
        folder.save_best(values(20), step=20)
        assert folder.set_best_aside(10) == "" and (tmp_path / "best.pt").is_file()

    def test_space_is_asked_for_before_the_first_step(self, tmp_path: Path, monkeypatch) -> None:
        folder = CheckpointFolder(tmp_path / "run" / "checkpoints")
        usage = shutil.disk_usage(tmp_path)
        monkeypatch.setattr(
            store.shutil, "disk_usage", lambda path: usage._replace(free=10_000_000)
        )
        folder.require_space(3_000_000)
        with pytest.raises(CheckpointError, match="needs 13 MB and has 10 MB"):
            folder.require_space(4_000_000)
        with pytest.raises(CheckpointError, match="needs 16 MB and has 10 MB"):
            folder.require_space(3_000_000, others=2)

    def test_a_write_that_cannot_fit_is_not_begun(self, tmp_path: Path, monkeypatch) -> None:
        folder = CheckpointFolder(tmp_path / "checkpoints")
        folder.save(values(1), step=1)
        usage = shutil.disk_usage(tmp_path)
        monkeypatch.setattr(store.shutil, "disk_usage", lambda path: usage._replace(free=399))
        with pytest.raises(CheckpointError, match=r"needs 0\.0 MB and 0\.0 MB are free"):
            folder.save(values(2), step=2)
        assert sorted(p.name for p in folder.folder.iterdir()) == ["index.json", "step_00000001.pt"]


class TestDisk:
    """Disks fill up, vanish and refuse writes in the middle of a run."""

    def test_a_disk_that_fills(self, runner: Runner, data: Path, tmp_path: Path) -> None:
        words = command(data, tmp_path)
        assert runner.run(words, patches=["clock_of_steps"], environment={}) == [0]
        whole = ending(tmp_path / "r")
        shutil.rmtree(tmp_path / "r")
        assert runner.run([*words, "--max-hours", str(5 / 3600)], patches=["clock_of_steps"]) == [
            75
        ]
        before = {p.name: p.read_bytes() for p in (tmp_path / "r" / "checkpoints").iterdir()}
        assert runner.run(words, patches=["small_disk"]) == [4], runner.said()
        assert "Could not write" in runner.said() and "are intact" in runner.said()
        after = {p.name: p.read_bytes() for p in (tmp_path / "r" / "checkpoints").iterdir()}
        assert after == before, "the old ones are as they were, and no stub lies beside them"
        assert runner.run(words) == [0] and ending(tmp_path / "r") == whole

    @pytest.mark.parametrize("fault", ["folder_vanishes", "folder_becomes_read_only"])
    def test_a_folder_that_is_gone(self, runner: Runner, data, tmp_path: Path, fault: str) -> None:
        assert runner.run(command(data, tmp_path), patches=[fault]) == [4], runner.said()
        said = runner.said()
        assert "Traceback" not in said and ("is gone" in said or "Permission denied" in said)


class TestState:
    """A checkpoint holds everything that decides how a run continues."""

    SETTINGS = ("--epochs", "3", "--run-name", "r", "--no-test", "--no-report", "--save-every", "1")

    @pytest.fixture(scope="class")
    def stopped_run(self, toy_data: Path, tmp_path_factory) -> tuple[Path, dict[str, Any]]:
        """Return a run that was stopped in its second epoch, and its checkpoint."""
        out = tmp_path_factory.mktemp("state")
        words = ["train", "--dataset-path", str(toy_data), "--checkpoint-dir", str(out)]
        words += ["--backbone", "tiny_test", "--no-pretrained", "--img-size", "32"]
        words += ["--batch-size", "8", "--num-experts", "3", "--num-workers", "0"]
        words += ["--no-tensorboard", "model.width=16", "model.detail_width=8", *self.SETTINGS]
        # A rate at which the last epoch is not the best: the best one's number then matters.
        words += ["--expert-family", "uniform", "--lr", "2.5e-4", "data.augment.strength=1"]
        assert main([*words, "--epochs", "3"]) == 0
        steps = sorted((out / "r" / "checkpoints").glob("step_*.pt"))
        checkpoint = load_checkpoint(steps[0])
        assert checkpoint.values["state"]["step"] == 14
        return out / "r", copy.deepcopy(checkpoint.values)

    def continued(self, run: Path, state: dict[str, Any], folder: Path, loss=None) -> str:
        """Continue from a checkpoint; return a digest of the finished run."""
        config = load_config(file=run / "config.yaml")
        resume = checkpoints.Checkpoint(Path("step.pt"), config, copy.deepcopy(state))
        prepared = prepare(config)
        if loss is not None:
            prepared.loss = loss
        train_in(prepared, folder, resume=resume)
        newest, _ = CheckpointFolder(folder / "checkpoints").newest()
        assert newest is not None
        end = {k: v for k, v in newest.values.items() if k != "config"}
        kinds = ("train", "validation", "routing")
        kept = [r for r in read_jsonl(folder / "metrics.jsonl") if r["kind"] in kinds]
        return digest_of([end, kept])

    def test_every_part_matters(self, stopped_run, tmp_path: Path) -> None:
        """Changing any one of them changes the result; unchanged, two runs end the same."""
        run, state = stopped_run
        same = self.continued(run, state, tmp_path / "same")
        assert self.continued(run, state, tmp_path / "again") == same

        def nudged(value: torch.Tensor) -> torch.Tensor:
            return value + 1e-3

        def changed(part: str) -> dict[str, Any]:
            other = copy.deepcopy(state)
            if part in other["state"]:
                value = other["state"][part]
                other["state"][part] = {
                    "position": 0,
                    "epoch": 0,
                    "best": 0.999,
                }.get(part, (value or 0) + 1)
            elif part in ("model", "ema"):
                weights = other[part] if part == "model" else other[part]["weights"]
                weights.update({n: nudged(w) for n, w in weights.items() if w.ndim})
            elif part == "average's count":
                other["ema"]["updates"] += 50
            elif part == "moments":
                for moments in other["optimizer"]["state"].values():
                    moments["exp_avg"] = nudged(moments["exp_avg"])
            elif part == "random state":
                other["rng"]["cpu"] = torch.Generator().manual_seed(99).get_state()
            elif part == "routing counts":
                other["routing"]["chosen"] = other["routing"]["chosen"] + 5
            return other

        clocks = {"seconds"}
        # Only matters until the next good step: it has a separate test.
        short_lived = {"skipped_in_a_row"}
        parts = [p for p in state["state"] if p not in clocks | short_lived]
        parts += ["model", "ema", "average's count", "moments", "random state", "routing counts"]
        for part in parts:
            folder = tmp_path / part.replace(" ", "_")
            assert self.continued(run, changed(part), folder) != same, part

    def test_skipped_steps_go_on_being_counted(self, stopped_run, tmp_path) -> None:
        run, state = stopped_run

        def broken(*args: Any, **options: Any):
            loss, parts = total_loss(*args, **options)
            return loss * float("nan"), parts

        state = copy.deepcopy(state)
        state["state"]["skipped_in_a_row"] = 10
        with pytest.raises(NumericError, match="11 optimizer steps in a row"):
            self.continued(run, state, tmp_path / "x", broken)

    def test_the_average_may_come_and_go(self, stopped_run) -> None:
        """Switching the EMA off and on between sessions does not change the weights."""
        run, state = stopped_run
        config = load_config(file=run / "config.yaml")
        without = load_config(file=run / "config.yaml", flags={"train.use_ema": False})

        def loaded(config: Config, state: dict[str, Any]):
            prepared = prepare(config)
            resume = checkpoints.Checkpoint(Path("step.pt"), config, copy.deepcopy(state))
            restore(prepared, resume)
            return prepared

        first = loaded(without, state)
        assert first.ema is None
        second = loaded(config, snapshot(first))
        assert second.ema is not None and int(second.ema.updates) == 0
        for name, weight in second.ema.module.state_dict().items():
            assert torch.equal(weight, state["model"][name]), name

    def test_a_run_may_go_on_where_fp16_needs_a_scaler(self, stopped_run) -> None:
        """The stopped run was in fp32, whose scaler is off and has no state."""
        run, state = stopped_run
        config = load_config(file=run / "config.yaml")
        assert state["scaler"] == {}
        for saved in ({}, {**torch.amp.GradScaler("cpu").state_dict(), "scale": 256.0}):
            prepared = prepare(config)
            prepared.scaler = torch.amp.GradScaler("cpu", init_scale=1024)
            values = {**copy.deepcopy(state), "scaler": saved}
            restore(prepared, checkpoints.Checkpoint(Path("step.pt"), config, values))
            assert prepared.scaler.get_scale() == (256 if saved else 1024)

    def test_compiling_leaves_the_names_alone(self, stopped_run) -> None:
        run, state = stopped_run
        prepared = prepare(load_config(file=run / "config.yaml"))
        prepared.model.compile(backend="eager")
        assert list(prepared.model.state_dict()) == list(state["model"])


class TestChanges:
    """What may change between two sessions of a run, and what may not."""

    WORDS = ("--run-name", "x", "--epochs", "2", "--no-test", "--no-report")

    def test_another_schedule_is_allowed_and_logged(self, train, stopped, tmp_path, capsys) -> None:
        assert stopped(*self.WORDS) == 75
        assert train(*self.WORDS, "--epochs", "3", "--lr", "0.001") == 0
        out = capsys.readouterr().out
        assert "optim.lr: 0.00025 -> 0.001" in out and "train.epochs: 2 -> 3" in out
        events = [r["text"] for r in read_jsonl(tmp_path / "x" / "metrics.jsonl") if "text" in r]
        assert any("optim.lr: 0.00025 -> 0.001" in text for text in events)

    def test_another_batch_is_refused_and_other_parts_of_it_are_not(
        self, train, stopped, capsys
    ) -> None:
        assert stopped(*self.WORDS) == 75
        assert train(*self.WORDS, "--batch-size", "4") == 4
        said = " ".join(capsys.readouterr().err.split())
        assert "took 8 images per optimizer step and this one would take 4" in said
        assert train(*self.WORDS, "--batch-size", "4", "--accumulation-steps", "2") == 0

    def test_smaller_micro_batches_go_on_at_the_same_image(
        self, train, stopped, tmp_path: Path
    ) -> None:
        """The rest of the epoch has the same order as in a run that was not stopped."""
        words = (*self.WORDS, "run.log_every=1", "loss.balance=0.0")
        assert stopped(*words, steps=2) == 75
        assert train(*words, "--batch-size", "4", "--accumulation-steps", "2") == 0
        assert train(*words[2:], "--run-name", "whole") == 0
        losses = [
            [r["loss"] for r in read_jsonl(tmp_path / name / "metrics.jsonl") if "loss" in r]
            for name in ("x", "whole")
        ]
        assert len(losses[0]) == len(losses[1]) == 10
        assert losses[0] == pytest.approx(losses[1], rel=2e-3)

    def test_changed_data_is_refused_unless_allowed(
        self, train, stopped, toy_data: Path, tmp_path: Path, capsys
    ) -> None:
        own = tmp_path / "data"
        shutil.copytree(toy_data, own)
        out = tmp_path / "runs"
        assert stopped(*self.WORDS, steps=3, data=own, out=out) == 75
        picture = sorted((own / "TrainDataset" / "Imgs").iterdir())[0]
        picture.unlink()
        next((own / "TrainDataset" / "GT").glob(f"{picture.stem}.*")).unlink()
        assert train(*self.WORDS, data=own, out=out) == 4
        said = " ".join(capsys.readouterr().err.split())
        assert f"(1 missing: {picture.stem})" in said and "--allow-data-change" in said
        assert train(*self.WORDS, "--allow-data-change", data=own, out=out) == 0
        assert "epoch 1 restarts, as allowed" in capsys.readouterr().out


class TestShared:
    """Weights for sharing."""

    def test_they_predict_the_same_and_name_no_place_of_the_maker(
        self, tiny_run: Path, toy_data: Path, tmp_path: Path
    ) -> None:
        folder = tiny_run / "model"
        names = ["README.md", "config.json", "model.safetensors"]
        assert sorted(p.name for p in folder.iterdir()) == names
        best, shared = (load_checkpoint(resolve_checkpoint(p)) for p in (tiny_run, folder))
        assert best.path.name == BEST and shared.path.suffix == ".safetensors"
        for name, weight in best.evaluated_weights.items():
            assert torch.equal(weight, shared.evaluated_weights[name]), name
        assert shared.config.model == best.config.model
        for path in folder.iterdir():
            assert str(toy_data).encode() not in path.read_bytes()
            assert str(tiny_run.parent).encode() not in path.read_bytes()
        images = str(toy_data / "TestDataset")
        for name, source in (("a", tiny_run), ("b", folder)):
            assert main(["predict", str(source), images, "-o", str(tmp_path / name)]) == 0
        maps = [sorted(p for p in (tmp_path / n).rglob("*.png")) for n in ("a", "b")]
        assert maps[0] and len(maps[0]) == len(maps[1])
        for a, b in zip(*maps, strict=True):
            assert a.read_bytes() == b.read_bytes()

    def test_damage_is_seen(self, tiny_run: Path, tmp_path: Path, capsys) -> None:
        whole = (tiny_run / "model" / "model.safetensors").read_bytes()
        for name, data in (("half", whole[: len(whole) // 2]), ("empty", b""), ("text", b"{}")):
            path = tmp_path / f"{name}.safetensors"
            path.write_bytes(data)
            with pytest.raises(CheckpointError, match="cannot be read as safetensors"):
                load_checkpoint(path)
        from safetensors.torch import save_file

        save_file({"w": torch.ones(1)}, tmp_path / "other.safetensors")
        with pytest.raises(CheckpointError, match="not a CamoXpert checkpoint"):
            load_checkpoint(tmp_path / "other.safetensors")

    def test_the_card_holds_no_markup_of_others(self, tmp_path: Path) -> None:
        config = load_config(
            flags={"model.backbone": "<script>x</script>[a](http://b)", "data.roots": ["/secret"]}
        )
        made = {**values(), "config": to_dict(config), "scores": {"<b>S": 0.5}}
        write_shared(tmp_path, checkpoints.Checkpoint(Path("x"), config, made))
        card = (tmp_path / "README.md").read_text()
        assert "<" not in card and "](" not in card and "/secret" not in card


class TestFirstFormat:
    """Files of the first format stay readable permanently; these were written by release 0.1."""

    def test_a_run_goes_on(self, tmp_path: Path) -> None:
        saved = load_checkpoint(GOLDEN / "format_1_step.pt")
        assert saved.values["format"] == 1
        prepared = prepare_golden(saved.config, tmp_path)
        restore(prepared, saved)
        state = prepared.state
        assert (state.step, state.epoch, state.position) == (3, 1, 8)
        assert prepared.ema is not None and int(prepared.ema.updates) == 3
        again = snapshot(prepared)
        for part in ("model", "ema", "state"):
            assert digest_of(again[part]) == digest_of(saved.values[part]), part
        # That release counted images, which were the routing units of every level.
        counted = dict(saved.values["routing"])
        counted["units"] = [counted.pop("images")] * len(prepared.meter.levels)
        assert digest_of(again["routing"]) == digest_of(counted)
        assert_moments_kept(prepared, saved)

    def test_its_moments_are_kept_and_the_settings_of_now_apply(self, tmp_path: Path) -> None:
        saved = load_checkpoint(GOLDEN / "format_1_step.pt")
        prepared = prepare_golden(saved.config, tmp_path)
        for group in prepared.optimizer.param_groups:
            group |= {"weight_decay": 0.5, "betas": (0.5, 0.6), "scale": 0.7}
        restore(prepared, saved)
        for group in prepared.optimizer.param_groups:
            assert (group["weight_decay"], group["betas"], group["scale"]) == (0.5, (0.5, 0.6), 0.7)
        assert_moments_kept(prepared, saved)

    @pytest.mark.parametrize("name", ["format_1_step.pt", "format_1.safetensors"])
    def test_its_weights_say_the_same(self, name: str) -> None:
        from camoxpert.models.camoxpert import build_model

        saved = load_checkpoint(GOLDEN / name)
        expected = json.loads((GOLDEN / "format_1.json").read_text())
        model = build_model(saved.config.model).eval()
        model.load_state_dict(saved.evaluated_weights)
        image = torch.arange(3 * 32 * 32).remainder(251).reshape(1, 3, 32, 32).to(torch.uint8)
        with torch.no_grad():
            logits = model(image).logits_B1HW[0, 0, ::8, ::8]
        torch.testing.assert_close(logits, torch.tensor(expected["logits"]), rtol=1e-4, atol=1e-4)


def assert_moments_kept(prepared: Run, saved: checkpoints.Checkpoint) -> None:
    """The first version grouped parameters by scale and number of dimensions, without names."""
    routers = {n for n, _ in prepared.model.named_parameters() if ".router." in n}
    groups: dict[tuple[bool, bool], list[str]] = {}
    for name, parameter in prepared.model.named_parameters():
        groups.setdefault((name in routers, parameter.ndim > 1), []).append(name)
    order = [name for names in groups.values() for name in names]
    before = saved.values["optimizer"]["state"]
    assert len(before) == len(order)
    for name, parameter in prepared.model.named_parameters():
        moments = before[order.index(name)]
        assert digest_of(prepared.optimizer.state[parameter]) == digest_of(moments), name


def prepare_golden(config: Config, folder: Path):
    """Prepare a run with the settings of the golden checkpoint, on separate generated data."""
    import dataclasses

    from camoxpert.synthesis.toy import generate_toy

    generate_toy(folder / "data", num_train=8, num_test=0, size=32, difficulty=0.1, seed=0)
    own = dataclasses.replace(
        config.data, roots=(str(folder / "data"),), cache_dir=str(folder / "cache")
    )
    return prepare(dataclasses.replace(config, data=own))
