"""The report: one complete page that loads and runs nothing."""

from __future__ import annotations

import json
import math
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np

from camoxpert.config import load_config, to_yaml
from camoxpert.data.files.image_io import write_jpeg
from camoxpert.files import write_json
from camoxpert.pages import charts
from camoxpert.pages.report import MEASURES, write_report
from camoxpert.runs.info import write_run_json
from camoxpert.runs.log import RunLog

EVIL = "<script>alert(1)</script>"


def make_run(folder: Path, *, name: str = "beetle") -> Path:
    """Write the files of a made-up run."""
    config = load_config(overrides=["optim.lr=3e-3", "data.roots=[data]"])
    (folder / "config.yaml").write_text(to_yaml(config))
    write_run_json(
        folder,
        argv=["camoxpert", "train", "--run-name", name],
        device="cpu",
        data_hash="abc",
        phases={"training": 61.0, "validation": 4.0},
        extra={"decisions": ["device cpu"], "parameters": 1_500_000, "gmacs": 0.16},
    )
    log = RunLog(folder, tensorboard=False)
    scores = {key: 0.5 for key in MEASURES}
    for step in range(1, 40):
        terms = {"mask": 1 / step, "side": 0.5 / step}
        log.write(
            {
                "kind": "train",
                "step": step,
                "epoch": 1 + step // 10,
                "stage": 1,
                "loss": 1.5 / step,
                "terms": terms,
                "lr": 1e-3 * math.exp(-step),
                "grad_norm": 1.0,
                "images_per_second": 12.5,
                "data_wait": 0.4,
            }
        )
    for epoch in (1, 2):
        log.write(
            {
                "kind": "validation",
                "step": 10 * epoch,
                "epoch": epoch,
                "stage": 1,
                "scores": scores,
                "best": epoch == 1,
                "weights": "ema",
            }
        )
    level = {"usage": [0.6, 0.39, 0.01], "gate": [0.4, 0.3, 0.3], "entropy": 0.64}
    log.write(
        {
            "kind": "routing",
            "step": 20,
            "epoch": 2,
            "stage": 1,
            "experts": ["texture", "edge", name],
            "levels": {"stride 32": level},
        }
    )
    log.write({"kind": "event", "step": 3, "epoch": 1, "text": f"stage 1: {name}"})
    log.close()
    write_jpeg(folder / "images" / "toy" / "best_1.jpg", np.zeros((20, 80, 3), np.uint8))
    curve = np.linspace(0, 1, 256).tolist()
    entry = {
        "name": name,
        "panel": "images/toy/best_1.jpg",
        "wFmeasure": 0.9,
        "Smeasure": 0.9,
        "MAE": 0.01,
    }
    outside = {**entry, "panel": "../secret.jpg"}
    result = {
        "dataset": "toy",
        "num_images": 8,
        "scores": {**scores, "wFmeasure": 0.777},
        "baseline": {"all_foreground": {key: 0.123 for key in MEASURES}},
        "curves": {key: curve for key in ("precision", "recall", "F", "E")},
        "gallery": {"best": [entry], "worst": [outside]},
    }
    write_json(folder / "evaluation" / "toy.json", result)
    return folder


def test_everything_is_on_the_page(tmp_path: Path) -> None:
    page = write_report(make_run(tmp_path)).read_text()
    for title in (
        "Scores",
        "Predictions",
        "Curves",
        "Experts",
        "Time",
        "Events",
        "Settings",
        "Repeat it",
    ):
        assert f"<h2>{title}</h2>" in page
    assert "0.777" in page and "0.123" in page and "–" not in page
    assert page.count("data:image/png;base64,") == 5
    assert page.count("data:image/jpeg;base64,") == 1
    assert "under a tenth of the fair share" in " ".join(page.split())
    assert "The device waits for data" in page
    assert re.search(r'changed"><td>optim.lr</td><td>0.003', page)
    assert "camoxpert train --run-name beetle" in page


def test_nothing_is_loaded_from_elsewhere_or_executed(tmp_path: Path) -> None:
    folder = make_run(tmp_path, name=EVIL)
    (tmp_path.parent / "secret.jpg").write_bytes(b"secret")
    page = write_report(folder).read_text()
    assert "<script" not in page and "&lt;script&gt;" in page
    assert not re.search(r"(src|href)=['\"](?!data:)", page)
    assert "c2VjcmV0" not in page  # the file outside the run folder


def test_missing_parts_become_sentences(tmp_path: Path) -> None:
    page = write_report(tmp_path).read_text()
    assert "No test set has been scored yet" in page and "Nothing logged yet" in page
    (tmp_path / "run.json").write_text("{broken")
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"kind": "train"}) + "\n")
    assert "<h2>Scores</h2>" in write_report(tmp_path).read_text()


def test_without_matplotlib_there_is_still_a_page(tmp_path: Path, monkeypatch) -> None:
    folder = make_run(tmp_path)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    page = write_report(folder).read_text()
    assert "No chart of training loss" in page and "0.777" in page


def test_a_run_without_tests_shows_its_validation(tmp_path: Path) -> None:
    folder = make_run(tmp_path)
    (folder / "evaluation" / "toy.json").unlink()
    page = write_report(folder).read_text()
    assert "validation, best: epoch 1" in page


def test_validation_of_photographs_alone_has_its_curve() -> None:
    """Runs with other modalities score both; an epoch without leaves a gap, not a zero."""
    both: dict[str, Any] = {"scores": {"Smeasure": 0.8, "MAE": 0.1}}
    records: list[Any] = [
        {"epoch": 1, **both, "rgb": {"Smeasure": 0.6, "MAE": 0.2}},
        {"epoch": 2, **both},
        {"epoch": 3, **both, "rgb": {"Smeasure": 0.7, "MAE": 0.15}},
    ]
    assert charts.half_curves(records, ("Smeasure", "MAE")) == {
        ("photographs alone", "Smeasure"): ([1, 3], [0.6, 0.7]),
        ("photographs alone", "MAE"): ([1, 3], [0.2, 0.15]),
    }
    plain: list[Any] = [{"epoch": number, **both} for number in (1, 2, 3)]
    assert charts.half_curves(plain, ("MAE",)) == {}
    drawn, without = charts.plot_scores(records), charts.plot_scores(plain)
    assert drawn.startswith(b"\x89PNG") and drawn != without == charts.plot_scores(plain)
