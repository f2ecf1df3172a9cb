"""An entry of ``scores.json`` holds every value of a result, in the order of its fields."""

from __future__ import annotations

import json
from dataclasses import asdict, fields, replace

from camoxpert.evaluation.experts import ExpertTable, ExpertUse
from camoxpert.evaluation.results import EvaluationResult, MapSource, ModelSource
from camoxpert.evaluation.robustness import CorruptedScore, Robustness
from camoxpert.evaluation.shots import ShotScore, ShotTable, SubsetTable
from camoxpert.metrics.presence import PresenceScores, ReliabilityBin
from camoxpert.pages.scored import run_results

SHOT = ShotScore("none", {"IoU": 0.5}, {"IoU": {"low": 0.1}}, 2)
PLAIN = EvaluationResult(
    dataset="CAMO",
    method="ours",
    num_images=2,
    num_skipped=1,
    scores={"IoU": 0.5},
    intervals={"IoU": (0.4, 0.6)},
    protocol="pysod",
    empty_gt="skip",
    data_hash="ab",
    breakdown={"class": {"Aquatic": {"IoU": 0.5}}},
    curves={"E": [0.1]},
    seconds=1.5,
    source=MapSource(1, 2, "error", None),
    unreadable=("a (why)",),
)
WHOLE = replace(
    PLAIN,
    source=ModelSource("best.pt", "cd", 32, "fp32", {"all_foreground": {"IoU": 0.1}}, zoom=True),
    robustness=Robustness(
        "IoU", (1, 3), 0, (CorruptedScore("fog", 1, {"IoU": 0.4}, {"IoU": 0.8}),),
        {"fog": 0.8}, {"fog": (0.7, 0.9)}, "fog.jpg",
    ),
    experts=ExpertTable(("IoU",), (ExpertUse("s4", "edge", 2, 1.0, {"IoU": 0.5}),), {"s4": {}}),
    presence=PresenceScores(
        2, 1, {"AUROC": 1.0}, {"AUROC": (0.9, 1.0)}, (ReliabilityBin(0.1, 0.2, 0.0, 0.3, 1.5),), 0.2
    ),
    shots=ShotTable(2, 1, 0, 7, (SHOT,), {
        "hits": 1, "misses": {}, "found_seconds": 0.0, "encoded_seconds": 0.0, "saved_seconds": 0.0
    }),
    modalities=SubsetTable(2, {"depth": 1}, (SHOT,), {"IoU": 0.5}, {"IoU": 0.5}),
    split="val",
)  # fmt: skip
PARTS = ("robustness", "experts", "presence", "shots", "modalities")


def by_fields(result: EvaluationResult) -> dict[str, object]:
    """Return the entry as the fields of the dataclasses have it."""
    values = asdict(result)
    source = values.pop("source")
    parts = {name: part for name in PARTS if (part := values.pop(name)) is not None}
    return {**values, **parts, "num_unreadable": len(result.unreadable), **source}


def test_an_entry_has_every_field_in_its_order() -> None:
    for result in (PLAIN, WHOLE):
        assert json.dumps(result.to_dict()) == json.dumps(by_fields(result))
    assert all(getattr(WHOLE, field.name) for field in fields(WHOLE))


def test_tables_that_nobody_asked_for_are_left_out() -> None:
    entry = PLAIN.to_dict()
    assert not entry.keys() & {*PARTS, "checkpoint", "img_size"} and entry["num_missing"] == 1


def test_a_run_reads_them_with_its_pictures(tmp_path) -> None:
    picture = {"dataset": "CAMO", "kind": "best", "name": "a", "measure": "IoU", "values": {},
               "scores": {"MAE": 0.25, "other": 1.0}, "panel": "images/a.jpg"}  # fmt: skip
    others = [{**picture, "dataset": "NC4K"}, {"dataset": "CAMO", "kind": "best"}, 3]
    content = {"results": [WHOLE.to_dict(), {"dataset": "empty"}, "x"],
               "gallery": [picture, *others]}  # fmt: skip
    (tmp_path / "evaluation").mkdir()
    (tmp_path / "evaluation" / "scores.json").write_text(json.dumps(content))
    (result,) = run_results(tmp_path)
    (shown,) = result["gallery"]["best"]
    assert shown["panel"] == "evaluation/images/a.jpg" and shown["MAE"] == 0.25
    assert "wFmeasure" not in shown
