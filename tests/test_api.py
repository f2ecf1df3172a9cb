"""The Python API imports fast and gives the same results as the command line."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from PIL import Image

import camoxpert
from camoxpert.cli import main
from camoxpert.config.keywords import config_from_keywords
from camoxpert.errors import CheckpointError, ConfigError, DataError
from camoxpert.inference.predictor import load_predictor


@pytest.fixture(scope="module")
def photos(toy_data: Path) -> list[Path]:
    return sorted((toy_data / "TestDataset" / "toy" / "Imgs").iterdir())


@pytest.fixture(scope="module")
def model(tiny_run: Path) -> camoxpert.Predictor:
    return camoxpert.load(tiny_run, device="cpu")


def tree(folder: Path) -> dict[str, bytes]:
    tables = ("results.csv", "predictions.jsonl", "predict.json", ".predictions.lock")
    files = (p for p in folder.rglob("*") if p.is_file() and p.name not in tables)
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in files}


def test_the_import_is_light_and_every_name_is_there() -> None:
    code = (
        "import sys, camoxpert\n"
        "heavy = {'torch', 'numpy', 'cv2', 'PIL', 'omegaconf'} & set(sys.modules)\n"
        "own = [name for name in sys.modules if name.startswith('camoxpert')]\n"
        "print(sorted(heavy), own, [n for n in camoxpert.__all__ if n not in dir(camoxpert)])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[] ['camoxpert'] []"
    # Only who builds a network of timm waits the seconds that it takes to import.
    code = "import sys, camoxpert.inference.predictor, camoxpert.training.session\n"
    code += "print({'timm', 'torchvision'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
    for name in camoxpert.__all__:
        assert getattr(camoxpert, name) is not None
    with pytest.raises(AttributeError, match="nothing"):
        _ = camoxpert.nothing


class TestPredict:
    def test_the_same_bytes_as_the_command_line(
        self, model: camoxpert.Predictor, tiny_run: Path, photos: list[Path], tmp_path: Path
    ) -> None:
        folder = photos[0].parent
        assert main(["predict", str(tiny_run), str(folder), "-o", str(tmp_path / "cli")]) == 0
        names = []
        for prediction in model.stream(folder):
            names.append(prediction.name)
            prediction.save(tmp_path / "api")
        assert names == [photo.stem for photo in photos]
        assert tree(tmp_path / "api") == tree(tmp_path / "cli")
        assert len(tree(tmp_path / "api")) == 4 * len(photos)

    def test_every_kind_of_input_gives_the_same(
        self, model: camoxpert.Predictor, photos: list[Path]
    ) -> None:
        path = photos[0]
        pixels = cv2.cvtColor(cv2.imread(str(path)), cv2.COLOR_BGR2RGB)
        expected = model.predict(path)
        with Image.open(path) as image:
            for form in (str(path), pixels, image):
                found = model.predict(form)
                assert found.probability_HW.shape == expected.size == pixels.shape[:2]
                assert np.abs(found.probability_HW - expected.probability_HW).max() < 0.02
        assert model.predict(pixels).name == "image"
        assert expected.name == path.stem and expected.presence is None

    def test_a_folder_is_predicted_as_on_the_command_line(
        self, model: camoxpert.Predictor, tiny_run: Path, photos: list[Path], tmp_path: Path
    ) -> None:
        folder = photos[0].parent
        assert main(["predict", str(tiny_run), str(folder), "-o", str(tmp_path / "cli")]) == 0
        result = camoxpert.predict_folder(model, folder, tmp_path / "api")
        assert (result.done, result.skipped, result.failed) == (len(photos), 0, [])
        assert tree(tmp_path / "api") == tree(tmp_path / "cli")
        assert result.summary["workers"][0]["images"] == len(photos)
        again = camoxpert.predict_folder(tiny_run, [folder], tmp_path / "api")
        assert (again.done, again.skipped) == (0, len(photos))
        for wrong in ({"kinds": ["cutuot"]}, {"threshold": 2}, {"batch_size": 0}, {"devices": "x"}):
            with pytest.raises(ConfigError):
                camoxpert.predict_folder(model, folder, tmp_path / "none", **wrong)
        assert not (tmp_path / "none").exists()

    def test_what_a_prediction_holds(self, model: camoxpert.Predictor, photos: list[Path]) -> None:
        first, second = model.predict([photos[0], photos[1]], threshold=0.3)
        assert first.name != second.name
        assert first.probability_HW.dtype == np.float32 and first.seconds > 0
        assert 0 <= first.probability_HW.min() <= first.probability_HW.max() <= 1
        assert first.mask_HW.dtype == bool
        assert np.array_equal(first.mask_HW, first.probability_HW > 0.3)
        assert first.cutout().shape == (*first.size, 4)
        assert first.overlay().shape == (*first.size, 3)

    def test_an_endless_stream_is_read_a_little_ahead(
        self, model: camoxpert.Predictor, photos: list[Path]
    ) -> None:
        taken = []

        def camera():
            while True:
                taken.append(1)
                yield np.zeros((20, 30, 3), np.uint8)

        stream = model.stream(camera(), batch_size=2)
        names = [next(stream).name for _ in range(5)]
        assert names == [f"image-{n}" for n in range(1, 6)]
        assert len(taken) <= 8

    def test_faults_are_exceptions(
        self, model: camoxpert.Predictor, photos: list[Path], tmp_path: Path
    ) -> None:
        with pytest.raises(CheckpointError):
            camoxpert.load(tmp_path)
        with pytest.raises(DataError):
            model.predict(tmp_path / "none.jpg")
        with pytest.raises(DataError, match="uint8 RGB"):
            model.predict(np.zeros((4, 4, 3), np.float32))
        with pytest.raises(DataError, match="not an image"):
            model.predict(3)  # type: ignore[call-overload]
        with pytest.raises(ConfigError, match="between 0 and 1"):
            model.stream(photos, threshold=2)
        with pytest.raises(ConfigError, match="Did you mean cutout"):
            model.predict(photos[0]).save(tmp_path, kinds=["cutuot"])


class TestEvaluate:
    def test_scores_of_a_model(
        self, model: camoxpert.Predictor, tiny_run: Path, toy_data: Path, tmp_path: Path
    ) -> None:
        before = set(tmp_path.iterdir())
        (result,) = camoxpert.evaluate(model, toy_data, intervals=False)
        own = json.loads((tiny_run / "evaluation" / "scores.json").read_text())["results"]
        assert result.scores == own[0]["scores"] and result.dataset == "toy"
        assert set(tmp_path.iterdir()) == before
        camoxpert.evaluate(model, [toy_data], output=tmp_path / "out", gallery=1)
        assert (tmp_path / "out" / "index.html").is_file()
        with pytest.raises(DataError, match="no file or folder"):
            camoxpert.evaluate(model, tmp_path / "none")

    @pytest.mark.parametrize(
        ("given", "said"),
        [
            ({"noncam": "Include"}, "noncam must be exclude or include; got 'Include'"),
            ({"resize": "bilinar"}, "Did you mean bilinear"),
        ],
    )
    def test_a_word_that_is_not_known_is_an_error(
        self, tiny_run: Path, toy_data: Path, given: dict[str, Any], said: str
    ) -> None:
        """The command line has choices; here `Include` meant exclude."""
        with pytest.raises(ConfigError, match=said):
            camoxpert.evaluate(tiny_run, toy_data, **given)
        with pytest.raises(ConfigError, match=said):
            camoxpert.score_maps(toy_data, toy_data, **given)

    def test_a_threshold_of_numpy_is_as_good(
        self, model: camoxpert.Predictor, photos: list[Path], tmp_path: Path
    ) -> None:
        half = np.float32(0.5)
        assert camoxpert.predict_folder(model, photos[:1], tmp_path / "a", threshold=half).done == 1
        with pytest.raises(ConfigError, match="threshold must be a number"):
            camoxpert.predict_folder(model, photos[:1], tmp_path / "b", threshold="0.5")

    def test_results_go_to_the_home_that_is_meant(
        self, tiny_run: Path, toy_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("HOME", str(tmp_path))
        camoxpert.evaluate(tiny_run, toy_data, output="~/scores", gallery=0)
        assert (tmp_path / "scores" / "scores.json").is_file()

    def test_scores_of_maps(self, toy_data: Path) -> None:
        masks = toy_data / "TestDataset" / "toy" / "GT"
        (result,) = camoxpert.score_maps(masks, masks, measures=["fast"], intervals=False)
        assert result.scores["MAE"] == 0 and result.scores["IoU"] == 1
        with pytest.raises(ConfigError, match="unknown measure"):
            camoxpert.score_maps(masks, masks, measures=["maee"])


class TestTrain:
    def test_settings_by_flag_path_group_and_mapping(self, tmp_path: Path) -> None:
        config = config_from_keywords(
            {"model": {"width": 16}, "lr": 1e-3},
            {"epochs": 2, "dataset_path": tmp_path, "optim__min_lr": 0.0, "loss": {"iou": 1.0}},
        )
        assert (config.model.width, config.optim.lr, config.train.epochs) == (16, 1e-3, 2)
        assert config.data.roots == (str(tmp_path),)
        assert (config.optim.min_lr, config.loss.iou) == (0.0, 1.0)
        again = config_from_keywords(config, {"train": {"epochs": 3}})
        assert (again.train.epochs, again.model.width) == (3, 16)

    @pytest.mark.parametrize(
        ("name", "near"), [("epoch", "epochs"), ("optim__lrr", "optim__lr"), ("dataset", "")]
    )
    def test_an_unknown_name_is_an_error_with_the_nearest(self, name: str, near: str) -> None:
        with pytest.raises(ConfigError, match=f"Unknown setting {name}.*{near}"):
            camoxpert.train(**{name: 1})

    def test_it_returns_folder_and_scores(self, toy_data: Path, tmp_path: Path) -> None:
        result = camoxpert.train(
            dataset_path=toy_data, checkpoint_dir=tmp_path, backbone="tiny_test",
            pretrained=False, img_size=32, batch_size=8, num_experts=3, num_workers=0,
            tensorboard=False, epochs=1, model={"width": 16, "detail_width": 8},
        )  # fmt: skip
        assert isinstance(result, camoxpert.Result) and result.path.parent == tmp_path
        own = json.loads((result.path / "evaluation" / "scores.json").read_text())["results"]
        assert result.scores == {"toy": own[0]["scores"]}
        assert load_predictor(result.path).img_size == 32
