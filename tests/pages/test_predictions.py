"""The page about a folder of predictions."""

from __future__ import annotations

import base64
import io
from pathlib import Path

import numpy as np
from PIL import Image

from camoxpert.data.files.image_io import write_jpeg
from camoxpert.pages.predictions import (
    BEHIND,
    FAILURES,
    SHOWN,
    Survey,
    _picture,
    write_predictions_page,
)


def row(number: int, fraction: float, confidence: float, **fields) -> dict:
    return {
        "item": f"p{number:03d}",
        "status": "ok",
        "kinds": ["mask", "overlay"],
        "object_fraction": fraction,
        "confidence": confidence,
    } | fields


def test_a_survey_counts_and_keeps_the_extremes() -> None:
    survey = Survey()
    for number in range(100):
        survey.add(row(number, (number % 4) / 100, number / 100))
    survey.add({"item": "film", "status": "ok", "kinds": ["video"]})
    for number in range(FAILURES + 5):
        survey.add({"item": f"f{number}", "status": "failed", "reason": "it is not an image"})
    assert survey.statuses == {"ok": 101, "video": 1, "failed": FAILURES + 5}
    # 0 % is none; 1, 2 and 3 % are small (1 to 5 %).
    assert survey.sizes == {0: 25, 2: 75}
    assert sum(survey.confidences.values()) == 75
    assert [r["item"] for r in survey.surest.best()][:3] == ["p099", "p098", "p097"]
    # Among equals the first: every fourth has 3 %; those without an object are not doubtful.
    assert [r["item"] for r in survey.largest.best()][:2] == ["p003", "p007"]
    assert [r["item"] for r in survey.doubtful.best()][:3] == ["p001", "p002", "p003"]
    assert [r["item"] for r in survey.empty.best()][:2] == ["p000", "p004"]
    assert len(survey.surest.best()) == SHOWN and len(survey.failures) == FAILURES


def test_the_page_shows_pictures_and_escapes_names(tmp_path: Path) -> None:
    write_jpeg(tmp_path / "overlays" / "p001.jpg", np.full((40, 60, 3), 90, np.uint8))
    rows = [
        row(1, 0.1, 0.9),
        row(2, 0.1, 0.8),  # its picture was deleted
        {"item": "<b>", "status": "failed", "reason": "<script>"},
        {"item": "../p001", "status": "ok", "kinds": ["overlay"]} | row(3, 0.2, 0.9, item="../x"),
    ]
    worker = {"worker": "cpu", "images": 2, "images_per_second": 4.0}
    worker |= {"loop_shares": {"forward": 0.75, "other": 0.25}, "thread_seconds": {"read": 0.5}}
    page = write_predictions_page(
        tmp_path / "report.html",
        rows,
        folder=tmp_path,
        settings={"threshold": 0.5, "tile": None},
        summary={"wall_seconds": 0.5, "workers": [worker]},
        finished=False,
    )
    text = page.read_text()
    assert "<script>" not in text and "&lt;script&gt;" in text and "stopped before its end" in text
    # Sure, doubtful and large: one picture in three galleries.
    assert text.count("p001: 10.0%, confidence 0.90") == 2 * 3 and "p002:" not in text
    assert "forward 75%, other 25%" in text and "250.0 ms" in text and ">4.0<" in text
    assert "threshold" in text and "tile" not in text.split("<h2>Settings")[1]


def test_a_cut_out_is_shown_cut_out(tmp_path: Path) -> None:
    """Below its transparency the file holds the whole photograph."""
    pixels = np.full((40, 60, 4), 200, np.uint8)
    pixels[:, 30:, 3], pixels[:, :30, 3] = 255, 0
    (tmp_path / "cutouts").mkdir()
    Image.fromarray(pixels).save(tmp_path / "cutouts" / "p001.png")
    shown = _picture(tmp_path, row(1, 0.5, 0.9, kinds=["cutout"]))
    assert shown is not None
    data = base64.b64decode(shown.source.rpartition(",")[2])
    grey = np.asarray(Image.open(io.BytesIO(data)).convert("L")).astype(int)
    width = grey.shape[1]
    assert abs(grey[:, : width // 3].mean() - BEHIND) < 4
    assert abs(grey[:, -width // 3 :].mean() - 200) < 4
