"""Folders of several splits: each image gets the mask of its own, and nothing is lost silently."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from camoxpert.data.files.image_io import write_jpeg, write_png
from camoxpert.data.files.manifest import (
    Search,
    find_test_sets,
    load_eval,
    load_train,
    load_training_data,
)
from camoxpert.errors import DataError

NAMES = ("001", "002", "003")


def fill(root: Path, images: str, masks: str = "", names: tuple[str, ...] = NAMES) -> None:
    """Write images, numbered alike everywhere, and masks."""
    for name in names:
        write_jpeg(root / images / f"{name}.jpg", np.full((8, 8, 3), 90, np.uint8))
        if masks:
            mask = np.zeros((8, 8), np.uint8)
            mask[:4] = 255
            write_png(root / masks / f"{name}.png", mask)


def places(manifests: dict, root: Path) -> dict[str, set[tuple[str, str]]]:
    """Return data set -> folders of its images and masks."""
    return {
        name: {
            (
                p.image.parent.relative_to(root).as_posix(),
                p.mask.parent.relative_to(root).as_posix(),
            )
            for p in manifest.pairs
        }
        for name, manifest in manifests.items()
    }


class TestWords:
    def test_two_test_folders_are_two_data_sets(self, tmp_path: Path) -> None:
        for split in ("train", "test1", "test2"):
            fill(tmp_path / "d", f"{split}/Imgs", f"{split}/GT")
        assert places(load_eval(tmp_path / "d"), tmp_path / "d") == {
            "d-test1": {("test1/Imgs", "test1/GT")},
            "d-test2": {("test2/Imgs", "test2/GT")},
        }

    def test_beside_each_other_below_images(self, tmp_path: Path) -> None:
        for split in ("train2014", "train2017", "test", "test_2"):
            fill(tmp_path / "d", f"images/{split}", f"masks/{split}")
        found = places(load_eval(tmp_path / "d"), tmp_path / "d")
        assert {pair for pairs in found.values() for pair in pairs} == {
            ("images/test", "masks/test"),
            ("images/test_2", "masks/test_2"),
        }
        whole = load_train([tmp_path / "d"])
        assert {(p.image.parent.name, p.mask.parent.name) for p in whole.pairs} == {
            ("train2014", "train2014"),
            ("train2017", "train2017"),
        }
        assert len(whole) == 6 and len({(p.dataset, p.name) for p in whole.pairs}) == 6

    def test_one_split_may_have_two_words(self, tmp_path: Path) -> None:
        fill(tmp_path / "d", "images/test", "masks/testing")
        (pairs,) = places(load_eval(tmp_path / "d"), tmp_path / "d").values()
        assert pairs == {("images/test", "masks/testing")}


class TestWithheldMasks:
    @pytest.mark.parametrize("folders", ["images masks", "Images GT", "imgs labels"])
    def test_those_of_another_split_are_not_taken(self, tmp_path: Path, folders: str) -> None:
        images, masks = folders.split()
        train, test = ("Train", "Test") if images == "Images" else ("train", "test")
        fill(tmp_path, f"{images}/{train}", f"{masks}/{train}")
        fill(tmp_path, f"{images}/{test}")
        with pytest.raises(DataError, match="no test split"):
            load_eval(tmp_path)
        assert find_test_sets([tmp_path]) == {}
        found = load_train([tmp_path])
        assert len(found) == 3
        assert any(f"not read: {images}/{test}" in note for note in found.notes)

    def test_a_validation_split_without_masks_chooses_nothing(self, tmp_path: Path) -> None:
        fill(tmp_path, "images/train", "masks/train")
        fill(tmp_path, "images/val")
        assert load_training_data([tmp_path], Search()).given is None

    def test_one_mask_for_two_splits_is_refused(self, tmp_path: Path) -> None:
        fill(tmp_path, "images/train", "masks")
        fill(tmp_path, "images/test")
        with pytest.raises(DataError, match="would be the mask of"):
            load_train([tmp_path])
        # Control: a folder of masks of all splits, each of its own images.
        fill(tmp_path / "b", "images/train", "masks")
        fill(tmp_path / "b", "images/test", "masks", ("101", "102"))
        assert len(load_train([tmp_path / "b"])) == 3
        assert [len(m) for m in load_eval(tmp_path / "b").values()] == [2]


def test_every_folder_that_is_not_read_is_named(tmp_path: Path) -> None:
    for images, masks in (
        ("CAMO/Imgs", "CAMO/GT"),
        ("NC4K/Imgs", "NC4K/GT_mask"),
        ("A/raw", "A/GT"),
    ):
        fill(tmp_path / "TestDataset", images, masks)
    fill(tmp_path, "TrainDataset/Imgs", "TrainDataset/GT")
    fill(tmp_path, "TrainDataset/Edge")
    notes = " ".join(load_train([tmp_path]).notes)
    assert "not read: TestDataset/A, TestDataset/NC4K" in notes
    assert "Edge" not in notes, "beside images and masks lie other kinds of the same data"


class TestNames:
    @pytest.mark.parametrize("form", ["{}/Image {}/Mask", "Images/{} GT/{}"])
    def test_a_layout_alone_makes_no_known_data_set(self, tmp_path: Path, form: str) -> None:
        images, masks = form.split()
        for split in ("Train", "Val", "Test"):
            fill(tmp_path / "site", images.format(split), masks.format(split))
        found = load_training_data([tmp_path / "site"], Search())
        assert found.given is not None and len(found.given) == 3
        assert list(load_eval(tmp_path / "site")) == ["site"]
        for root in ("a", "b"):
            for split in ("Train", "Test"):
                fill(tmp_path / root / "data", images.format(split), masks.format(split))
        both = load_train([tmp_path / "a" / "data", tmp_path / "b" / "data"])
        assert {pair.dataset for pair in both.pairs} == {"a-data", "b-data"}

    def test_images_or_the_folder_say_which_it_is(self, tmp_path: Path) -> None:
        own = ("COD10K-CAM-1-Aquatic-3-Crab-32",)
        for split in ("Train", "Test"):
            fill(tmp_path / "x", f"{split}/Image", f"{split}/GT_Object", own)
            fill(tmp_path / "CAMO-V.1.0-CVIU2019", f"Images/{split}", f"GT/{split}")
        assert list(load_eval(tmp_path / "x")) == ["COD10K"]
        assert list(load_eval(tmp_path / "CAMO-V.1.0-CVIU2019")) == ["CAMO"]


def test_a_folder_around_the_data_is_looked_into(tmp_path: Path) -> None:
    for split in ("train", "val", "test"):
        fill(tmp_path / "wrap", f"mydata/images/{split}", f"mydata/masks/{split}")
    assert len(load_train([tmp_path / "wrap"])) == 3
    assert places(load_eval(tmp_path / "wrap"), tmp_path / "wrap") == {
        "mydata": {("mydata/images/test", "mydata/masks/test")}
    }
    # Control: one data set without splits in a folder is a test set, and never trained on.
    fill(tmp_path / "TestDataset", "CAMO/Imgs", "CAMO/GT")
    with pytest.raises(DataError, match="no training split"):
        load_train([tmp_path / "TestDataset"])


class TestTables:
    def table(self, root: Path, splits: list[str], *, masks: bool = True) -> Path:
        names = tuple(f"{n:03}" for n in range(len(splits)))
        fill(root, "i", "m", names)
        rows = [f"i/{n}.jpg,m/{n}.png,{split}" for n, split in zip(names, splits, strict=True)]
        (root / "d.csv").write_text("\n".join(["image,mask,split", *rows]) + "\n")
        return root / "d.csv"

    @pytest.mark.parametrize(("other", "asked"), [("val", "test"), ("test", "val")])
    def test_rows_that_are_trained_on_are_no_other_split(
        self, tmp_path: Path, other: str, asked: str
    ) -> None:
        table = self.table(tmp_path, ["", "", "", other, other])
        assert len(load_train([table])) == 3
        with pytest.raises(DataError, match=f"no {asked} split"):
            load_eval(table, split=asked)
        # Control: with rows for training, those without a split are not trained on.
        assert sum(map(len, load_eval(self.table(tmp_path, ["train", "", ""])).values())) == 2

    def test_an_image_is_not_its_own_mask(self, tmp_path: Path) -> None:
        table = self.table(tmp_path, ["", ""])
        table.write_text(table.read_text().replace("m/001.png", "i/001.jpg"))
        with pytest.raises(DataError, match="line 3: image and mask are the same file"):
            load_train([table])

    def test_links_are_called_as_the_table_calls_them(self, tmp_path: Path) -> None:
        """Their targets may be called by their content (git-annex, DVC)."""
        fill(tmp_path, "store", "m", ("SHA1",))
        (tmp_path / "l").mkdir()
        for name in ("Crab_001", "Frog_002"):
            (tmp_path / "l" / f"{name}.jpg").symlink_to("../store/SHA1.jpg")
            write_png(tmp_path / "m" / f"{name}.png", np.full((8, 8), 255, np.uint8))
        rows = [f"l/{name}.jpg,m/{name}.png" for name in ("Crab_001", "Frog_002")]
        (tmp_path / "d.csv").write_text("\n".join(["image,mask", *rows]) + "\n")
        # Out of the folder and back into it: names never hold two dots.
        back = f"../{tmp_path.name}/m/Crab_001.png,m/Frog_002.png"
        (tmp_path / "e.csv").write_text(f"image,mask\n{back}\n")
        assert [p.name for p in load_train([tmp_path / "e.csv"]).pairs] == ["m/Crab_001"]
        pairs = load_train([tmp_path / "d.csv"]).pairs
        assert [(p.name, p.group) for p in pairs] == [
            ("l/Crab_001", "Crab"),
            ("l/Frog_002", "Frog"),
        ]
