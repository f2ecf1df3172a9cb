"""Reports and comparisons of cross-validations, and images that are special to them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
from helpers.folds import copy, result, rows
from helpers.printed import said

from camoxpert.cli import main
from camoxpert.config import load_config
from camoxpert.crossval import heldout
from camoxpert.crossval.collect import collect, compare_methods
from camoxpert.crossval.heldout import FINAL, OUT_OF_FOLD
from camoxpert.crossval.report import PAGE, remarks
from camoxpert.crossval.summary import spread
from camoxpert.data.files.folds import read_splits
from camoxpert.data.files.labels import VOID
from camoxpert.errors import DataError
from camoxpert.files import read_json
from camoxpert.metrics import Evaluator
from camoxpert.metrics.statistics import Scores, compare, confidence_intervals
from camoxpert.runs.checkpoint import load_checkpoint
from camoxpert.synthesis.toy import generate_toy

pytestmark = pytest.mark.slow
Crossval = Callable[..., int]


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

    def test_the_page_finds_the_other_method_from_anywhere(
        self, crossval: Crossval, finished: Path, tmp_path: Path, monkeypatch, capsys
    ) -> None:
        place = tmp_path / "place"
        ours, theirs = copy(finished, place / "ours"), copy(finished, place / "theirs")
        monkeypatch.chdir(place)
        assert crossval(Path("ours"), "--folds", "3", "--compare-with", "theirs") == 0
        (before,) = read_json(ours / "summary.json")["comparisons"]
        monkeypatch.chdir(ours)
        assert main(["report", str(ours)]) == 0
        assert "gone" not in said(capsys)
        shutil.move(place, tmp_path / "moved")
        ours, theirs = (tmp_path / "moved" / name for name in ("ours", "theirs"))
        monkeypatch.chdir(tmp_path)
        assert main(["report", str(ours)]) == 0
        (after,) = read_json(ours / "summary.json")["comparisons"]
        assert after["measures"] == before["measures"] and after["place"] == before["place"]
        shutil.rmtree(theirs)
        for _ in range(2):
            capsys.readouterr()
            assert main(["report", str(ours)]) == 0
            assert "its comparison stays as it was" in said(capsys)
            assert read_json(ours / "summary.json")["comparisons"] == [after]

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
    # Every repeat holds it out once; it is one image.
    twice = {**summary, "splits": {**summary["splits"], "repeats": 2}}
    twice["folds"] = [*summary["folds"], *summary["folds"]]
    assert "1 image could not be read" in remarks(twice)[2]
    assert "images have no score" not in " ".join(remarks(twice))
