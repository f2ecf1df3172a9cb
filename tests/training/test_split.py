"""Validation is carved from TRAIN once, and copies of a picture stay on one side."""

from __future__ import annotations

import csv
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest

from camoxpert.config import Config, build_config
from camoxpert.data.files.image_io import write_jpeg, write_png
from camoxpert.data.files.manifest import TrainingData, load_train
from camoxpert.doctor import families
from camoxpert.synthesis.toy import toy_pair
from camoxpert.training.split import SAMPLES, decide_split, read_split, write_samples


def with_copies(root: Path, images: int = 24, copies: int = 12) -> Path:
    """Write pictures and copies of the first ones: the same bytes, smaller, or mirrored."""
    for folder in ("Imgs", "GT"):
        (root / folder).mkdir(parents=True)
    for index in range(images):
        image, mask = toy_pair(7, index, size=96, difficulty=0.6)
        write_jpeg(root / "Imgs" / f"{index:02d}.jpg", image)
        write_png(root / "GT" / f"{index:02d}.png", mask)
        if index < copies:
            twin = root / "Imgs" / f"twin{index:02d}.jpg"
            if index % 3 == 0:
                shutil.copy(root / "Imgs" / f"{index:02d}.jpg", twin)
            elif index % 3 == 1:
                write_jpeg(twin, cv2.resize(image, (64, 64), interpolation=cv2.INTER_AREA))
                mask = cv2.resize(mask, (64, 64), interpolation=cv2.INTER_NEAREST)
            else:
                image, mask = image[:, ::-1].copy(), mask[:, ::-1].copy()
                write_jpeg(twin, image)
            write_png(root / "GT" / f"twin{index:02d}.png", np.ascontiguousarray(mask))
    return root


def config_for(root: Path, cache: Path, **settings: object) -> Config:
    values = {"data.roots": [str(root)], "data.cache_dir": str(cache), "data.val_fraction": 0.25}
    return build_config(values | {key.replace("__", "."): v for key, v in settings.items()})


def split_families(root: Path, config: Config) -> int:
    """Return how many pictures and their twins lie on different sides."""
    train, validation = decide_split(TrainingData(load_train([root])), config, {})
    places = {pair.name: "train" for pair in train.pairs}
    places |= {pair.name: "validation" for pair in validation.pairs}
    assert 7 <= len(validation) <= 9 and len(places) == 36
    return sum(places[f"{i:02d}"] != places[f"twin{i:02d}"] for i in range(12))


def test_copies_stay_on_one_side(tmp_path: Path, capsys) -> None:
    root = with_copies(tmp_path / "data")
    for seed in range(3):
        config = config_for(root, tmp_path / "cache", train__seed=seed)
        assert split_families(root, config) == 0
    assert "24 images are copies of others, in 12 groups" in capsys.readouterr().out
    # Control: without the search some families are split.
    config = config_for(root, tmp_path / "cache", data__group_copies=False)
    assert split_families(root, config) > 0


def test_copies_are_looked_for_once(tmp_path: Path, monkeypatch) -> None:
    root = with_copies(tmp_path / "data", images=6, copies=2)
    config = config_for(root, tmp_path / "cache")
    whole = load_train([root])
    found = families.copy_families(whole, config.data)
    assert len(found) == 2
    monkeypatch.setattr(families, "fingerprints", lambda *a, **k: pytest.fail("looked again"))
    assert families.copy_families(whole, config.data) == found
    monkeypatch.undo()
    # A file that changed is looked at again.
    shutil.copy(root / "Imgs" / "05.jpg", root / "Imgs" / "04.jpg")
    assert len(families.copy_families(load_train([root]), config.data)) == 3


def test_a_cache_folder_that_cannot_be_written_is_no_fault(tmp_path: Path, capsys) -> None:
    root = with_copies(tmp_path / "data", images=4, copies=1)
    (tmp_path / "file").write_text("")
    config = config_for(root, tmp_path / "file")
    assert len(families.copy_families(load_train([root]), config.data)) == 1
    assert "are not kept" in capsys.readouterr().out


