"""Scores by what a guided model is shown."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from camoxpert import evaluate, load
from camoxpert.cli import main
from camoxpert.data.files.image_io import read_image, read_mask, write_png
from camoxpert.data.files.manifest import load_eval, load_train
from camoxpert.errors import ConfigError, DataError
from camoxpert.evaluation.guided import find_pool
from camoxpert.evaluation.model import evaluate_model
from camoxpert.evaluation.options import ScoringOptions, ShotOptions, choose_shots
from camoxpert.evaluation.shots import Shots, ShotTable
from camoxpert.files import file_digest
from camoxpert.pages.shots import SHOT_FORMATS


@pytest.fixture(scope="module")
def shots(scenes: Path) -> Shots:
    (manifest,) = load_eval([scenes]).values()
    return Shots(manifest, load_train([scenes]).pairs, seed=0)


def test_references_are_of_the_class_and_nested(shots: Shots) -> None:
    assert len(shots.pairs) == 6
    for pair in shots.pairs:
        three = shots.right(pair, 3)
        assert len(three) == 3 and len({p.name for p in three}) == 3
        assert shots.right(pair, 1) == three[:1]
        assert {p.group for p in three} == {pair.group}
    again = Shots(shots.manifest, load_train_of(shots), seed=0)
    assert [again.right(p, 3) for p in shots.pairs] == [shots.right(p, 3) for p in shots.pairs]
    other = Shots(shots.manifest, load_train_of(shots), seed=1)
    assert [other.right(p, 3) for p in shots.pairs] != [shots.right(p, 3) for p in shots.pairs]


def load_train_of(shots: Shots) -> tuple:
    return tuple(pair for pairs in shots._pool.values() for pair in pairs)


def test_wrong_references_show_the_other_object_of_the_image(shots: Shots) -> None:
    by_image: dict[str, set[str]] = {}
    for pair in shots.pairs:
        by_image.setdefault(file_digest(pair.image), set()).add(pair.group)
    for pair in shots.pairs:
        (other,) = by_image[file_digest(pair.image)] - {pair.group}
        assert {p.group for p in shots.wrong(pair, 2)} == {other}


def test_no_image_is_its_own_reference(scenes: Path) -> None:
    manifest = load_train([scenes])
    shots = Shots(manifest, manifest.pairs)
    for pair in manifest.pairs:
        shown = {file_digest(p.image) for p in shots.right(pair, 50)}
        assert shown and file_digest(pair.image) not in shown


def test_an_image_that_cannot_be_read_is_left_to_the_loader(scenes: Path) -> None:
    """It is refused or skipped there, as ``--unreadable`` says."""
    manifest = load_train([scenes])
    gone = replace(manifest.pairs[0], image=scenes / "gone.jpg")
    assert Shots(replace(manifest, pairs=(gone,)), manifest.pairs).right(gone, 1)


def test_the_table_by_shots(guided_run: Path, scenes: Path, tmp_path: Path, capsys) -> None:
    words = ["evaluate", str(guided_run), "--data", str(scenes), "-o", str(tmp_path)]
    assert main([*words, "--shots", "3", "1", "--gallery", "0"]) == 0
    said = capsys.readouterr()
    assert "3 of another class" in said.out and "class memory" in said.out
    assert "support cache: " in said.err
    (result,) = json.loads((tmp_path / "scores.json").read_text())["results"]
    table = result["shots"]
    shown = [row["shown"] for row in table["rows"]]
    assert shown == [
        *("no reference", "class memory", "1 reference", "3 references", "3 of another class"),
    ]
    assert table["images"] == 6 and table["left_out"] == 0 and table["cache"]["hits"] >= 0
    scores = {row["shown"]: row["scores"] for row in table["rows"]}
    # Without a reference it is the model as it is scored anyway, bit for bit.
    assert scores["no reference"] == result["scores"]
    # The negative control: what is shown matters.
    assert scores["3 references"] != scores["3 of another class"]
    assert scores["3 references"] != scores["no reference"]
    assert not table["rows"][0]["differences"] and table["rows"][2]["differences"]["IoU"]
    assert "By reference" in (tmp_path / "index.html").read_text()
    markdown = SHOT_FORMATS["markdown"]([result])
    assert "| 3 of another class |" in markdown and markdown.count("\n|") == 7


def test_the_api_scores_with_references_and_leaves_the_models_own_alone(
    guided_run: Path, scenes: Path
) -> None:
    predictor = load(guided_run, device="cpu")
    predictor.set_reference_class("fish")
    options = {"intervals": False, "shots": [1], "noncam": "include"}
    (told,) = evaluate(predictor, [scenes], **options)
    assert predictor.target is not None and predictor.target.name == "class fish"
    predictor.clear_references()
    (result,) = evaluate(predictor, [scenes], **options)
    assert result.shots is not None and told.shots is not None
    # What the model was told before counts in its own scores, and in no row of the table.
    assert [row.scores for row in told.shots.rows] == [row.scores for row in result.shots.rows]
    assert result.shots.rows[0].scores == result.scores != told.scores


def copied(scenes: Path, place: Path) -> Path:
    """Return a copy of the training images, with references to damage."""
    for folder in ("Imgs", "GT"):
        shutil.copytree(scenes / "TrainDataset" / folder, place / folder)
    return place


@pytest.mark.parametrize("damage", ["empty", "torn"])
def test_references_are_described_before_anything_is_scored(
    guided_run: Path, scenes: Path, tmp_path: Path, capsys, damage: str
) -> None:
    place = copied(scenes, tmp_path / "data")
    pool = load_train([place]).pairs
    sets = load_eval([scenes])
    (manifest,) = sets.values()
    whole = Shots(manifest, pool)
    bad = whole.right(manifest.pairs[0], 1)[0]
    if damage == "empty":
        write_png(bad.mask, np.zeros((32, 32), np.uint8))
    else:
        bad.mask.write_bytes(bad.mask.read_bytes()[:40])
    predictor = load(guided_run, device="cpu")
    passes: list[int] = []
    predictor.network.register_forward_hook(lambda *_: passes.append(1))

    def scored(unreadable: str) -> ShotTable:
        (result,) = evaluate_model(
            predictor,
            sets,
            ScoringOptions(intervals=False, keys=("IoU", "MAE")),
            shots=ShotOptions((1, 50), (str(place),)),
            unreadable=unreadable,
        )
        assert result.shots is not None
        return result.shots

    if damage == "torn":
        with pytest.raises(DataError, match=bad.mask.name):
            scored("error")
        assert not passes, "an hour of scoring would be lost"
    table = scored("skip" if damage == "torn" else "error")
    assert passes and "1 training image cannot be a reference, because the mask is empty or a " in (
        " ".join(capsys.readouterr().err.split())
    )
    assert table.images == 6 and table.rows[-1].shown == "50 of another class"
    # Another one is drawn instead, and all others as before.
    instead = Shots(manifest, pool, usable=lambda pair: pair != bad)
    for pair in manifest.pairs:
        every = [one for one in whole.right(pair, 50) if one != bad]
        assert instead.right(pair, 50) == every and instead.right(pair, 1) == every[:1]


def test_what_training_had_beside_its_images_is_in_the_pool(
    guided_run: Path, scenes: Path, tmp_path: Path
) -> None:
    beside = tmp_path / "beside"
    mirrored: list[str] = []
    for pair in load_train([scenes]).pairs[:4]:
        (beside / "Imgs").mkdir(parents=True, exist_ok=True)
        (beside / "GT").mkdir(exist_ok=True)
        if mirrored:
            name = f"{pair.group}_{9000 + len(mirrored)}"
            write_png(beside / "Imgs" / f"{name}.png", read_image(pair.image)[:, ::-1].copy())
            write_png(beside / "GT" / f"{name}.png", read_mask(pair.mask)[:, ::-1].copy())
        else:
            name = f"{pair.group}_9000"  # A copy: the training leaves it out as well.
            shutil.copy(pair.image, beside / "Imgs" / f"{name}{pair.image.suffix}")
            shutil.copy(pair.mask, beside / "GT" / f"{name}{pair.mask.suffix}")
        mirrored.append(name)
    predictor = load(guided_run, device="cpu")
    own = find_pool(predictor, ShotOptions((1,)))
    config = predictor.config
    episodes = replace(config.data.episodes, references=str(beside))
    predictor.config = replace(config, data=replace(config.data, episodes=episodes))
    pool = find_pool(predictor, ShotOptions((1,)))
    assert pool[: len(own)] == own
    assert sorted(pair.name for pair in pool[len(own) :]) == sorted(mirrored[1:])
    # Named data is all that is drawn from.
    named = find_pool(predictor, ShotOptions((1,), (str(scenes),)))
    assert len(named) == len(own)
    shutil.rmtree(beside)
    with pytest.raises(DataError, match=r"--reference-data of the training, .*with --reference-d"):
        find_pool(predictor, ShotOptions((1,)))


def test_rows_say_how_many_images_were_shown_something(
    guided_run: Path, scenes: Path, tmp_path: Path, capsys
) -> None:
    place = copied(scenes, tmp_path / "data")
    # Cows, which the model does not remember, for one kind; no other kind may replace theirs.
    test = tmp_path / "test"
    for folder in ("Imgs", "GT"):
        shutil.copytree(scenes / "TestDataset" / "toy" / folder, test / folder)
    for path in [*place.rglob("fish_*"), *test.rglob("fish_*")]:
        path.rename(path.with_name(path.name.replace("fish", "cow")))
    cows = len(list((test / "Imgs").glob("cow_*")))
    number = len(list((test / "Imgs").iterdir()))
    assert 0 < cows < number
    words = ["evaluate", str(guided_run), "--data", str(test), "-o", str(tmp_path / "o")]
    words += ["--shots", "1", "--reference-data", str(place), "--gallery", "0", "--no-intervals"]
    assert main(words) == 0
    said = capsys.readouterr().out
    assert f"class memory ({number - cows} of {number} images)" in said
    (result,) = json.loads((tmp_path / "o" / "scores.json").read_text())["results"]
    images = {row["shown"]: row["images"] for row in result["shots"]["rows"]}
    expected = {"no reference": 0, "class memory": number - cows}
    expected |= {"1 reference": number, "1 of another class": number}
    assert images == expected
    for shown in ("no reference", "1 reference", "1 of another class"):
        assert f"{shown} (" not in said, "all of them"
    page = (tmp_path / "o" / "index.html").read_text()
    assert f"class memory ({number - cows} of {number} images)" in page


def test_shots_that_cannot_be_had_are_refused(
    guided_run: Path, tiny_run: Path, scenes: Path, toy_data: Path, tmp_path: Path, capsys
) -> None:
    words = ["--data", str(scenes), "-o", str(tmp_path / "o"), "--shots", "1"]
    assert main(["evaluate", str(tiny_run), *words]) == 2
    assert "trained without guidance" in " ".join(capsys.readouterr().err.split())
    images = tmp_path / "data" / "Imgs"
    images.parent.mkdir()
    images.symlink_to(scenes / "TrainDataset" / "Imgs")
    assert (
        main(["evaluate", str(guided_run), *words, "--reference-data", str(tmp_path / "no")]) == 3
    )
    for numbers, roots, expected in (([0], (), "at least 1"), ([], ("d",), "belongs to --shots")):
        with pytest.raises(ConfigError, match=expected):
            choose_shots(numbers, roots)
    assert choose_shots([]) is None


def test_a_table_beside_its_images_needs_leave_for_references_too(
    guided_run: Path, scenes: Path, tmp_path: Path, capsys
) -> None:
    pairs = load_train([scenes]).pairs
    rows = [f"{pair.image},{pair.mask},train,{pair.group}" for pair in pairs]
    table = tmp_path / "table.csv"
    table.write_text("\n".join(["image,mask,split,class", *rows]))
    words = ["evaluate", str(guided_run), "--data", str(scenes), "-o", str(tmp_path / "o")]
    words += ["--shots", "1", "--reference-data", str(table), "--gallery", "0", "--no-intervals"]
    assert main(words) == 3
    assert "--allow-outside" in capsys.readouterr().err
    assert main([*words, "--allow-outside"]) == 0


def test_the_report_says_what_the_cache_did(guided_run: Path) -> None:
    report = (guided_run / "report.html").read_text()
    assert "support cache: " in report and "tiny_test" in report
    info = json.loads((guided_run / "run.json").read_text())["guidance"]
    assert info["references"] == 22
    assert info["cache"]["hits"] + sum(info["cache"]["misses"].values()) == 22


def test_the_model_at_two_sizes_is_guided_alike(guided_run: Path, scenes: Path) -> None:
    """References reach both sizes, from a target and from a batch of its own."""
    import torch

    from camoxpert.models.guidance import Reference

    predictor = load(guided_run, device="cpu", zoom=True)
    images = torch.zeros(2, 3, predictor.img_size, predictor.img_size, dtype=torch.uint8)
    predictor.set_reference_class("fish")
    told = predictor.logits(images)
    target = predictor.network.reference_D
    predictor.clear_references()
    assert target is not None
    present = torch.ones(2, dtype=torch.bool)
    with torch.inference_mode():
        own = predictor.model(images, Reference(target.expand(2, -1), present)).logits_B1HW
    assert torch.equal(told, own) and not torch.equal(predictor.logits(images), own)
