"""Scores and pictures of a trained checkpoint, through the command line and below it."""

from __future__ import annotations

import csv
import json
import os
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from helpers.printed import complained

from camoxpert.cli import main
from camoxpert.data.files.manifest import load_eval
from camoxpert.data.loader import build_eval_loader
from camoxpert.errors import DataError
from camoxpert.evaluation.gallery import Gallery
from camoxpert.inference import engine
from camoxpert.inference.prediction import Prediction
from camoxpert.inference.predictor import load_predictor
from camoxpert.inference.score import score
from camoxpert.inference.sources import find_photos
from camoxpert.metrics import RESULT_KEYS, Evaluator
from camoxpert.pages.tables import text_table
from camoxpert.text import safe_name


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Three photos of different sizes in nested folders."""
    folder = tmp_path / "photos"
    (folder / "sub").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for name, size in (("a.jpg", (40, 60)), ("b.png", (33, 20)), ("sub/a.jpg", (64, 64))):
        cv2.imwrite(str(folder / name), rng.integers(0, 256, (*size, 3), dtype=np.uint8))
    return folder


def read(path: Path) -> np.ndarray:
    image = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
    assert image is not None
    return image


def scores_of(folder: Path) -> dict[str, float]:
    (result,) = json.loads((folder / "scores.json").read_text())["results"]
    return result["scores"]


class TestEvaluate:
    def test_table_json_and_per_image_rows_agree(
        self, tiny_run: Path, toy_data: Path, tmp_path: Path, capsys
    ) -> None:
        words = ["evaluate", str(tiny_run), "--data", str(toy_data), "-o", str(tmp_path)]
        assert main(words) == 0
        out = capsys.readouterr().out
        content = json.loads((tmp_path / "scores.json").read_text())
        (result,) = content["results"]
        with (tmp_path / "per_image" / "tiny" / "toy.csv").open() as file:
            rows = list(csv.DictReader(file))
        assert set(RESULT_KEYS) == set(result["scores"])
        assert len(rows) == result["num_images"] == 8
        for key in ("MAE", "Smeasure", "wFmeasure", "IoU"):
            mean = float(np.mean([float(row[key]) for row in rows]))
            assert mean == pytest.approx(result["scores"][key], abs=1e-9)
            assert f"{result['scores'][key]:.3f}" in out
        for entry in content["gallery"]:
            assert (tmp_path / entry["panel"]).is_file()
        assert {entry["kind"] for entry in content["gallery"]} == {"best", "worst"}
        best = [e["values"]["tiny"] for e in content["gallery"] if e["kind"] == "best"]
        assert best == sorted(best, reverse=True)

    def test_it_is_what_the_run_reported(
        self, tiny_run: Path, toy_data: Path, tmp_path: Path
    ) -> None:
        words = ["evaluate", str(tiny_run), "--data", str(toy_data), "-o", str(tmp_path)]
        assert main([*words, "--batch-size", "8"]) == 0
        own = scores_of(tiny_run / "evaluation")
        again = scores_of(tmp_path)
        assert again == own

    @pytest.mark.parametrize("batch_size", [1, 3])
    def test_batch_size_does_not_matter(
        self, tiny_run: Path, toy_data: Path, tmp_path: Path, batch_size: int
    ) -> None:
        words = ["evaluate", str(tiny_run), "--data", str(toy_data), "-o", str(tmp_path)]
        assert main([*words, "--batch-size", str(batch_size)]) == 0
        own = scores_of(tiny_run / "evaluation")
        again = scores_of(tmp_path)
        assert again == own  # to the last bit
        folders = (tmp_path, tiny_run / "evaluation")
        mine, theirs = (folder / "per_image" / "tiny" / "toy.csv" for folder in folders)
        assert mine.read_text() == theirs.read_text()

    def test_the_torch_path_gives_the_same_scores(self, tiny_run: Path, toy_data: Path) -> None:
        """The path of a GPU run, here on the CPU: results are read one batch late."""
        predictor = load_predictor(tiny_run, device="cpu")
        (manifest,) = load_eval(toy_data).values()
        both = []
        for on_device in (False, True):
            evaluator, seen = Evaluator(), []
            loader = build_eval_loader(
                manifest, predictor.config.data, batch_size=3, keep_images=True
            )
            score(
                predictor.model,
                loader,
                device=predictor.device,
                evaluator=evaluator,
                groups={pair.name: "toy" for pair in manifest.pairs},
                seen=lambda item, map_HW, row, seen=seen: seen.append((item.name, map_HW(), row)),
                on_device=on_device,
            )
            both.append((evaluator, seen))
        (host, host_seen), (device, device_seen) = both
        assert host.results() == pytest.approx(device.results(), abs=1e-12)
        assert host.data_hash() == device.data_hash()
        assert [name for name, _, _ in device_seen] == [pair.name for pair in manifest.pairs]
        for (name, a, row), (other, b, _) in zip(host_seen, device_seen, strict=True):
            assert name == other == row["name"] and row["group"] == "toy"
            assert np.array_equal(a, b)

    def test_scores_equal_pysodmetrics_on_the_saved_maps(
        self, tiny_run: Path, toy_data: Path, tmp_path: Path
    ) -> None:
        oracle = pytest.importorskip("py_sod_metrics")
        test = toy_data / "TestDataset" / "toy"
        assert (
            main(
                ["predict", str(tiny_run), str(test / "Imgs"), "-o", str(tmp_path), "--save", "map"]
            )
            == 0
        )
        measures = {
            "Smeasure": oracle.Smeasure(),
            "wFmeasure": oracle.WeightedFmeasure(),
            "MAE": oracle.MAE(),
        }
        for mask in sorted((test / "GT").iterdir()):
            prediction = read(tmp_path / "maps" / f"{mask.stem}.png")
            for measure in measures.values():
                measure.step(pred=prediction, gt=read(mask))
        keys = {"Smeasure": "sm", "wFmeasure": "wfm", "MAE": "mae"}
        own = scores_of(tiny_run / "evaluation")
        for name, measure in measures.items():
            assert own[name] == pytest.approx(float(measure.get_results()[keys[name]]), abs=2e-3)

    def test_json_on_stdout(self, tiny_run: Path, toy_data: Path, tmp_path: Path, capsys) -> None:
        words = ["evaluate", str(tiny_run), "--data", str(toy_data), "-o", str(tmp_path), "--json"]
        assert main(words) == 0
        assert set(json.loads(capsys.readouterr().out)["toy"]) == set(RESULT_KEYS)

    def test_faults_have_their_codes(self, tiny_run: Path, toy_data: Path, tmp_path: Path) -> None:
        assert main(["evaluate", str(tiny_run), "--data", str(tmp_path / "none")]) == 3
        broken = tmp_path / "data"
        shutil.copytree(toy_data, broken)
        next((broken / "TestDataset" / "toy" / "GT").iterdir()).unlink()
        out = tmp_path / "out"
        assert main(["evaluate", str(tiny_run), "--data", str(broken), "-o", str(out)]) == 3
        assert not out.exists()
        out.mkdir()
        (out / "mine.txt").write_text("x")
        assert main(["evaluate", str(tiny_run), "--data", str(toy_data), "-o", str(out)]) == 2

    def test_checkpoints_and_maps_are_written_alike(
        self, tiny_run: Path, toy_data: Path, tmp_path: Path, monkeypatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        test = toy_data / "TestDataset" / "toy"
        assert main(["evaluate", str(tiny_run), "--data", str(toy_data), "-o", "a"]) == 0
        assert main(["predict", str(tiny_run), str(test / "Imgs"), "-o", "p", "--save", "map"]) == 0
        maps = ["--predictions", "p/maps", "--gt", str(test / "GT"), "--method", "tiny"]
        assert main(["evaluate", *maps, "-o", "b"]) == 0
        trees = [
            {p.relative_to(folder).as_posix() for p in Path(folder).rglob("*") if p.is_file()}
            for folder in ("a", "b")
        ]
        assert trees[0] == trees[1] and "images/toy_best_1.jpg" in trees[0]
        assert {p.split("/")[0] for p in trees[0]} == {
            "scores.json", "scores.csv", "scores.md", "scores.tex",
            "per_image", "curves", "images", "index.html",
        }  # fmt: skip
        one, other = (json.loads(Path(folder, "scores.json").read_text()) for folder in "ab")
        assert set(one) == set(other)
        own = {"checkpoint", "weights", "img_size", "precision", "baseline", "zoom", "experts"}
        assert set(one["results"][0]) - own == set(other["results"][0]) - {
            "num_missing", "num_extra", "resize", "gt_threshold",
        }  # fmt: skip

    def test_a_second_data_set_stands_beside_the_first(
        self, tiny_run: Path, toy_data: Path, tmp_path: Path, capsys
    ) -> None:
        other = tmp_path / "other" / "TestDataset" / "second"
        shutil.copytree(toy_data / "TestDataset" / "toy", other)
        out = tmp_path / "out"
        words = ["evaluate", str(tiny_run), "--gallery", "1", "-o", str(out), "--data"]
        assert main([*words, str(toy_data)]) == 0
        assert main([*words, str(tmp_path / "other")]) == 0

        def results() -> list[str]:
            content = json.loads((out / "scores.json").read_text())
            return [entry["dataset"] for entry in content["results"]]

        assert results() == ["toy", "second"]
        assert len(list(out.glob("per_image/*/*.csv"))) == len(list(out.glob("curves/*.png"))) == 2
        assert len(list(out.glob("images/*.jpg"))) == 4
        # Scores of other weights under the same name are stale.
        content = json.loads((out / "scores.json").read_text())
        content["results"][0]["weights"] = "0" * 64
        (out / "scores.json").write_text(json.dumps(content))
        assert main([*words, str(tmp_path / "other")]) == 0
        assert results() == ["second"]
        assert "on toy were those of other weights" in " ".join(capsys.readouterr().err.split())
        assert len(list(out.glob("per_image/*/*.csv"))) == 1

    def test_files_of_the_first_release_are_replaced(
        self, tiny_run: Path, toy_data: Path, tmp_path: Path
    ) -> None:
        for name in ("toy.json", "toy.csv", "toy.png", "scores.csv", "scores.md", "scores.tex"):
            (tmp_path / name).write_text("{}")
        words = ["--gallery", "0", "--no-intervals", "-o", str(tmp_path)]
        assert main(["evaluate", str(tiny_run), "--data", str(toy_data), *words]) == 0
        assert not (tmp_path / "toy.json").exists() and (tmp_path / "scores.json").is_file()


class TestPredict:
    def test_outputs_have_the_original_size(
        self, tiny_run: Path, photos: Path, tmp_path: Path
    ) -> None:
        out = tmp_path / "out"
        assert (
            main(["predict", str(tiny_run), str(photos), "-o", str(out), "--batch-size", "2"]) == 0
        )
        for name, (height, width) in {"a": (40, 60), "b": (33, 20), "sub/a": (64, 64)}.items():
            probability = read(out / "maps" / f"{name}.png")
            mask = read(out / "masks" / f"{name}.png")
            cutout = read(out / "cutouts" / f"{name}.png")
            assert probability.shape == mask.shape == (height, width)
            assert set(np.unique(mask)) <= {0, 255}
            # Truncation: 0.5 < p maps to 127 or more.
            assert np.array_equal(mask > 0, probability > 127) or (probability == 127).any()
            assert cutout.shape == (height, width, 4)
            assert read(out / "overlays" / f"{name}.jpg").shape == (height, width, 3)
        with (out / "results.csv").open() as file:
            rows = {row["image"]: row for row in csv.DictReader(file)}
        assert set(rows) == {"a", "b", "sub/a"}
        assert rows["a"]["height"] == "40"

    def test_it_is_the_model_on_the_resized_image(
        self, tiny_run: Path, photos: Path, tmp_path: Path
    ) -> None:
        import torch

        predictor = load_predictor(tiny_run)
        image = cv2.cvtColor(read(photos / "b.png"), cv2.COLOR_BGR2RGB)
        by_hand = predictor.model(predictor.prepare(image)[None]).logits_B1HW
        by_hand = torch.nn.functional.interpolate(by_hand, size=(33, 20), mode="bilinear").sigmoid()
        out = tmp_path / "out"
        main(["predict", str(tiny_run), str(photos / "b.png"), "-o", str(out), "--save", "map"])
        wanted = (by_hand[0, 0].detach().numpy() * 255).astype(int)
        assert np.abs(read(out / "maps" / "b.png").astype(int) - wanted).max() <= 1

    def test_a_second_call_does_only_what_is_missing(
        self, tiny_run: Path, photos: Path, tmp_path: Path, capsys
    ) -> None:
        out = tmp_path / "out"
        words = ["predict", str(tiny_run), str(photos), "-o", str(out)]
        assert main(words) == 0
        (out / "masks" / "a.png").unlink()
        capsys.readouterr()
        assert main(words) == 0
        assert "1 images predicted, 2 were there already" in capsys.readouterr().out
        assert (out / "masks" / "a.png").is_file()
        assert main([*words, "--overwrite"]) == 0
        assert "3 images predicted;" in capsys.readouterr().out

    def test_an_unreadable_image_is_named_and_the_others_go_on(
        self, tiny_run: Path, photos: Path, tmp_path: Path, capsys
    ) -> None:
        data = (photos / "a.jpg").read_bytes()
        (photos / "broken.jpg").write_bytes(data[: len(data) // 2])
        assert main(["predict", str(tiny_run), str(photos), "-o", str(tmp_path / "out")]) == 3
        captured = capsys.readouterr()
        assert "broken.jpg" in captured.err and "3 images predicted" in captured.out
        assert not (tmp_path / "out" / "masks" / "broken.png").exists()

    def test_a_page_of_the_folder(self, tiny_run: Path, photos: Path, tmp_path: Path) -> None:
        (photos / "broken.jpg").write_bytes(b"no picture")
        out = tmp_path / "out"
        assert main(["predict", str(tiny_run), str(photos), "-o", str(out)]) == 3
        assert main(["report", str(out)]) == 0
        page = (out / "report.html").read_text()
        number = len(list((out / "maps").rglob("*.png")))
        assert f"<b>{number}</b><span>predicted" in page and "<b>1</b><span>failed" in page
        assert "broken.jpg is not an image" in page and "data:image/jpeg" in page
        # The ledger is only read: the same command still finds everything done.
        assert main(["predict", str(tiny_run), str(photos), "-o", str(out)]) == 3

    def test_inputs(self, photos: Path) -> None:
        assert [p.name for p in find_photos([str(photos)])] == ["a", "b", "sub/a"]
        assert [p.name for p in find_photos([str(photos / "*.jpg")])] == ["a"]
        table = photos / "list.csv"
        table.write_text("image\nsub/a.jpg\nb.png\n")
        assert [p.name for p in find_photos([str(table)])] == ["sub/a", "b"]
        table.write_text("image\n../../etc/passwd\n")
        with pytest.raises(DataError, match="may not lead out of it"):
            find_photos([str(table)])
        with pytest.raises(DataError, match="No file matches"):
            find_photos([str(photos / "nothing*")])
        with pytest.raises(DataError, match="both be written"):
            find_photos([str(photos / "a.jpg"), str(photos / "sub" / "a.jpg")])


def test_gallery_keeps_the_extremes_only() -> None:
    gallery = Gallery(2)
    made = []
    for value in (0.5, 0.1, 0.9, 0.3, 0.7):

        def picture(value: float = value) -> np.ndarray:
            made.append(value)
            return np.zeros((2, 2, 3), np.uint8)

        row = {"name": str(value), "wFmeasure": value, "Smeasure": 0, "MAE": 0}
        gallery.offer({**row, "object_fraction": 0.1}, picture)
        gallery.offer({**row, "object_fraction": 0.0}, picture)
    assert sorted(kept[2]["name"] for kept in gallery._kept["best"]) == ["0.7", "0.9"]
    assert sorted(kept[2]["name"] for kept in gallery._kept["worst"]) == ["0.1", "0.3"]


def test_table_is_aligned() -> None:
    rows = [
        {"dataset": "CAMO", "method": "m", "num_images": 250, "scores": {"MAE": 0.05}},
        {"dataset": "a long name", "method": "m", "num_images": 7, "scores": {"MAE": 0.5}},
    ]
    lines = text_table(rows, ("MAE",)).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert lines[2].endswith("0.050")


@pytest.mark.parametrize("name", ["../../x", "a b/c", "", ".."])
def test_names_stay_in_their_folder(name: str) -> None:
    safe = safe_name(name)
    assert safe and "/" not in safe and not safe.startswith(".")


def test_a_checkpoint_brings_its_own_settings(tiny_run: Path, toy_data: Path) -> None:
    predictor = load_predictor(tiny_run)
    assert predictor.img_size == 32
    assert predictor.config.model.num_experts == 3
    assert not predictor.model.training
    assert list(load_eval(toy_data)) == ["toy"]


class TestWhatIsThereAlready:
    """A second call into a folder keeps only what it would have made itself."""

    def rows(self, out: Path) -> list[dict[str, str]]:
        with (out / "results.csv").open() as file:
            return list(csv.DictReader(file))

    def test_another_model_is_refused_and_overwrite_takes_it(
        self, tiny_run: Path, photos: Path, tmp_path: Path, capsys
    ) -> None:
        out, other = tmp_path / "out", tmp_path / "other.pt"
        content = torch.load(tiny_run / "checkpoints" / "best.pt", weights_only=True)
        for weights in (content["model"], (content["ema"] or {}).get("weights", {})):
            for weight in weights.values():
                weight += 0.01 if weight.is_floating_point() else 0
        torch.save(content, other)
        words = [str(photos), "-o", str(out), "--save", "map"]
        assert main(["predict", str(tiny_run), *words]) == 0
        before = (out / "maps" / "a.png").read_bytes()
        assert main(["predict", str(other), *words]) == 2
        said = " ".join(capsys.readouterr().err.split())
        assert "holds the results of 3 photos" in said and "other.pt" in said
        assert "--overwrite" in said and (out / "maps" / "a.png").read_bytes() == before
        # The shared weights of the run are the same model.
        assert main(["predict", str(tiny_run / "model"), *words]) == 0
        assert "3 were there already" in capsys.readouterr().out
        assert main(["predict", str(other), *words, "--overwrite"]) == 0
        assert (out / "maps" / "a.png").read_bytes() != before
        assert main(["predict", str(tiny_run), *words]) == 2

    def test_another_threshold_is_refused(
        self, tiny_run: Path, photos: Path, tmp_path: Path, capsys
    ) -> None:
        words = ["predict", str(tiny_run), str(photos), "-o", str(tmp_path / "out")]
        assert main(words) == 0
        assert main([*words, "--threshold", "0.4"]) == 2
        assert "threshold 0.5, now 0.4" in " ".join(capsys.readouterr().err.split())

    def test_a_replaced_photo_is_predicted_again(
        self, tiny_run: Path, photos: Path, tmp_path: Path, capsys
    ) -> None:
        out = tmp_path / "out"
        words = ["predict", str(tiny_run), str(photos), "-o", str(out), "--save"]
        assert main([*words, "map"]) == 0
        before = (out / "maps" / "b.png").read_bytes()
        kept = (photos / "b.png").stat()
        pixels = read(photos / "b.png")[::-1, ::-1]
        cv2.imwrite(str(photos / "b.png"), np.ascontiguousarray(pixels))
        os.utime(photos / "b.png", ns=(kept.st_atime_ns, kept.st_mtime_ns))
        capsys.readouterr()
        assert main([*words, "mask"]) == 0
        assert main([*words, "map"]) == 0
        said = capsys.readouterr().out
        # Its mask is of the new photo, and its old map does not count as made.
        assert "1 images predicted, 2 were there already" in said
        assert (out / "maps" / "b.png").read_bytes() != before

    def test_a_copied_data_set_is_the_same(
        self, tiny_run: Path, photos: Path, tmp_path: Path, capsys
    ) -> None:
        words = ["-o", str(tmp_path / "out"), "--save", "map"]
        assert main(["predict", str(tiny_run), str(photos), *words]) == 0
        moved = tmp_path / "moved"
        shutil.copytree(photos, moved)
        shutil.rmtree(photos)
        assert main(["predict", str(tiny_run), str(moved), *words]) == 0
        assert "3 were there already" in capsys.readouterr().out

    def test_other_photos_of_the_same_name_are_refused(
        self, tiny_run: Path, photos: Path, tmp_path: Path, capsys
    ) -> None:
        words = ["-o", str(tmp_path / "out"), "--save", "map"]
        assert main(["predict", str(tiny_run), str(photos / "a.jpg"), *words]) == 0
        assert main(["predict", str(tiny_run), str(photos / "sub" / "a.jpg"), *words]) == 3
        assert "other photos under the same names" in " ".join(capsys.readouterr().err.split())

    def test_pictures_of_unknown_origin_are_refused(
        self, tiny_run: Path, photos: Path, tmp_path: Path, capsys
    ) -> None:
        out = tmp_path / "out"
        (out / "maps").mkdir(parents=True)
        (out / "maps" / "a.png").write_bytes(b"somebody else's")
        words = ["predict", str(tiny_run), str(photos), "-o", str(out), "--save", "map"]
        assert main(words) == 2
        assert (out / "maps" / "a.png").read_bytes() == b"somebody else's"
        assert main([*words, "--overwrite"]) == 0
        assert read(out / "maps" / "a.png").shape == (40, 60)

    def test_each_image_has_one_row(self, tiny_run: Path, photos: Path, tmp_path: Path) -> None:
        out = tmp_path / "out"
        words = ["predict", str(tiny_run), str(photos), "-o", str(out), "--save"]
        assert main([*words, "map"]) == 0
        assert main([*words, "mask"]) == 0
        assert [row["image"] for row in self.rows(out)] == ["a", "b", "sub/a"]
        # --overwrite of one photo keeps the rows of the others.
        one = ["predict", str(tiny_run), str(photos / "a.jpg"), "-o", str(out), "--overwrite"]
        assert main(one) == 0
        assert [row["image"] for row in self.rows(out)] == ["a", "b", "sub/a"]
        # The table is written from the ledger: one that is lost comes back.
        (out / "results.csv").unlink()
        assert main([*words, "map"]) == 0
        assert [row["image"] for row in self.rows(out)] == ["a", "b", "sub/a"]

    @pytest.mark.parametrize("writers", [1, 4])
    def test_a_full_disk_loses_no_finished_photo(
        self, tiny_run: Path, photos: Path, tmp_path: Path, monkeypatch, writers: int, capsys
    ) -> None:
        """Every row has its picture, every other photo is predicted by the next call."""
        whole = tmp_path / "whole"
        words = ["predict", str(tiny_run), str(photos), "--save", "map", "--batch-size", "1", "-o"]
        assert main([*words, str(whole)]) == 0
        monkeypatch.setattr(engine, "FINISHERS", writers)
        save = Prediction.save

        def fails(self: Prediction, folder: Path, kinds: list[str]) -> list[Path]:
            if self.name == "b":
                raise DataError("No space left on device.")
            return save(self, folder, kinds)

        out = tmp_path / "out"
        monkeypatch.setattr(Prediction, "save", fails)
        assert main([*words, str(out)]) == 3
        assert "No space left" in complained(capsys)
        written = [row["image"] for row in self.rows(out)]
        assert written == ["a"]
        assert all((out / "maps" / f"{name}.png").is_file() for name in written)
        monkeypatch.setattr(Prediction, "save", save)
        assert main([*words, str(out)]) == 0
        there = len(written)
        expected = f"{3 - there} images predicted, {there} were there already"
        assert expected in capsys.readouterr().out
        for path in (whole / "maps").rglob("*.png"):
            assert (out / path.relative_to(whole)).read_bytes() == path.read_bytes()
