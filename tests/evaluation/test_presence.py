"""Is anything hidden at all: what evaluate, predict and their pages say of it."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from helpers.maps import evaluate, write

import camoxpert
from camoxpert.cli import main
from camoxpert.config import build_config, to_dict
from camoxpert.errors import ConfigError
from camoxpert.inference.predictor import Predictor, load_predictor
from camoxpert.inference.video import FrameStages, VideoOptions
from camoxpert.metrics.presence import PROBABILITY_KEYS
from camoxpert.models.camoxpert import build_model
from camoxpert.runs.checkpoint import FORMAT, Checkpoint
from camoxpert.runs.share import write_shared
from camoxpert.synthesis.toy import toy_pair

TINY = {
    "model.backbone": "tiny_test", "model.pretrained": False, "model.width": 16,
    "model.detail_width": 8, "model.num_experts": 2, "data.img_size": 32,
}  # fmt: skip


def model_file(folder: Path, presence: str, *, sure: bool = False) -> Path:
    """Write an untrained model; with the head its presence follows the stride-32 features."""
    torch.manual_seed(1)
    model = build_model(build_config(TINY | {"model.presence": presence}).model)
    if sure:
        # Edges alone count, a thousandfold: every map reaches from 0 to 1.
        head = model.decoder.detail.head
        head.weight.data -= head.weight.data.mean((2, 3), keepdim=True)
        head.weight.data *= 1e3
        head.bias.data.zero_()
    if model.presence is not None:
        torch.nn.init.normal_(model.presence.leave.weight, std=8.0)
        model.presence.calibration.set(2.0, 0.0, 40)
    # A run saves what the user asked for: auto.
    values = {"format": FORMAT, "config": to_dict(build_config(TINY)), "model": model.state_dict()}
    return write_shared(folder, Checkpoint(folder, build_config(TINY), values))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_file(tmp_path_factory.mktemp("with"), "on")


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_file(tmp_path_factory.mktemp("without"), "off")


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A test set of six scenes with an object and five without."""
    root = tmp_path_factory.mktemp("both")
    for index in range(11):
        image, mask = toy_pair(0, index, size=40, difficulty=0.1, empty=index > 5)
        write(root / "Imgs" / f"{index:02d}.png", image[..., ::-1])
        write(root / "GT" / f"{index:02d}.png", mask)
    return root


def result_of(folder: Path) -> dict:
    (result,) = json.loads((folder / "scores.json").read_text())["results"]
    return result


