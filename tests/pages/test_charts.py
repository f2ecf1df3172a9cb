"""The pixels of charts: nothing is cut off, they are transparent, and each is drawn once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from helpers.maps import evaluate, pair, write

from camoxpert.pages import charts
from camoxpert.runs.records import TrainRecord, ValidationRecord

SLOPE = np.linspace(0, 1, 256).tolist()


def train_records(loss: float, rate: float) -> list[TrainRecord]:
    """Return ten records."""
    return [
        {"step": 1000 * i, "loss": loss * (1 - i / 20), "lr": rate * i, "terms": {"bce": loss / 2}}
        for i in range(10)
    ]


def validations(error: float) -> list[ValidationRecord]:
    """Return five validations."""
    return [
        {"epoch": i, "scores": {"Smeasure": i / 7, "MAE": error * i}, "best": i == 3}
        for i in range(5)
    ]


def curves(*names: str) -> Mapping[str, Mapping[str, Sequence[float]]]:
    """Return a curve for each name."""
    return {
        name: {"recall": SLOPE, "precision": SLOPE[::-1], "F": SLOPE, "E": SLOPE} for name in names
    }


@pytest.mark.parametrize(
    "make",
    [
        lambda: charts.plot_training(train_records(12.5, 1e-3)),
        lambda: charts.plot_training(train_records(123456.7, 2.5e-9)),
        lambda: charts.plot_scores(validations(0.1)),
        lambda: charts.plot_scores(validations(3e-5)),
        lambda: charts.plot_curves(curves("ours")),
        lambda: charts.plot_curves(curves(*"abcdefghij")),
        lambda: charts.plot_phases({"a phase with a long name": 12.0, "b": 0.1}),
    ],
    ids=["training", "large and small", "scores", "small errors", "curves", "ten curves", "phases"],
)
def test_nothing_is_cut_off(make: Callable[[], bytes]) -> None:
    picture = cv2.imdecode(np.frombuffer(make(), np.uint8), cv2.IMREAD_UNCHANGED)
    assert picture.ndim == 3 and picture.shape[2] == 4
    drawn = picture[..., 3] > 0
    # The background is transparent, and a text that reaches the edge may go on behind it.
    assert 0.01 < drawn.mean() < 0.5
    assert not (drawn[0].any() or drawn[-1].any() or drawn[:, 0].any() or drawn[:, -1].any())


def test_a_margin_that_is_too_small_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(charts, "_margins", lambda *size: {"left": 0.01})
    with pytest.raises(AssertionError):
        test_nothing_is_cut_off(lambda: charts.plot_training(train_records(12.5, 1e-3)))


def test_an_evaluation_draws_its_curves_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for index in range(2):
        values, mask = pair(index, 0.2)
        write(tmp_path / "maps" / f"{index}.png", values)
        write(tmp_path / "gt" / f"{index}.png", mask)
    drawn: list[Any] = []
    plot = charts.plot_curves
    monkeypatch.setattr(charts, "plot_curves", lambda c: drawn.append(c) or plot(c))
    out = tmp_path / "out"
    words = ("--predictions", str(tmp_path / "maps"), "--gt", str(tmp_path / "gt"))
    assert evaluate(*words, "-o", str(out)) == 0
    (file,) = (out / "curves").glob("*.png")
    picture = cv2.imread(str(file), cv2.IMREAD_UNCHANGED)
    assert len(drawn) == 1 and picture.shape[1] == round(9.6 * 130)
    assert "data:image/png;base64," in (out / "index.html").read_text()


def test_every_term_of_a_loss_has_its_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """There are more terms than colours."""
    terms = {name: 0.1 * i for i, name in enumerate("abcdefghi", start=1)}
    records = [{"step": step, "loss": 1.0, "lr": 1e-3, "terms": terms} for step in (1, 2)]
    drawn = []
    monkeypatch.setattr(charts, "_png", lambda figure: drawn.append(figure) or b"")
    charts.plot_training(records)
    lines = drawn[0].axes[0].lines
    assert [line.get_label() for line in lines] == ["loss", *"abcdefghi"]
    assert len({(line.get_color(), line.get_linestyle()) for line in lines}) == 10


def test_bars_that_are_left_out_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = []
    monkeypatch.setattr(charts, "_png", lambda figure: drawn.append(figure) or b"")
    counts = {f"class {n}": n for n in range(1, 41)}
    charts.plot_counts({"classes": counts, "few": {"a": 1}})
    many, few = drawn[0].axes
    assert many.get_title() == "classes (the largest 16 of 40)" and len(many.patches) == 16
    assert few.get_title() == "few"
