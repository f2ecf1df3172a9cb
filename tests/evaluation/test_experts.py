"""What each expert does best: choices, kind of the images, table, page and skipping."""

from __future__ import annotations

import csv
import io
import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.pages import active_parts

import camoxpert
from camoxpert.cli import main
from camoxpert.config import DataConfig
from camoxpert.data.files.manifest import load_eval
from camoxpert.data.loader import build_eval_loader
from camoxpert.evaluation import model as evaluation
from camoxpert.evaluation.chosen import expert_meter
from camoxpert.evaluation.experts import (
    column,
    expert_table,
    object_contrast,
    shrunk,
    texture,
)
from camoxpert.inference.predictor import load_predictor
from camoxpert.metrics.statistics import group_p_value
from camoxpert.models.camoxpert import build_model
from camoxpert.models.router import choose, first_choices


def row(number: int, expert: str, wf: float, *, contrast: float = 0.5) -> dict[str, object]:
    values = {"wFmeasure": wf, "IoU": wf / 2, "object_fraction": 0.1 * number}
    return {
        "name": f"{number}",
        **values,
        "texture": 0.25,
        "contrast": contrast,
        column("stride 4"): expert,
    }


class TestTable:
    def test_by_hand(self) -> None:
        rows = [row(1, "edge", 0.2), row(2, "edge", 0.4, contrast=math.nan), row(3, "hybrid", 0.9)]
        table = expert_table(rows, ["stride 4"], ["edge", "hybrid", "texture"])
        assert table.keys == ("wFmeasure", "IoU", "object_fraction", "texture", "contrast")
        edge, hybrid, idle = table.uses
        assert (edge.level, edge.expert, edge.images) == ("stride 4", "edge", 2)
        assert edge.share == pytest.approx(2 / 3) and idle.images == 0 and idle.means == {}
        expected = {"wFmeasure": 0.3, "IoU": 0.15, "object_fraction": 0.15, "texture": 0.25}
        # The object without surroundings has no contrast.
        assert edge.means == pytest.approx(expected | {"contrast": 0.5})
        assert hybrid.means["wFmeasure"] == pytest.approx(0.9)
        assert table.p_values["stride 4"]["texture"] == 1
        assert expert_table(rows, ["stride 4"], ["edge", "hybrid"], statistics=False).p_values == {}

    def test_the_permutation_test_is_exact_on_few_values(self) -> None:
        """Against all orders of six values in groups of two and four."""
        labels, values = np.array([0, 0, 1, 1, 1, 1]), np.array([9.0, 8, 1, 2, 7, 3])

        def between(order: tuple[float, ...]) -> float:
            parts = [[v for v, own in zip(order, labels, strict=True) if own == g] for g in (0, 1)]
            return sum(len(part) * (np.mean(part) - values.mean()) ** 2 for part in parts)

        observed = between(tuple(values))
        orders = list(itertools.permutations(values))
        exact = sum(between(order) >= observed - 1e-9 for order in orders) / len(orders)
        assert exact == pytest.approx(2 / 15)  # {9, 8}, and {1, 2} on the other side
        assert group_p_value(labels, values, resamples=20_000) == pytest.approx(exact, abs=0.008)

    def test_related_and_unrelated(self) -> None:
        rng = np.random.default_rng(0)
        labels = rng.integers(0, 3, 90)
        assert group_p_value(labels, labels + rng.normal(0, 0.5, 90)) < 0.001
        # Negative control: of unrelated values one in ten has a p-value under 0.1.
        found = [group_p_value(labels, rng.normal(0, 1, 90), resamples=200) for _ in range(60)]
        assert 0.02 <= np.mean(np.array(found) < 0.1) <= 0.25


