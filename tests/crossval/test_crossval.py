"""Whole cross-validations: what is scored, what is resumed, what is refused, what is compared."""

from __future__ import annotations

import csv
import shutil
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from conftest import TINY
from helpers.folds import copy, result, rows
from helpers.pages import active_parts
from helpers.printed import said

from camoxpert.cli import main
from camoxpert.crossval.collect import collect
from camoxpert.crossval.heldout import FINAL, MARKER, OUT_OF_FOLD
from camoxpert.crossval.report import PAGE
from camoxpert.data.files.folds import read_splits
from camoxpert.errors import DataError
from camoxpert.files import read_json, write_json
from camoxpert.metrics import Evaluator
from camoxpert.runs.checkpoint import load_checkpoint
from camoxpert.training import session

pytestmark = pytest.mark.slow
Crossval = Callable[..., int]


class TestScores:
    def test_every_image_is_scored_by_a_model_that_never_saw_it(self, finished: Path) -> None:
        splits = read_splits(finished / "splits.json")
        seen: list[str] = []
        for fold in (1, 2, 3):
            held_out = {image.name for image in splits.held_out(fold)}
            assert rows(finished, fold).keys() == held_out
            with (finished / f"fold-{fold}" / "samples.csv").open() as file:
                samples = {row["name"]: row["split"] for row in csv.DictReader(file)}
            trained = {name for name, split in samples.items() if split == "training"}
            assert trained == {image.name for image in splits.images} - held_out
            seen += held_out
        assert len(seen) == len(set(seen)) == 18

    def test_the_numbers_of_the_summary_by_hand(self, finished: Path) -> None:
        summary = read_json(finished / "summary.json")
        tables = [rows(finished, fold) for fold in (1, 2, 3)]
        for key in ("wFmeasure", "Smeasure", "IoU", "MAE"):
            folds = [np.mean([float(row[key]) for row in table.values()]) for table in tables]
            over = summary["over_folds"][key]
            assert over["mean"] == pytest.approx(sum(folds) / 3)
            assert over["deviation"] == pytest.approx(np.std(folds, ddof=1))
            every = [float(row[key]) for table in tables for row in table.values()]
            pooled = summary["out_of_fold"][key]
            assert pooled["value"] == pytest.approx(np.mean(every))
            assert pooled["low"] <= pooled["value"] <= pooled["high"]
        assert summary["splits"]["held_out"] == 18

    def test_the_weights_are_those_of_the_last_epoch(self, finished: Path) -> None:
        """And not those of the best one, whose score is told apart."""
        run = finished / "fold-1"
        about = read_json(run / OUT_OF_FOLD / MARKER)
        assert about["epoch"] == 2 and about["best"]["epoch"] in (1, 2)
        final = load_checkpoint(run / OUT_OF_FOLD / FINAL)
        assert final.values["state"]["epoch"] == 2
        best = load_checkpoint(run / "checkpoints" / "best.pt")
        same = all(
            torch.equal(final.values["model"][name], tensor)
            for name, tensor in best.evaluated_weights.items()
        )
        assert same == (about["best"]["epoch"] == 2)
        # The scores of validation in the last epoch, which looked at the same images.
        last = [r for r in (run / "metrics.jsonl").read_text().splitlines() if "validation" in r][
            -1
        ]
        assert f'"wFmeasure": {about["scores"]["wFmeasure"]}' in last
        summary = read_json(finished / "summary.json")
        best_of = [fold["best_scores"]["wFmeasure"] for fold in summary["folds"]]
        assert summary["best_epoch"]["wFmeasure"]["mean"] == pytest.approx(np.mean(best_of))

    def test_maps_are_what_was_scored(self, finished: Path, easy: Path) -> None:
        maps = finished / "maps" / "repeat-1"
        assert len(list(maps.glob("*.png"))) == 18
        evaluator = Evaluator()
        for path in maps.glob("*.png"):
            mask = easy / "TrainDataset" / "GT" / path.name
            evaluator.add(path.stem, *(cv2.imread(str(p), 0) for p in (path, mask)))
        scored = read_json(finished / "summary.json")["out_of_fold"]
        for key, value in evaluator.results().items():
            assert scored[key]["value"] == pytest.approx(value, abs=1e-12), key

    def test_maps_are_a_teacher(self, finished: Path, easy: Path, tmp_path: Path, capsys) -> None:
        """What models that never saw an image say of it, for the model that sees all of them."""
        run = ["train", "--dataset-path", str(easy), "--checkpoint-dir", str(tmp_path), *TINY]
        run += ["--epochs", "1", "--stage1-epochs", "0", "--no-report", "--no-test"]
        assert main([*run, "--teacher", str(finished / "maps" / "repeat-1")]) == 0
        assert f"maps in {finished / 'maps' / 'repeat-1'}" in said(capsys)

    def test_checkpoints_to_continue_from_are_gone(self, finished: Path) -> None:
        assert not list(finished.rglob("step_*.pt"))
        assert len(list(finished.rglob("final.pt"))) == 3

    def test_page_and_markdown(self, finished: Path) -> None:
        page = (finished / "report.html").read_text()
        assert active_parts(page) == [] and page.count("<img") >= 3
        for text in (page, (finished / "summary.md").read_text()):
            assert "never saw it" in text and "optimistic" in text and "best epoch" in text


