"""Scoring: forward passes of one size, whatever the loader, the last images and the ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from camoxpert.config import DataConfig
from camoxpert.data.files.manifest import load_eval
from camoxpert.data.loader import build_eval_loader
from camoxpert.errors import NumericError
from camoxpert.evaluation import model as evaluation
from camoxpert.evaluation.model import evaluate_model
from camoxpert.evaluation.options import ScoringOptions
from camoxpert.inference.predictor import load_predictor
from camoxpert.inference.score import FORWARD_BATCH, forward_batch, score
from camoxpert.metrics import Evaluator
from camoxpert.metrics.scoring import FAST_KEYS
from camoxpert.runtime.processes import World
from camoxpert.training.validate import own_share

CPU = torch.device("cpu")


@pytest.mark.parametrize("images", [1, 5, 8])
def test_the_last_pass_is_filled(tiny_run: Path, toy_data: Path, images: int) -> None:
    predictor = load_predictor(tiny_run)
    manifest = load_eval(toy_data)["toy"]
    few = type(manifest)(manifest.pairs[:images], "toy", "test", "toy")
    sizes: list[int] = []
    predictor.model.register_forward_pre_hook(lambda model, words: sizes.append(len(words[0])))
    rows = {}
    for batch_size in (1, 3, 8):
        loader = build_eval_loader(
            few, DataConfig(img_size=predictor.img_size), batch_size=batch_size, num_workers=0
        )
        evaluator = Evaluator()
        score(predictor.model, loader, device=CPU, evaluator=evaluator)
        assert evaluator.num_images == images, "a repeated image is not scored twice"
        rows[batch_size] = evaluator.rows()
    assert set(sizes) == {FORWARD_BATCH["cpu"]} == {forward_batch(CPU)}
    assert rows[1] == rows[3] == rows[8]


def test_ranks_take_whole_passes() -> None:
    """So the images of a pass are those of one process, which is what its rounding depends on."""
    pairs = tuple(range(22))
    shares = [own_share(pairs, World(rank=rank, size=3), 4) for rank in range(3)]
    assert shares[0] == (0, 1, 2, 3, 12, 13, 14, 15) and shares[2] == (8, 9, 10, 11, 20, 21)
    assert sorted(pair for share in shares for pair in share) == list(pairs)
    assert own_share(pairs, World(), 4) == pairs


def test_the_floor_costs_no_distance_transform(tiny_run: Path, toy_data: Path, monkeypatch) -> None:
    """Marking everything took twice the time of the model's own measures, mostly weighted F."""
    from camoxpert.metrics import scoring

    calls: list[int] = []
    honest = scoring.weighted_fmeasure
    monkeypatch.setattr(
        scoring, "weighted_fmeasure", lambda *words, **k: calls.append(1) or honest(*words, **k)
    )
    manifest = load_eval(toy_data)["toy"]
    options = ScoringOptions(gallery=0, intervals=False)
    (result,) = evaluate_model(load_predictor(tiny_run), {"toy": manifest}, options, batch_size=4)
    assert len(calls) == len(manifest)
    floor = result.source.baseline["all_foreground"]
    assert set(floor) == set(FAST_KEYS)
    # The same numbers as with all measures.
    monkeypatch.setattr(evaluation, "FAST_KEYS", scoring.RESULT_KEYS)
    (whole,) = evaluate_model(load_predictor(tiny_run), {"toy": manifest}, options, batch_size=4)
    before = whole.source.baseline["all_foreground"]
    assert "wFmeasure" in before and floor == {key: before[key] for key in floor}


@pytest.mark.parametrize("broken", [0, 3, 7])
def test_a_map_that_is_not_finite_is_no_score(tiny_run: Path, toy_data: Path, broken: int) -> None:
    predictor = load_predictor(tiny_run)
    manifest = load_eval(toy_data)["toy"]
    size, passes = forward_batch(CPU), []

    class Spoilt(torch.nn.Module):
        def forward(self, images_BCHW: torch.Tensor, *more: Any) -> Any:
            output = predictor.network(images_BCHW, *more)
            passes.append(1)
            if len(passes) == 1 + broken // size:
                output.logits_B1HW[broken % size, :, 2, 3] = float("nan")
            return output

    loader = build_eval_loader(manifest, DataConfig(img_size=32), batch_size=4)
    with torch.inference_mode(), pytest.raises(NumericError) as raised:
        score(Spoilt(), loader, device=CPU, evaluator=Evaluator(keys=("MAE",)))
    assert f"for 1 image ({manifest.pairs[broken].name})" in " ".join(str(raised.value).split())