def test_very_many_images_are_grouped_by_their_bytes(tmp_path: Path, monkeypatch, capsys) -> None:
    root = with_copies(tmp_path / "data", images=6, copies=3)
    monkeypatch.setattr(families, "MOST_IMAGES", 5)
    config = config_for(root, tmp_path / "cache")
    assert len(families.copy_families(load_train([root]), config.data)) == 1
    assert "identical files are kept together" in capsys.readouterr().out


def test_a_continued_run_keeps_its_split(tmp_path: Path, monkeypatch, capsys) -> None:
    """Also one whose split this version would choose otherwise."""
    root = with_copies(tmp_path / "data", images=8, copies=0)
    config = config_for(root, tmp_path / "cache")
    whole = load_train([root])
    train, validation = decide_split(TrainingData(whole), config, {})
    write_samples(tmp_path, train, validation)
    rows = list(csv.DictReader((tmp_path / SAMPLES).open()))
    other = {"training": "validation", "validation": "training"}
    swapped = {(row["dataset"], row["name"]): other[row["split"]] for row in rows}
    again = decide_split(TrainingData(whole), config, swapped)
    assert [m.pairs for m in again] == [validation.pairs, train.pairs]
    assert again[1].split == "validation" and again[0].split == whole.split
    assert "as the stopped run carved it" in capsys.readouterr().out
    assert [m.pairs for m in decide_split(TrainingData(whole), config, read_split(tmp_path))] == [
        train.pairs,
        validation.pairs,
    ]
    # Other data: carved again.
    del swapped[next(iter(swapped))]
    assert decide_split(TrainingData(whole), config, swapped)[1].pairs == validation.pairs


def test_a_split_that_cannot_be_read_is_empty(tmp_path: Path) -> None:
    assert read_split(None) == {} and read_split(tmp_path) == {}
    (tmp_path / SAMPLES).write_text("split,dataset,name\nother,a,b\n")
    assert read_split(tmp_path) == {}
    (tmp_path / SAMPLES).write_text("something else\n1\n")
    assert read_split(tmp_path) == {}


def with_column(root: Path, group: dict[str, str]) -> Path:
    """Write a CSV of the pictures in a folder with the column ``group``."""
    lines = ["image,mask,group"]
    for path in sorted((root / "Imgs").glob("*.jpg")):
        lines.append(f"Imgs/{path.name},GT/{path.stem}.png,{group.get(path.stem, '')}")
    table = root / "list.csv"
    table.write_text("\n".join(lines))
    return table


def test_a_group_of_a_table_stays_on_one_side_with_its_copies(tmp_path: Path, capsys) -> None:
    """Five pictures of a patient, and the twin of one of them, which is of another patient."""
    root = with_copies(tmp_path / "data")
    first = ("00", "05", "09", "14", "20")
    table = with_column(root, dict.fromkeys(first, "p1") | {"twin00": "p2", "21": "p2"})
    together = {*first, "twin00", "twin05", "twin09", "21"}
    sides = set()
    for seed in range(6):
        config = config_for(table, tmp_path / "cache", train__seed=seed)
        _, validation = decide_split(TrainingData(load_train([table])), config, {})
        names = {pair.name.rpartition("/")[2] for pair in validation.pairs}
        assert names >= together or not names & together
        sides.add(bool(names & together))
    assert "by the column group" in capsys.readouterr().out
    # Without the column the same seeds separate them.
    alone = with_column(root, {})
    separated = 0
    for seed in range(6):
        config = config_for(alone, tmp_path / "cache", train__seed=seed)
        _, validation = decide_split(TrainingData(load_train([alone])), config, {})
        names = {pair.name.rpartition("/")[2] for pair in validation.pairs} & together
        separated += 0 < len(names) < len(together)
    assert separated


def test_a_group_is_kept_without_the_search_for_copies(tmp_path: Path) -> None:
    root = with_copies(tmp_path / "data")
    table = with_column(root, {f"{i:02d}": f"video {i // 4}" for i in range(24)})
    config = config_for(table, tmp_path / "cache", data__group_copies=False)
    _, validation = decide_split(TrainingData(load_train([table])), config, {})
    by_video: dict[str, int] = {}
    for pair in validation.pairs:
        if pair.series:
            by_video[pair.series] = by_video.get(pair.series, 0) + 1
    assert by_video and set(by_video.values()) == {4}
