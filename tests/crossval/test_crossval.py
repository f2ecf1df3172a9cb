"""Whole cross-validations: what is scored, what is resumed, what is refused, what is compared."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from conftest import TINY
from helpers.folds import result, rows
from helpers.pages import active_parts

from camoxpert.cli import main
from camoxpert.config import load_config
from camoxpert.crossval import heldout
from camoxpert.crossval.collect import collect, compare_methods
from camoxpert.crossval.heldout import FINAL, MARKER, OUT_OF_FOLD
from camoxpert.crossval.report import PAGE
from camoxpert.crossval.summary import spread
from camoxpert.data.files.folds import read_splits
from camoxpert.data.files.labels import VOID
from camoxpert.errors import DataError
from camoxpert.files import read_json, write_json
from camoxpert.metrics import Evaluator
from camoxpert.metrics.statistics import Scores, compare, confidence_intervals
from camoxpert.runs.checkpoint import load_checkpoint
from camoxpert.synthesis.toy import generate_toy
from camoxpert.training import session

pytestmark = pytest.mark.slow
Crossval = Callable[..., int]


def copy(folder: Path, to: Path) -> Path:
    shutil.copytree(folder, to)
    return to


def said(capsys: pytest.CaptureFixture[str]) -> str:
    printed = capsys.readouterr()
    return " ".join((printed.out + printed.err).split())


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


class TestReport:
    def test_the_page_is_written_again(self, finished: Path, tmp_path: Path, capsys) -> None:
        out = copy(finished, tmp_path / "out")
        for name in (PAGE, "summary.md"):
            (out / name).unlink()
        assert main(["report", str(out)]) == 0
        assert str(out / PAGE) in said(capsys)
        assert result(out) == result(finished)
        assert (out / "summary.md").read_text() == (finished / "summary.md").read_text()
        assert (out / PAGE).read_text().count("<img") == (finished / PAGE).read_text().count("<img")
        assert read_json(out / "summary.json")["command"][:2] == ["camoxpert", "crossval"]

    def test_what_it_cannot_do(self, finished: Path, easy: Path, tmp_path: Path, capsys) -> None:
        out = copy(finished, tmp_path / "out")
        for settings in out.glob("fold-*/config.yaml"):
            settings.write_text(settings.read_text().replace(str(easy), "/gone"))
        assert main(["report", str(out)]) == 3
        assert "its data is not here (/gone)" in said(capsys)
        assert main(["report", str(out), "-o", "page.html"]) == 2
        assert main(["report", str(out), str(finished)]) == 4
        assert "It is a cross-validation: compare it" in said(capsys)
        shutil.rmtree(out / "fold-2")
        assert main(["report", str(out)]) == 3
        assert "1 fold of 3 is missing" in said(capsys)


class TestComparison:
    def test_a_second_method_on_the_same_splits(
        self, crossval: Crossval, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        out, splits = tmp_path / "out", str(finished / "splits.json")
        more = ["--splits", splits, "--compare-with", str(finished), "model.width=24"]
        assert crossval(out, *more) == 0
        assert f"this method minus {finished}, on the same folds" in said(capsys)
        assert (out / "splits.json").read_bytes() == Path(splits).read_bytes()
        (gap,) = read_json(out / "summary.json")["comparisons"]
        ours = [r for n in (1, 2, 3) for r in rows(out, n).items()]
        theirs = {k: v for n in (1, 2, 3) for k, v in rows(finished, n).items()}
        for key in ("wFmeasure", "MAE"):
            by_hand = np.mean([float(row[key]) - float(theirs[name][key]) for name, row in ours])
            measure = gap["measures"][key]
            assert measure["difference"] == pytest.approx(by_hand)
            assert measure["low"] <= by_hand <= measure["high"]
        assert "This method minus" in (out / "report.html").read_text()
        # With itself there is no difference, and no doubt about it.
        same = compare_methods(collect(finished), collect(finished))["wFmeasure"]
        assert tuple(same) == (0.0, 0.0, 0.0, 1.0)

    def test_other_splits_are_refused_before_training(
        self, crossval: Crossval, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        out = tmp_path / "out"
        assert crossval(out, "--folds", "2", "--compare-with", str(finished)) == 3
        assert "have other folds" in said(capsys)
        assert not list(out.glob("fold-*"))

    def test_paired_intervals_by_hand(self) -> None:
        """Two groups, of two images and of one. Method a is 0.2 better on each image of the first
        and 0.8 on that of the second. Drawn twice with replacement the groups give 0.2 (both
        first), 0.4 (one of each: (0.2 + 0.2 + 0.8) / 3) or 0.8: the interval's ends are exact."""
        a, b = _scores({"x": 0.2, "y": 0.4, "z": 0.0}), _scores({"x": 0.4, "y": 0.6, "z": 0.8})
        found = compare(a, b, units_N=np.array([0, 0, 1]))["MAE"]
        assert found.difference == pytest.approx(-0.4)
        assert (found.low, found.high) == pytest.approx((-0.8, -0.2))
        # Swapped by groups, only both kept or both swapped are as far apart: p is one half.
        assert found.p_value == pytest.approx(0.5, abs=0.05)
        # Image by image there are more draws in between, and the tosses have eight outcomes.
        alone = compare(a, b)["MAE"]
        assert alone.p_value == pytest.approx(0.25, abs=0.05)

    def test_groups_of_one_image_are_images(self) -> None:
        scores = _scores({name: 0.1 * n for n, name in enumerate("abcdef")})
        plain = confidence_intervals(scores)
        one_each = confidence_intervals(scores, units_N=np.arange(6))
        assert one_each["MAE"] == pytest.approx(plain["MAE"])
        wide = confidence_intervals(scores, units_N=np.array([0, 0, 0, 1, 1, 1]))["MAE"]
        assert wide.high - wide.low > plain["MAE"].high - plain["MAE"].low

    def test_repeats_are_averaged(self) -> None:
        mean = Scores.averaged([_scores({"x": 0.2, "y": 0.4}), _scores({"x": 0.4, "y": 0.8})])
        assert mean.table_NK[:, 0] == pytest.approx([0.3, 0.6], abs=3e-3)
        with pytest.raises(DataError, match="same images"):
            Scores.averaged([_scores({"x": 0.2}), _scores({"y": 0.2})])

    def test_spread_by_hand(self) -> None:
        found = spread([{"IoU": 0.1, "MAE": 1.0}, {"IoU": 0.3}, {"IoU": 0.5}])
        assert found == {"IoU": {"mean": pytest.approx(0.3), "deviation": pytest.approx(0.2)}}
        assert spread([{"IoU": 0.1}])["IoU"]["deviation"] is None


