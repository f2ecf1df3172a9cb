"""Folds: groups stay whole, classes are spread, and nothing depends on order or place."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest

from camoxpert.cli import main
from camoxpert.config import Config, build_config
from camoxpert.crossval.divide import divide, find_pool, strata_of
from camoxpert.data.files.folds import (
    SPLITS,
    Splits,
    fold_of,
    read_splits,
    require_same_images,
    write_splits,
)
from camoxpert.data.files.image_io import write_jpeg, write_png
from camoxpert.errors import ConfigError, DataError
from camoxpert.synthesis.toy import toy_pair

CLASSES = ("crab", "frog", "owl")


def images(root: Path, number: int = 30, *, order: int = 1) -> Path:
    """Write pictures and a table of them: three classes, three of each video of frogs, and a
    smaller copy of every sixth under another name.

    Args:
        root: receives them.
        number: of pictures without the copies.
        order: -1 writes files and lines backwards.
    """
    (root / "im").mkdir(parents=True)
    lines = []
    for index in list(range(number))[::order]:
        image, mask = toy_pair(3, index, size=96, difficulty=0.6)
        label = CLASSES[index % 3]
        video = f"v{index // 9}" if label == "frog" else ""
        for name, side in ((f"0{index:02d}", 96), (f"1{index:02d}", 72)):
            if side == 72 and index % 6:
                continue
            write_jpeg(root / "im" / f"{name}.jpg", cv2.resize(image, (side, side)))
            small = cv2.resize(mask, (side, side), interpolation=cv2.INTER_NEAREST)
            write_png(root / "im" / f"{name}.png", np.ascontiguousarray(small))
            lines.append(f"im/{name}.jpg,im/{name}.png,{label},{video}")
    table = root / "list.csv"
    table.write_text("\n".join(["image,mask,class,group", *lines[::order]]))
    return table


def config_for(table: Path, cache: Path, **settings: object) -> Config:
    values = {"data.roots": [str(table)], "data.cache_dir": str(cache)}
    return build_config(values | {key.replace("__", "."): v for key, v in settings.items()})


def made(table: Path, cache: Path, **options: object) -> Splits:
    config = config_for(table, cache)
    return divide(find_pool(config), config.data, **{"folds": 3, "seed": 5, **options})


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return images(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def splits(table: Path) -> Splits:
    return made(table, table.parent / "cache", repeats=2)


def sides(splits: Splits, fold: int) -> tuple[set[str], set[str]]:
    """Return the names that a fold trains on, and those that it holds out."""
    held = {i.name for i in splits.held_out(fold)}
    return {i.name for i in splits.images if fold not in i.apart} - held, held


def test_every_image_is_held_out_once_a_repeat(splits: Splits) -> None:
    assert splits.total == 6 and len(splits.images) == 35
    for repeat in range(2):
        numbers = Counter(image.folds[repeat] for image in splits.images)
        assert sorted(numbers) == [3 * repeat + n for n in (1, 2, 3)]
        assert max(numbers.values()) - min(numbers.values()) <= 3
    first, second = ([image.folds[r] - 3 * r for image in splits.images] for r in (0, 1))
    assert first != second, "the repeats divide in different ways"


def test_copies_and_videos_are_never_on_both_sides(splits: Splits, table: Path) -> None:
    videos: dict[str, set[str]] = {}
    for image in splits.images:
        if image.series:
            videos.setdefault(image.series, set()).add(image.name)
    twins = [{f"im/0{i:02d}", f"im/1{i:02d}"} for i in range(0, 30, 6)]
    assert sorted(map(len, videos.values())) == [1, 3, 3, 3]
    for fold in range(1, splits.total + 1):
        train, held_out = sides(splits, fold)
        for together in (*videos.values(), *twins):
            assert together <= train or together <= held_out, (fold, together)
    # Negative control: without the search for copies, twins are separated.
    config = config_for(table, table.parent / "cache", data__group_copies=False)
    alone = divide(find_pool(config), config.data, folds=3, seed=5, repeats=2)
    assert any(
        twin & held and twin - held
        for n in range(1, 7)
        for twin in twins
        for held in [sides(alone, n)[1]]
    )


def test_order_and_place_change_nothing(splits: Splits, tmp_path: Path) -> None:
    """Files and lines written backwards in another folder; on another machine times differ too."""
    other = images(tmp_path / "elsewhere" / "deep", order=-1)
    again = made(other, tmp_path / "cache", repeats=2)
    assert again.digest == splits.digest
    write_splits(tmp_path / "1.json", splits)
    write_splits(tmp_path / "2.json", again)
    assert (tmp_path / "1.json").read_bytes() == (tmp_path / "2.json").read_bytes()
    assert made(other, tmp_path / "cache", repeats=2, seed=6).digest != splits.digest


def test_classes_and_sizes_are_spread(tmp_path: Path) -> None:
    labels = ["a"] * 12 + ["b"] * 6 + ["rare"] * 2
    sizes = (["small"] * 2 + ["large"]) * 4 + ["small"] * 6 + ["large", "small"]
    strata = strata_of(labels, sizes, 3)
    # By hand: 8 small and 4 large of a, 6 of b; two of a rare class are fewer than three folds, by
    # size one large and one small are too, so they are left together.
    assert Counter(strata) == {"a/small": 8, "a/large": 4, "b/small": 6, "": 2}


def test_the_table_of_folds_is_even(tmp_path: Path, table: Path) -> None:
    config = config_for(table, table.parent / "cache", data__group_copies=False)
    pool = find_pool(config)
    # Without videos: 10 to 15 images of a class in five folds.
    pool = replace(pool, pairs=tuple(replace(pair, series="") for pair in pool.pairs))
    even = divide(pool, config.data, folds=5, seed=1)
    for label in CLASSES:
        counts = [sum(i.label == label for i in even.held_out(n)) for n in range(1, 6)]
        assert max(counts) - min(counts) <= 2, (label, counts)


def test_leave_class_out(table: Path, tmp_path: Path) -> None:
    """A fold holds out a class; what is joined with its images in another class is on neither
    side, and an image of no class is always trained on."""
    lines = table.read_text().splitlines()
    lines = [line.replace("owl,", "owl,v0") if "/002." in line else line for line in lines]
    lines = [line.replace("crab", "") if "/003." in line else line for line in lines]
    data = tmp_path / "data"
    shutil.copytree(table.parent / "im", data / "im")
    (data / "list.csv").write_text("\n".join(lines))
    found = made(data / "list.csv", tmp_path / "cache", by_class=True)
    assert found.classes == CLASSES and found.total == 3
    frog = CLASSES.index("frog") + 1
    for fold, label in enumerate(CLASSES, 1):
        assert {image.label for image in found.held_out(fold)} == {label}
    train, held_out = sides(found, frog)
    assert "im/002" not in train | held_out, "an owl in a video of frogs"
    pool = find_pool(config_for(data / "list.csv", tmp_path / "cache"))
    trained, held = fold_of(found, frog, pool)
    assert {pair.name for pair in trained.pairs} == train
    assert {pair.name for pair in held.pairs} == held_out
    assert all("im/003" in sides(found, fold)[0] for fold in (1, 2, 3))


def test_one_class_is_refused(table: Path, tmp_path: Path) -> None:
    config = config_for(table, table.parent / "cache")
    pool = find_pool(config)
    owls = replace(pool, pairs=tuple(pair for pair in pool.pairs if pair.group == "owl"))
    with pytest.raises(ConfigError, match="at least two classes; found: owl"):
        divide(owls, config.data, folds=0, by_class=True)


def test_more_folds_than_groups(table: Path) -> None:
    config = config_for(table, table.parent / "cache")
    pool = find_pool(config)
    one = replace(pool, pairs=tuple(replace(pair, series="all") for pair in pool.pairs[:9]))
    with pytest.raises(ConfigError, match=r"9 images are 1 group .* Give at most 1"):
        divide(one, config.data, folds=3)


def test_the_file(splits: Splits, tmp_path: Path) -> None:
    path = write_splits(tmp_path / SPLITS, splits)
    assert read_splits(path) == splits
    changed = path.read_text().replace('"folds": [1, 4]', '"folds": [2, 4]', 1)
    assert changed != path.read_text()
    path.write_text(changed)
    with pytest.raises(DataError, match="was changed since it was written"):
        read_splits(path)
    for text in ("", "[]", "{}", '{"hash": 1, "format": 1}'):
        path.write_text(text)
        with pytest.raises(DataError, match="not a file of folds"):
            read_splits(path)
    with pytest.raises(DataError, match="There is no file"):
        read_splits(tmp_path / "none.json")


def test_versions_of_the_solver_do_not_count(splits: Splits) -> None:
    assert replace(splits, made_with={"scikit-learn": "9"}).digest == splits.digest


def test_other_data_is_refused_with_what_changed(splits: Splits, table: Path) -> None:
    pool = find_pool(config_for(table, table.parent / "cache"))
    require_same_images(splits, pool, Path("s.json"))
    first, second, *rest = pool.pairs
    new = replace(first, name="im/new")
    other = replace(second, mask=rest[0].mask, series="v9")
    changed = replace(pool, pairs=(new, other, *rest))
    with pytest.raises(DataError) as caught:
        require_same_images(splits, changed, Path("s.json"))
    words = str(caught.value)
    for part in (
        "1 missing: im/000",
        "1 new: im/new",
        "another size: im/001",
        "(column group): im",
    ):
        assert part in words


def test_a_missing_fold_is_no_random_split(
    splits: Splits, table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_splits(tmp_path / SPLITS, splits)
    train = ["train", "--dataset-path", str(table), "--checkpoint-dir", str(tmp_path / "runs")]
    for words, code, text in (
        (["--splits", str(path), "--fold", "9"], 3, "has 6 folds, numbered from 1"),
        (["--splits", str(path)], 2, "Say with --fold"),
        (["--fold", "2"], 2, "no splits are given"),
    ):
        assert main([*train, *words]) == code
        assert text in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "runs").exists()
    # `json` of the file: one line for an image, so that a difference can be read.
    assert len(path.read_text().splitlines()) > len(json.loads(path.read_text())["images"])
