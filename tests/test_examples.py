"""The examples run unchanged on a tiny model and generated data."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_example_is_run_here() -> None:
    source = Path(__file__).read_text()
    names = [path.stem for path in EXAMPLES.glob("*.py")]
    assert len(names) >= 5 and all(f'load("{name}")' in source for name in names)


def test_prediction_and_scoring(
    tiny_run: Path, toy_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, test = str(tiny_run), toy_data / "TestDataset" / "toy"
    photos = sorted((test / "Imgs").iterdir())
    load("predict_photo").main(run, str(photos[0]), str(tmp_path / "out"))
    assert (tmp_path / "out" / "masks" / f"{photos[0].stem}.png").is_file()
    load("stream_folder").main(run, str(test / "Imgs"))
    load("evaluate_model").main(run, str(toy_data))
    load("score_maps").main(str(test / "GT"), str(test / "GT"))
    said = capsys.readouterr().out
    assert "tiny on toy, 8 images" in said and "Smeasure 1.000, MAE 0.000" in said


def test_training(toy_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    load("train_model").main(
        str(toy_data), str(tmp_path), backbone="tiny_test", pretrained=False, img_size=32,
        batch_size=8, num_experts=3, num_workers=0, tensorboard=False, epochs=1,
        model={"width": 16, "detail_width": 8},
    )  # fmt: skip
    assert "toy: weighted F" in capsys.readouterr().out