def test_sure_by_hand() -> None:
    """Only pixels where map and mask disagree count: 0 sure ones give 1, 128 gives almost 0."""
    mask = np.array([[255, 255, 0, 0]], np.uint8)
    for level, expected in ((0, 1.0), (64, 127 / 255), (127, 1 / 255)):
        found = heldout._sure(np.array([[level, 255, 0, 0]], np.uint8), mask)
        assert found == pytest.approx(expected)
    # Of two wrong pixels the mean; none: nothing is contradicted.
    assert heldout._sure(np.array([[0, 255, 255, 0]], np.uint8), mask) == 1.0
    assert heldout._sure(mask, mask) == 0.0
    void = np.array([[VOID, 255, 0, 0]], np.uint8)
    assert heldout._sure(np.array([[0, 255, 0, 0]], np.uint8), void) == 0.0, "nobody labelled it"


def _scores(errors: dict[str, float]) -> Scores:
    """Return scores whose MAE is known: a map of 1 on a mask of 1, less the error."""
    evaluator = Evaluator(protocol="raw", keys=("MAE",))
    for name, error in errors.items():
        value = round(255 * (1 - error))
        evaluator.add(name, np.full((4, 4), value, np.uint8), np.full((4, 4), 255, np.uint8))
    return Scores(evaluator)


def test_repeats_and_two_data_sets_with_names_in_common(
    crossval: Crossval, easy: Path, tmp_path: Path
) -> None:
    """Names start with their data set; an image has a map, and a chance to be wrong, a repeat."""
    other = copy(easy / "TrainDataset", tmp_path / "other")
    for path in (other / "Imgs").iterdir():
        # Another picture, so that the two are not copies.
        pixels = np.random.default_rng(len(path.stem)).integers(0, 255, (32, 32, 3), np.uint8)
        cv2.imwrite(str(path), np.roll(pixels, hash(path.stem) % 31, axis=0))
    out = tmp_path / "out"
    more = ("--dataset-path", str(other), "--folds", "2", "--repeats", "2", "--epochs", "1")
    more += ("--stage1-epochs", "0", "--no-group-copies", "--val-fraction", "0")
    assert crossval(out, *more) == 0
    summary = read_json(out / "summary.json")
    assert [fold["repeat"] for fold in summary["folds"]] == [1, 1, 2, 2]
    assert summary["splits"]["held_out"] == 36 and summary["best_epoch"] == {}
    assert len(list((out / "maps" / "repeat-2" / "other").glob("*.png"))) == 18
    assert all(len(one["IoU"]) == 2 for one in summary["suspects"])
    assert load_config(file=out / "fold-3" / "config.yaml").train.seed == 43
    values = {n: [float(rows(out, f)[n]["IoU"]) for f in range(1, 5) if n in rows(out, f)]
              for f in (1, 2) for n in rows(out, f)}  # fmt: skip
    never = sorted(name for name, found in values.items() if max(found) < 0.5)
    assert summary["wrong_always"] == never
    first = summary["suspects"][0]
    assert first["suspicion"] == max(one["suspicion"] for one in summary["suspects"])


QUICK = ("--epochs", "1", "--stage1-epochs", "0")


