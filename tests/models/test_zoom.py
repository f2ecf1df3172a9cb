"""Two sizes of an image, joined: numbers by hand, and the commands that use it."""

from __future__ import annotations

import json
import math
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers.printed import complained

import camoxpert
from camoxpert.cli import main
from camoxpert.inference.predictor import load_predictor
from camoxpert.models.zoom import Zoomed, describe_zoom, join_logits, zoomed_side


def one(value: float) -> torch.Tensor:
    return torch.tensor([[[[value]]]])


def test_the_join_by_hand() -> None:
    # Confidences tanh(|x| / 2): .7616 for 2 and .4621 for -1.
    sure, less = math.tanh(1), math.tanh(0.5)
    expected = (sure * 2 - less * 1) / (sure + less)
    assert float(join_logits(one(2), one(-1))) == pytest.approx(expected, rel=1e-6)
    # Who is unsure does not count; equal answers stay; two unsure ones stay unsure.
    assert float(join_logits(one(3), one(0))) == pytest.approx(3, rel=1e-5)
    assert float(join_logits(one(-4), one(-4))) == pytest.approx(-4, rel=1e-5)
    assert float(join_logits(one(0), one(0))) == 0
    assert float(join_logits(one(500), one(-500))) == 0


def test_sides_and_cost() -> None:
    assert [zoomed_side(side) for side in (32, 64, 224, 320, 352)] == [64, 96, 320, 480, 512]
    assert "64 and 96 px, which takes 3.25 times" in describe_zoom(64)


def test_both_passes_and_nothing_else(tiny_run: Path) -> None:
    predictor = load_predictor(tiny_run, device="cpu", precision="fp32", zoom=True)
    plain = load_predictor(tiny_run, device="cpu", precision="fp32")
    assert isinstance(predictor.model, Zoomed)
    assert (predictor.img_size, plain.img_size) == (64, 32)
    torch.manual_seed(0)
    smooth = F.interpolate(torch.rand(2, 3, 9, 9), size=(64, 64), mode="bicubic")
    images = (smooth.clamp(0, 1) * 255).to(torch.uint8)
    small = F.interpolate(images.float(), size=(32, 32), mode="bilinear", antialias=True)
    with torch.inference_mode():
        found = predictor.model(images)
        far = plain.model(small.round().to(torch.uint8))
        near = plain.model(images)
    enlarged = F.interpolate(far.logits_B1HW, size=(64, 64), mode="bilinear")
    torch.testing.assert_close(found.logits_B1HW, join_logits(enlarged, near.logits_B1HW))
    assert torch.equal(found.routing[0].experts_BK, far.routing[0].experts_BK)
    # The control: it is neither of the two.
    assert not torch.allclose(found.logits_B1HW, near.logits_B1HW, atol=1e-3)


def test_predict(tiny_run: Path, toy_data: Path, tmp_path: Path, capsys) -> None:
    (images,) = (toy_data / "TestDataset").glob("*/Imgs")
    base = ["predict", str(tiny_run), str(images), "--save", "map", "-o"]
    assert main([*base, str(tmp_path / "zoom"), "--zoom"]) == 0
    assert "32 and 64 px" in complained(capsys)
    assert main([*base, str(tmp_path / "plain")]) == 0
    assert "zoom" not in capsys.readouterr().err
    names = sorted(path.name for path in (tmp_path / "zoom" / "maps").iterdir())
    maps = [
        [cv2.imread(str(tmp_path / way / "maps" / name), 0) for name in names]
        for way in ("zoom", "plain")
    ]
    assert len(names) == 8
    assert not any(np.array_equal(a, b) for a, b in zip(*maps, strict=True))
    # The Python API gives the same, and maps of both do not get into one folder.
    loaded = camoxpert.load(tiny_run, device="cpu", zoom=True)
    photos = sorted(images.iterdir())
    predicted = [p.probability_HW for p in loaded.stream(photos)]
    for own, written in zip(predicted, maps[0], strict=True):
        assert np.array_equal((own * 255).astype(np.uint8), written)
    assert main([*base, str(tmp_path / "plain"), "--zoom"]) == 2
    assert "image size" in complained(capsys)


def test_evaluate_stands_beside_the_plain_scores(
    tiny_run: Path, toy_data: Path, tmp_path: Path, capsys
) -> None:
    base = ["evaluate", str(tiny_run), "--num-workers", "0", "--no-intervals", "--gallery", "0"]
    base += ["-o", str(tmp_path / "scores")]
    assert main([*base, "--zoom"]) == 0 and main(base) == 0
    results = json.loads((tmp_path / "scores" / "scores.json").read_text())["results"]
    assert {result["method"] for result in results} == {"tiny", "tiny-zoom"}
    scores = {result["method"]: result["scores"]["MAE"] for result in results}
    assert scores["tiny"] != scores["tiny-zoom"]
    capsys.readouterr()
    words = ["evaluate", "--predictions", str(tmp_path), "--gt", str(tmp_path), "--zoom"]
    assert main(words) == 2
    assert "--zoom belongs to a checkpoint" in complained(capsys)
