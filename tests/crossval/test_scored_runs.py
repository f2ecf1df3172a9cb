"""What is scored is the run that was trained, with all that its model sees."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers.folds import words
from helpers.sensors import TINY_WORDS, views

from camoxpert.cli import main
from camoxpert.crossval import heldout
from camoxpert.files import lock, read_json
from camoxpert.training import session

pytestmark = pytest.mark.slow
Crossval = Callable[..., int]
SHORT = ("--folds", "2", "--epochs", "1", "--stage1-epochs", "0", "--no-report")


def said(capsys: pytest.CaptureFixture[str]) -> str:
    printed = capsys.readouterr()
    return " ".join((printed.out + printed.err).split())


def test_sensors_reach_the_scored_model(tmp_path: Path, monkeypatch) -> None:
    """A model with depth is not scored on photographs alone."""
    data, out = views(tmp_path / "data"), tmp_path / "cv"
    planes: list[torch.Tensor | None] = []
    honest = heldout.score

    def score(model, batches, **options):
        def watched():
            for batch in batches:
                planes.append(batch.planes)
                yield batch

        return honest(model, watched(), **options)

    monkeypatch.setattr(heldout, "score", score)
    base = ["crossval", "--dataset-path", str(data), "-o", str(out), *TINY_WORDS]
    assert main([*base, *SHORT, "--fold", "1"]) == 0
    assert planes
    assert all(plane is not None and plane.shape[1] == 2 and plane.any() for plane in planes)


def test_a_run_in_another_folder_is_not_scored(
    crossval: Crossval, tmp_path: Path, monkeypatch, capsys
) -> None:
    """Another process holds the stopped fold: its half-trained weights are not the last epoch's."""
    from camoxpert.stop import DEADLINE_CODE, Stop

    out = tmp_path / "cv"
    more = (*SHORT, "--fold", "1", "--save-every", "1")
    with monkeypatch.context() as patch:
        patch.setattr(Stop, "code", lambda stop: DEADLINE_CODE)
        assert crossval(out, *more) == 75
    assert crossval(out, *more, "--resume", "never") == 2
    assert "remove its run folder" in said(capsys)
    with lock(out / "fold-1" / ".lock"):
        assert crossval(out, *more) == 4
    words = said(capsys)
    assert "was trained in" in words and "fold-1-2" in words
    assert not (out / "fold-1" / "out_of_fold" / "fold.json").exists()
    assert crossval(out, *more) == 0
    assert read_json(out / "fold-1" / "out_of_fold" / "fold.json")["epoch"] == 1


def test_a_run_that_is_not_finished_is_not_scored(
    easy: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    honest = session.run

    def run(config, **options):
        result = honest(config, **options)
        session.update_run_json(result.path, status="failed")
        return result

    monkeypatch.setattr(session, "run", run)
    out = tmp_path / "cv"
    assert main(words(easy, out, *SHORT, "--fold", "1")) == 4
    assert "says failed and not finished" in said(capsys)
    assert not (out / "fold-1" / "out_of_fold" / "fold.json").exists()