class TestKindOfImage:
    def test_texture_of_flat_and_busy_images(self) -> None:
        flat = np.full((32, 32, 3), 90, np.uint8)
        assert texture(flat) == pytest.approx(0, abs=1e-6)
        stripes = np.zeros((32, 32, 3), np.uint8)
        stripes[:, ::2] = 255
        # Nine columns of a window hold four and five of either: sqrt(20 / 81) in the middle.
        assert texture(stripes) == pytest.approx(math.sqrt(20) / 9, abs=0.01)

    def test_contrast_of_an_object(self) -> None:
        mask = np.zeros((32, 32), bool)
        mask[12:20, 12:20] = True
        picture = np.zeros((32, 32, 3), np.uint8)
        picture[mask] = 255
        assert object_contrast(picture, mask) == pytest.approx(1)
        picture[mask] = (51, 0, 0)
        assert object_contrast(picture, mask) == pytest.approx(0.2 / math.sqrt(3))
        # Only the ring of two pixels counts, and void is not in it.
        picture[:8] = 255
        assert object_contrast(picture, mask) == pytest.approx(0.2 / math.sqrt(3))
        picture[10:12] = 255
        assert object_contrast(picture, mask) > 0.2
        void = np.zeros((32, 32), bool)
        void[10:12] = True
        assert object_contrast(picture, mask, void) == pytest.approx(0.2 / math.sqrt(3))
        assert math.isnan(object_contrast(picture, np.zeros((32, 32), bool)))
        assert math.isnan(object_contrast(picture, np.ones((32, 32), bool)))

    def test_a_tiny_object_does_not_vanish(self) -> None:
        mask = np.zeros((320, 320), bool)
        mask[100:103, 100:103] = True
        assert shrunk(mask, (32, 32)).any()
        assert not shrunk(np.zeros((320, 320), bool), (32, 32)).any()


def test_the_first_choice_of_most_units() -> None:
    logits = torch.eye(3)[[0, 1, 1, 2, 0, 2, 1, 0]] * 5
    routing = choose(logits, 1)
    assert first_choices(routing, 8).tolist() == [0, 1, 1, 2, 0, 2, 1, 0]
    assert first_choices(routing, 2).tolist() == [1, 0]
    assert first_choices(choose(logits, 2), 4).tolist() == [0, 1, 0, 0]


class TestCommand:
    def test_choices_are_those_of_the_model(
        self, tiny_run: Path, toy_data: Path, tmp_path: Path, capsys
    ) -> None:
        out = tmp_path / "out"
        words = ["evaluate", str(tiny_run), "--data", str(toy_data), "-o", str(out)]
        assert main([*words, "--gallery", "0"]) == 0
        said = capsys.readouterr().out
        assert "images by the expert that each level chose" in said and "object size" in said
        (table,) = (out / "per_image").glob("*/toy.csv")
        rows = {r["name"]: r for r in csv.DictReader(io.StringIO(table.read_text()))}
        predictor = load_predictor(tiny_run)
        manifest = load_eval(toy_data)["toy"]
        (batch,) = build_eval_loader(manifest, DataConfig(img_size=32), batch_size=8)
        with torch.no_grad():
            routing = predictor.model(batch.images).routing
        names = predictor.model.expert_kinds
        for level, decided in zip(predictor.model.level_names(), routing, strict=True):
            for name, expert in zip(batch.names, decided.experts_BK[:, 0].tolist(), strict=True):
                assert rows[name][f"expert at {level}"] == names[expert]
        (result,) = json.loads((out / "scores.json").read_text())["results"]
        uses = result["experts"]["uses"]
        assert len(uses) == 4 * 3 and sum(use["images"] for use in uses) == 4 * 8
        for use in uses:
            own = [r for r in rows.values() if r[f"expert at {use['level']}"] == use["expert"]]
            assert len(own) == use["images"]
            for key, mean in use["means"].items():
                assert np.mean([float(r[key]) for r in own]) == pytest.approx(mean)
        page = (out / "index.html").read_text()
        assert "What each expert does best" in page and not active_parts(page)

    def test_the_device_is_read_once(self, tiny_run: Path, toy_data: Path, monkeypatch) -> None:
        """Choices are collected on the device and read after the last image."""
        reads = []
        honest = torch.Tensor.tolist
        monkeypatch.setattr(torch.Tensor, "tolist", lambda self: reads.append(1) or honest(self))
        predictor = load_predictor(tiny_run)
        for level in predictor.model.moe_levels:
            level.dispatch = "dense"
        reads.clear()
        options = evaluation.ScoringOptions(intervals=False)
        (result,) = evaluation.evaluate_model(predictor, load_eval(toy_data), options)
        assert len(reads) == 1
        assert result.experts is not None and result.experts.p_values == {}

    def test_left_out_where_there_is_no_choice(self) -> None:
        base = {"model.backbone": "tiny_test", "model.pretrained": False, "model.width": 16}
        one = camoxpert.config.build_config(base | {"model.num_experts": 1, "model.top_k": 1})
        assert expert_meter(build_model(one.model)) is None
        assert expert_meter(torch.nn.Conv2d(3, 1, 1)) is None
        two = camoxpert.config.build_config(base | {"model.num_experts": 2, "model.top_k": 1})
        assert expert_meter(build_model(two.model)) is not None