class TestResume:
    def test_a_deadline_in_the_second_fold(
        self,
        crossval: Crossval,
        finished: Path,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        """Four steps a fold: stopped in the sixth, the same command ends bit for bit alike."""
        from camoxpert.stop import DEADLINE_CODE, Stop
        from camoxpert.training import trainer

        taken: list[int] = []
        honest = trainer.train_step

        def step(*arguments: object, **options: object) -> object:
            taken.append(1)
            return honest(*arguments, **options)

        with monkeypatch.context() as patch:
            patch.setattr(trainer, "train_step", step)
            patch.setattr(Stop, "code", lambda stop: DEADLINE_CODE if len(taken) >= 6 else 0)
            assert crossval(tmp_path / "out", "--folds", "3") == 75
        words = said(capsys)
        assert "Fold 2 of 3; the same command continues there" in words
        assert not (tmp_path / "out" / "summary.json").exists()
        assert crossval(tmp_path / "out", "--folds", "3") == 0
        words = said(capsys)
        assert "fold 1: done before" in words and "resumed" in words
        assert result(tmp_path / "out") == result(finished)

    def test_other_settings_are_other_results(
        self, crossval: Crossval, finished: Path, tmp_path: Path
    ) -> None:
        """The control of the comparison above."""
        splits = str(finished / "splits.json")
        assert crossval(tmp_path / "out", "--splits", splits, "--seed", "7") == 0
        assert result(tmp_path / "out") != result(finished)

    def test_nothing_is_trained_twice(
        self,
        crossval: Crossval,
        finished: Path,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        out = copy(finished, tmp_path / "out")
        monkeypatch.setattr(session, "run", lambda *a, **o: pytest.fail("a run was started"))
        assert crossval(out) == 0
        assert said(capsys).count("done before") == 3
        assert result(out) == result(finished)

    def test_a_fold_that_was_trained_and_not_scored(
        self, crossval: Crossval, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        out = copy(finished, tmp_path / "out")
        own = out / "fold-2" / OUT_OF_FOLD
        (own / MARKER).unlink()
        shutil.rmtree(own / "maps")
        monkeypatch.setattr(session, "run", lambda *a, **o: pytest.fail("a run was started"))
        assert crossval(out) == 0
        assert result(out) == result(finished)

    def test_folds_on_several_machines(
        self, crossval: Crossval, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """Each divides the images itself; the run folders together are the cross-validation."""
        for number in (1, 2, 3):
            out = tmp_path / f"machine{number}" / "cv"
            assert crossval(out, "--folds", "3", "--fold", str(number)) == 0
            assert "no summary yet: folds still to train" in said(capsys)
            if number > 1:
                shutil.move(str(out / f"fold-{number}"), tmp_path / "machine1" / "cv")
        joined = tmp_path / "machine1" / "cv"
        assert crossval(joined, "--summary-only") == 0
        assert result(joined) == result(finished)


class TestPlaces:
    def test_folds_from_another_machine(
        self,
        crossval: Crossval,
        finished: Path,
        easy: Path,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        """Its data lay elsewhere; only its content counts, in the summary and where it is
        continued."""
        out = copy(finished, tmp_path / "out")
        settings = out / "fold-2" / "config.yaml"
        text = settings.read_text()
        settings.write_text(text.replace(str(easy), f"/elsewhere/{easy.name}"))
        assert settings.read_text() != text
        monkeypatch.setattr(session, "run", lambda *a, **o: pytest.fail("a run was started"))
        assert crossval(out, "--summary-only") == 0
        assert crossval(out) == 0
        assert result(out) == result(finished)
        # The control: other data of that name.
        info = read_json(out / "fold-2" / "run.json")
        write_json(out / "fold-2" / "run.json", info | {"data_hash": "0" * 64})
        assert crossval(out, "--summary-only") == 3
        assert crossval(out) == 4
        assert said(capsys).count("has other content") == 2


class TestRefusals:
    def test_a_missing_fold_is_named(
        self, crossval: Crossval, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        out = copy(finished, tmp_path / "out")
        shutil.rmtree(out / "fold-2")
        (out / "summary.json").unlink()
        assert crossval(out, "--summary-only") == 3
        words = said(capsys)
        assert "1 fold of 3 is missing or not scored: 2." in words and "(fold-2)" in words
        assert not (out / "summary.json").exists() and not (out / "fold-2").exists()
        assert crossval(out, "--compare-with", str(out), "--summary-only") == 3

    def test_changed_data(
        self,
        crossval: Crossval,
        finished: Path,
        easy: Path,
        tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        out = copy(finished, tmp_path / "out")
        data = copy(easy, tmp_path / easy.name)
        first, second = sorted((data / "TrainDataset" / "Imgs").iterdir())[:2]
        first.unlink()
        (data / "TrainDataset" / "GT" / f"{first.stem}.png").unlink()
        second.write_bytes(second.read_bytes() + b"\0")
        assert crossval(out, data=data) == 3
        words = said(capsys)
        assert f"1 missing: {first.stem}" in words
        assert f"1 with a file of another size: {second.stem}" in words
        assert "made for 18 images" in words

    def test_other_settings(
        self, crossval: Crossval, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        out = copy(finished, tmp_path / "out")
        assert crossval(out, "optim.lr=1e-3") == 4
        assert "optim.lr: 0.00025 -> 0.001" in said(capsys)
        assert crossval(out, "--folds", "4") == 2
        assert "--folds 4" in said(capsys)
        assert crossval(out, "--early-stopping", "2") == 2
        assert crossval(out, "--fold", "4") == 3
        assert "has 3 folds, numbered from 1" in said(capsys)

    def test_quick_folds_say_so_and_mix_with_no_others(
        self, crossval: Crossval, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        out = tmp_path / "quick"
        assert crossval(out, "--folds", "3", "--limit-batches", "1") == 0
        assert [path.name for path in sorted(out.glob("fold-*"))] == [
            f"fold-{number}-quick-limit1" for number in (1, 2, 3)
        ]
        summary = read_json(out / "summary.json")
        assert len(summary["quick"]) == 1 and "at most 1 batch" in summary["quick"][0]
        for text in (said(capsys), (out / "summary.md").read_text(), (out / PAGE).read_text()):
            assert "Quick runs, not whole ones" in text
        assert "Quick runs" not in (finished / PAGE).read_text()
        assert crossval(out) == 4
        assert "fold-1-quick-limit1 is there: quick runs and whole ones" in said(capsys)
        # Copied together by hand.
        shutil.copytree(finished / "fold-1", out / "fold-1")
        with pytest.raises(DataError, match="fold 1 more than once"):
            collect(out)
        assert crossval(tmp_path / "heart", "--folds", "3", "--overfit-batches", "1") == 2
        assert "learns a few batches by heart" in said(capsys)

    def test_a_fold_of_another_method(
        self, crossval: Crossval, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        out = copy(finished, tmp_path / "out")
        settings = out / "fold-3" / "config.yaml"
        settings.write_text(settings.read_text().replace("lr: 0.00025", "lr: 0.5"))
        with pytest.raises(DataError, match=r"fold-3 was trained with other .*optim.lr"):
            collect(out)

    def test_a_fold_of_other_splits(self, finished: Path, tmp_path: Path) -> None:
        out = copy(finished, tmp_path / "out")
        marker = out / "fold-3" / OUT_OF_FOLD / MARKER
        write_json(marker, read_json(marker) | {"splits": "0" * 64})
        with pytest.raises(DataError, match="scored on other folds"):
            collect(out)

    def test_damaged_scores(self, finished: Path, tmp_path: Path) -> None:
        out = copy(finished, tmp_path / "out")
        state = out / "fold-1" / OUT_OF_FOLD / "scores.json.gz"
        state.write_bytes(state.read_bytes()[:-9])
        with pytest.raises(DataError, match="differs from what was written"):
            collect(out)

    def test_a_model_that_was_trained_on_these_images(
        self, crossval: Crossval, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """A fold's model saw the images that other folds hold out."""
        model = str(finished / "fold-1" / "checkpoints" / "best.pt")
        assert crossval(tmp_path / "out", "--init-from", model) == 3
        assert "was trained on these images" in said(capsys)

    def test_dry_run_writes_nothing(
        self, crossval: Crossval, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert crossval(tmp_path / "out", "--dry-run", "--repeats", "2") == 0
        words = said(capsys)
        assert "10 of 18 images" in words and "5 (repeat 1)" in words
        assert not (tmp_path / "out").exists()