class TestEvaluate:
    def test_a_model_with_the_head(self, model: Path, both: Path, tmp_path: Path, capsys) -> None:
        words = ("--data", str(both), "-o", str(tmp_path), "--gallery", "2")
        assert evaluate(str(model), *words) == 0
        found = result_of(tmp_path)["presence"]
        assert (found["num_present"], found["num_empty"]) == (6, 5)
        assert set(found["scores"]) == {*PROBABILITY_KEYS, "FalseMasks", "FalseArea", "Missed"}
        assert set(found["intervals"]) == set(found["scores"]) - {"FalseArea"}
        out = capsys.readouterr().out
        assert "Is anything hidden? images: with an object + without" in out and "6 + 5" in out
        assert f"{found['scores']['AUROC']:.3f}" in out
        with next((tmp_path / "per_image").rglob("*.csv")).open() as file:
            rows = list(csv.DictReader(file))
        predictor = load_predictor(model, device="cpu")
        images = [both / "Imgs" / f"{row['name']}.png" for row in rows]
        for row, own in zip(rows, predictor.predict(images, batch_size=4), strict=True):
            assert float(row["presence"]) == pytest.approx(own.presence, abs=1e-6)
            share = np.mean((own.probability_HW * 255).astype(np.uint8) > 127)
            assert float(row["mask_fraction"]) == pytest.approx(share)
        present = np.array([float(row["object_fraction"]) > 0 for row in rows])
        value = np.array([float(row["presence"]) for row in rows])
        won = (value[present][:, None] > value[~present]).mean()
        assert found["scores"]["AUROC"] == pytest.approx(won)
        for name in ("presence.csv", "presence.md", "presence.tex", f"presence/{both.name}.png"):
            assert (tmp_path / name).is_file()
        gallery = json.loads((tmp_path / "scores.json").read_text())["gallery"]
        shown = {
            kind: [entry["name"] for entry in gallery if entry["kind"] == kind]
            for kind in ("false_alarm", "missed", "best", "worst")
        }
        ranked = [rows[index]["name"] for index in np.argsort(value)]
        empty = {row["name"] for row, has in zip(rows, present, strict=True) if not has}
        assert shown["missed"] == [name for name in ranked if name not in empty][:2]
        assert shown["false_alarm"] == [name for name in ranked[::-1] if name in empty][:2]
        assert not empty & {*shown["best"], *shown["worst"]}
        page = (tmp_path / "index.html").read_text()
        assert "Is anything hidden?" in page and "reliability" in page
        assert "without an object that look most as if they had one" in page

    def test_neither_protocol_nor_skipping_changes_it(
        self, model: Path, both: Path, tmp_path: Path
    ) -> None:
        found = [
            camoxpert.evaluate(model, both, protocol=protocol, empty_gt=empty_gt, intervals=False)[
                0
            ]
            for protocol, empty_gt in (("pysod", "pysod"), ("raw", "correct"), ("pysod", "skip"))
        ]
        assert found[0].presence is not None
        assert found[0].presence == found[1].presence == found[2].presence
        assert found[2].num_images == 6 and found[2].num_skipped == 5
        # What is left out of the scores keeps its line of the table.
        words = ("-o", str(tmp_path), "--empty-gt", "skip", "--no-intervals", "--gallery", "0")
        assert evaluate(str(model), "--data", str(both), *words) == 0
        with next((tmp_path / "per_image").rglob("*.csv")).open() as file:
            rows = list(csv.DictReader(file))
        assert len(rows) == 11 and all(row["presence"] for row in rows)
        assert sum(row["Smeasure"] == "" for row in rows) == 5

    def test_a_model_without_it_has_its_masks_counted(
        self, plain: Path, both: Path, tmp_path: Path, capsys
    ) -> None:
        assert evaluate(str(plain), "--data", str(both), "-o", str(tmp_path), "--json") == 0
        assert set(result_of(tmp_path)["presence"]["scores"]) == {
            "FalseMasks", "FalseArea", "Missed",
        }  # fmt: skip
        printed = json.loads(capsys.readouterr().out)[both.name]
        assert {"Smeasure", "FalseMasks", "Missed"} <= printed.keys()
        assert not (tmp_path / "presence").exists()
        with next((tmp_path / "per_image").rglob("*.csv")).open() as file:
            assert "presence" not in next(csv.reader(file))

    def test_the_false_masks_of_a_model_that_is_always_sure_are_counted(
        self, both: Path, tmp_path: Path, capsys
    ) -> None:
        """Its maps reach from 0 to 255 like stretched files, but nobody stretched them."""
        folder = model_file(tmp_path / "model", "off", sure=True)
        predictor = load_predictor(folder, device="cpu")
        for found in predictor.stream(str(both / "Imgs")):
            levels = (found.probability_HW * 255).astype(np.uint8)
            assert (levels.min(), levels.max()) == (0, 255)
        assert evaluate(str(folder), "--data", str(both), "-o", str(tmp_path / "out")) == 0
        presence = result_of(tmp_path / "out")["presence"]
        assert presence["scores"]["FalseMasks"] == 1 and not presence["stretched"]
        assert "stretched" not in capsys.readouterr().err

    def test_sets_with_objects_alone_say_nothing(
        self, model: Path, toy_data: Path, tmp_path: Path, capsys
    ) -> None:
        words = ("--data", str(toy_data), "-o", str(tmp_path), "--no-intervals", "--gallery", "0")
        assert evaluate(str(model), *words) == 0
        assert "presence" not in result_of(tmp_path)
        assert "hidden" not in capsys.readouterr().out
        assert "Is anything hidden" not in (tmp_path / "index.html").read_text()

    def test_maps_of_any_model(self, both: Path, tmp_path: Path, capsys, monkeypatch) -> None:
        monkeypatch.chdir(tmp_path)
        rng = np.random.default_rng(0)
        for path in sorted((both / "GT").iterdir()):
            mask = cv2.imread(str(path), cv2.IMREAD_GRAYSCALE)
            faint = rng.integers(0, 70, mask.shape).astype(np.uint8)
            own = np.maximum(faint, mask)
            if path.stem == "07":
                own[:5] = 220
            if path.stem == "02":
                own = faint
            write(tmp_path / "maps" / "honest" / path.name, own)
            wide = (own - own.min()) * (255 / (own.max() - own.min()))
            write(tmp_path / "maps" / "stretched" / path.name, wide.astype(np.uint8))
        words = ("--predictions", "maps", "--gt", str(both / "GT"), "--measures", "fast")
        assert evaluate(*words, "-o", "out", "--format", "csv") == 0
        said = capsys.readouterr()
        assert "the maps of stretched were stretched" in " ".join(said.err.split())
        by_method = {row["method"]: row for row in csv.DictReader(said.out.splitlines())}
        assert float(by_method["honest"]["FalseMasks"]) == pytest.approx(1 / 5)
        assert float(by_method["honest"]["Missed"]) == pytest.approx(1 / 6)
        assert (by_method["honest"]["Present"], by_method["honest"]["Empty"]) == ("6", "5")
        assert by_method["stretched"]["FalseMasks"] == ""
        page = Path("out/index.html").read_text()
        assert "stretched to their full range before they were saved" in page
        words = ("--predictions", "maps/honest", *words[2:])
        assert evaluate(*words, "-o", "alone", "--gallery", "3") == 0
        gallery = json.loads(Path("alone/scores.json").read_text())["gallery"]
        found = [(e["kind"], e["name"]) for e in gallery if e["measure"] == "mask share"]
        assert found == [("false_alarm", "07"), ("missed", "02")]