def made_from(data: Path, number: int, folder: Path) -> tuple[Path, list[str]]:
    """Make a data set, each image of which says that it comes from the image of that number."""
    generate_toy(folder, num_train=number, num_test=1, size=32, difficulty=0.1, seed=3)
    images = sorted((folder / "TrainDataset" / "Imgs").iterdir())
    lines = []
    for image, place in zip(images, range(number), strict=True):
        (source,) = (data / "Imgs").glob(f"{place}.*")
        row = {"image": str(image.relative_to(folder)), "sources": [{"path": str(source)}]}
        lines.append(json.dumps(row))
    (folder / "provenance.jsonl").write_text("\n".join(lines))
    return folder, [image.stem for image in images]


def test_leave_class_out(crossval: Crossval, easy: Path, tmp_path: Path, capsys) -> None:
    """Two classes and images of none: a fold for each class, and a score for its images alone."""
    data = copy(easy / "TrainDataset", tmp_path / "data")
    names = sorted(path.stem for path in (data / "Imgs").iterdir())
    lines = ["image,mask,class,group"]
    for number, name in enumerate(names):
        # A video that shows both classes: its frames of the other class are on neither side.
        video = "v" if number in (0, 1) else ""
        label = "" if number >= 14 else ("crab", "owl")[number % 2]
        suffix = next((data / "Imgs").glob(f"{name}.*")).suffix
        image = Path("Imgs") / f"{number}{suffix}"
        (data / "Imgs" / f"{name}{suffix}").rename(data / image)
        lines.append(f"{image},GT/{name}.png,{label},{video}")
    (data / "list.csv").write_text("\n".join(lines))
    made, own = made_from(data, 4, tmp_path / "made")
    out = tmp_path / "out"
    more = ("--leave-class-out", "--synthetic", str(made), *QUICK)
    assert crossval(out, *more, data=data / "list.csv") == 0
    words = said(capsys)
    assert "1 image on neither side" in words and "3 of 4 made images come from held-out" in words
    # Images 0 and 2 are crabs, 1 and 3 owls; 1 is apart from the crabs and 0 from the owls.
    for fold, kept in ((1, own[3]), (2, own[2])):
        samples = (out / f"fold-{fold}" / "samples.csv").read_text().splitlines()
        assert [row.split(",")[2] for row in samples if row.startswith("synthetic,")] == [kept]
    summary = read_json(out / "summary.json")
    assert [fold["name"] for fold in summary["folds"]] == ["1: crab", "2: owl"]
    assert [fold["images"] for fold in summary["folds"]] == [7, 7]
    assert summary["splits"]["held_out"] == 14 and summary["splits"]["images"] == 18
    assert "4 images have no score: no class is known" in (out / "summary.md").read_text()
    assert crossval(out, "--leave-class-out", "--folds", "3") == 2


def out_of_fold_and_best(run: Path) -> tuple[Path, Path]:
    return run / OUT_OF_FOLD / FINAL, run / "checkpoints" / "best.pt"


def test_images_without_an_object(crossval: Crossval, easy: Path, tmp_path: Path, capsys) -> None:
    """They are divided as well; masks are scored of the others, presence of both kinds."""
    empty = tmp_path / "empty"
    empty.mkdir()
    rng = np.random.default_rng(0)
    for number in range(12):
        cv2.imwrite(str(empty / f"{number}.png"), rng.integers(0, 255, (32, 32, 3), np.uint8))
    out = tmp_path / "out"
    assert crossval(out, "--folds", "2", "--negatives", str(empty), *QUICK) == 0
    summary = read_json(out / "summary.json")
    assert summary["splits"]["images"] == 30 and summary["splits"]["held_out"] == 18
    assert summary["empty_gt"] == "skip" and "AUROC" in summary["presence"]
    assert len(list((out / "maps" / "repeat-1").rglob("*.png"))) == 30
    splits = read_splits(out / "splits.json")
    assert [sum(i.size == "none" for i in splits.held_out(n)) for n in (1, 2)] == [6, 6]
    for number in (1, 2):
        # After one epoch the best weights are the last ones, and so is their calibration.
        files = out_of_fold_and_best(out / f"fold-{number}")
        final, best = (load_checkpoint(file).values["model"] for file in files)
        for name in ("temperature", "bias", "images"):
            name = f"presence.calibration.{name}"
            assert final[name] == best[name], name
        assert final["presence.calibration.images"] > 0
        assert final["presence.calibration.bias"] != 0


def test_images_that_cannot_be_read(crossval: Crossval, easy: Path, tmp_path: Path, capsys) -> None:
    data = copy(easy, tmp_path / "data")
    bad = sorted((data / "TrainDataset" / "Imgs").iterdir())[3]
    bad.write_bytes(bad.read_bytes()[:200])
    out = tmp_path / "out"
    skip = ("--unreadable", "skip", "data.max_unreadable=0.5")
    assert crossval(out, "--folds", "2", *QUICK, data=data) == 3
    assert crossval(out, "--folds", "2", *skip, *QUICK, data=data) == 0
    summary = read_json(out / "summary.json")
    assert summary["splits"]["held_out"] == 17
    assert sum(len(fold["unreadable"]) for fold in summary["folds"]) == 1
    assert "1 image could not be read" in (out / "summary.md").read_text()
