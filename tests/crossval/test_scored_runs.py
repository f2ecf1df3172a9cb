"""What is scored is the run that was trained, with all that its model sees."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from helpers.folds import words
from helpers.printed import said
from helpers.sensors import TINY_WORDS, views

from camoxpert.cli import main
from camoxpert.crossval import heldout, run
from camoxpert.crossval.report import _pictures
from camoxpert.data.files.manifest import Search, load_train
from camoxpert.files import file_digest, lock, read_json, write_json
from camoxpert.metrics import Evaluator
from camoxpert.training import session

pytestmark = pytest.mark.slow
Crossval = Callable[..., int]
SHORT = ("--folds", "2", "--epochs", "1", "--stage1-epochs", "0", "--no-report")


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
        assert "is being trained by another process" in said(capsys)
        assert not (out / "fold-1-2").exists(), "nothing is trained beside it"
        # The other process may begin a moment later.
        monkeypatch.setattr(run, "_require_idle", lambda found, fold: None)
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


def test_a_fold_without_scores(finished: Path, easy: Path, tmp_path: Path, capsys) -> None:
    """None of its images has an object, or could be read: the summary is that of the others."""
    out = Path(shutil.copytree(finished, tmp_path / "cv"))
    folder = out / "fold-1" / "out_of_fold"
    about = read_json(folder / "fold.json")
    options = heldout.read_fold(out / "fold-1").evaluator
    blank = Evaluator(empty_gt=options.empty_gt, keys=options.keys)
    heldout._write_state(folder / heldout.STATE, blank, {"sure": {}, "presence": {}})
    state = file_digest(folder / heldout.STATE)
    write_json(folder / "fold.json", {**about, "scores": {}, "state": state})
    assert main(words(easy, out, "--folds", "3")) == 0
    summary, before = read_json(out / "summary.json"), read_json(finished / "summary.json")
    assert summary["folds"][0]["scores"] == {} and summary["folds"][1:] == before["folds"][1:]
    own = [fold["scores"]["IoU"] for fold in before["folds"][1:]]
    assert summary["over_folds"]["IoU"]["mean"] == pytest.approx(sum(own) / 2)
    assert summary["over_folds"]["IoU"]["deviation"] == pytest.approx(np.std(own, ddof=1))
    assert "none of their images has a score: 1." in (out / "summary.md").read_text()
    # Compared with itself: no difference, over the folds that have scores.
    other = Path(shutil.copytree(out, tmp_path / "other"))
    assert main(words(easy, out, "--folds", "3", "--compare-with", str(other))) == 0
    (difference,) = read_json(out / "summary.json")["comparisons"]
    assert difference["folds"]["IoU"]["mean"] == 0


def test_a_mask_of_another_size_than_its_image(tmp_path: Path, easy: Path) -> None:
    """Such images are pictured as well: the map has the size of the mask."""
    root = Path(shutil.copytree(easy, tmp_path / "data"))
    image = sorted((root / "TrainDataset" / "Imgs").iterdir())[0]
    cv2.imwrite(str(image), cv2.resize(cv2.imread(str(image)), (64, 48)))
    pool = load_train([root], Search(any_size=True))
    maps = tmp_path / "maps" / "repeat-1"
    maps.mkdir(parents=True)
    cv2.imwrite(str(maps / f"{image.stem}.png"), np.full((32, 32), 90, np.uint8))
    suspect = {"name": image.stem, "suspicion": 0.5, "IoU": [0.1]}
    assert len(_pictures(tmp_path, [suspect], pool, several=False)) == 1
    # In a folder whose name is not UTF-8, as on old disks.
    odd = tmp_path / os.fsdecode(b"caf\xe9")
    shutil.move(tmp_path / "maps", odd / "maps")
    assert len(_pictures(odd, [suspect], pool, several=False)) == 1


@pytest.mark.parametrize("left", [("config.yaml",), ("config.yaml", "samples.csv")])
def test_a_fold_that_was_killed_as_it_began_is_trained(
    crossval: Crossval, easy: Path, tmp_path: Path, left: tuple[str, ...]
) -> None:
    """Its folder has settings and no run.json yet."""
    out = tmp_path / "cv"
    assert crossval(out, *SHORT, "--fold", "1") == 0
    whole = Path(shutil.copytree(out, tmp_path / "whole"))
    for path in (out / "fold-1").iterdir():
        if path.name not in left:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert crossval(out, *SHORT, "--fold", "1") == 0
    scores = [
        read_json(folder / "fold-1/out_of_fold/fold.json")["scores"] for folder in (out, whole)
    ]
    assert scores[0] == scores[1] and not (out / "fold-1-2").exists()
