"""An evaluation into a folder that holds an earlier one of another kind, split or name."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
from evaluation.test_sensors import command
from helpers.maps import evaluate, pair, summary, write
from helpers.sensors import views

import camoxpert
from camoxpert.runs import per_image
from camoxpert.runs.origin import scored


def model_call(run: Path, *words: str | Path) -> int:
    return evaluate(str(run), *map(str, words))


def test_retention_of_an_earlier_call_stays_with_its_picture(
    tiny_run: Path, toy_data: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    shutil.copytree(toy_data / "TestDataset" / "toy", other)
    out = tmp_path / "out"
    words = ("-o", out, "--gallery", "0", "--no-intervals")
    corrupted = ("--corruptions", "contrast", "--severity", "1")
    assert model_call(tiny_run, "--data", toy_data, *words, *corrupted) == 0
    before = (out / "robustness" / "toy.jpg").read_bytes()
    assert model_call(tiny_run, "--data", other, *words) == 0
    first, second = summary(str(out))["results"]
    assert first["robustness"]["picture"] == "robustness/toy.jpg"
    assert (out / "robustness" / "toy.jpg").read_bytes() == before
    assert "robustness" not in second and second["dataset"] == "other"
    # A picture that is gone is no reason to lose the scores of this call.
    (out / "robustness" / "toy.jpg").unlink()
    assert model_call(tiny_run, "--data", other, *words) == 0
    assert summary(str(out))["results"][0]["robustness"]["picture"] == ""


def test_pairs_with_other_measures_stand_in_one_table(world: Path) -> None:
    for method, noise in (("third", 0.8), ("fourth", 1.2)):
        for index in range(50, 56):
            write(Path("more", method, "CAMO", f"camo_{index}.png"), pair(index, noise)[0])
    words = ("--gt", "data/CAMO", "-o", "out")
    assert evaluate("--predictions", "maps", *words) == 0
    assert evaluate("--predictions", "more", *words, "--measures", "fast") == 0
    pairs = summary("out")["comparisons"]
    assert len(pairs) == 2 and "wFmeasure" in set(pairs[0]["measures"]) - set(pairs[1]["measures"])
    page = Path("out/index.html").read_text()
    assert "good − bad" in page and "third − fourth" in page


def test_names_that_give_one_file_name_have_pictures_of_their_own(
    tiny_run: Path, toy_data: Path, tmp_path: Path
) -> None:
    for number, name in enumerate(("a b", "a_b", "a+b")):
        shutil.copytree(toy_data / "TestDataset" / "toy", tmp_path / name)
        for image in sorted((tmp_path / name / "Imgs").iterdir())[: number + 1]:
            image.unlink()
            (tmp_path / name / "GT" / f"{image.stem}.png").unlink()
    out = tmp_path / "out"
    words = ("-o", out, "--gallery", "1", "--no-intervals")
    assert model_call(tiny_run, "--data", tmp_path / "a b", tmp_path / "a_b", *words) == 0
    first = {
        entry["panel"]: (out / entry["panel"]).read_bytes() for entry in summary(out)["gallery"]
    }
    assert len(first) == 4
    assert model_call(tiny_run, "--data", tmp_path / "a+b", *words) == 0
    panels = [entry["panel"] for entry in summary(str(out))["gallery"]]
    assert len(set(panels)) == 6
    assert {name: (out / name).read_bytes() for name in first} == first


def test_tables_follow_their_results_to_new_names(world: Path) -> None:
    """The first of two methods whose names give one file name is scored on another data set."""
    for method in ("x y", "x+y"):
        source = "good" if method == "x y" else "bad"
        shutil.copytree(f"maps/{source}", f"sets/{method}")
        words = ("--gt", "data/CAMO", "--method", method, "-o", "out", "--gallery", "0")
        assert evaluate("--predictions", f"sets/{method}/CAMO", *words) == 0
    scores = json.loads(Path("out/scores.json").read_text())
    for entry in scores["results"]:
        entry["weights"] = f"of {entry['method']}"
    Path("out/scores.json").write_text(json.dumps(scores))
    expected = Path("out/per_image/x_y-2/CAMO.csv").read_bytes()
    words = ("--gt", "data/COD10K", "--method", "x y", "-o", "out", "--gallery", "0")
    assert evaluate("--predictions", "sets/x y/COD10K", *words) == 0
    # Other weights: the earlier scores of "x y" are gone, and "x+y" comes first.
    results = summary("out")["results"]
    assert [(e["method"], e["dataset"]) for e in results] == [("x+y", "CAMO"), ("x y", "COD10K")]
    assert Path("out/per_image/x_y/CAMO.csv").read_bytes() == expected
    for result in results:
        folder = Path("run")
        shutil.copytree("out", folder / "evaluation", dirs_exist_ok=True)
        assert len(per_image.image_scores(folder, results, result)) == result["num_images"]


@pytest.mark.parametrize("empty_gt", ["pysod", "skip", "correct"])
def test_images_without_an_object_are_neither_best_nor_worst(world: Path, empty_gt: str) -> None:
    for name in ("camo_50", "camo_52"):
        write(Path("data/CAMO/GT", f"{name}.png"), np.zeros((36, 48), np.uint8))
        for method in ("good", "bad"):
            write(Path("maps", method, "CAMO", f"{name}.png"), np.zeros((36, 48), np.uint8))
    words = ("--predictions", "maps", "--gt", "data/CAMO", "-o", "out", "--gallery", "2")
    assert evaluate(*words, "--empty-gt", empty_gt) == 0
    shown = [entry for entry in summary("out")["gallery"] if entry["kind"] in ("best", "worst")]
    assert len(shown) == 4 and not {e["name"] for e in shown} & {"camo_50", "camo_52"}


def test_images_that_were_left_out_have_no_scores(world: Path) -> None:
    """Every further column of the table describes a mask or an image."""
    write(Path("data/CAMO/GT/camo_50.png"), np.zeros((36, 48), np.uint8))
    words = ("--predictions", "maps/good/CAMO", "--gt", "data/CAMO", "-o", "out")
    assert evaluate(*words, "--empty-gt", "skip") == 0
    file = Path("out/per_image/good/CAMO.csv")
    with file.open() as stream:
        rows = {row["name"]: row for row in csv.DictReader(stream)}
    assert rows["camo_50"]["mask_fraction"] and not rows["camo_50"]["IoU"]
    found = per_image.read_image_scores(file)
    assert len(rows) == 6 and set(found) == set(rows) - {"camo_50"}
    measures = set(summary("out")["results"][0]["scores"])
    assert all(set(scores) <= measures for scores in found.values())


class TestSplits:
    @pytest.fixture
    def run(self, tiny_run: Path, tmp_path: Path) -> Path:
        return Path(shutil.copytree(tiny_run, tmp_path / "tiny"))

    def test_training_images_do_not_take_the_place_of_test_images(
        self, run: Path, toy_data: Path, capsys
    ) -> None:
        words = ("--gallery", "0", "--no-intervals")
        best = run / "checkpoints" / "best.pt"
        assert model_call(run, "--data", toy_data, *words) == 0
        (before,) = summary(run / "evaluation")["results"]
        assert model_call(run, "--data", toy_data, "--split", "train", *words) == 0
        test, train = summary(run / "evaluation")["results"]
        assert test == before and test["dataset"] == "toy" and test["split"] == "test"
        assert train["split"] == "train" and train["num_images"] == 40
        assert train["dataset"] != test["dataset"]
        # Of what is shared only the test images speak.
        assert [(row["dataset"], row["num_images"]) for row in scored(best)] == [("toy", 8)]
        assert model_call(run, "--data", toy_data, "--zoom", "--method", "mine", *words) == 0
        assert [row["dataset"] for row in scored(best)] == ["toy"]

    def test_other_images_of_the_same_name_are_told(
        self, run: Path, toy_data: Path, tmp_path: Path, capsys
    ) -> None:
        words = ("--gallery", "0", "--no-intervals")
        assert model_call(run, "--data", toy_data, *words) == 0
        fewer = tmp_path / "fewer"
        shutil.copytree(toy_data, fewer)
        first = min((fewer / "TestDataset" / "toy" / "Imgs").iterdir())
        (fewer / "TestDataset" / "toy" / "GT" / f"{first.stem}.png").unlink()
        first.unlink()
        capsys.readouterr()
        assert model_call(run, "--data", fewer, *words) == 0
        said = " ".join(capsys.readouterr().err.split())
        assert "The earlier scores of tiny on toy were those of other images" in said


def test_what_images_have_is_counted_among_the_scored(tmp_path: Path, toy_data: Path) -> None:
    data = views(tmp_path / "data")
    assert command(data, tmp_path, "--run-name", "r", "--no-test") == 0
    test = data / "TestDataset" / "toy"
    masks = sorted((test / "GT").iterdir())
    for mask in masks[:3]:
        cv2.imwrite(str(mask), np.zeros_like(cv2.imread(str(mask), cv2.IMREAD_GRAYSCALE)))
    for mask in masks[2:5]:
        next((test / "Depth").glob(f"{mask.stem}.*")).unlink()
    (found,) = camoxpert.evaluate(tmp_path / "r", data, empty_gt="skip", intervals=False)
    table = found.modalities
    assert table is not None and table.images == found.num_images == 5
    # Of the five that are scored two lack depth; of all eight five have it.
    assert table.have == {"depth": 3, "thermal": 5}
