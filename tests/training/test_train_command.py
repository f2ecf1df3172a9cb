"""`camoxpert train` from start to report: what it writes, continues, refuses and prints."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from helpers.runs import records

from camoxpert.cli import main
from camoxpert.config import load_config
from camoxpert.data.files.manifest import load_train
from camoxpert.files import read_jsonl
from camoxpert.runs.checkpoint import load_checkpoint, read_index
from camoxpert.runs.records import read_info


class TestCommand:
    """`camoxpert train` from start to report."""

    def test_a_run_folder_holds_what_the_readme_says(self, tiny_run: Path) -> None:
        for name in ("config.yaml", "run.json", "metrics.jsonl", "report.html"):
            assert (tiny_run / name).stat().st_size > 0
        info = json.loads((tiny_run / "run.json").read_text())
        assert info["status"] == "finished"
        assert {"training", "validation", "testing", "start"} <= info["phases"].keys()
        assert info["argv"][:2] == ["camoxpert", "train"]
        kinds = [r["kind"] for r in read_jsonl(tiny_run / "metrics.jsonl")]
        assert {"train", "validation", "routing", "event"} <= set(kinds)
        result = json.loads((tiny_run / "evaluation" / "scores.json").read_text())["results"][0]
        assert result["num_images"] == 8
        assert load_config(file=tiny_run / "config.yaml").train.epochs == 2
        stages = [r["text"] for r in records(tiny_run, "event") if "stage" in r["text"]]
        assert stages == ["stage 1: decoder only, backbone frozen", "stage 2: everything"]

    def test_the_same_command_again_makes_a_second_run(self, train, tmp_path: Path) -> None:
        words = ("--epochs", "1", "--no-test", "--no-report")
        assert train(*words) == 0
        first = next(tmp_path.iterdir())
        before = (first / "checkpoints" / "best.pt").read_bytes()
        assert train(*words) == 0
        assert sorted(p.name for p in tmp_path.iterdir()) == [first.name, f"{first.name}-2"]
        assert (first / "checkpoints" / "best.pt").read_bytes() == before

    def test_the_deadline_saves_and_the_same_command_goes_on(
        self, train, stopped, tmp_path: Path
    ) -> None:
        words = ("--epochs", "3", "--no-test", "--no-report")
        assert stopped(*words) == 75
        folder = next(tmp_path.iterdir())
        assert json.loads((folder / "run.json").read_text())["status"] == "stopped"
        assert train(*words) == 0
        assert list(tmp_path.iterdir()) == [folder]
        assert json.loads((folder / "run.json").read_text())["status"] == "finished"

    def test_a_stopped_run_is_not_continued_with_another_model(
        self, train, stopped, tmp_path: Path, capsys
    ) -> None:
        words = ("--run-name", "x", "--epochs", "2", "--no-test", "--no-report")
        assert stopped(*words) == 75
        assert train(*words, "--num-experts", "4") == 4
        message = " ".join(capsys.readouterr().err.split())
        assert "model.num_experts: 3 -> 4" in message
        assert train(*words, "--num-experts", "4", "--resume", "never") == 0
        assert sorted(p.name for p in tmp_path.iterdir()) == ["x", "x-2"]

    def test_resume_from_a_folder(self, train, stopped, tmp_path: Path, capsys) -> None:
        words = ("--run-name", "x", "--no-test", "--no-report", "--epochs", "2")
        assert stopped(*words) == 75
        assert train(*words, "--resume-from", str(tmp_path / "x")) == 0
        assert "resumed" in capsys.readouterr().out
        assert [p.name for p in tmp_path.iterdir()] == ["x"]
        # The event of the very step at which the run was stopped is there, once.
        stages = [r["text"] for r in records(tmp_path / "x", "event") if "stage" in r["text"]]
        assert len(stages) == len(set(stages)) and stages
        assert train(*words, "--resume", str(tmp_path / "nowhere")) == 4

    @pytest.mark.parametrize("more", [("--val-fraction", "0"), ("--validate-every", "10")])
    @pytest.mark.parametrize("steps", [7, 12])
    def test_fewer_epochs_than_are_done_end_the_run_with_its_weights(
        self, train, stopped, tmp_path: Path, more: tuple[str, ...], steps: int
    ) -> None:
        words = ("--run-name", "x", "--no-report", "--stage1-epochs", "0", *more)
        assert stopped(*words, "--epochs", "3", steps=steps) == 75
        assert not (tmp_path / "x" / "checkpoints" / "best.pt").exists()
        assert train(*words, "--epochs", "1") == 0
        newest = max((tmp_path / "x" / "checkpoints").glob("step_*.pt"))
        best, last = map(load_checkpoint, (newest.with_name("best.pt"), newest))
        for name, weight in last.evaluated_weights.items():
            assert torch.equal(best.evaluated_weights[name], weight), name
        assert (tmp_path / "x" / "evaluation" / "scores.json").is_file(), "and it is tested"

    def test_a_stopped_run_is_found_where_one_before_it_is_gone(
        self, train, stopped, tmp_path: Path
    ) -> None:
        words = ("--run-name", "x", "--no-test", "--no-report", "--stage1-epochs", "0")
        assert train(*words, "--epochs", "1") == 0
        assert stopped(*words, "--epochs", "2", "--seed", "1", steps=3) == 75
        assert (tmp_path / "x-2").is_dir()
        shutil.rmtree(tmp_path / "x")
        assert train(*words, "--epochs", "2", "--seed", "1") == 0
        assert not (tmp_path / "x").exists()
        assert read_info(tmp_path / "x-2")["status"] == "finished"

    def test_going_back_to_an_earlier_step(self, train, stopped, tmp_path: Path, capsys) -> None:
        """The best weights of what is given up are neither shared nor overwritten."""
        words = ("--run-name", "x", "--no-test", "--no-report", "--stage1-epochs", "0")
        words += ("--keep-every", "1", "--val-fraction", "0.2")
        assert stopped(*words, "--epochs", "5", "--lr", "3e-3", steps=14) == 75
        folder = tmp_path / "x" / "checkpoints"
        step = min(folder.glob("step_*.pt"))
        first = next(e["step"] for e in read_index(folder) if e["file"] == "best.pt")
        assert first > load_checkpoint(step).values["state"]["step"], "or nothing is tested"
        assert train(*words, "--epochs", "3", "--lr", "0.2", "--resume", str(step)) == 0
        said = f"best_of_step_{first:08d}.pt"
        assert said in capsys.readouterr().out and (folder / said).is_file()
        scored = [r["step"] for r in records(tmp_path / "x", "validation") if r["best"]]
        now = next(e["step"] for e in read_index(folder) if e["file"] == "best.pt")
        assert scored and scored[-1] == now

    def test_a_checkpoint_in_no_run_folder_is_refused(
        self, train, stopped, tmp_path: Path, capsys
    ) -> None:
        """The folder two levels above is not a run folder: nothing is written there."""
        words = ("--run-name", "x", "--no-test", "--no-report", "--epochs", "2")
        assert stopped(*words) == 75
        (tmp_path / "other" / "deep").mkdir(parents=True)
        copy = next((tmp_path / "x" / "checkpoints").glob("step_*.pt")).rename(
            tmp_path / "other" / "deep" / "mine.pt"
        )
        assert train(*words, "--resume", str(copy)) == 4
        assert "is not in a run folder" in " ".join(capsys.readouterr().err.split())
        assert [p.name for p in (tmp_path / "other").iterdir()] == ["deep"]

    def test_dry_run_writes_nothing(self, train, tmp_path: Path, capsys) -> None:
        assert train("--dry-run") == 0
        out = capsys.readouterr().out
        assert not list(tmp_path.iterdir())
        assert "precision   fp32" in out and "one step" in out

    def test_a_dry_run_says_what_it_did_not_read(
        self, train, toy_data: Path, tmp_path: Path, capsys
    ) -> None:
        """It reads headers: a JPEG that is damaged in the middle is the doctor's to find."""
        data = tmp_path / "data"
        for folder in ("Imgs", "GT"):
            (data / "TrainDataset" / folder).mkdir(parents=True)
        for index, pair in enumerate(load_train([toy_data]).pairs[:20]):
            shutil.copy(pair.mask, data / "TrainDataset/GT" / f"{index}.png")
            photo = cv2.resize(cv2.imread(str(pair.image)), (96, 96))
            photo += np.random.default_rng(index).integers(0, 99, photo.shape, dtype=np.uint8)
            kept = data / "TrainDataset/Imgs" / f"{index}.jpg"
            assert cv2.imwrite(str(kept), photo, [cv2.IMWRITE_JPEG_QUALITY, 90])
            mask = data / "TrainDataset/GT" / f"{index}.png"
            cv2.imwrite(str(mask), cv2.resize(cv2.imread(str(mask), 0), (96, 96)) // 128 * 255)
        damaged = data / "TrainDataset/Imgs/3.jpg"
        whole = damaged.read_bytes()
        half = len(whole) // 2
        damaged.write_bytes(whole[:half] + bytes(len(whole) - half - 2) + whole[-2:])
        words = ("--val-fraction", "0.2", "--epochs", "1")
        assert train(*words, "--cache", "none", "--dry-run", data=data) == 0
        said = " ".join(capsys.readouterr().out.split())
        assert "the headers of 20 training pairs and the pixels of" in said
        assert "damage inside a file was not looked for" in said
        assert "`camoxpert doctor` reads every file" in said
        # What it points to finds the file, as does decoding all of them into a cache.
        assert main(["doctor", str(data), "--no-copies", "-o", str(tmp_path / "page")]) == 3
        assert "3.jpg" in capsys.readouterr().out
        assert train(*words, "--cache", "ram", data=data) == 3
        assert "3.jpg" in capsys.readouterr().err
        damaged.write_bytes(whole)
        place = ("--cache", "disk", "--cache-dir", str(tmp_path / "cache"))
        assert train(*words, *place, data=data) == 0
        capsys.readouterr()
        assert train(*words, *place, "--seed", "7", "--dry-run", data=data) == 0
        said = " ".join(capsys.readouterr().out.split())
        assert "every pixel of the 20 training pairs was decoded into the cache" in said

    def test_decisions_are_said_with_their_reason(self, train, capsys) -> None:
        train("--dry-run")
        out = capsys.readouterr().out
        for word in ("data ", "test sets", "workers", "device", "precision", "model", "plan"):
            assert word in out

    def test_an_unknown_backbone_is_a_config_error(self, train, capsys) -> None:
        assert train("--backbone", "edgenext_bass") == 2
        assert "Did you mean edgenext_base" in " ".join(capsys.readouterr().err.split())

    def test_router_warmup_sends_every_image_through_all_experts(
        self, train, tmp_path: Path
    ) -> None:
        words = ("--run-name", "warm", "--epochs", "2", "--top-k", "1", "--no-test", "--no-report")
        assert train(*words, "--router-warmup", "1") == 0
        lines = (tmp_path / "warm" / "metrics.jsonl").read_text().splitlines()
        routing = [r for r in map(json.loads, lines) if r["kind"] == "routing"]
        for level in routing[0]["levels"].values():
            assert level["usage"] == pytest.approx([1 / 3] * 3, abs=1e-6)
        later = [level["usage"] for level in routing[1]["levels"].values()]
        assert any(max(usage) > 0.34 for usage in later)  # the control: routed again


def test_a_run_that_died_before_its_first_checkpoint_starts_anew_in_its_folder(
    train, tmp_path: Path, capsys
) -> None:
    words = ["--run-name", "r", "--epochs", "1", "--no-test", "--no-report"]
    (tmp_path / "r").mkdir()
    (tmp_path / "r" / "run.json").write_text('{"status": "running"}')
    (tmp_path / "r" / "metrics.jsonl").write_text('{"kind": "train", "step": 1, "epoch": 1}\n')
    assert train(*words) == 0
    assert "had saved nothing yet and restarts" in capsys.readouterr().out
    steps = [record["step"] for record in records(tmp_path / "r", "train")]
    assert steps == sorted(set(steps)) and not (tmp_path / "r-2").exists()


def test_a_folder_of_somebody_else_is_left_alone(train, tmp_path: Path) -> None:
    (tmp_path / "r").mkdir()
    (tmp_path / "r" / "thesis.txt").write_text("mine")
    assert train("--run-name", "r", "--epochs", "1", "--no-test", "--no-report") == 0
    assert [p.name for p in (tmp_path / "r").iterdir()] == ["thesis.txt"]
    assert (tmp_path / "r-2" / "run.json").is_file()


def test_a_signal_while_the_report_is_written_does_not_undo_a_finished_run(
    train, tmp_path: Path, monkeypatch
) -> None:
    """Otherwise the command fails on a finished run, and starts a second one next time."""
    from camoxpert.pages import report

    written = []

    def interrupted(folder: Path) -> Path:
        signal.raise_signal(signal.SIGTERM)
        written.append(folder)
        return folder

    monkeypatch.setattr(report, "write_report", interrupted)
    assert train("--run-name", "r", "--epochs", "1", "--no-test") == 0
    assert written == [tmp_path / "r"]
    assert json.loads((tmp_path / "r" / "run.json").read_text())["status"] == "finished"


def test_a_signal_during_the_last_save_says_that_training_is_done(
    train, tmp_path: Path, monkeypatch, capsys
) -> None:
    from camoxpert.training import session

    honest = session.train

    def interrupted(run):
        state = honest(run)
        with run.stop.deferred():
            signal.raise_signal(signal.SIGTERM)
        return state

    monkeypatch.setattr(session, "train", interrupted)
    words = ("--run-name", "r", "--epochs", "1", "--no-report")
    assert train(*words) == 143
    said = " ".join(capsys.readouterr().err.split())
    assert "Training is done and saved" in said and "the same command finishes it" in said
    monkeypatch.undo()
    assert train(*words) == 0 and not (tmp_path / "r-2").exists()


def test_a_signal_while_a_run_is_resumed_says_that_it_is_unchanged(
    train, stopped, monkeypatch, capsys
) -> None:
    from camoxpert.training import session

    words = ("--run-name", "r", "--epochs", "2", "--no-test", "--no-report")
    assert stopped(*words) == 75
    capsys.readouterr()
    monkeypatch.setattr(
        session, "prepare", lambda *args, **options: signal.raise_signal(signal.SIGTERM)
    )
    assert train(*words) == 143
    said = " ".join(capsys.readouterr().err.split())
    assert "is as it was; the same command continues it" in said
    assert "Nothing was trained yet" not in said


def test_a_dry_run_says_what_a_resume_would_say(train, stopped, tmp_path: Path, capsys) -> None:
    words = ("--run-name", "r", "--epochs", "2", "--no-test", "--no-report")
    assert stopped(*words) == 75
    before = {p: p.read_bytes() for p in (tmp_path / "r").rglob("*") if p.is_file()}
    assert train(*words, "--num-experts", "4", "--dry-run") == 4
    assert "model.num_experts: 3 -> 4" in " ".join(capsys.readouterr().err.split())
    assert train(*words, "--lr", "0.002", "--dry-run") == 0
    assert "changed     optim.lr" in capsys.readouterr().out
    after = {p: p.read_bytes() for p in (tmp_path / "r").rglob("*") if p.is_file()}
    assert after == before


def test_a_dry_run_that_runs_out_of_memory_is_explained(train, monkeypatch, capsys) -> None:
    import torch

    from camoxpert.training import session

    def does_not_fit(*args, **options):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(session, "trial_step", does_not_fit)
    assert train("--dry-run") == 2
    assert "--accumulation-steps" in capsys.readouterr().err


def test_samples_with_a_torn_line_are_not_compared(tmp_path: Path) -> None:
    from camoxpert.training.resume import SAMPLES, data_changes

    header = "split,dataset,name,image_bytes,mask_bytes\n"
    (tmp_path / SAMPLES).write_text(header + "training,d,a,10,5\ntraining,d,b,1")
    assert data_changes(tmp_path, None) == ""


def test_a_broken_test_image_does_not_keep_a_run_from_finishing(
    train, toy_data: Path, tmp_path: Path, capsys
) -> None:
    """Otherwise the same command trains nothing, and fails at the same image, every time."""
    import shutil

    from camoxpert.cli import main

    own = tmp_path / "data"
    shutil.copytree(toy_data, own)
    images = sorted((own / "TestDataset" / "toy" / "Imgs").iterdir())
    images[2].write_bytes(images[2].read_bytes()[:200])
    words = ("--epochs", "1", "--run-name", "x")
    assert train(*words, data=own, out=tmp_path / "runs") == 0
    run = tmp_path / "runs" / "x"
    assert json.loads((run / "run.json").read_text())["status"] == "finished"
    said = " ".join(capsys.readouterr().err.split())
    assert "1 of 8 images cannot be read and are missing from the scores" in said
    assert images[2].name in said
    result = json.loads((run / "evaluation" / "scores.json").read_text())["results"][0]
    assert (result["num_images"], result["num_unreadable"]) == (7, 1)
    assert images[2].name in result["unreadable"][0]
    assert "7, 1 unreadable left out" in (run / "report.html").read_text()
    assert "1 unreadable left out" in (run / "evaluation" / "index.html").read_text()
    # `evaluate` refuses it unless asked, and says how to ask.
    command = ["evaluate", str(run), "--data", str(own), "-o", str(tmp_path / "e"), "--device"]
    assert main([*command, "cpu"]) == 3
    assert main([*command, "cpu", "--unreadable", "skip", "--num-workers", "1"]) == 0
    # No image at all: the run still finishes, and says why it has no scores.
    for image in images:
        image.write_bytes(b"")
    assert train("--epochs", "1", "--run-name", "y", data=own, out=tmp_path / "runs") == 0
    assert "none of its images can be read" in " ".join(capsys.readouterr().err.split())
    events = [record["text"] for record in records(tmp_path / "runs" / "y", "event")]
    assert any("could not be scored" in text for text in events)
