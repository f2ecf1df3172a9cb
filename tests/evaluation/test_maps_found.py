"""Maps as they are published: of the test split, in folders, with suffixes and files beside."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from helpers.maps import evaluate, pair, summary, write

from camoxpert.cli import main
from camoxpert.evaluation.maps.masks import find_masks


@pytest.fixture
def camo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Write CAMO with one folder of masks for both splits, and maps of its test images."""
    monkeypatch.chdir(tmp_path)
    for index in range(6):
        split = "Train" if index < 4 else "Test"
        prediction, mask = pair(index, 0.5)
        write(tmp_path / f"CAMO/Images/{split}/camo_{index}.jpg", np.dstack([mask] * 3))
        write(tmp_path / f"CAMO/GT/camo_{index}.png", mask)
        write(tmp_path / f"all/camo_{index}.png", prediction)
        if split == "Test":
            write(tmp_path / f"maps/camo_{index}.png", prediction)
    return tmp_path


def scored(capsys, *words: str) -> tuple[int, str]:
    """Return the number of images scored, 0 for a refusal, and what was printed to stderr."""
    shutil.rmtree("evaluation", ignore_errors=True)
    code = evaluate("--no-intervals", "--gallery", "0", *words)
    said = " ".join(capsys.readouterr().err.split())
    return (0 if code else summary()["results"][0]["num_images"]), said


class TestSplits:
    @pytest.mark.parametrize("gt", ["CAMO", "CAMO/GT"])
    def test_maps_of_the_test_images_alone(self, camo: Path, capsys, gt: str) -> None:
        number, said = scored(capsys, "--predictions", "maps", "--gt", gt)
        assert number == 2 and "the 2 images of the test split are scored (6 masks in all)" in said

    @pytest.mark.parametrize("gt", ["CAMO", "CAMO/GT"])
    def test_an_incomplete_method_is_still_refused(self, camo: Path, capsys, gt: str) -> None:
        (camo / "maps" / "camo_4.png").unlink()
        number, said = scored(capsys, "--predictions", "maps", "--gt", gt)
        assert number == 0 and "1 of 2 masks have no map: camo_4" in said

    def test_maps_of_all_images(self, camo: Path, capsys) -> None:
        number, said = scored(capsys, "--predictions", "all", "--gt", "CAMO")
        assert number == 2 and "4 maps of other splits not (camo_0" in said
        assert scored(capsys, "--predictions", "all", "--gt", "CAMO/GT")[0] == 6

    def test_maps_of_some_training_images_are_incomplete(self, camo: Path, capsys) -> None:
        (camo / "all" / "camo_0.png").unlink()
        number, said = scored(capsys, "--predictions", "all", "--gt", "CAMO/GT")
        assert number == 0 and "1 of 6 masks have no map: camo_0" in said

    def test_inside_a_folder_of_data_sets(self, camo: Path, capsys) -> None:
        (camo / "sets").mkdir()
        (camo / "CAMO").rename(camo / "sets" / "CAMO")
        (camo / "method").mkdir()
        (camo / "maps").rename(camo / "method" / "camo")
        assert scored(capsys, "--predictions", "method", "--gt", "sets")[0] == 2

    def test_a_data_set_without_a_test_split(self, camo: Path, capsys) -> None:
        for path in (camo / "CAMO/Images/Test").iterdir():
            path.unlink()
        (camo / "CAMO/Images/Test").rmdir()
        number, said = scored(capsys, "--predictions", "all", "--gt", "CAMO")
        assert number == 0 and "no test split (found: train)" in said


class TestFolders:
    def rename(self, folder: Path, form: str) -> None:
        for path in sorted(folder.iterdir()):
            path.rename(folder / form.format(path.stem, number=path.stem.rpartition("_")[2]))

    @pytest.mark.parametrize(
        ("form", "rule"),
        [
            ("{}_sal_fuse.png", "NAME_sal_fuse for NAME"),
            ("{}_mask.png", "NAME_mask for NAME"),
            ("{}.jpg.png", "NAME.jpg for NAME"),
            ("camo_00{number}.png", "zeros before numbers ignored"),
        ],
    )
    def test_one_rule_for_all_names(self, camo: Path, capsys, form: str, rule: str) -> None:
        self.rename(camo / "maps", form)
        number, said = scored(capsys, "--predictions", "maps", "--gt", "CAMO")
        assert number == 2 and f"maps matched by a rule: {rule}" in said

    def test_several_kinds_of_maps_need_a_choice(self, camo: Path, capsys) -> None:
        for path in sorted((camo / "maps").iterdir()):
            for kind in ("sal", "edge"):
                (path.parent / f"{path.stem}_{kind}.png").write_bytes(path.read_bytes())
            path.unlink()
        number, said = scored(capsys, "--predictions", "maps", "--gt", "CAMO")
        assert number == 0 and "NAME_edge, NAME_sal" in said and "--map-suffix" in said
        words = ("--predictions", "maps", "--gt", "CAMO", "--map-suffix", "_sal")
        number, said = scored(capsys, *words)
        assert number == 2 and "2 of 4 maps do not end in _sal" in said

    def test_files_beside_maps(self, camo: Path, capsys) -> None:
        for name in ("Thumbs.db", "desktop.ini", ".DS_Store", "._camo_4.png", "result.txt"):
            (camo / "maps" / name).write_bytes(b"x")
        (camo / "maps" / ".ipynb_checkpoints").mkdir()
        (camo / "CAMO" / "GT" / "Thumbs.db").write_bytes(b"x")
        number, said = scored(capsys, "--predictions", "maps", "--gt", "CAMO/GT")
        assert number == 2 and "1 file ignored: .txt 1 (for example result.txt)" in said
        (camo / "maps" / "camo_0.npy").write_bytes(b"x")
        number, said = scored(capsys, "--predictions", "maps", "--gt", "CAMO/GT")
        assert number == 0 and "not images: camo_0.npy" in said

    def test_arrays_instead_of_maps_are_named(self, camo: Path, capsys) -> None:
        (camo / "arrays").mkdir()
        (camo / "arrays" / "camo_4.npy").write_bytes(b"x")
        number, said = scored(capsys, "--predictions", "arrays", "--gt", "CAMO")
        assert number == 0 and ".npy 1 (for example camo_4.npy), which are not images" in said

    @pytest.mark.parametrize("kinds", [("map", "mask", "cutout", "overlay"), ("mask",)])
    def test_our_own_output_is_a_method(self, camo: Path, tiny_run: Path, capsys, kinds) -> None:
        photos = str(camo / "CAMO" / "Images" / "Test")
        assert main(["predict", str(tiny_run), photos, "-o", "ours", "--save", *kinds]) == 0
        number, _ = scored(capsys, "--predictions", "ours", "--gt", "CAMO")
        assert number == 2 and summary()["results"][0]["method"] == "ours"

    def test_maps_in_a_folder_of_a_data_sets_folder(self, camo: Path, capsys) -> None:
        (camo / "ours" / "CAMO").mkdir(parents=True)
        (camo / "maps").rename(camo / "ours" / "CAMO" / "maps")
        assert scored(capsys, "--predictions", "ours", "--gt", "CAMO")[0] == 2

    def test_two_data_sets_whose_folders_have_one_name(self, camo: Path) -> None:
        for site in ("a", "b"):
            write(camo / site / "data" / "GT" / "1.png", pair(1, 0.5)[1])
        found = find_masks([camo / "a" / "data", camo / "b" / "data" / "GT"])
        assert set(found) == {"a-data", "b-data"}