class TestPredict:
    def test_table_ledger_and_page_have_the_presence(
        self, model: Path, both: Path, tmp_path: Path
    ) -> None:
        assert main(["predict", str(model), str(both / "Imgs"), "-o", str(tmp_path)]) == 0
        with (tmp_path / "results.csv").open() as file:
            rows = list(csv.DictReader(file))
        predictor = load_predictor(model, device="cpu")
        for row in rows:
            (own,) = predictor.predict([both / "Imgs" / f"{row['image']}.png"])
            assert float(row["presence"]) == pytest.approx(own.presence, abs=1e-3)
        lines = (tmp_path / "predictions.jsonl").read_text().splitlines()
        assert json.loads(lines[0])["settings"]["presence"] is True
        assert all(0 <= json.loads(line)["presence"] <= 1 for line in lines if "item" in line)
        assert main(["report", str(tmp_path)]) == 0
        page = (tmp_path / "report.html").read_text()
        assert ", presence " in page

    def test_below_the_least_presence_nothing_is_found(
        self, model: Path, both: Path, tmp_path: Path, capsys
    ) -> None:
        predictor = load_predictor(model, device="cpu")
        found = {p.name: p for p in predictor.stream(str(both / "Imgs"))}
        least = float(np.median([p.presence for p in found.values()]))
        words = ["predict", str(model), str(both / "Imgs"), "-o", str(tmp_path)]
        words += ["--save", "map", "mask", "--min-presence", str(least)]
        assert main(words) == 0
        emptied = 0
        for name, own in found.items():
            read = [
                cv2.imread(str(tmp_path / kind / f"{name}.png"), cv2.IMREAD_UNCHANGED)
                for kind in ("maps", "masks")
            ]
            if own.presence < least:
                emptied += 1
                assert not read[0].any() and not read[1].any()
            else:
                assert np.array_equal(read[0], (own.probability_HW * 255).astype(np.uint8))
        assert emptied == 5
        again = predictor.predict([both / "Imgs" / "00.png"], min_presence=1.0)[0]
        assert not again.probability_HW.any()
        assert again.presence == pytest.approx(found["00"].presence, abs=1e-5)
        # What was made with another least presence is not mixed in.
        capsys.readouterr()
        words[-1] = "0.9"
        assert main(words) == 2
        said = " ".join(capsys.readouterr().err.split())
        assert f"--min-presence {least}, now 0.9" in said

    def test_a_model_without_the_head(
        self, plain: Path, both: Path, tmp_path: Path, capsys
    ) -> None:
        words = ["predict", str(plain), str(both / "Imgs"), "-o", str(tmp_path), "--save", "mask"]
        assert main([*words, "--min-presence", "0.5"]) == 2
        said = " ".join(capsys.readouterr().err.split())
        assert "has no presence head" in said and "--negatives" in said
        assert main([*words, "--min-presence", "1.5"]) == 2
        assert main(words) == 0
        assert (tmp_path / "results.csv").read_text().splitlines()[0].endswith("seconds")
        assert load_predictor(plain).predict(both / "Imgs" / "00.png").presence is None

    def test_several_looks(self, model: Path, both: Path) -> None:
        """Mirrored images have the same presence; of windows the largest counts."""
        predictor = load_predictor(model, device="cpu")
        image = cv2.imread(str(both / "Imgs" / "00.png"))
        plain, mirrored = predictor.predict([image, np.ascontiguousarray(image[:, ::-1])])
        (flipped,) = predictor.predict([image], tta="flip")
        assert flipped.presence == pytest.approx((plain.presence + mirrored.presence) / 2, abs=1e-5)
        (tiled,) = predictor.predict([image], tile=32, overlap=0.0)
        windows = [image[y : y + 32, x : x + 32] for y in (0, 8) for x in (0, 8)]
        every = predictor.predict([image, *map(np.ascontiguousarray, windows)])
        assert tiled.presence == pytest.approx(max(p.presence for p in every), abs=1e-5)

    def test_frames_of_a_video_are_smoothed(self, model: Path, tmp_path: Path) -> None:
        predictor = load_predictor(model, device="cpu")
        stages = FrameStages(predictor, tmp_path, ["mask"], 0.5, VideoOptions(smooth=0.5))
        images = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
        with torch.inference_mode():
            _, single = predictor.look(images)
            _, smooth = stages.forward(images)
        expected = [single[0], (single[0] + single[1]) / 2]
        assert smooth[:2].tolist() == pytest.approx([float(value) for value in expected])

    def test_the_head_changes_no_digest_of_older_models(self, plain: Path) -> None:
        from camoxpert.inference.plan import model_digest

        checkpoint = load_predictor(plain).checkpoint
        before = model_digest(checkpoint)
        config = build_config(TINY | {"model.presence": "off"})
        assert model_digest(Checkpoint(checkpoint.path, config, checkpoint.values)) == before

    def test_the_python_api_refuses_it_alike(self, plain: Path, both: Path, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match="no presence head"):
            camoxpert.predict_folder(plain, both / "Imgs", tmp_path, min_presence=0.5)
        predictor: Predictor = camoxpert.load(plain)
        with pytest.raises(ConfigError, match="no presence head"):
            predictor.predict(both / "Imgs" / "00.png", min_presence=0.5)
