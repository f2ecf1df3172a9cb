"""Score any model's maps through the command line: what is found, refused, written and kept."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
from helpers.maps import CAMO, evaluate, listing, pair, summary, write
from helpers.pages import active_parts
from helpers.printed import complained
from PIL import Image

from camoxpert.errors import ConfigError, DataError
from camoxpert.evaluation.maps.masks import find_masks
from camoxpert.metrics import FAST_KEYS, KNOWN_KEYS, RESULT_KEYS, Evaluator


class TestFinding:
    def test_methods_times_data_sets(self, world: Path, capsys) -> None:
        assert evaluate("--predictions", "maps", "--gt", "data") == 0
        results = summary()["results"]
        assert [(r["dataset"], r["method"], r["num_images"]) for r in results] == [
            ("CAMO", "bad", 6), ("CAMO", "good", 6), ("COD10K", "bad", 12), ("COD10K", "good", 12),
        ]  # fmt: skip
        scores = {(r["dataset"], r["method"]): r["scores"] for r in results}
        for dataset in ("CAMO", "COD10K"):
            assert scores[dataset, "good"]["wFmeasure"] > scores[dataset, "bad"]["wFmeasure"] + 0.05
        direct = Evaluator()
        for index in range(50, 56):
            direct.add(f"camo_{index}", *pair(index, 0.5))
        assert scores["CAMO", "good"] == direct.results()
        out = capsys.readouterr().out
        assert f"{scores['CAMO', 'good']['Smeasure']:.3f}*" in out

    @pytest.mark.parametrize(
        ("predictions", "gt"),
        [
            ("maps/good/CAMO", "data/CAMO/GT"),
            ("maps/good/CAMO", "data/CAMO"),
            ("maps/good", "data/CAMO"),
            ("maps/good", "data/CAMO/GT"),
        ],
    )
    def test_every_way_to_name_one_set(self, world: Path, predictions: str, gt: str) -> None:
        assert evaluate("--predictions", predictions, "--gt", gt) == 0
        (result,) = summary()["results"]
        assert (result["method"], result["dataset"], result["num_images"]) == ("good", "CAMO", 6)

    def test_a_yaml_list(self, world: Path) -> None:
        (world / "list.yaml").write_text(
            "datasets:\n  Hidden: {gt: data/CAMO/GT, images: data/CAMO/Imgs}\n"
            "methods:\n  first: {Hidden: maps/good/CAMO}\n  second: maps/bad/CAMO\n"
        )
        assert evaluate("--list", "list.yaml") == 0
        found = [(r["dataset"], r["method"]) for r in summary()["results"]]
        assert found == [("Hidden", "first"), ("Hidden", "second")]

    @pytest.mark.parametrize(
        ("text", "says"),
        [
            ("datasets: {}\nmethods: {a: b}\n", "two tables"),
            ("datasets: {X: data/CAMO/GT}\nmethods: {a: {Y: maps}}\n", "unknown data set Y"),
            ("datasets: {X: data}\nmethods: {a: maps}\n", "holds no masks"),
            ("datasets: {X: {mask: data}}\nmethods: {a: maps}\n", "give a folder, or"),
            ("datasets: {X: data/CAMO/GT}\nmethods: {a: nowhere}\n", "no folder"),
            ("datasets: {X: data/CAMO/GT}\nmethods: {a: b}\nextra: 1\n", "extra"),
        ],
    )
    def test_faulty_lists(self, world: Path, capsys, text: str, says: str) -> None:
        (world / "list.yaml").write_text(text)
        assert evaluate("--list", "list.yaml") in (2, 3)
        assert says in " ".join(capsys.readouterr().err.split())

    def test_noncam_masks_are_left_out_and_said(self, world: Path, capsys) -> None:
        write(world / "data/COD10K/GT/COD10K-NonCAM-5-Other-1.png", np.zeros((36, 48), np.uint8))
        words = ("--predictions", "maps/good/COD10K", "--gt", "data/COD10K/GT")
        assert evaluate(*words) == 0
        assert "1 images without a camouflaged object are left out" in complained(capsys)
        assert evaluate(*words, "--noncam", "include") == 3
        assert "COD10K-NonCAM-5-Other-1" in capsys.readouterr().err


class TestNothingSilently:
    """Scripts that score the intersection of names miss each of these faults."""

    def run(self, capsys, *words: str) -> str:
        assert evaluate(*words) == 3
        assert not Path("evaluation").exists()
        return " ".join(capsys.readouterr().err.split())

    def test_missing_extra_and_other_files_are_listed_together(self, world: Path, capsys) -> None:
        folder = world / "maps/good/CAMO"
        (folder / "camo_51.png").unlink()
        (folder / "camo_52.png").rename(folder / "wrong name.png")
        (folder / "maps.npy").write_text("x")
        (folder / ".DS_Store").write_text("x")
        said = self.run(capsys, *CAMO)
        assert "2 of 6 masks have no map: camo_51, camo_52" in said
        assert "1 maps have no mask: wrong name" in said
        assert "not images: maps.npy" in said
        (folder / "maps.npy").unlink()
        assert evaluate(*CAMO, "--allow-missing", "--allow-extra") == 0
        (result,) = summary()["results"]
        assert (result["num_images"], result["num_missing"], result["num_extra"]) == (4, 2, 1)

    def test_a_data_set_without_maps(self, world: Path, capsys) -> None:
        for path in (world / "maps/bad/CAMO").iterdir():
            path.unlink()
        (world / "maps/bad/CAMO").rmdir()
        said = self.run(capsys, "--predictions", "maps", "--gt", "data")
        assert "bad has no folder for the data set CAMO" in said
        assert evaluate("--predictions", "maps", "--gt", "data", "--allow-missing") == 0
        assert len(summary()["results"]) == 3

    def test_methods_with_maps_of_other_images_do_not_share_a_table(
        self, world: Path, capsys
    ) -> None:
        (world / "maps/bad/CAMO/camo_51.png").unlink()
        words = ("--predictions", "maps/bad", "maps/good", "--gt", "data/CAMO", "--allow-missing")
        assert "different images (bad 5, good 6)" in self.run(capsys, *words)

    def test_unusable_files_are_listed_by_kind(self, world: Path, capsys) -> None:
        folder = world / "maps/good/CAMO"
        prediction, mask = pair(51, 0.5)
        write(folder / "camo_50.png", prediction[:20])
        write(folder / "camo_51.png", np.dstack([prediction, prediction // 2, prediction]))
        whole = (folder / "camo_52.png").read_bytes()
        (folder / "camo_52.png").write_bytes(whole[: len(whole) // 2])
        (folder / "camo_53.png").write_text("not a picture")
        write(world / "data/CAMO/GT/camo_54.png", mask // 2)
        Image.fromarray(np.dstack([prediction] * 3 + [mask])).save(folder / "camo_55.png")
        said = self.run(capsys, *CAMO)
        for text in (
            "1 maps of another size than their mask (--resize bilinear resizes them): camo_50 "
            "(48x20",
            "4 maps that are not usable:",
            "camo_51.png is in colour",
            "camo_52.png",
            "camo_53.png",
            "camo_55.png has transparent pixels",
            "1 masks with other levels than 0 and 255",
            "camo_54.png (0, 127)",
        ):
            assert text in said, text

    def test_opting_in_to_resizing_and_grey_masks(self, world: Path) -> None:
        assert evaluate(*CAMO) == 0
        before = summary()["results"][0]
        for index in range(50, 56):
            path = world / f"data/CAMO/GT/camo_{index}.png"
            write(path, cv2.imread(str(path), 0) // 2)
            path = world / f"maps/good/CAMO/camo_{index}.png"
            write(path, cv2.resize(cv2.imread(str(path), 0), None, fx=2, fy=2))
        words = ("--resize", "bilinear", "--gt-threshold", "100", "-o", "second")
        assert evaluate(*CAMO, *words) == 0
        after = summary("second")["results"][0]
        assert after["data_hash"] == before["data_hash"]
        assert after["scores"]["Smeasure"] == pytest.approx(before["scores"]["Smeasure"], abs=0.03)
        assert after["resize"] == "bilinear" and after["gt_threshold"] == 100

    def test_maps_and_masks_in_every_harmless_encoding(self, world: Path) -> None:
        assert evaluate(*CAMO) == 0
        folder, truth = world / "maps/good/CAMO", world / "data/CAMO/GT"
        grey = {i: cv2.imread(str(folder / f"camo_{i}.png"), 0) for i in range(50, 56)}
        masks = {i: cv2.imread(str(truth / f"camo_{i}.png"), 0) for i in range(50, 56)}
        write(folder / "camo_50.png", np.dstack([grey[50]] * 3))
        write(folder / "camo_51.png", grey[51].astype(np.uint16) * 257)
        image = Image.fromarray(grey[52]).convert("P")
        image.putpalette([value for level in range(256) for value in (level,) * 3])
        image.save(folder / "camo_52.png")
        write(truth / "camo_53.png", masks[53] // 255)
        Image.fromarray(masks[54] > 0).save(truth / "camo_54.png")
        write(truth / "camo_55.png", masks[55].astype(np.uint16) * 257)
        assert evaluate(*CAMO, "-o", "second") == 0
        first, second = (summary(folder)["results"][0] for folder in ("evaluation", "second"))
        assert first["scores"] == second["scores"]
        assert first["data_hash"] == second["data_hash"]

    def test_zero_one_maps_under_raw(self, world: Path, capsys) -> None:
        for path in (world / "maps/good/CAMO").iterdir():
            write(path, (cv2.imread(str(path), 0) > 127).astype(np.uint8))
        assert "nearly black" in self.run(capsys, *CAMO, "--protocol", "raw")
        assert evaluate(*CAMO) == 0

    def test_a_threshold_leaves_plain_masks_alone(self, world: Path, capsys) -> None:
        assert evaluate(*CAMO, "-o", "a") == 0
        for path in (world / "data/CAMO/GT").iterdir():
            write(path, cv2.imread(str(path), 0) // 255)
        assert evaluate(*CAMO, "--gt-threshold", "128", "-o", "b") == 0
        assert summary("a")["results"][0]["scores"] == summary("b")["results"][0]["scores"]
        write(world / "data/CAMO/GT/camo_50.png", pair(50, 1)[1] // 3)
        assert "no object would be left" in self.run(capsys, *CAMO, "--gt-threshold", "128")

    def test_sixteen_bits_of_unclear_scale(self, world: Path, capsys) -> None:
        path = world / "maps/good/CAMO/camo_50.png"
        write(path, cv2.imread(str(path), 0).astype(np.uint16))
        assert "its scale is unclear" in self.run(capsys, *CAMO)

    def test_folders_that_hold_nothing_are_named(self, world: Path, capsys) -> None:
        both = ("--predictions", "maps", "--gt", "data")
        (world / "data/NC4K/masks_are_elsewhere").mkdir(parents=True)
        assert "hold no masks: NC4K" in self.run(capsys, *both)
        (world / "data/NC4K/masks_are_elsewhere").rmdir()
        (world / "data/NC4K").rmdir()
        (world / "maps/later/out").mkdir(parents=True)
        assert "hold no maps for CAMO, COD10K: later" in self.run(capsys, *both)
        (world / "maps/later/out").rmdir()
        (world / "maps/later").rmdir()
        (world / "maps/good/camo").mkdir()
        assert "are both named like the data set CAMO" in self.run(capsys, *both)
        (world / "maps/good/camo").rmdir()
        (world / "maps/good/NC4K").mkdir()
        assert evaluate(*both) == 0
        assert "no such data set: NC4K" in complained(capsys)

    def test_a_set_without_any_object_and_skip(self, world: Path, capsys) -> None:
        for path in (world / "data/CAMO/GT").iterdir():
            write(path, np.zeros((36, 48), np.uint8))
        said = self.run(capsys, *CAMO, "--empty-gt", "skip")
        assert "good on CAMO: none of the 6 images has an object" in said

    def test_names_that_are_no_utf8(self, world: Path) -> None:
        for folder in ("maps/good/CAMO", "data/CAMO/GT"):
            path = os.fsencode(world / folder)
            Path(os.fsdecode(path + b"/camo_50.png")).rename(os.fsdecode(path + b"/caf\xe9.png"))
        assert evaluate(*CAMO, "--ledger", "led.jsonl") == 0
        assert b"caf\xe9" in Path("evaluation/per_image/good/CAMO.csv").read_bytes()

    def test_two_files_of_one_name(self, world: Path, capsys) -> None:
        write(world / "maps/good/CAMO/camo_50.jpg", pair(50, 1)[0])
        assert "have the same name" in self.run(capsys, *CAMO)


class TestFlags:
    @pytest.mark.parametrize(
        ("words", "says"),
        [
            ([], "Give a checkpoint"),
            (["run", "--predictions", "maps"], "one at a time"),
            (["--predictions", "maps"], "belong together"),
            (["--list", "x.yaml", "--gt", "data"], "leave the others out"),
            ([*CAMO, "--measures", "wfmeasur"], "Did you mean wFmeasure"),
            ([*CAMO, "--gt-threshold", "255"], "0..254"),
            ([*CAMO, "--data", "data"], "--data belongs to a checkpoint"),
            ([*CAMO, "--device", "cpu"], "--device belongs to a checkpoint"),
            ([*CAMO, "--measures", ","], "names no measure"),
            (["run", "--measures", "fast"], "belongs to prediction maps"),
            ([*CAMO, "--images", "a", "b"], "one for each"),
            (
                ["--predictions", "maps/good", "maps/bad", "--gt", "data", "--method", "x"],
                "renames a single method",
            ),
        ],
    )
    def test_contradictions_are_refused(self, world: Path, capsys, words, says) -> None:
        assert evaluate(*words) == 2
        assert says in " ".join(capsys.readouterr().err.split())

    def test_measures(self, world: Path, capsys) -> None:
        assert evaluate(*CAMO, "--measures", "fast", "boundaryiou", "--json") == 0
        assert set(json.loads(capsys.readouterr().out)["CAMO"]) == {*FAST_KEYS, "BoundaryIoU"}
        pytest.importorskip("skimage")
        assert evaluate(*CAMO, "--measures", "all", "--format", "csv") == 0
        head = capsys.readouterr().out.splitlines()[0].split(",")
        assert head[3 : 3 + len(KNOWN_KEYS)] == list(KNOWN_KEYS)

    def test_torch_is_not_needed(self, world: Path) -> None:
        code = (
            "import sys; sys.modules['torch'] = None\n"
            "from camoxpert.cli import main\n"
            f"sys.exit(main(['evaluate', *{CAMO!r}]))"
        )
        root = Path(__file__).parents[2]
        done = subprocess.run(
            [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(root)}, check=False
        )
        assert done.returncode == 0


class TestWritten:
    def test_files_agree_with_each_other(self, world: Path) -> None:
        assert evaluate("--predictions", "maps", "--gt", "data", "-o", "out") == 0
        for result in summary("out")["results"]:
            path = Path("out/per_image", result["method"], f"{result['dataset']}.csv")
            with path.open() as file:
                rows = list(csv.DictReader(file))
            assert len(rows) == result["num_images"]
            mean = np.mean([float(row["wFmeasure"]) for row in rows])
            assert mean == pytest.approx(result["scores"]["wFmeasure"])
            low, high = result["intervals"]["wFmeasure"]
            assert low < mean < high
        with Path("out/scores.csv").open() as file:
            table = {(r["dataset"], r["method"]): r for r in csv.DictReader(file)}
        assert float(table["CAMO", "good"]["MAE"]) == summary("out")["results"][1]["scores"]["MAE"]
        assert "**" in Path("out/scores.md").read_text()
        latex = Path("out/scores.tex").read_text()
        assert latex.count(r"\begin{tabular}") == latex.count(r"\end{tabular}") == 1
        rows = [line for line in latex.splitlines() if line.endswith(r"\\")]
        assert {row.count("&") for row in rows} == {1 + len(RESULT_KEYS)}
        for name in ("CAMO", "COD10K"):
            assert cv2.imread(f"out/curves/{name}.png") is not None

    def test_breakdown_comparison_and_gallery(self, world: Path) -> None:
        assert evaluate("--predictions", "maps", "--gt", "data", "--gallery", "2") == 0
        content = summary()
        result = content["results"][3]
        assert list(result["breakdown"]["class"]) == ["Aquatic", "Terrestrial"]
        assert set(result["breakdown"]["sub-class"]) == {
            "Aquatic/Crab", "Aquatic/Frog", "Terrestrial/Cat",
        }  # fmt: skip
        assert result["breakdown"]["class"]["Aquatic"]["images"] == 8
        shares = result["breakdown"]["object size"].values()
        assert sum(part["images"] for part in shares) == 12
        (_, cod) = content["comparisons"]
        assert (cod["a"], cod["b"]) == ("good", "bad")
        assert cod["measures"]["wFmeasure"]["p_value"] < 0.01
        assert cod["measures"]["MAE"]["difference"] < 0
        kinds = {(e["dataset"], e["kind"]) for e in content["gallery"]}
        assert kinds == {(d, k) for d in ("CAMO", "COD10K") for k in ("best", "worst", "disputed")}
        for entry in content["gallery"]:
            assert cv2.imread(str(Path("evaluation", entry["panel"]))) is not None
        best = [e for e in content["gallery"] if (e["dataset"], e["kind"]) == ("COD10K", "best")]
        worst = [e for e in content["gallery"] if (e["dataset"], e["kind"]) == ("COD10K", "worst")]
        mean = [np.mean(list(e["values"].values())) for e in (*best, *reversed(worst))]
        assert len(mean) == 4 and mean == sorted(mean, reverse=True)

    def test_the_page_is_self_contained_and_escapes(self, world: Path) -> None:
        (world / "maps/good").rename(world / "maps/<b>good")
        assert evaluate("--predictions", "maps", "--gt", "data") == 0
        page = Path("evaluation/index.html").read_text()
        assert "<b>good" not in page and "&lt;b&gt;good" in page
        assert active_parts(page) == []
        assert page.count("data:image/jpeg") == len(summary()["gallery"])
        assert "Paired differences" in page and "By class" in page
        assert str(world) not in page

    def test_an_evaluation_never_overwrites_another_by_itself(self, world: Path) -> None:
        assert evaluate(*CAMO) == evaluate(*CAMO) == 0
        assert Path("evaluation/scores.json").is_file() and Path("evaluation-2").is_dir()

    def test_an_output_folder_keeps_what_is_not_its_own(self, world: Path, capsys) -> None:
        own = world / "photos" / "gallery" / "holiday.jpg"
        own.parent.mkdir(parents=True)
        own.write_text("x")
        assert evaluate(*CAMO, "-o", "photos") == 2
        assert "holds other files (gallery ...)" in " ".join(capsys.readouterr().err.split())
        assert own.read_text() == "x" and listing(world / "photos") == {"gallery"}
        assert evaluate(*CAMO, "-o", str(own)) == 2
        assert evaluate(*CAMO, "-o", str(own / "below")) == 2

    def test_a_list_that_was_tampered_with_reaches_nothing(self, world: Path, capsys) -> None:
        assert evaluate(*CAMO, "-o", "out") == 0
        content = summary("out")
        content["files"].append("../data/CAMO/GT/camo_50.png")
        Path("out/scores.json").write_text(json.dumps(content))
        assert evaluate(*CAMO, "-o", "out") == 2
        assert "outside its folder" in " ".join(capsys.readouterr().err.split())
        assert Path("data/CAMO/GT/camo_50.png").is_file()

    def test_names_that_make_one_file_name(self, world: Path) -> None:
        for name in ("a b", "A_b", "_x$1$"):
            (world / "maps" / name).mkdir()
            (world / "maps" / name / "CAMO").symlink_to(world / "maps/good/CAMO")
        assert evaluate("--predictions", "maps", "--gt", "data/CAMO") == 0
        assert listing(Path("evaluation/per_image")) == {
            "a_b",
            "A_b-2",
            "_x_1_",
            "good",
            "bad",
        } or (len(listing(Path("evaluation/per_image"))) == 5)
        assert Path("evaluation/curves/CAMO.png").is_file()

    def test_pictures_show_what_the_scores_mean(self, world: Path) -> None:
        """Maps of 85 on the object are perfect after the stretch, and the picture shows it."""
        for index in range(50, 56):
            write(world / f"maps/faint/camo_{index}.png", pair(index, 0.5)[1] // 3)
        words = ("--gt", "data/CAMO/GT", "--gallery", "1", "-o")
        blue = {}
        for protocol in ("pysod", "raw"):
            picks = ("--predictions", "maps/faint", *words, protocol, "--protocol", protocol)
            assert evaluate(*picks) == 0
            panel = cv2.imread(f"{protocol}/images/CAMO_best_1.jpg").astype(int)
            last = panel[20:, panel.shape[1] * 2 // 3 :]
            blue[protocol] = ((last[..., 0] - last[..., 1]) > 60).mean()
        assert blue["pysod"] < 0.01 < blue["raw"]

    def test_images_of_other_sizes_are_no_reason_to_stop(self, world: Path) -> None:
        for path in (world / "data/CAMO/Imgs").iterdir():
            path.write_bytes(b"")
        assert evaluate(*CAMO) == 0
        assert len(summary()["gallery"]) == 12

    def test_images_without_an_object(self, world: Path) -> None:
        write(world / "data/CAMO/GT/camo_50.png", np.zeros((36, 48), np.uint8))
        counts = {}
        for option in ("pysod", "skip", "correct"):
            assert evaluate(*CAMO, "--empty-gt", option, "-o", option) == 0
            counts[option] = summary(option)["results"][0]
        assert counts["skip"]["num_images"] == 5 and counts["skip"]["num_skipped"] == 1
        assert counts["skip"]["data_hash"] == counts["pysod"]["data_hash"]
        assert counts["skip"]["scores"]["IoU"] > counts["pysod"]["scores"]["IoU"]


def test_images_and_masks_must_pair_up(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no folder"):
        find_masks([tmp_path / "none"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no masks found"):
        find_masks([tmp_path / "empty"])
    with pytest.raises(ConfigError, match="one for each"):
        find_masks([tmp_path], images=[tmp_path, tmp_path])
    with pytest.raises(DataError, match="--images: There is no folder"):
        find_masks([tmp_path], images=[tmp_path / "none"])
