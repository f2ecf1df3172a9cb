"""Test images among training images: found by split, name and content, and nothing else is."""

from __future__ import annotations

import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest

from camoxpert.data.files.manifest import Manifest
from camoxpert.data.files.pairing import Pair
from camoxpert.doctor.leaks import LeakSearch, find_leaks, is_telling


def picture(path: Path, seed: int) -> Path:
    rng = np.random.default_rng(seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = cv2.GaussianBlur(rng.integers(0, 256, (80, 100, 3), dtype=np.uint8), (0, 0), 3)
    cv2.imwrite(str(path), cv2.normalize(pixels, None, 0, 255, cv2.NORM_MINMAX))
    return path


def pair(path: Path) -> Pair:
    return Pair(path.stem, path, path, "d", "")


def search(*paths: Path, folder: Path | None = None) -> LeakSearch:
    return LeakSearch(
        {"NC4K": Manifest(tuple(map(pair, paths)), "NC4K", "test", "")}, folder=folder
    )


@pytest.mark.parametrize(
    ("name", "telling"),
    [
        ("0001", False),
        ("cat_12", False),
        ("img-7", False),
        ("COD10K-CAM-1-Aquatic-3-Crab-32", True),
    ],
)
def test_only_telling_names_count(name: str, telling: bool) -> None:
    assert is_telling(name) == telling


def test_each_kind_of_leak_is_named_and_others_pass(tmp_path: Path) -> None:
    tests = [picture(tmp_path / "nc4k" / f"{n}.png", n) for n in range(3)]
    tests.append(picture(tmp_path / "nc4k" / "COD10K-CAM-2-X-9.png", 9))
    flipped = tmp_path / "a" / "Imgs" / "7.png"
    flipped.parent.mkdir(parents=True)
    cv2.imwrite(str(flipped), cv2.flip(cv2.imread(str(tests[1])), 1)[4:76, 5:95])
    sources = [
        picture(tmp_path / "a" / "Imgs" / "0.png", 20),
        flipped,
        tests[2],
        picture(tmp_path / "b" / "Imgs" / "COD10K-CAM-2-X-9.png", 30),
        picture(tmp_path / "c" / "TestDataset" / "CAMO" / "Imgs" / "5.png", 31),
        picture(tmp_path / "test" / "TrainDataset" / "Imgs" / "5.png", 32),
    ]
    found = find_leaks([pair(path) for path in sources], search(*tests))
    assert list(found) == [1, 2, 3, 4]
    assert "a copy of 1 in the test set NC4K (flipped left-right" in found[1]
    assert "in the test set NC4K" in found[2] and "has an image of this name" in found[3]
    assert "its folder TestDataset says" in found[4]


def test_the_result_is_kept_until_a_file_changes(tmp_path: Path, monkeypatch) -> None:
    test, source = picture(tmp_path / "t" / "1.png", 1), picture(tmp_path / "s" / "2.png", 2)
    wanted = search(test, folder=tmp_path / "kept")
    assert find_leaks([pair(source)], wanted) == {}

    def refuse(*arguments, **options):
        raise AssertionError("compared again")

    with monkeypatch.context() as patch:
        patch.setattr("camoxpert.doctor.leaks.fingerprints", refuse)
        assert find_leaks([pair(source)], wanted) == {}
    shutil.copy(test, source)
    assert list(find_leaks([pair(source)], wanted)) == [0]
    with monkeypatch.context() as patch:
        patch.setattr("camoxpert.doctor.leaks.MOST_PAIRS", 0)
        found = find_leaks([pair(source)], search(test))
        assert "the same file" in found[0], "too many for pictures: identical files are found"
