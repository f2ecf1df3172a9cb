"""Parts of the loss that see the whole step or the progress of the run."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers.runs import ending

from camoxpert.config import build_config
from camoxpert.data.samples.batches import Batch
from camoxpert.runtime.processes import World
from camoxpert.training.plan import Plan, Stage
from camoxpert.training.step import loss_options


def batch_of(*pixels: int) -> Batch:
    masks = torch.stack([(torch.arange(100) < n).view(1, 10, 10) for n in pixels]) * 255
    masks, names = masks.to(torch.uint8), [str(n) for n in pixels]
    return Batch(
        masks.expand(-1, 3, -1, -1), masks, names, [(10, 10)] * len(names), [0] * len(names)
    )


def options_of(
    settings: dict[str, float],
    *parts: Batch,
    world: World | None = None,
    negatives: tuple[str, ...] = (),
) -> dict:
    plan = Plan((Stage(2, 0, 2, 0, 4, 4, 4, 1e-3),))
    run = SimpleNamespace(
        config=build_config(settings),
        plan=plan,
        world=world or World(),
        state=SimpleNamespace(step=2),
        data=SimpleNamespace(negatives=negatives),
    )
    return loss_options(run, list(parts))


def test_the_loss_gets_what_settings_ask_for(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = batch_of(1, 50), batch_of(90, 50, 50, 0)
    assert options_of({}, *parts) == {}
    assert options_of({}, *parts, negatives=("sky.jpg",)) == {"empty_alone": True}
    assert options_of({"loss.uncertainty": 0.1}, *parts) == {"progress": 2 / 8}
    # 2, 1; 2, 1, 1, 1: the mean of the step, not of its parts.
    balanced = options_of({"loss.size_balance": 1.0}, *parts)
    assert balanced.keys() == {"size_mean"} and balanced["size_mean"].item() == pytest.approx(8 / 6)
    # Two processes: the other has four more ordinary images.
    sums = []
    monkeypatch.setattr(
        World, "sum", lambda self, x: sums.append(x.tolist()) or x + torch.tensor([4.0, 4.0])
    )
    both = options_of({"loss.size_balance": 1.0}, *parts)
    assert sums == [[8, 6]] and both["size_mean"].item() == pytest.approx(12 / 10)


def test_a_resumed_run_goes_up_the_same_ramp(train, stopped, tmp_path: Path, capsys) -> None:
    words = ("--epochs", "1", "--stage1-epochs", "0", "--no-test", "--no-report", "--run-name", "r")
    words += ("--expert-family", "uniform", "run.log_every=1")
    on = ("loss.uncertainty=0.5", "loss.size_balance=1")
    whole, parts, off = (tmp_path / name for name in ("whole", "parts", "off"))
    assert train(*words, *on, out=whole) == 0
    said = capsys.readouterr().out
    assert "under 2% or over 80% of the pixels have 2 times the weight" in said
    assert "uncertain pixels cost up to 0.5, from 0 at first" in said
    assert stopped(*words, *on, steps=2, out=parts) == 75
    assert train(*words, *on, out=parts) == 0
    assert ending(parts / "r") == ending(whole / "r")
    assert train(*words, out=off) == 0
    assert ending(off / "r") != ending(whole / "r"), "negative control"
    terms = [step["uncertainty"] for step in steps_of(whole / "r") if "uncertainty" in step]
    assert terms[0] == 0 and terms == sorted(terms) and terms[-1] > 0.02
    assert not any("uncertainty" in step for step in steps_of(off / "r"))


def steps_of(run: Path) -> list[dict]:
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [record.get("terms", record) for record in records if record["kind"] == "train"]
