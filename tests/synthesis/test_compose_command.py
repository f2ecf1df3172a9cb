"""``synthesize compose`` from the command line; what it shares with ``relight`` is tested there."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
from synthesis.test_relight_command import everything, files_of, rows_of

from camoxpert.cli import main
from camoxpert.data.files.image_io import read_image, read_pair
from camoxpert.data.files.manifest import load_train
from camoxpert.synthesis.records import LEDGER, PAGE
from camoxpert.synthesis.toy import generate_toy

MADE = 8


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("sources") / "toys"
    generate_toy(root, num_train=6, num_test=3, size=96, difficulty=0.2, seed=8)
    return root


def make(data: Path, out: Path, *words: str) -> int:
    base = ["synthesize", "compose", "--dataset-path", str(data), "-o", str(out)]
    page = () if "--page" in words else ("--no-page",)
    return main([*base, "--num-samples", str(MADE), *words, *page])


@pytest.fixture(scope="module")
def made(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("made") / "composed"
    assert make(data, out, "--decoys", "0.4", "--page") == 0
    return out


def test_train_reads_pairs_decoys_and_provenance(data: Path, made: Path) -> None:
    found = load_train([made])
    assert len(found) == MADE
    _, *rows = rows_of(made)
    real = {str(path.resolve()) for path in (data / "TrainDataset").rglob("*.*")}
    for pair, row in zip(found.pairs, rows, strict=True):
        image, mask = read_pair(pair.image, pair.mask)
        assert image.shape[:2] == mask.shape == (row["height"], row["width"])
        assert {source["path"] for source in row["sources"]} <= real
        assert all(len(source["sha256"]) == 64 for source in row["sources"])
        if row["made"] == "edit":
            assert row["difficulty"] is None
        else:
            assert (mask == 255).any() and 0 <= row["difficulty"] <= 1
        pixels = row["parameters"]["object_pixels"]
        assert int((mask > 0).sum()) == pixels
    assert {row["made"] for row in rows} == {"edit", "object"}
    page = (made / PAGE).read_text()
    assert page.count("data:image/jpeg") == MADE and "decoy: an edit without an object" in page


@pytest.mark.parametrize("words", [("--batch-size", "1"), ("--cache", "none")])
def test_the_same_bytes_whatever_the_batch_and_the_cache(data, made, tmp_path, words) -> None:
    assert make(data, tmp_path / "out", "--decoys", "0.4", *words) == 0
    assert everything(tmp_path / "out") == everything(made)
    assert make(data, tmp_path / "other", "--decoys", "0.4", "--seed", "1") == 0
    assert files_of(tmp_path / "other") != files_of(made)


def test_resume_and_other_settings(data: Path, tmp_path: Path, capsys) -> None:
    out = tmp_path / "out"
    assert make(data, out, "--limit", "3") == 0
    assert make(data, out) == 0
    assert "5 images made, 3 were there already" in capsys.readouterr().out
    assert make(data, out, "--difficulty", "0.5", "0.9") == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "composition difficulty off, now 0.5 0.9" in said
    grown = tmp_path / "toys"
    shutil.copytree(data, grown)
    victim = max((grown / "TrainDataset" / "Imgs").iterdir())
    cv2.imwrite(str(victim), 255 - cv2.imread(str(victim)))
    assert make(grown, out) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "with other settings: sources " in said, "every image is drawn from all sources"


def test_a_broken_source_is_left_out_and_named(data: Path, tmp_path: Path, capsys) -> None:
    broken = tmp_path / "toys"
    shutil.copytree(data, broken)
    victim = min((broken / "TrainDataset" / "Imgs").iterdir())
    victim.write_bytes(victim.read_bytes()[:500])
    assert make(broken, tmp_path / "out") == 3
    said = capsys.readouterr()
    assert victim.name in said.err and f"{MADE} images made" in said.out
    assert ", 5 backgrounds" in said.out


def test_cut_outs_before_photographs(data: Path, tmp_path: Path, capsys) -> None:
    cutouts, photos = tmp_path / "cutouts", tmp_path / "photos"
    cutouts.mkdir()
    for path in (data / "TrainDataset" / "Imgs").iterdir():
        image, mask = read_pair(path, path.parents[1] / "GT" / f"{path.stem}.png")
        cv2.imwrite(str(cutouts / f"{path.stem}.png"), np.dstack([image[..., ::-1], mask]))
    shutil.copytree(data / "TestDataset" / "toy" / "Imgs", photos)
    words = ["synthesize", "compose", "--cutouts", str(cutouts), "-o", str(tmp_path / "out")]
    assert main(words) == 2
    assert "Cut-outs need backgrounds" in " ".join(capsys.readouterr().err.split())
    assert main([*words, "--backgrounds", str(photos), "--num-samples", "4", "--no-page"]) == 0
    roles = {source["role"] for row in rows_of(tmp_path / "out")[1:] for source in row["sources"]}
    assert {"object", "background"} <= roles and "background mask" not in roles


class TestLeaks:
    def test_a_background_of_a_test_set_is_refused(
        self, data: Path, tmp_path: Path, capsys
    ) -> None:
        photos = tmp_path / "photos"
        photos.mkdir()
        test = min((data / "TestDataset").rglob("*.jpg"))
        shutil.copy(test, photos / "0001.jpg")
        words = ("--backgrounds", str(photos), "--test-data", str(data))
        assert make(data, tmp_path / "out", *words) == 3
        said = " ".join(capsys.readouterr().err.split())
        assert "1 background of 1 would leak" in said and f"copy of {test.stem}" in said
        assert make(data, tmp_path / "out", *words, "--allow-test-sources") == 0
        rows = rows_of(tmp_path / "out")[1:]
        assert all("0001.jpg" in row["test_source"] for row in rows)
        summary = json.loads((tmp_path / "out" / "compose.json").read_text())
        assert list(summary["test_sources"]) == [str(photos / "0001.jpg")]

    def test_backgrounds_of_its_own_pass(self, data: Path, tmp_path: Path, capsys) -> None:
        photos = tmp_path / "photos"
        photos.mkdir()
        noise = np.random.default_rng(1).integers(0, 255, (90, 120, 3), dtype=np.uint8)
        cv2.imwrite(str(photos / "0001.png"), cv2.GaussianBlur(noise, (0, 0), 3))
        words = ("--backgrounds", str(photos), "--test-data", str(data))
        assert make(data, tmp_path / "out", *words) == 0
        assert not any("test_source" in row for row in rows_of(tmp_path / "out", LEDGER))


def test_png_holds_the_pixels_of_the_jpeg(data: Path, made: Path, tmp_path: Path) -> None:
    """The camera's compression is part of the picture; the format of the file is not."""
    assert make(data, tmp_path / "out", "--decoys", "0.4", "--format", "png") == 0
    for path in sorted((tmp_path / "out" / "TrainDataset" / "Imgs").iterdir()):
        stored = read_image(made / "TrainDataset" / "Imgs" / f"{path.stem}.jpg")
        assert np.abs(read_image(path).astype(int) - stored).max() <= 3


def test_values_out_of_range(data: Path, tmp_path: Path, capsys) -> None:
    for words, text in (
        (("--difficulty", "0.9", "0.2"), "--difficulty takes rising numbers"),
        (("--object-size", "0.5", "0.1"), "--object-size takes two numbers"),
        (("--decoys", "2"), "--decoys must be between 0 and 1"),
        (("--strict-cache", "--cache", "none"), "--strict-cache: the descriptions of objects"),
    ):
        assert make(data, tmp_path / "out", *words) == 2
        assert text in " ".join(capsys.readouterr().err.split())
